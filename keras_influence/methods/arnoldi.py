"""Influence on the dominant eigenvectors of the loss's Hessian."""

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import keras
import numpy as np

from keras_influence import checkpoints, data, storage
from keras_influence.linalg import (
    ArnoldiResult,
    Basis,
    Journal,
    Space,
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
from keras_influence.methods.completion import (
    certificate,
    complement_of,
    completion_work,
    sketch_of,
)
from keras_influence.methods.curvature import FrozenCurvature, batches_fingerprint
from keras_influence.methods.eigenbasis import EigenbasisInverse
from keras_influence.methods.iteration import Iteration, Outcome, query_start
from keras_influence.methods.iteration_plan import iteration_work
from keras_influence.methods.preemption import between_steps
from keras_influence.methods.resumption import (
    DurableBasis,
    DurableDeviceBasis,
    examples_fingerprint,
)
from keras_influence.methods.shared_fit import SharedFit
from keras_influence.methods.work import Job, Work
from keras_influence.workers import Workers


class Arnoldi(EigenbasisInverse):
    """Influence functions on the curvature's dominant eigenvectors (Schioppa et al., 2022).

    The curvature H of the mean training loss is never formed: an Arnoldi iteration over its
    products with vectors finds the eigenpairs (lambda_j, u_j) of largest magnitude, once. With
    c the complement's constant and r = g - UU'g the remainder of a gradient g,

        I(z, x) = (1/N) sum_j <g(z), u_j> <g(x), u_j> / (lambda_j + damping) + (c/N) <r(z), r(x)>.

    Use it where many questions will be asked of one model. The published method is
    `complement=None`: what lies outside the kept eigenvectors counts as zero. For predicting the
    effect of removals that can do worse than plain gradient products; with the constant it comes
    near the exact inverse.

    `scores` and `self_influence` are exact in the formula above. An encoding, and so an index,
    holds the products with the u_j and with `sketch_size` further directions that hold most of the
    remainders of a sample of training gradients, and, for self-influence, the gradient's norm.

    Args:
        model: a built Keras model, trained.
        rank: eigenpairs to keep.
        num_iterations: products with H, each a pass over its examples; `2 * rank` by default, so
            that most of the kept pairs converge. With a `tolerance`, those at most: `10 * rank` by
            default, or `20 * rank` with `max_vectors`.
        tolerance: goes on until |Hu - lambda u| is at most this share of the largest |lambda| for
            all kept pairs. Below about 1e-6 (1e-12 in float64) rounding is larger.
        max_vectors: vectors that the iteration may hold, at least `rank + 2 * block_size`; one for
            each product by default. When they are full it restarts from the best `rank` and some
            more: less room, more products.
        block_size: starting vectors, whose products are made together. From one vector an
            iteration finds one eigenvector of a repeated eigenvalue, and takes long to tell near
            ones apart: from k it finds k, for more products in all.
        complement: what stands for H outside of the kept eigenvectors: `"rayleigh"`, the inverse
            Rayleigh quotient of training gradients' remainders; `"trace"`, that of random vectors;
            `"damping"`, 1 / damping, as if H were zero there; None, nothing. See `complement.py`.
        num_probes: random sums of gradients, or random vectors, that the constant is estimated
            from: a product with H each.
        sketch_size: directions of the complement in an encoding at most: half as many as gradients
            that the memory budget holds, where that is less.
        refine: steps of conjugate gradients, preconditioned by the formula above, that `scores`,
            `self_influence` and `inverse_products` take for each gradient from there: `refine + 1`
            products with H for each block of them, for which the training set of `fit` is kept.
        negative_eigenvalues: what becomes of pairs with lambda < 0, at a weight vector that is no
            minimum: `"drop"` leaves them out, `"keep"` divides by them as they are, `"absolute"` by
            their magnitude. `summary()` reports their share.
        basis: where the iteration keeps its vectors, `num_iterations` times the parameters:
            `"host"`, in memory; `"device"`, where the model computes, so that no vector passes
            through the host: on each replica of the model's strategy its share of the columns; or
            a directory, for those that are larger. There the fit can be gone on with, as with
            `fit(..., directory=)`.
        basis_dtype: of these vectors where they lie: that of the parameters, or `"bfloat16"`, for
            twice as many in the same room. They are orthogonalised against what is stored, in
            float32; `residuals` and `summary()` say what the rounding costs.
        **kwargs: `damping`, `run`, `l2`, `num_examples`, `seed`: see `InverseMethod`; `loss`,
            `variables`, `measurement`, `batch_size`, `scale`, `verbose`...: see `InfluenceMethod`.

    Attributes:
        eigenbasis: after `fit`, an `Eigenbasis`: `values` [rank], `vectors` [rank, p], `residuals`.
        complement_estimate: after `fit`, a `Complement`, or None.

    Raises:
        ValueError: `rank` above `num_iterations`; `complement="damping"` without damping.
        FloatingPointError: in `fit`, a loss that is not finite; the message names the example.

    Example:

    >>> arnoldi = ki.Arnoldi(model, rank=100).fit(train)
    >>> suspects = np.argsort(-arnoldi.self_influence(train))[:25]
    """

    def __init__(
        self,
        model: keras.Model,
        rank: int = 100,
        num_iterations: int | None = None,
        *,
        tolerance: float | None = None,
        max_vectors: int | None = None,
        block_size: int = 1,
        complement: str | None = "rayleigh",
        num_probes: int = 8,
        sketch_size: int = 100,
        refine: int = 0,
        negative_eigenvalues: str = "drop",
        basis: str | os.PathLike = "host",
        basis_dtype: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            model,
            rank,
            complement=complement,
            num_probes=num_probes,
            sketch_size=sketch_size,
            refine=refine,
            negative_eigenvalues=negative_eigenvalues,
            **kwargs,
        )
        self._iteration = Iteration(rank, num_iterations, tolerance, max_vectors, block_size)
        self.num_iterations = self._iteration.num_iterations
        self.basis = checked_place(basis)
        self.basis_dtype = basis_dtype
        self._stored_dtype = checked_dtype(basis_dtype, self.maps)
        self.product_seconds: float | None = None
        self.asymmetry: float | None = None
        self.orthogonality: float | None = None

    def fit(
        self, dataset: Any, directory: str | os.PathLike | None = None, queries: Any = None
    ) -> Self:
        """Finds the eigenbasis of the training set's Hessian.

        Args:
            dataset: the training data; see `data.batches` for the forms it may take.
            directory: where to keep each finished step. A fit of the same model, weights, data and
                settings with the same directory goes on after the last one, to the bits of a fit
                that was never interrupted; when all are done the directory is what `save` writes,
                and such a fit reads it. On SIGTERM the step in hand is finished, and the process
                exits with code 143. Of several workers it is the first one's, which tells the
                others what they need; where the basis lies on the disk they keep it on theirs, in
                a hidden directory beside this one.
            queries: labelled examples whose influences will be asked for. The iteration then starts
                from `block_size` random combinations of their gradients, and by default makes
                `rank` products, all of whose space is kept: the best that there is for these
                queries, and less good for others.

        Returns:
            The method itself.

        Raises:
            ValueError: the directory holds another fit, or something else; queries whose gradients
                are all zero.
            storage.StoreInUseError: another process is fitting there.
        """
        if directory is not None:
            self._choose_sizes(dataset, pathlib.Path(directory))
        if directory is None:
            directory = self.basis if self._on_disk else None
        elif self.basis not in (*PLACES, os.fspath(directory)):
            raise ValueError(
                f"The basis lies in {self.basis!r}, where the fit's steps are kept too. Received "
                f"another directory: {os.fspath(directory)!r}."
            )
        if directory is None:
            self._choose_sizes(dataset)
            self._timed(dataset, lambda: self._fit(dataset, queries))
            return self
        path, workers = pathlib.Path(directory), Workers(self.model)
        with workers.writing(path), between_steps("the fit") as check:
            self._timed(dataset, lambda: self._fit_in(path, dataset, check, queries, workers))
        return self

    def _places(self, path: pathlib.Path | None) -> tuple[str, ...]:
        if self._on_disk:
            return (self.basis,)
        memory = ("device", "host") if self.basis == "device" else ("host",)
        return memory if path is None else (*memory, str(path))

    def _fit(self, dataset: Any, queries: Any = None) -> int:
        batches, num_train = self._frozen(dataset)
        steps = self._iteration.rows(self._size)
        basis = new_basis(self.basis, steps, self.maps, self.model, self._stored_dtype)
        self._find(batches, dataset, self._batches_of(queries), basis)
        return num_train

    def _fit_in(
        self, path: pathlib.Path, dataset: Any, check: Any, queries: Any, workers: Workers
    ) -> int:
        batches, num_train = self._frozen(dataset)
        asked = self._batches_of(queries)
        directory = SharedFit(path, self._identity(batches, num_train, asked), workers)
        if directory.finished:
            manifest, arrays = directory.load(self._large if self._on_disk else ())
            self._set_state(arrays)
            self.asymmetry = manifest["asymmetry"]
            self.orthogonality = manifest["orthogonality"]
            self._iteration.outcome = Outcome(*manifest["iteration"])
            directory.finish(manifest, arrays)
            if self.refine:
                self._operator = self._operator_over(batches)
            return num_train
        size, dtype = self._size, self.maps.parameters.dtype.as_numpy_dtype
        steps = self._iteration.rows(size)
        arguments = (steps, self.maps, self.model, self._stored_dtype)
        on_device = device_arguments(*arguments) if self.basis == "device" else ()
        memory = new_basis(self.basis, *arguments) if self.basis == "host" else None
        stored = directory.basis(steps, size, self._stored_dtype, self.direction_bytes, memory)
        basis: Basis | Space
        if stored is None:
            assert memory is not None
            basis = memory
        elif memory is not None:
            basis = DurableBasis(memory, stored)
        else:
            basis = DurableDeviceBasis(stored, *on_device) if on_device else stored

        def vectors(count: int) -> storage.StoredRows:
            assert stored is not None
            return storage.StoredRows.create(
                directory.place, "vectors", (count, size), dtype, stored.width
            )

        self._find(
            batches,
            dataset,
            asked,
            basis,
            directory.journal(check),
            vectors if self._on_disk else None,
        )
        self.num_train = num_train
        manifest, arrays = self._to_store()
        quality = {
            "asymmetry": self.asymmetry,
            "orthogonality": self.orthogonality,
            "iteration": self._iteration.outcome,
        }
        directory.finish({**manifest, **quality}, arrays)
        return num_train

    def _fit_work(self, job: Job) -> Iterator[Work]:
        yield from self._begin_work(job)
        place = self.basis if self._on_disk else None
        yield from iteration_work(
            job,
            self._iteration.most_products(job.size),
            self._iteration.rows(job.size),
            self._iteration.block_size,
            self.rank,
            self.num_examples,
            place,
            self.direction_bytes,
        )
        if self.complement is not None:
            yield from completion_work(self, job, self._directions_bytes(job))

    @property
    def _on_disk(self) -> bool:  # type: ignore[override]
        return self.basis not in PLACES

    @property
    def _size(self) -> int:
        return self.maps.parameters.size

    def _batches_of(self, queries: Any) -> list[data.Batch] | None:
        return None if queries is None else data.freeze(queries, self.batch_size)[0]

    def _identity(
        self,
        batches: Sequence[data.Batch],
        num_train: int,
        queries: Sequence[data.Batch] | None,
    ) -> dict[str, Any]:
        """All that the bits of the result depend on."""
        config = self.get_config()
        for name in (
            "verbose",
            "memory_budget",
            "direction_bytes",
            "basis",
            "scale",
            "leverage",
            "measurement",
            "refine",
        ):
            del config[name]
        if queries is not None:
            config["queries"] = batches_fingerprint(queries)
            config["measurement"] = self.get_config()["measurement"]
        return {
            **config,
            "kind": type(self).__name__,
            "place": "disk" if self._on_disk else self.basis,
            "architecture": checkpoints.architecture_fingerprint(self.model),
            "weights": self._fitted_weights,
            "data": examples_fingerprint(batches),
            "num_train": num_train,
        }

    def _find(
        self,
        frozen: list[data.Batch],
        dataset: Any,
        queries: list[data.Batch] | None,
        basis: Basis | Space,
        journal: Journal | None = None,
        vectors: Callable[[int], Basis] | None = None,
    ) -> None:
        """The eigenbasis and what completes it, over `frozen`, which is emptied."""
        operator = self._operator_over(frozen)
        try:
            self._settle_damping(operator)
            result = self._iterate(operator, self._start(queries), basis, journal)
            self.asymmetry = result.asymmetry
            self.orthogonality = orthogonality(result.basis)
            kept = vectors(min(self.rank, len(result.matrix))) if vectors else None
            self.eigenbasis = distill(result, self.rank, kept)
            self._iteration.check_converged(self.eigenbasis)
            del result, basis
            self.complement_estimate, self._sketch = None, None
            if self.complement is not None:
                again = self._frozen(dataset)[0]
                self._sketch = sketch_of(self, again)
                self.complement_estimate = complement_of(self, operator, again)
        except FloatingPointError:
            self._diagnose(self._frozen(dataset)[0])
            raise
        self.product_seconds = operator.seconds
        self._operator = operator if self.refine else None

    def _start(self, queries: list[data.Batch] | None) -> np.ndarray | None:
        if queries is None:
            return None
        count = self._iteration.block_size
        sums = query_start(self.query_maps, self.model, queries, count, self.seed)
        if not np.isfinite(sums).all():
            self._diagnose(queries)
            raise FloatingPointError("A gradient of a query is not finite.")
        return sums

    def _iterate(
        self,
        operator: FrozenCurvature,
        start: np.ndarray | None,
        basis: Basis | Space,
        journal: Journal | None,
    ) -> ArnoldiResult:
        return self._iteration.run(
            operator,
            self.maps.parameters.dtype,
            self._progress("Hessian-vector products", self._iteration.target(self._size)),
            seed=self.seed,
            start=start,
            basis=basis,
            journal=journal,
        )

    def _report(self) -> Iterator[str]:
        if self.eigenbasis is None:
            return
        values, _, residuals = self.eigenbasis
        head = " ".join(f"{value:.6g}" for value in values[:6])
        yield f"eigenvalues: {head}{' ...' if len(values) > 6 else ''} (smallest {values[-1]:.3g})"
        yield from self._iteration.report(self.eigenbasis)
        converged = int(np.sum(residuals <= 0.01 * np.abs(values)))
        yield (
            f"converged pairs (|Hu - lambda u| within 1% of lambda): {converged} of {len(values)}; "
            f"largest residual {residuals.max(initial=0):.3g}"
        )
        yield self._signs()
        if self.trace is not None:
            trace, error = self.trace
            yield (
                f"trace: {trace:.4g} +- {error:.2g}, of which {trace - values.sum():.3g} lie "
                "outside of the kept pairs"
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
        yield from certificate(self)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_iterations": self._iteration.given,
            "tolerance": self._iteration.tolerance,
            "max_vectors": self._iteration.max_vectors,
            "block_size": self._iteration.block_size,
            "basis": self.basis,
            "basis_dtype": self.basis_dtype,
        }
