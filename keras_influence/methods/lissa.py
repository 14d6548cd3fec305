"""Inverse-Hessian products by a stochastic recursion."""

import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence import data, distribution, storage
from keras_influence.gradients import Projector
from keras_influence.methods.direction import DIRECTIONS, DirectionMethod
from keras_influence.methods.scoring import Steps
from keras_influence.methods.work import Job, Load, Work


class LiSSA(DirectionMethod):
    """Influence functions with LiSSA's stochastic Neumann series (Koh & Liang 2017, section 3).

        h_0 = g,   h_{j+1} = g + h_j - (H_j + damping I) h_j / scale_factor,

    where H_j is the Hessian on a fresh random batch. h_depth / scale_factor estimates the solution
    of (H + damping I) h = g: the damping is that of the documented system, and not multiplied by
    the scale as in several published implementations. Every query pays `depth` Hessian products of
    its own, so LiSSA is for few queries; `Arnoldi` asks the Hessian once for all of them.

    The recursion converges when every batch's eigenvalues, damped, lie between 0 and
    2 * scale_factor. When they do not it is stopped, and the error says by how much to change what.
    After `depth` steps an eigendirection of eigenvalue lambda has reached the share
    1 - (1 - (lambda + damping) / scale_factor)^(depth + 1) of its solution.

    Args:
        model: a built Keras model, trained.
        depth: steps of the recursion.
        damping: added to the eigenvalues of H, in units of the loss per squared parameter.
        scale_factor: divides the Hessian; choose it above the largest eigenvalue of a batch.
        hessian_batch_size: examples of each step's Hessian.
        num_repeats: independent recursions that are averaged.
        seed: of the batches.
        **kwargs: see `InfluenceMethod`.

    Raises:
        FloatingPointError: in `scores` and `self_influence`, when the recursion diverges.
    """

    def __init__(
        self,
        model: keras.Model,
        depth: int = 100,
        damping: float = 0.01,
        scale_factor: float = 10.0,
        *,
        hessian_batch_size: int = 32,
        num_repeats: int = 1,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        for name, value in (
            ("depth", depth),
            ("hessian_batch_size", hessian_batch_size),
            ("num_repeats", num_repeats),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {value}.")
        if not scale_factor > 0 or damping < 0:
            raise ValueError(
                "`scale_factor` must be above zero and `damping` not below. "
                f"Received: scale_factor={scale_factor}, damping={damping}."
            )
        self.depth = depth
        self.damping = damping
        self.scale_factor = scale_factor
        self.hessian_batch_size = hessian_batch_size
        self.num_repeats = num_repeats
        self.seed = seed
        self._train: data.Examples | None = None

    def _fit(self, dataset: Any) -> int:
        self._train = data.read(dataset)
        return len(self._train.ids)

    def _check_ready(self) -> None:
        self._check_fitted()
        if self._train is None:
            raise ValueError(
                "LiSSA computes with the training set itself, which is not saved with it: call "
                "`fit(train)` after loading."
            )

    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        def block(batch: data.Batch) -> np.ndarray:
            gradients = self._gradients(batch)
            return tf.reduce_sum(gradients * self._directions(gradients), axis=1).numpy()

        rows = [
            steps.keep(f"queries{number}", functools.partial(block, batch))
            for number, batch in enumerate(self._query_batches(dataset))
        ]
        return (np.concatenate(rows) * self._per_train()).astype(np.float32)

    def _projector(self, batch: data.Batch, steps: Steps) -> Projector:
        directions = steps.keep(
            DIRECTIONS, lambda: self._directions(self._gradients(batch)).numpy()
        )
        return Projector(self.maps, functools.partial(tf.convert_to_tensor, directions))

    def _gradients(self, batch: data.Batch) -> tf.Tensor:
        """Of the queries of a batch, [b, p]."""
        return tf.convert_to_tensor(self._rows(self.maps.example_gradients, [batch], "gradient"))

    def _scores_depend_on(self) -> dict[str, Any]:
        assert self._train is not None
        return {
            **super()._scores_depend_on(),
            "fitted on": storage.arrays_fingerprint(tf.nest.flatten(self._train.arrays)),
        }

    def _fit_work(self, job: Job) -> Iterator[Work]:
        # Batches, and all of them in one array.
        yield job.reading(job.train, host=2 * job.train.bytes)

    def _scores_work(self, job: Job) -> Iterator[Work]:
        blocks = Load.of(job.query_data, self._query_rows())
        yield from self._recursions_work(job, blocks)
        for work in self._products_work(job, blocks):
            yield work._replace(host=work.host + job.train.bytes)

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        yield from self._recursions_work(job, load.cut(self._query_rows()))

    def _recursions_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        vectors = blocks.batch_size * job.vector_bytes
        yield Work(
            "gradients",
            job.rows("example_gradients", blocks),
            blocks.num_batches,
            host=job.train.bytes + vectors,
        )
        products = blocks.num_examples * self.depth * self.num_repeats
        size = min(self.hessian_batch_size, job.train.num_examples)
        yield Work(
            f"Hessian products on {size} examples",
            job.curvature(job.train.cut(size)),
            products,
            products,
            host=job.train.bytes,
            # Gradients, the solution, its products as they come and together.
            device=5 * vectors,
        )

    def _directions(self, gradients: tf.Tensor) -> tf.Tensor:
        runs = [
            self._recursion(gradients, np.random.default_rng([self.seed, repeat]))
            for repeat in range(self.num_repeats)
        ]
        return tf.add_n(runs) / self.num_repeats

    def _recursion(self, gradients: tf.Tensor, random: np.random.Generator) -> tf.Tensor:
        assert self._train is not None
        size = min(self.hessian_batch_size, len(self._train.ids))
        start_norms = np.linalg.norm(gradients, axis=1)
        solution = gradients
        quotients = [0.0]
        progress = self._progress("recursion", self.depth)
        for step in range(1, self.depth + 1):
            rows = random.choice(len(self._train.ids), size, replace=False)
            batch = data.Batch(self._train.take(rows), np.ones(size, np.float32), rows)
            batches = distribution.place([batch], self.model)
            products = [
                distribution.total(self.maps.curvature, batches, self.model, row)
                for row in tf.unstack(solution)
            ]
            curved = tf.stack(products) / size + self.damping * solution
            squares = tf.reduce_sum(solution * solution, axis=1)
            quotients += (tf.reduce_sum(solution * curved, axis=1) / squares).numpy().tolist()
            solution = gradients + solution - curved / self.scale_factor
            self._check_growth(step, np.linalg.norm(solution, axis=1), start_norms, quotients)
            progress.add(1)
        progress.close()
        return solution / self.scale_factor

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
        if largest > self.scale_factor:
            advice = (
                f"A batch had a damped curvature of {largest:.4g}. Use a `scale_factor` above "
                f"{largest / 2:.4g}, better {1.2 * largest:.4g}."
            )
        elif smallest < 0:
            advice = (
                f"A batch had a damped curvature of {smallest:.4g}, which is negative: the weights "
                f"are no minimum. Use a `damping` of at least {self.damping - smallest:.4g}."
            )
        else:
            advice = f"Use a `scale_factor` above {2 * self.scale_factor:.4g}, or larger batches."
        raise FloatingPointError(
            f"LiSSA diverges: after step {step} of {self.depth} the estimate is {growth:.3g} times "
            f"as long as the gradient (damping={self.damping:g}, scale_factor="
            f"{self.scale_factor:g}, hessian_batch_size={self.hessian_batch_size}). {advice}"
        )

    def _report(self) -> Iterator[str]:
        yield (
            f"system: (H + {self.damping:g} I) h = g by {self.depth} steps at scale "
            f"{self.scale_factor:g}, Hessian batches of {self.hessian_batch_size}, "
            f"{self.num_repeats} repeats"
        )
        half = self.scale_factor * (1 - 0.5 ** (1 / (self.depth + 1))) - self.damping
        yield f"solved by half or more along eigenvalues of at least {max(half, 0.0):.3g}"

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "depth": self.depth,
            "damping": self.damping,
            "scale_factor": self.scale_factor,
            "hessian_batch_size": self.hessian_batch_size,
            "num_repeats": self.num_repeats,
            "seed": self.seed,
        }
