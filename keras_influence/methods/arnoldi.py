"""Influence on the dominant eigenvectors of the loss's Hessian."""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from keras_influence import checkpoints, data, distribution, storage
from keras_influence.gradients import Projector, check_curvature
from keras_influence.linalg import (
    ArnoldiResult,
    Basis,
    DeviceBasis,
    Eigenbasis,
    Journal,
    Space,
    arnoldi,
    distill,
    orthogonality,
)
from keras_influence.methods.basis_place import (
    PLACES,
    checked_dtype,
    checked_place,
    device_arguments,
    new_basis,
)
from keras_influence.methods.curvature import FrozenCurvature
from keras_influence.methods.encoding import EncodingMethod
from keras_influence.methods.iteration_plan import iteration_work
from keras_influence.methods.preemption import between_steps
from keras_influence.methods.resumption import (
    DurableBasis,
    DurableDeviceBasis,
    FitDirectory,
    examples_fingerprint,
)
from keras_influence.methods.work import Job, Work

NEGATIVE_EIGENVALUES = ("drop", "keep", "absolute")


class Arnoldi(EncodingMethod):
    """Influence functions on the Hessian's dominant eigenvectors (Schioppa et al., 2022).

    The Hessian H of the mean training loss is never formed: an Arnoldi iteration over
    Hessian-vector products finds its eigenpairs (lambda_j, u_j) of largest magnitude, once. An
    example is then encoded by the products of its gradient with the u_j, and

        I(z, x) = (1/N) sum_j <grad l(z), u_j> <grad l(x), u_j> / (lambda_j + damping).

    Use it where many questions will be asked of one model. What lies outside the kept eigenvectors
    counts as zero, so that for predicting the effect of removals on a convex model it can do worse
    than plain gradient products; to find mislabeled examples it does well.

    Args:
        model: a built Keras model, trained.
        rank: eigenpairs to keep: the length of an encoding.
        num_iterations: Hessian-vector products, each a pass over the examples of the Hessian;
            `2 * rank` by default, so that most of the kept pairs converge.
        damping: added to the eigenvalues, in units of the loss per squared parameter.
        curvature: `"hessian"`, or `"gauss_newton"` or `"fisher"`; see `InverseMethod`.
        l2: coefficient of a penalty (l2/2)|theta|^2 in the training objective, added to H.
        negative_eigenvalues: what becomes of pairs with lambda < 0, at a weight vector that is no
            minimum: `"drop"` leaves them out, `"keep"` divides by them as they are, `"absolute"` by
            their magnitude. `summary()` reports their share.
        num_examples: training examples that make up H, drawn once with `seed`; all by default. The
            same ones serve every product.
        seed: of the starting vector and of the draw.
        basis: where the iteration keeps its vectors, `num_iterations` times the parameters:
            `"host"`, in memory; `"device"`, where the model computes, so that no vector passes
            through the host: on each replica of the model's strategy its share of the columns; or
            a directory, for those that are larger. There the fit can be gone on with, as with
            `fit(..., directory=)`.
        basis_dtype: of these vectors where they lie: that of the parameters, or `"bfloat16"`, for
            twice as many in the same room. They are orthogonalised against what is stored, in
            float32; `residuals` and `summary()` say what the rounding costs.
        **kwargs: `loss`, `variables`, `sequence_reduction`, `batch_size`, `scale`, `verbose`: see
            `InfluenceMethod`.

    Attributes:
        eigenbasis: after `fit`, an `Eigenbasis`: `values` [rank], `vectors` [rank, p], `residuals`.

    Raises:
        ValueError: `rank` above `num_iterations`.
        FloatingPointError: in `fit`, a loss that is not finite; the message names the example.

    Example:

    >>> arnoldi = ki.Arnoldi(model, rank=100).fit(train)
    >>> suspects = np.argsort(-arnoldi.self_influence(train))[:25]
    """

    _bound_to_weights = True
    _large = ("vectors",)

    def __init__(
        self,
        model: keras.Model,
        rank: int = 100,
        num_iterations: int | None = None,
        *,
        damping: float = 0.0,
        curvature: str = "hessian",
        l2: float = 0.0,
        negative_eigenvalues: str = "drop",
        num_examples: int | None = None,
        seed: int = 0,
        basis: str | os.PathLike = "host",
        basis_dtype: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        if num_iterations is None:
            num_iterations = 2 * rank
        if not 1 <= rank <= num_iterations:
            raise ValueError(
                f"`rank` must be between 1 and `num_iterations`={num_iterations}: an iteration "
                f"yields one eigenpair at most. Received: rank={rank}."
            )
        if negative_eigenvalues not in NEGATIVE_EIGENVALUES:
            raise ValueError(
                f"`negative_eigenvalues` must be one of {NEGATIVE_EIGENVALUES}. "
                f"Received: {negative_eigenvalues!r}."
            )
        if damping < 0 or l2 < 0:
            raise ValueError(
                f"`damping` and `l2` must not be negative. Received: damping={damping}, l2={l2}."
            )
        check_curvature(curvature)
        self.curvature = curvature
        self.rank = rank
        self.num_iterations = num_iterations
        self.damping = damping
        self.l2 = l2
        self.negative_eigenvalues = negative_eigenvalues
        self.num_examples = num_examples
        self.seed = seed
        self.basis = checked_place(basis)
        self.basis_dtype = basis_dtype
        self._stored_dtype = checked_dtype(basis_dtype, self.maps)
        self.eigenbasis: Eigenbasis | None = None
        self.product_seconds: float | None = None
        self.asymmetry: float | None = None
        self.orthogonality: float | None = None

    def fit(self, dataset: Any, directory: str | os.PathLike | None = None) -> Self:
        """Finds the eigenbasis of the training set's Hessian.

        Args:
            dataset: the training data; see `data.batches` for the forms it may take.
            directory: where to keep each finished step. A fit of the same model, weights, data and
                settings with the same directory goes on after the last one, to the bits of a fit
                that was never interrupted; when all are done the directory is what `save` writes,
                and such a fit reads it. On SIGTERM the step in hand is finished, and the process
                exits with code 143.

        Returns:
            The method itself.

        Raises:
            ValueError: the directory holds another fit, or something else.
            storage.StoreInUseError: another process is fitting there.
        """
        if directory is None:
            directory = self.basis if self._on_disk else None
        elif self.basis not in (*PLACES, os.fspath(directory)):
            raise ValueError(
                f"The basis lies in {self.basis!r}, where the fit's steps are kept too. Received "
                f"another directory: {os.fspath(directory)!r}."
            )
        if directory is None:
            return super().fit(dataset)
        distribution.check_one_worker(self.model, "A fit in a directory")
        path = pathlib.Path(directory)
        with storage.writing(path), between_steps("the fit") as check:
            self._timed(dataset, lambda: self._fit_in(path, dataset, check))
        return self

    def _fit(self, dataset: Any) -> int:
        batches, num_train = self._frozen(dataset)
        steps = min(self.num_iterations, self._size)
        basis = new_basis(self.basis, steps, self.maps, self.model, self._stored_dtype)
        self._set_basis(self._iterate(batches, dataset, basis))
        return num_train

    def _fit_in(self, path: pathlib.Path, dataset: Any, check: Any) -> int:
        batches, num_train = self._frozen(dataset)
        directory = FitDirectory(path, self._identity(batches, num_train))
        if directory.finished:
            manifest, arrays = storage.load_store(path, self._large if self._on_disk else ())
            self._set_state(arrays)
            self.asymmetry = manifest["asymmetry"]
            self.orthogonality = manifest["orthogonality"]
            directory.finish(manifest, arrays)
            return num_train
        size, dtype = self._size, self.maps.parameters.dtype.as_numpy_dtype
        steps = min(self.num_iterations, size)
        stored = directory.basis(steps, size, self._stored_dtype, self.memory_budget)
        basis: Basis | Space = stored
        arguments = (steps, self.maps, self.model, self._stored_dtype)
        if self.basis == "device":
            basis = DurableDeviceBasis(stored, *device_arguments(*arguments))
        elif not self._on_disk:
            basis = DurableBasis(new_basis(self.basis, *arguments), stored)
        result = self._iterate(batches, dataset, basis, directory.journal(check))
        vectors = None
        if self._on_disk:
            kept = min(self.rank, len(result.matrix))
            vectors = storage.StoredRows.create(path, "vectors", (kept, size), dtype, stored.width)
        self._set_basis(result, vectors)
        self.num_train = num_train
        manifest, arrays = self._to_store()
        quality = {"asymmetry": self.asymmetry, "orthogonality": self.orthogonality}
        directory.finish({**manifest, **quality}, arrays)
        return num_train

    def _fit_work(self, job: Job) -> Iterator[Work]:
        place = self.basis if self._on_disk else None
        return iteration_work(
            job, self.num_iterations, self.rank, self.num_examples, place, self.memory_budget
        )

    def _directions_bytes(self, job: Job) -> float:
        return 0.0 if self._on_disk else min(self.rank, job.size) * job.vector_bytes

    @property
    def _on_disk(self) -> bool:
        return self.basis not in PLACES

    @property
    def _size(self) -> int:
        return self.maps.parameters.size

    def _identity(self, batches: Sequence[data.Batch], num_train: int) -> dict[str, Any]:
        """All that the bits of the result depend on."""
        config = self.get_config()
        for name in ("verbose", "memory_budget", "basis", "scale", "damping"):
            del config[name]
        return {
            **config,
            "kind": type(self).__name__,
            "place": "disk" if self._on_disk else self.basis,
            "architecture": checkpoints.architecture_fingerprint(self.model),
            "weights": self._fitted_weights,
            "data": examples_fingerprint(batches),
            "num_train": num_train,
        }

    def _frozen(self, dataset: Any) -> tuple[list[data.Batch], int]:
        return data.freeze(dataset, self.batch_size, self.num_examples, self.seed)

    def _iterate(
        self,
        frozen: list[data.Batch],
        dataset: Any,
        basis: Basis | Space,
        journal: Journal | None = None,
    ) -> ArnoldiResult:
        """The iteration over `frozen`, which is emptied: the host needs no copy."""
        operator = FrozenCurvature(self.maps, self.model, frozen, self.l2, kind=self.curvature)
        parameters = self.maps.parameters
        progress = self._progress(
            "Hessian-vector products", min(self.num_iterations, parameters.size)
        )
        if journal is not None:
            progress.add(len(journal.steps()))

        def product(vector: Any) -> Any:
            on_device = isinstance(basis, DeviceBasis)
            result = operator.on_replicas(vector) if on_device else operator(vector).numpy()
            progress.add(1)
            return result

        start = tf.random.stateless_normal(
            [parameters.size], [self.seed, 0], dtype=parameters.dtype
        )
        try:
            result = arnoldi(
                product, start, self.num_iterations, seed=self.seed, basis=basis, journal=journal
            )
        except FloatingPointError:
            self._diagnose(self._frozen(dataset)[0])
            raise
        progress.close()
        self.product_seconds = operator.seconds
        return result

    def _set_basis(self, result: ArnoldiResult, vectors: Basis | None = None) -> None:
        self.asymmetry = result.asymmetry
        self.orthogonality = orthogonality(result.basis)
        self.eigenbasis = distill(result, self.rank, vectors)

    def _check_ready(self) -> None:
        self._check_fitted()

    def _fitted_basis(self) -> Eigenbasis:
        if self.eigenbasis is None:
            self._raise_not_fitted()
        return self.eigenbasis

    def _direction_rows(self, start: int, stop: int) -> np.ndarray:
        return self._fitted_basis().vectors[start:stop]

    def _query_encoders(self) -> Iterator[Projector]:
        # Vectors that were too many for memory are so for a copy of them that is laid out.
        several = len(list(self._encoders())) > 1
        return self._encoders(keep=not (several and self._on_disk))

    @property
    def metric(self) -> np.ndarray:
        """1 / (lambda_j + damping), and 0 for the pairs that are left out; float64 [rank]."""
        values = self._fitted_basis().values
        # Beyond rounding of the largest, an eigenvalue is not told from zero, nor is its inverse.
        epsilon = np.finfo(self.maps.parameters.dtype.as_numpy_dtype).eps
        kept = np.abs(values) > 10 * epsilon * np.max(np.abs(values), initial=0.0)
        if self.negative_eigenvalues == "drop":
            kept &= values > 0
        elif self.negative_eigenvalues == "absolute":
            values = np.abs(values)
        damped = values + self.damping
        kept &= damped != 0
        return np.divide(1.0, damped, out=np.zeros_like(damped), where=kept)

    @property
    def negative_mass(self) -> float:
        """Share of the kept eigenvalues' total magnitude that belongs to negative ones."""
        values = self._fitted_basis().values
        total = np.abs(values).sum()
        return float(np.abs(values[values < 0]).sum() / total) if total else 0.0

    def _report(self) -> Iterator[str]:
        if self.eigenbasis is None:
            return
        values, _, residuals = self.eigenbasis
        head = " ".join(f"{value:.6g}" for value in values[:6])
        yield f"eigenvalues: {head}{' ...' if len(values) > 6 else ''} (smallest {values[-1]:.3g})"
        converged = int(np.sum(residuals <= 0.01 * np.abs(values)))
        yield (
            f"converged pairs (|Hu - lambda u| within 1% of lambda): {converged} of {len(values)}; "
            f"largest residual {residuals.max(initial=0):.3g}"
        )
        yield (
            f"negative eigenvalues: {int((values < 0).sum())}, {self.negative_mass:.1%} of the "
            f"magnitude ({self.negative_eigenvalues}); curvature {self.curvature}, "
            f"damping {self.damping:g}, l2 {self.l2:g}"
        )
        if self.asymmetry is not None:
            yield f"asymmetry of T: {self.asymmetry:.1e}"
        if self.orthogonality is not None:
            yield (
                f"basis: {np.dtype(self._stored_dtype).name}, on the "
                f"{'disk' if self._on_disk else self.basis}; |Q'Q - I| {self.orthogonality:.1e}"
            )
        if self.product_seconds is not None and self.fit_seconds:
            share = 1 - self.product_seconds / self.fit_seconds
            yield f"time outside of Hessian products: {share:.1%}"

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "rank": self.rank,
            "num_iterations": self.num_iterations,
            "damping": self.damping,
            "curvature": self.curvature,
            "l2": self.l2,
            "negative_eigenvalues": self.negative_eigenvalues,
            "num_examples": self.num_examples,
            "seed": self.seed,
            "basis": self.basis,
            "basis_dtype": self.basis_dtype,
        }

    def _state(self) -> dict[str, np.ndarray]:
        return {} if self.eigenbasis is None else self.eigenbasis._asdict()

    def _set_state(self, arrays: dict[str, np.ndarray]) -> None:
        if arrays:
            self.eigenbasis = Eigenbasis(**arrays)
