"""The curvature inverted by conjugate gradients, for as many queries at a time as memory holds."""

import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_influence import data
from keras_influence.gradients import Projector
from keras_influence.linalg import Solutions, block_conjugate_gradient
from keras_influence.methods.curvature import FrozenCurvature
from keras_influence.methods.inverse import InverseMethod
from keras_influence.methods.work import Job, Load, Work


class ConjugateGradient(InverseMethod):
    """Influence functions by conjugate gradients (Martens 2010; Koh & Liang 2017, section 3).

    (H + damping I) h = g is solved for all queries of a block in the space that they span together
    (see `linalg.block_conjugate_gradient`), each to a residual that is known, and they share each
    pass over the examples: the more queries come together, the fewer passes. Exact as far as it
    converges, at the price of tens of passes for every block of queries: for questions that are
    few, or to check the other inverses by.

    Where a direction without positive curvature is met, each query of the block is solved by itself
    instead, stops at the first one that it meets, and is counted: `summary()` and a warning say how
    many, and which damping would have been enough.

    Args:
        model: a built Keras model, trained.
        tolerance: of the residual |g - (H + damping I) h| / |g|.
        max_iterations: steps for a block of queries at most; a warning says who needs more.
        preconditioner: a fitted inverse of the same model, such as `Arnoldi` or `EKFAC`, whose
            products come near those that are wanted: fewer steps.
        **kwargs: see `InverseMethod`.

    Attributes:
        solutions: of the last block, a `linalg.Solutions`: residuals, iterations, curvatures.

    Example:

    >>> arnoldi = ki.Arnoldi(model, rank=50).fit(train)
    >>> method = ki.ConjugateGradient(model, preconditioner=arnoldi).fit(train)
    >>> scores = method.scores(queries=test, train=train)
    """

    _vectors_per_query = 9

    def __init__(
        self,
        model: keras.Model,
        tolerance: float = 1e-4,
        max_iterations: int = 200,
        *,
        preconditioner: InverseMethod | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        if not tolerance > 0 or max_iterations < 1:
            raise ValueError(
                "`tolerance` must be above zero and `max_iterations` at least 1. "
                f"Received: tolerance={tolerance}, max_iterations={max_iterations}."
            )
        if preconditioner is not None:
            if not isinstance(preconditioner, InverseMethod):
                raise TypeError(
                    "`preconditioner` must be an inverse, such as Arnoldi or EKFAC. "
                    f"Received: {type(preconditioner).__name__}."
                )
            sizes = preconditioner.maps.parameters.size, self.maps.parameters.size
            if sizes[0] != sizes[1]:
                raise ValueError(
                    "`preconditioner` must be of the same parameters. Received one of "
                    f"{sizes[0]:,}, for {sizes[1]:,}."
                )
            preconditioner._check_ready()
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.preconditioner = preconditioner
        self.solutions: Solutions | None = None
        self._operator: FrozenCurvature | None = None

    def _fit(self, dataset: Any) -> int:
        self._operator, num_train = self._begin(dataset)
        return num_train

    def _check_ready(self) -> None:
        self._check_fitted()
        if self._operator is None:
            raise ValueError(
                "ConjugateGradient computes with the training set itself, which is not saved with "
                "it: call `fit(train)` after loading."
            )

    def _fit_work(self, job: Job) -> Iterator[Work]:
        return self._begin_work(job)

    def _solve_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        frozen, count = job.joined(self.num_examples), blocks.batch_size
        # As many steps as are allowed, and the residual.
        products = (self.max_iterations + 1) * blocks.num_batches
        yield Work(
            f"products with {count:,} vectors, at most",
            job.products(frozen, count),
            products * frozen.num_batches,
            products * count,
            device=frozen.bytes + 10 * count * job.vector_bytes,
        )
        if self.preconditioner is not None:
            for work in self.preconditioner._solve_work(job, blocks):
                yield work.times(self.max_iterations + 1)

    def _inverse_products(self, vectors: tf.Tensor) -> tf.Tensor:
        operator = self._operator
        assert operator is not None
        progress = self._progress("conjugate gradients", self.max_iterations)
        try:
            self.solutions = block_conjugate_gradient(
                lambda rows: operator.products(rows, self._damping),
                vectors,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
                precondition=(
                    None if self.preconditioner is None else self.preconditioner._inverse_products
                ),
                after=lambda: progress.add(1),
            )
        finally:
            progress.close()
        self._complain(self.solutions)
        return self.solutions.vectors

    def _scores_depend_on(self) -> dict[str, Any]:
        found = super()._scores_depend_on()
        if self.preconditioner is not None:
            found["preconditioner"] = self.preconditioner._scores_depend_on()
        return found

    def _scores_with_error(self, queries: Any, train: Any) -> tuple[np.ndarray, np.ndarray]:
        """With r = g - A h for A = H + damping I: |r'A^-1 g(x)| <= |r| |g(x)| / (damping + l2)."""
        self._check_uncorrected("The uncertainty of scores")
        floor = self._damping + self.l2
        if floor <= 0:
            raise ValueError(
                "The residual bounds the error only with a damping or an l2 above zero, which no "
                f"eigenvalue is below. Received: damping={self._damping:g}, l2={self.l2:g}."
            )
        factor = self._per_train()
        norms = np.sqrt(self._gather(self.maps.squared_norms, train, "gradient norm"))
        scores, bounds, ids = [], [], []
        for batch in self._query_batches(queries):
            gradients = self._gradients(batch, self.query_maps)
            directions = self._inverse_products(tf.convert_to_tensor(gradients))
            found = self.solutions
            assert found is not None
            projector = Projector(self.maps, functools.partial(tf.identity, directions))
            rows = self._gather(self.maps.project, train, "projection", projector.directions)
            scores.append(rows.T)
            left = found.residuals * np.linalg.norm(gradients, axis=1)
            left[found.indefinite] = np.inf
            bounds.append(left[:, np.newaxis] * norms / floor)
            ids.append(batch.ids)
        return (
            (data.in_order(scores, ids) * factor).astype(np.float32),
            (data.in_order(bounds, ids) * factor).astype(np.float32),
        )

    def _complain(self, found: Solutions) -> None:
        bad = int(found.indefinite.sum())
        if bad:
            logging.warning(
                "The damped curvature has directions of negative curvature (%.3g): %d of %d "
                "solutions stopped at the first that they met. A damping of %.3g would be enough "
                "for those.",
                found.curvatures.min(),
                bad,
                len(found.indefinite),
                self._damping - 1.1 * found.curvatures.min(),
            )
        short = (found.residuals > 2 * self.tolerance) & ~found.indefinite
        if short.any():
            logging.warning(
                "After %d steps %d of %d solutions have a residual above the tolerance %.1e; the "
                "largest is %.1e. Raise `max_iterations` or `damping`, or pass a `preconditioner`.",
                found.iterations.max(),
                int(short.sum()),
                len(short),
                self.tolerance,
                found.residuals[~found.indefinite].max(),
            )

    def _report(self) -> Iterator[str]:
        if self.used_damping is None:
            return
        by = ""
        if self.preconditioner is not None:
            by = f", preconditioned by {type(self.preconditioner).__name__}"
        yield f"{self._system()}; residual {self.tolerance:g}, {self.max_iterations} steps{by}"
        found = self.solutions
        if found is None:
            yield "verdict: known once something was solved"
            return
        count = len(found.residuals)
        solved = int((found.residuals <= 2 * self.tolerance).sum())
        yield (
            f"last block of {count}: steps {found.iterations.min()} to {found.iterations.max()}, "
            f"residuals up to {found.residuals.max():.1e}, smallest curvature met "
            f"{found.curvatures.min():.3g}"
        )
        floor = self._damping + self.l2
        if not found.indefinite.any() and floor > 0:
            # g'A^-1 g - g'x = r'A^-1 g, and |A^-1| <= 1 / (damping + l2) where H is positive.
            yield (
                "error of a quadratic form: at most the residual times |g|^2 / "
                f"{floor:.3g}, for a curvature without negative eigenvalues"
            )
        stopped = int(found.indefinite.sum())
        if stopped:
            yield f"verdict: {stopped} of {count} stopped at negative curvature; raise the damping"
        elif solved < count:
            yield f"verdict: {count - solved} of {count} not converged"
        else:
            yield "verdict: exact to the tolerance"

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
        }
