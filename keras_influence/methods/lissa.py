"""Inverse products by a stochastic recursion."""

import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_influence import data, storage
from keras_influence.gradients import Projector
from keras_influence.linalg import arnoldi, distill
from keras_influence.methods.curvature import FrozenCurvature
from keras_influence.methods.inverse import InverseMethod
from keras_influence.methods.work import Job, Load, Work

# Products that find the ends of a spectrum, and batches whose spectra are looked at.
_SPECTRUM_STEPS = 12
_SPECTRUM_BATCHES = 4
# The scale, in units of the largest curvature that was met.
_MARGIN = 1.2


class LiSSA(InverseMethod):
    """Influence functions with LiSSA's stochastic Neumann series (Koh & Liang 2017, section 3).

        h_0 = g,   h_{j+1} = g + h_j - (H_j + damping I) h_j / scale_factor,

    where H_j is the curvature on a fresh random batch. h_depth / scale_factor estimates the
    solution of (H + damping I) h = g: the damping is that of the documented system, and not
    multiplied by the scale as in several published implementations. Every query pays `depth`
    products of its own, so LiSSA is for few queries; `Arnoldi` asks the curvature once for all.

    The recursion converges when every batch's eigenvalues, damped, lie between 0 and
    2 * scale_factor. `fit` measures the ends of the spectrum, of the whole set and of a few
    batches, by a dozen products each; a recursion that diverges all the same is stopped, and the
    error says by how much to change what. After `depth` steps an eigendirection of eigenvalue
    lambda has reached the share 1 - (1 - (lambda + damping) / scale_factor)^(depth + 1) of its
    solution.

    Args:
        model: a built Keras model, trained.
        depth: steps of the recursion.
        damping: see `InverseMethod`.
        scale_factor: divides the curvature; `"auto"`: 1.2 times the largest damped eigenvalue that
            `fit` met.
        hessian_batch_size: examples of each step's curvature.
        num_repeats: independent recursions that are averaged; their spread is the uncertainty that
            `scores(..., return_uncertainty=True)` returns.
        **kwargs: `run`, `curvature`, `l2`, `seed`: see `InverseMethod`; others: `InfluenceMethod`.

    Attributes:
        used_scale: after `fit`, the scale as a number.
        spectrum: after `fit`, the smallest and the largest eigenvalue of the whole set's curvature,
            and the largest of a batch's, as far as a dozen steps find them; not damped.

    Raises:
        ValueError: in `fit`, a `scale_factor` below the largest damped eigenvalue.
        FloatingPointError: in `scores` and `self_influence`, when the recursion diverges.
    """

    # A gradient, its solution, and the products as they come and together.
    _vectors_per_query = 5

    def __init__(
        self,
        model: keras.Model,
        depth: int = 100,
        damping: float | str = "auto",
        scale_factor: float | str = "auto",
        *,
        hessian_batch_size: int = 32,
        num_repeats: int = 1,
        **kwargs: Any,
    ):
        super().__init__(model, damping=damping, **kwargs)
        for name, value in (
            ("depth", depth),
            ("hessian_batch_size", hessian_batch_size),
            ("num_repeats", num_repeats),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {value}.")
        if scale_factor != "auto" and (isinstance(scale_factor, str) or not scale_factor > 0):
            raise ValueError(
                f"`scale_factor` must be above zero, or 'auto'. Received: {scale_factor!r}."
            )
        self.depth = depth
        self.scale_factor = scale_factor
        self.hessian_batch_size = hessian_batch_size
        self.num_repeats = num_repeats
        self.used_scale: float | None = None
        self.spectrum: tuple[float, float, float] | None = None
        # By their shapes.
        self._train: list[data.Examples] | None = None

    def _fit(self, dataset: Any) -> int:
        self._train = data.read_shapes(dataset)
        operator, num_train = self._begin(dataset)
        smallest, largest = self._ends(operator)
        random = np.random.default_rng([self.seed, 4])
        batches = [self._on_batch(random) for _ in range(_SPECTRUM_BATCHES)]
        of_batches = max(self._ends(each)[1] for each in batches)
        self.spectrum = smallest, largest, of_batches
        self._settle_scale(largest, of_batches)
        if smallest + self._damping < 0:
            logging.warning(
                "The curvature has an eigenvalue of %.3g, which the damping of %.3g does not "
                "outweigh: along it the recursion grows, by %.3g in %d steps. Use a damping above "
                "%.3g.",
                smallest,
                self._damping,
                (1 - (smallest + self._damping) / self._scale) ** self.depth,
                self.depth,
                -smallest,
            )
        return num_train

    def _ends(self, operator: FrozenCurvature) -> tuple[float, float]:
        """The smallest and the largest eigenvalue, as far as a few steps find them."""
        parameters = self.maps.parameters
        start = tf.random.stateless_normal(
            [parameters.size], [self.seed, 1], dtype=parameters.dtype
        )
        result = arnoldi(operator, start, _SPECTRUM_STEPS, seed=self.seed)
        pairs = distill(result, min(_SPECTRUM_STEPS, len(result.matrix)))
        top = int(np.argmax(pairs.values))
        return float(pairs.values.min()), float(pairs.values[top] + pairs.residuals[top])

    def _settle_scale(self, largest: float, of_batches: float) -> None:
        damped = max(largest, of_batches) + self._damping
        if isinstance(self.scale_factor, str):
            self.used_scale = _MARGIN * max(damped, float(np.finfo(np.float32).tiny))
            return
        if self.scale_factor < largest + self._damping:
            raise ValueError(
                f"`scale_factor` must be above the largest eigenvalue of the damped curvature, "
                f"which is {largest + self._damping:.4g} (of a batch of {self.hessian_batch_size}: "
                f"up to {of_batches + self._damping:.4g}). Received: {self.scale_factor:g}; use "
                f"{_MARGIN * damped:.4g}, or 'auto'."
            )
        self.used_scale = float(self.scale_factor)

    @property
    def _scale(self) -> float:
        if self.used_scale is None:
            self._raise_not_fitted()
        return self.used_scale

    def _check_ready(self) -> None:
        self._check_fitted()
        if self._train is None:
            raise ValueError(
                "LiSSA computes with the training set itself, which is not saved with it: call "
                "`fit(train)` after loading."
            )

    def _scores_depend_on(self) -> dict[str, Any]:
        assert self._train is not None
        return {
            **super()._scores_depend_on(),
            "fitted on": storage.arrays_fingerprint(
                leaf for alike in self._train for leaf in tf.nest.flatten(alike.arrays)
            ),
        }

    def _fit_work(self, job: Job) -> Iterator[Work]:
        # Batches, and all of them in one array.
        yield job.reading(job.train, host=2 * job.train.bytes)
        yield from self._begin_work(job)
        frozen = job.joined(self.num_examples)
        steps = min(_SPECTRUM_STEPS, job.size)
        yield Work(
            "products for the ends of the spectrum",
            job.curvature(frozen),
            steps * frozen.num_batches,
            steps,
            host=job.train.bytes + steps * job.vector_bytes,
            device=frozen.bytes + 2 * job.vector_bytes,
        )
        size = min(self.hessian_batch_size, job.train.num_examples)
        yield Work(
            f"Hessian products on {size} examples",
            job.curvature(job.train.cut(size)),
            _SPECTRUM_BATCHES * steps,
            _SPECTRUM_BATCHES * steps,
            host=job.train.bytes + steps * job.vector_bytes,
        )

    def _solve_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        vectors = blocks.batch_size * job.vector_bytes
        products = self.depth * self.num_repeats * blocks.num_batches
        size = min(self.hessian_batch_size, job.train.num_examples)
        yield Work(
            f"products on {size} examples with {blocks.batch_size:,} vectors",
            job.products(job.train.cut(size).first(size), blocks.batch_size),
            products,
            products * blocks.batch_size,
            host=job.train.bytes,
            device=5 * vectors,
        )

    def _inverse_products(self, vectors: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(self._repeats(vectors), axis=0)

    def _repeats(self, vectors: tf.Tensor) -> tf.Tensor:
        """What each recursion gives, [repeats, k, p]."""
        return tf.stack(
            [
                self._recursion(vectors, np.random.default_rng([self.seed, repeat]))
                for repeat in range(self.num_repeats)
            ]
        )

    def _scores_with_error(self, queries: Any, train: Any) -> tuple[np.ndarray, np.ndarray]:
        self._check_uncorrected("The uncertainty of scores")
        if self.num_repeats < 2:
            raise ValueError(
                "The uncertainty of LiSSA is the spread of its repeats: pass `num_repeats` of at "
                f"least 2. Received: {self.num_repeats}."
            )
        means, errors, ids = [], [], []
        for batch in self._query_batches(queries):
            gradients = self._gradients(batch, self.query_maps)
            repeats = self._repeats(tf.convert_to_tensor(gradients))
            found = []
            for directions in tf.unstack(repeats):
                projector = Projector(self.maps, functools.partial(tf.identity, directions))
                rows = self._gather(self.maps.project, train, "projection", projector.directions)
                found.append(rows.T)
            means.append(np.mean(found, axis=0))
            errors.append(np.std(found, axis=0, ddof=1) / np.sqrt(self.num_repeats))
            ids.append(batch.ids)
        factor = self._per_train()
        return (
            (data.in_order(means, ids) * factor).astype(np.float32),
            (data.in_order(errors, ids) * factor).astype(np.float32),
        )

    def _on_batch(self, random: np.random.Generator) -> FrozenCurvature:
        """The curvature of a random batch."""
        assert self._train is not None
        total = sum(len(alike.ids) for alike in self._train)
        size = min(self.hessian_batch_size, total)
        drawn = random.choice(total, size, replace=False)
        frozen = []
        for alike in self._train:
            # Positions in the dataset, of which each shape has some, in order.
            places = np.minimum(np.searchsorted(alike.ids, drawn), len(alike.ids) - 1)
            rows = places[alike.ids[places] == drawn]
            if len(rows):
                # Of one size, so that one graph serves each shape.
                frozen.append(data.padded(alike.take(rows), alike.ids[rows], size))
        return self._operator_over(frozen)

    def _recursion(self, gradients: tf.Tensor, random: np.random.Generator) -> tf.Tensor:
        start_norms = np.linalg.norm(gradients, axis=1)
        solution = gradients
        quotients = [0.0]
        progress = self._progress("recursion", self.depth)
        for step in range(1, self.depth + 1):
            curved = self._on_batch(random).products(solution, self._damping)
            squares = tf.reduce_sum(solution * solution, axis=1)
            met = tf.math.divide_no_nan(tf.reduce_sum(solution * curved, axis=1), squares)
            quotients += met.numpy().tolist()
            solution = gradients + solution - curved / self._scale
            self._check_growth(step, np.linalg.norm(solution, axis=1), start_norms, quotients)
            progress.add(1)
        progress.close()
        return solution / self._scale

    def _check_growth(
        self, step: int, norms: np.ndarray, start_norms: np.ndarray, quotients: list[float]
    ) -> None:
        """Stops a recursion whose terms have grown beyond any that converges.

        Where all eigenvalues of I - (H + damping I)/scale lie in [-1, 1], each step adds at most
        |g|: after j of them |h| is at most (j + 1) |g|. A tenth more allows for rounding. The
        Rayleigh quotients h'(H + damping I)h / h'h that were met on the way tell the reason, since
        a growing h turns to the eigenvector that makes it grow.
        """
        if (norms <= 1.1 * (step + 1) * start_norms).all():  # False for NaN too.
            return
        growth = np.max(np.divide(norms, start_norms, where=start_norms > 0, out=0 * norms))
        met = [quotient for quotient in quotients if np.isfinite(quotient)]
        largest, smallest = max(met), min(met)
        if largest > self._scale:
            advice = (
                f"A batch had a damped curvature of {largest:.4g}. Use a `scale_factor` above "
                f"{largest / 2:.4g}, better {1.2 * largest:.4g}."
            )
        elif smallest < 0:
            advice = (
                f"A batch had a damped curvature of {smallest:.4g}, which is negative: the weights "
                f"are no minimum. Use a `damping` of at least {self._damping - smallest:.4g}."
            )
        else:
            advice = f"Use a `scale_factor` above {2 * self._scale:.4g}, or larger batches."
        raise FloatingPointError(
            f"LiSSA diverges: after step {step} of {self.depth} the estimate is {growth:.3g} times "
            f"as long as the gradient (damping={self._damping:g}, scale_factor="
            f"{self._scale:g}, hessian_batch_size={self.hessian_batch_size}). {advice}"
        )

    def _report(self) -> Iterator[str]:
        if self.used_scale is None or self.spectrum is None:
            return
        smallest, largest, of_batches = self.spectrum
        how = " (1.2 times the largest)" if self.scale_factor == "auto" else ""
        yield (
            f"{self._system()}: {self.depth} steps at scale {self._scale:.4g}{how}, batches of "
            f"{self.hessian_batch_size}, {self.num_repeats} repeats"
        )
        yield (
            f"spectrum, not damped: {smallest:.3g} to {largest:.4g}, of a batch up to "
            f"{of_batches:.4g}"
        )
        half = self._scale * (1 - 0.5 ** (1 / (self.depth + 1)))
        yield f"solved by half or more along damped eigenvalues of at least {half:.3g}"
        least = max(smallest, 0.0) + self._damping
        left = max(1 - least / self._scale, 0.0) ** (self.depth + 1)
        # g'A^-1 g is short by the part that the series has not summed, and noisy by its batches.
        yield f"error of a quadratic form: up to {left:.1%} missing, beside the batches' noise"
        if smallest + self._damping < 0:
            yield "verdict: negative curvature, along which the recursion grows; raise the damping"
        elif left > 0.1:
            yield "verdict: not converged along the flattest directions; a larger depth would help"
        elif self.num_repeats == 1:
            yield "verdict: converged in the mean; `num_repeats` would tell the noise"
        else:
            yield "verdict: converged in the mean; `return_uncertainty=True` tells the noise"

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "depth": self.depth,
            "scale_factor": self.scale_factor,
            "hessian_batch_size": self.hessian_batch_size,
            "num_repeats": self.num_repeats,
        }

    def _state(self) -> dict[str, np.ndarray]:
        if self.used_scale is None or self.spectrum is None:
            return {}
        numbers = np.array([self.used_scale, *self.spectrum])
        return {**super()._state(), "spectrum": numbers}

    def _set_state(self, arrays: dict[str, np.ndarray]) -> None:
        super()._set_state(arrays)
        if "spectrum" in arrays:
            self.used_scale, smallest, largest, of_batches = arrays["spectrum"].tolist()
            self.spectrum = smallest, largest, of_batches
