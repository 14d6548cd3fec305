"""Influence functions: what every inverse of the curvature has in common."""

import abc
import functools
import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_influence import checkpoints, data, distribution
from keras_influence.gradients import LossMaps, Projector, check_curvature
from keras_influence.methods.curvature import NUM_PROBES, FrozenCurvature, hutchinson_trace
from keras_influence.methods.direction import DIRECTIONS, DirectionMethod
from keras_influence.methods.leverage import Leverage, removed_work, scores_work
from keras_influence.methods.scoring import Steps
from keras_influence.methods.work import Job, Load, Work

# Of the mean eigenvalue, as Grosse et al. (2023, section 5) damp EK-FAC.
_DAMPING_SHARE = 0.1


class InverseMethod(DirectionMethod):
    """Influence functions (Koh & Liang 2017, equation 2), by one way to invert the curvature.

        I(z, x) = (1/N) grad m(z)' (H + damping I)^-1 grad l(x),

    with H the curvature of the mean training loss, l2 included, and m the measurement of a query.

    Args:
        model: a built Keras model, trained.
        damping: added to the eigenvalues of H, in units of the loss per squared parameter.
            `"auto"`: where `run` is given, 1 / (sum over the run's steps of the effective learning
            rate), the damping that stopping after so many steps amounts to; else a tenth of the
            mean eigenvalue of H, estimated by eight random vectors.
        curvature: `"hessian"`; or `"gauss_newton"` or `"fisher"`, which have no negative
            eigenvalues, for losses that are convex in the outputs. The two are one for
            cross-entropies and squared errors. Where the network fits its labels well, or is linear
            in its parameters, they are near the Hessian; see `gradients.convexity`.
        run: directory of the `TracInCheckpoint` that watched the training, for `damping="auto"`.
        l2: coefficient of a penalty (l2/2)|theta|^2 in the training objective, added to H.
        num_examples: training examples that make up H, drawn once with `seed`; all by default. The
            same ones serve every product.
        leverage: whether `scores` and `self_influence` also count that a removed example takes its
            share of the curvature along: for one output, I / (1 - h) with h its leverage, l''/l'^2
            times its self-influence; for several, the matrix form in `methods/leverage.py`. With
            few examples for each parameter, where h is not small, that is what comes true. Exact
            for squared errors of a model that is linear in its parameters, and one Newton step for
            any other. It costs a gradient and a product with the inverse for each output of each
            training example. Sums over groups, and indexes, are without it.
        seed: of every random draw.
        **kwargs: see `InfluenceMethod`.

    Attributes:
        used_damping: after `fit`, the damping as a number.
        trace: after a `fit` that chose the damping by it, the trace of H and its standard error.
    """

    _bound_to_weights = True
    _vectors_per_query = 2
    # Of a method that goes on computing with the training set.
    _operator: FrozenCurvature | None = None

    def __init__(
        self,
        model: keras.Model,
        *,
        damping: float | str = "auto",
        curvature: str = "hessian",
        run: str | os.PathLike | None = None,
        l2: float = 0.0,
        num_examples: int | None = None,
        leverage: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        if isinstance(damping, str) and damping != "auto":
            raise ValueError(f"`damping` must be a number or 'auto'. Received: {damping!r}.")
        if (damping != "auto" and damping < 0) or l2 < 0:  # type: ignore[operator]
            raise ValueError(
                f"`damping` and `l2` must not be negative. Received: damping={damping}, l2={l2}."
            )
        check_curvature(curvature)
        self.damping = damping
        self.curvature = curvature
        self.run = None if run is None else os.fspath(run)
        self.l2 = l2
        self.num_examples = num_examples
        self.leverage = leverage
        self.seed = seed
        self.used_damping: float | None = None
        self.trace: tuple[float, float] | None = None

    @abc.abstractmethod
    def _inverse_products(self, vectors: tf.Tensor) -> tf.Tensor:
        """(H + damping I)^-1 v_j of each row, [k, p]."""

    def inverse_products(self, vectors: Any) -> np.ndarray:
        """(H + damping I)^-1 v of each vector.

        Args:
            vectors: [k, p], in the order of `maps.parameters`.

        Returns:
            [k, p], in the parameters' dtype.
        """
        self._check_ready()
        vectors = np.asarray(vectors, self.maps.parameters.dtype.as_numpy_dtype)
        if vectors.ndim != 2 or vectors.shape[1] != self.maps.parameters.size:
            raise ValueError(
                f"`vectors` must have the shape [k, {self.maps.parameters.size}]. "
                f"Received: {vectors.shape}."
            )
        rows = self._query_rows()
        blocks = [
            self._inverse_products(tf.convert_to_tensor(vectors[start : start + rows])).numpy()
            for start in range(0, len(vectors), rows)
        ]
        if len(blocks) == 1:
            return blocks[0]
        return np.concatenate(blocks) if blocks else vectors

    def parameter_change(self, examples: Any) -> np.ndarray:
        """How the parameters would change if a group of training examples were removed.

        (1/N) (H + damping I)^-1 sum_i grad l_i, to first order.

        Args:
            examples: the group, labelled.

        Returns:
            [p], in the order of `maps.parameters`; its products with gradients of a query are the
            change of the query's loss: the sum of the group's scores.
        """
        self._check_ready()
        total = self._summed_gradient(examples)
        return self.inverse_products(total[np.newaxis])[0] * self._per_train()

    def group_scores(
        self, queries: Any, train: Any, query_groups: Any = None, train_groups: Any = None
    ) -> np.ndarray:
        """Influence of groups of training examples on groups of queries.

        Args:
            queries: Q labelled examples.
            train: N training examples.
            query_groups: [Q], the group of each query, counted from 0; each by itself by default.
                A group's loss is the mean of its queries': one solution serves the group.
            train_groups: [N], the group of each training example, likewise. A group's influence is
                the sum of its examples': the effect of removing them together, to first order.

        Returns:
            float32 [groups of queries, groups of training examples].
        """
        self._check_ready()
        blocks, ids = [], []
        for batch in self._query_batches(queries):
            blocks.append(self._gradients(batch, self.query_maps))
            ids.append(batch.ids)
        gradients = data.in_order(blocks, ids)
        if query_groups is not None:
            sums = _sums_by_group(gradients, query_groups, "query_groups")
            counts = np.bincount(np.asarray(query_groups), minlength=len(sums))
            gradients = sums / np.maximum(counts, 1)[:, np.newaxis].astype(sums.dtype)
        rows = []
        step = self._query_rows()
        for start in range(0, len(gradients), step):
            directions = self._inverse_products(
                tf.convert_to_tensor(gradients[start : start + step])
            )
            projector = Projector(self.maps, functools.partial(tf.identity, directions))
            projected = self._gather(self.maps.project, train, "projection", projector.directions)
            if train_groups is not None:
                projected = _sums_by_group(projected, train_groups, "train_groups")
            rows.append(projected.T)
        return (np.concatenate(rows) * self._per_train()).astype(np.float32)

    @functools.cached_property
    def corrected(self) -> Leverage:
        """What computes scores with `leverage`."""
        return Leverage(self)

    def _scores(self, queries: Any, train: Any, steps: Steps) -> np.ndarray:
        if self.leverage:
            return self.corrected.scores(queries, train, steps)
        return super()._scores(queries, train, steps)

    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        if self.leverage:
            return self.corrected.self_influence(dataset, steps)
        factor = self._per_train()

        def block(batch: data.Batch) -> np.ndarray:
            return self._quadratic_forms(tf.convert_to_tensor(self._gradients(batch, self.maps)))

        rows, ids = [], []
        for number, batch in enumerate(self._query_batches(dataset)):
            rows.append(steps.keep(f"queries{number}", functools.partial(block, batch)))
            ids.append(batch.ids)
        return (data.in_order(rows, ids) * factor).astype(np.float32)

    def _quadratic_forms(self, vectors: tf.Tensor) -> np.ndarray:
        """v_j' (H + damping I)^-1 v_j of each row, float64 [k]."""
        products = self._inverse_products(vectors)
        return np.einsum("kp,kp->k", vectors, products, dtype=np.float64)

    def _projector(self, batch: data.Batch, steps: Steps) -> Projector:
        def solve() -> np.ndarray:
            gradients = self._gradients(batch, self.query_maps)
            return self._inverse_products(tf.convert_to_tensor(gradients)).numpy()

        directions = steps.keep(DIRECTIONS, solve)
        return Projector(self.maps, functools.partial(tf.convert_to_tensor, directions))

    def _gradients(self, batch: data.Batch, maps: LossMaps) -> np.ndarray:
        """Of the examples of a batch, [n, p]."""
        return self._rows(maps.example_gradients, [batch], "gradient")

    def _scores_depend_on(self) -> dict[str, Any]:
        found = super()._scores_depend_on()
        if self._operator is not None:
            found["fitted on"] = self._operator.fingerprint
        return found

    def _begin_work(self, job: Job) -> Iterator[Work]:
        """Of `_begin`: what every fit does first."""
        yield job.freezing(self.num_examples)
        if self.damping == "auto" and self.run is None:
            frozen = job.joined(self.num_examples)
            yield Work(
                "products for the mean eigenvalue",
                job.products(frozen, self._probe_rows()),
                -(-NUM_PROBES // self._probe_rows()) * frozen.num_batches,
                NUM_PROBES,
                device=frozen.bytes + 2 * self._probe_rows() * job.vector_bytes,
            )

    def _scores_work(self, job: Job) -> Iterator[Work]:
        if self.leverage:
            yield from scores_work(self, job)
            return
        blocks = Load.of(job.query_data, self._query_rows())
        yield from self._gradients_work(job, blocks, self.query_maps)
        yield from self._solve_work(job, blocks)
        yield from self._products_work(job, blocks)

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        if self.leverage:
            yield from removed_work(self, job, load)
            return
        blocks = load.cut(self._query_rows())
        yield from self._gradients_work(job, blocks, self.maps)
        yield from self._forms_work(job, blocks)

    def _gradients_work(self, job: Job, blocks: Load, maps: LossMaps) -> Iterator[Work]:
        unit = job.rows("example_gradients", blocks, maps)
        held = 2 * blocks.batch_size * job.vector_bytes
        yield Work("gradients", unit, blocks.num_batches, host=held)

    def _solve_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        """Of `_inverse_products` for each block of gradients."""
        raise NotImplementedError

    def _forms_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        """Of `_quadratic_forms`, likewise."""
        return self._solve_work(job, blocks)

    def _summed_gradient(self, examples: Any) -> np.ndarray:
        batches = list(data.batches(examples, self.batch_size))
        total = distribution.total(
            self.maps.gradient,
            distribution.place(batches, self.model, self.steps_per_execution),
            self.model,
        ).numpy()
        if not np.isfinite(total).all():
            self._diagnose(batches)
        return total

    def _begin(self, dataset: Any) -> tuple[FrozenCurvature, int]:
        """The curvature over the frozen examples, and the number of all; settles the damping."""
        frozen, num_train = self._frozen(dataset)
        operator = self._operator_over(frozen)
        try:
            self._settle_damping(operator)
        except FloatingPointError:
            self._diagnose(self._frozen(dataset)[0])
            raise
        return operator, num_train

    def _frozen(self, dataset: Any) -> tuple[list[data.Batch], int]:
        return data.freeze(dataset, self.batch_size, self.num_examples, self.seed)

    def _operator_over(self, frozen: list[data.Batch]) -> FrozenCurvature:
        """Over `frozen`, which is emptied: the host needs no copy."""
        return FrozenCurvature(
            self.maps,
            self.model,
            frozen,
            self.l2,
            self.direction_bytes,
            self.curvature,
            self.steps_per_execution,
        )

    def _settle_damping(self, operator: FrozenCurvature) -> None:
        if not isinstance(self.damping, str):
            self.used_damping = float(self.damping)
            return
        if self.run is not None:
            rate = checkpoints.effective_rate_sum(self.run, self.model)
            self.used_damping = 1.0 / rate
            return
        self.trace = hutchinson_trace(
            operator, self.maps.parameters.dtype, self.seed, block=self._probe_rows()
        )
        trace = self.trace[0]
        self.used_damping = _DAMPING_SHARE * abs(trace) / self.maps.parameters.size
        if trace < 0:
            logging.warning(
                "The Hessian's mean eigenvalue is negative (%.3g): these weights are far from a "
                "minimum. The damping is a tenth of its size.",
                trace / self.maps.parameters.size,
            )

    def _probe_rows(self) -> int:
        """Probes of the trace that are held together: themselves, products, and their tensors."""
        parameters = self.maps.parameters
        room = self._rows_in_budget(4 * parameters.size * parameters.dtype.size)
        # Blocks of one size, so that one graph serves.
        return max(each for each in (1, 2, 4, NUM_PROBES) if each <= max(room, 1))

    @property
    def _damping(self) -> float:
        if self.used_damping is None:
            self._raise_not_fitted()
        return self.used_damping

    def _check_ready(self) -> None:
        self._check_fitted()

    def _check_uncorrected(self, what: str) -> None:
        if self.leverage:
            raise ValueError(
                f"{what} with `leverage=True` is not known: a training example's correction is no "
                "number of its own. Make another method without it."
            )

    def _system(self) -> str:
        how = ""
        if self.damping == "auto":
            how = " (1 / sum of the run's rates)" if self.run else " (a tenth of the mean)"
        return f"curvature {self.curvature}, damping {self._damping:.4g}{how}, l2 {self.l2:g}"

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "damping": self.damping,
            "curvature": self.curvature,
            "run": self.run,
            "l2": self.l2,
            "num_examples": self.num_examples,
            "leverage": self.leverage,
            "seed": self.seed,
        }

    def _state(self) -> dict[str, np.ndarray]:
        if self.used_damping is None:
            return {}
        arrays = {"used_damping": np.array(self.used_damping)}
        if self.trace is not None:
            arrays["trace"] = np.array(self.trace)
        return arrays

    def _set_state(self, arrays: dict[str, np.ndarray]) -> None:
        if "used_damping" in arrays:
            self.used_damping = float(arrays["used_damping"])
        if "trace" in arrays:
            trace, error = arrays["trace"].tolist()
            self.trace = trace, error


def _sums_by_group(rows: np.ndarray, groups: Any, name: str) -> np.ndarray:
    groups = np.asarray(groups)
    if groups.shape != rows.shape[:1] or groups.dtype.kind not in "iu" or groups.min() < 0:
        raise ValueError(
            f"`{name}` must be {len(rows)} integers, the group of each example counted from 0. "
            f"Received: shape {groups.shape} of {groups.dtype}."
        )
    sums = np.zeros((int(groups.max()) + 1, rows.shape[1]), rows.dtype)
    np.add.at(sums, groups, rows)
    return sums
