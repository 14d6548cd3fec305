"""Influence by an eigenbasis of the curvature, and a constant for what that leaves out."""

import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_influence import data
from keras_influence.gradients import Projector
from keras_influence.linalg import Eigenbasis, conjugate_gradient
from keras_influence.methods.complement import COMPLEMENTS, Complement
from keras_influence.methods.completion import sample_size
from keras_influence.methods.encoding import EncodingMethod
from keras_influence.methods.inverse import InverseMethod
from keras_influence.methods.negative import check_negative, inverses
from keras_influence.methods.outside import combined, inside, remainders
from keras_influence.methods.scoring import Steps
from keras_influence.methods.work import Job, Load, Work


class EigenbasisInverse(InverseMethod, EncodingMethod):
    """What is done with eigenpairs, however they were found: see `Arnoldi`.

    Args: as of `Arnoldi`.
    """

    _large = ("vectors",)
    # Whether the eigenvectors are too many for memory.
    _on_disk: bool = False

    def __init__(
        self,
        model: keras.Model,
        rank: int,
        *,
        complement: str | None,
        num_probes: int,
        sketch_size: int,
        refine: int,
        negative_eigenvalues: str,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        if complement not in COMPLEMENTS:
            raise ValueError(
                f"`complement` must be one of {COMPLEMENTS}. Received: {complement!r}."
            )
        if complement == "damping" and self.damping == 0:
            raise ValueError(
                "`complement='damping'` is 1 / damping: pass a damping above zero. Received: 0."
            )
        if num_probes < 2 or sketch_size < 0 or refine < 0:
            raise ValueError(
                "`num_probes` must be at least 2, and `sketch_size` and `refine` not negative. "
                f"Received: {num_probes}, {sketch_size}, {refine}."
            )
        check_negative(negative_eigenvalues)
        self.rank = rank
        self.complement = complement
        self.num_probes = num_probes
        self.sketch_size = sketch_size
        self.refine = refine
        self.negative_eigenvalues = negative_eigenvalues
        self.eigenbasis: Eigenbasis | None = None
        self.complement_estimate: Complement | None = None
        self._sketch: np.ndarray | None = None

    def _scores_work(self, job: Job) -> Iterator[Work]:
        if self.complement is None and not (self.refine or self.leverage):
            return EncodingMethod._scores_work(self, job)
        return InverseMethod._scores_work(self, job)

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        if self.refine or self.leverage:
            return InverseMethod._self_influence_work(self, job, load)
        return EncodingMethod._self_influence_work(self, job, load)

    def _solve_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        count = blocks.batch_size
        held = self._directions_bytes(job) + 3 * count * job.vector_bytes
        rank = min(self.rank, job.size)
        # There and back.
        yield Work(
            "inverse by the eigenbasis",
            job.combination(count, rank),
            2 * blocks.num_batches * job.parts(rank),
            host=held,
        )
        if self.refine:
            frozen = job.joined(self.num_examples)
            products = (self.refine + 2) * blocks.num_batches
            yield Work(
                f"products with {count:,} vectors",
                job.products(frozen, count),
                products * frozen.num_batches,
                products * count,
                host=held,
                device=frozen.bytes + 7 * count * job.vector_bytes,
            )

    def _num_directions(self, job: Job) -> int:
        # Half of the sample's directions at most.
        num = job.frozen(self.num_examples).num_examples
        sketched = 0 if self.complement is None else min(self.sketch_size, sample_size(self, num))
        return min(self.rank + sketched, job.size)

    def _directions_bytes(self, job: Job) -> float:
        return 0.0 if self._on_disk else min(self.rank, job.size) * job.vector_bytes

    @property
    def _constant(self) -> float:
        return 0.0 if self.complement_estimate is None else self.complement_estimate.constant

    @property
    def _keeps_norms(self) -> bool:  # type: ignore[override]
        return self.complement is not None

    def _inverse_products(self, vectors: tf.Tensor) -> tf.Tensor:
        if not self.refine:
            return self._preconditioned(vectors)
        operator = self._operator
        assert operator is not None
        found = conjugate_gradient(
            lambda rows: operator.products(rows, self._damping),
            vectors,
            # Of residuals that rounding leaves: never met before the steps are done.
            tolerance=float(np.finfo(vectors.dtype.as_numpy_dtype).eps),
            max_iterations=self.refine + 1,
            precondition=self._preconditioned,
        )
        if found.indefinite.any():
            logging.warning(
                "%d of %d queries met negative curvature (%.3g) and stopped refining there.",
                int(found.indefinite.sum()),
                len(found.indefinite),
                found.curvatures.min(),
            )
        return found.vectors

    def _preconditioned(self, vectors: tf.Tensor) -> tf.Tensor:
        """The inverse by eigenbasis and constant: U diag(w - c) U'v + c v."""
        basis = self._fitted_basis().vectors
        rows = np.asarray(vectors)
        inner = inside(basis, rows) * (self._kept_inverses() - self._constant)
        products = combined(basis, inner, rows.dtype) + self._constant * rows
        return tf.convert_to_tensor(products, vectors.dtype)

    def _scores(self, queries: Any, train: Any, steps: Steps) -> np.ndarray:
        if self.complement is None and not (self.refine or self.leverage):
            return EncodingMethod._scores(self, queries, train, steps)
        return InverseMethod._scores(self, queries, train, steps)

    def _scores_with_error(self, queries: Any, train: Any) -> tuple[np.ndarray, np.ndarray]:
        """The constant's standard error times |<r(z), r(x)>|."""
        self._check_uncorrected("The uncertainty of scores")
        found = self.complement_estimate
        if found is None or self.refine:
            raise ValueError(
                "The uncertainty of Arnoldi is that of the complement's constant, which it has "
                f"with a complement and without refining. Received: complement={self.complement!r},"
                f" refine={self.refine}."
            )
        errors, ids = [], []
        for batch in self._query_batches(queries):
            rest, _ = remainders(
                self._fitted_basis().vectors, self._gradients(batch, self.query_maps)
            )
            projector = Projector(self.maps, functools.partial(tf.identity, rest))
            rows = self._gather(self.maps.project, train, "projection", projector.directions)
            errors.append(np.abs(rows.T) * found.error * self._per_train())
            ids.append(batch.ids)
        found_errors = data.in_order(errors, ids).astype(np.float32)
        return self._scores(queries, train, Steps()), found_errors

    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        if self.refine or self.leverage:
            return InverseMethod._self_influence(self, dataset, steps)
        # Products with the eigenvectors, and norms, are all that the forms are made of.
        return EncodingMethod._self_influence(self, dataset, steps)

    def self_influence_of(self, encoded: np.ndarray) -> np.ndarray:
        if not self._keeps_norms:
            return super().self_influence_of(encoded)
        weights = self._kept_inverses()
        kept = np.square(encoded[:, : len(weights)], dtype=np.float64)
        norms = encoded[:, -1].astype(np.float64)
        forms = kept @ (weights - self._constant) + self._constant * norms
        return (forms * self._per_train()).astype(np.float32)

    def _check_ready(self) -> None:
        self._check_fitted()
        if self.refine and self._operator is None:
            raise ValueError(
                "`refine` computes with the training set itself, which is not saved with the "
                "method: call `fit(train)` after loading, or set `refine` to 0."
            )

    def _fitted_basis(self) -> Eigenbasis:
        if self.eigenbasis is None:
            self._raise_not_fitted()
        return self.eigenbasis

    def _direction_rows(self, start: int, stop: int) -> np.ndarray:
        vectors = self._fitted_basis().vectors
        kept = vectors.shape[0]
        rows = []
        if start < kept:
            rows.append(vectors[start : min(stop, kept)])
        if stop > kept and self._sketch is not None:
            rows.append(self._sketch[max(start - kept, 0) : stop - kept])
        return np.concatenate(rows)

    def _encoders(self, keep: bool = True) -> Iterator[Projector]:
        self._check_uncorrected("An encoding")
        return super()._encoders(keep)

    def _query_encoders(self) -> Iterator[Projector]:
        # Vectors that were too many for memory are so for a copy of them that is laid out.
        several = len(list(self._encoders())) > 1
        return self._encoders(keep=not (several and self._on_disk))

    def _kept_inverses(self) -> np.ndarray:
        """1 / (lambda_j + damping), and 0 for the pairs that are left out; float64 [rank]."""
        epsilon = np.finfo(self.maps.parameters.dtype.as_numpy_dtype).eps
        values = self._fitted_basis().values
        return inverses(values, self._damping, self.negative_eigenvalues, epsilon)

    @property
    def metric(self) -> np.ndarray:
        """Weights of an encoding's numbers: of the eigenvectors, the sketch, and the norm (0)."""
        weights = self._kept_inverses()
        if not self._keeps_norms:
            return weights
        sketched = 0 if self._sketch is None else len(self._sketch)
        return np.concatenate([weights, np.full(sketched, self._constant), [0.0]])

    @property
    def negative_mass(self) -> float:
        """Share of the kept eigenvalues' total magnitude that belongs to negative ones."""
        values = self._fitted_basis().values
        total = np.abs(values).sum()
        return float(np.abs(values[values < 0]).sum() / total) if total else 0.0

    def _signs(self) -> str:
        negative = int((self._fitted_basis().values < 0).sum())
        return (
            f"negative eigenvalues: {negative}, {self.negative_mass:.1%} of the magnitude "
            f"({self.negative_eigenvalues}); {self._system()}"
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "rank": self.rank,
            "complement": self.complement,
            "num_probes": self.num_probes,
            "sketch_size": self.sketch_size,
            "refine": self.refine,
            "negative_eigenvalues": self.negative_eigenvalues,
        }

    def _state(self) -> dict[str, np.ndarray]:
        if self.eigenbasis is None:
            return {}
        arrays = {**super()._state(), **self.eigenbasis._asdict()}
        if self.complement_estimate is not None:
            arrays["complement"] = np.array(self.complement_estimate, np.float64)
        if self._sketch is not None:
            arrays["sketch"] = self._sketch
        return arrays

    def _set_state(self, arrays: dict[str, np.ndarray]) -> None:
        super()._set_state(arrays)
        if not arrays:
            return
        self.eigenbasis = Eigenbasis(*(arrays[name] for name in Eigenbasis._fields))
        if "complement" in arrays:
            found = Complement._make(arrays["complement"].tolist())
            self.complement_estimate = found._replace(clipped=bool(found.clipped))
        self._sketch = arrays.get("sketch")
