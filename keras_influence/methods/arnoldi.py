"""Influence on the dominant eigenvectors of the loss's Hessian."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_influence import checkpoints, data, storage
from keras_influence.gradients import Projector
from keras_influence.linalg import (
    ArnoldiResult,
    Basis,
    Eigenbasis,
    Journal,
    Space,
    conjugate_gradient,
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
from keras_influence.methods.complement import COMPLEMENTS, Complement
from keras_influence.methods.completion import (
    certificate,
    complement_of,
    completion_work,
    sample_size,
    sketch_of,
)
from keras_influence.methods.curvature import FrozenCurvature, batches_fingerprint
from keras_influence.methods.encoding import EncodingMethod
from keras_influence.methods.inverse import InverseMethod
from keras_influence.methods.iteration import Iteration, Outcome, query_start
from keras_influence.methods.iteration_plan import iteration_work
from keras_influence.methods.negative import check_negative, inverses
from keras_influence.methods.outside import combined, inside, remainders
from keras_influence.methods.preemption import between_steps
from keras_influence.methods.resumption import (
    DurableBasis,
    DurableDeviceBasis,
    examples_fingerprint,
)
from keras_influence.methods.scoring import Steps
from keras_influence.methods.shared_fit import SharedFit
from keras_influence.methods.work import Job, Load, Work
from keras_influence.workers import Workers


class Arnoldi(InverseMethod, EncodingMethod):
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

    _large = ("vectors",)

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
        super().__init__(model, **kwargs)
        self._iteration = Iteration(rank, num_iterations, tolerance, max_vectors, block_size)
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
        self.num_iterations = self._iteration.num_iterations
        self.complement = complement
        self.num_probes = num_probes
        self.sketch_size = sketch_size
        self.refine = refine
        self.negative_eigenvalues = negative_eigenvalues
        self.basis = checked_place(basis)
        self.basis_dtype = basis_dtype
        self._stored_dtype = checked_dtype(basis_dtype, self.maps)
        self.eigenbasis: Eigenbasis | None = None
        self.complement_estimate: Complement | None = None
        self.product_seconds: float | None = None
        self.asymmetry: float | None = None
        self.orthogonality: float | None = None
        self._sketch: np.ndarray | None = None

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

    def _scores_work(self, job: Job) -> Iterator[Work]:
        if self.complement is None and not self.refine:
            return EncodingMethod._scores_work(self, job)
        return InverseMethod._scores_work(self, job)

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        if self.refine:
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
            frozen = job.frozen(self.num_examples)
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
    def _on_disk(self) -> bool:
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
            lambda rows: operator.products(rows) + self._damping * rows,
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
        if self.complement is None and not self.refine:
            return EncodingMethod._scores(self, queries, train, steps)
        return InverseMethod._scores(self, queries, train, steps)

    def _scores_with_error(self, queries: Any, train: Any) -> tuple[np.ndarray, np.ndarray]:
        """The constant's standard error times |<r(z), r(x)>|."""
        found = self.complement_estimate
        if found is None or self.refine:
            raise ValueError(
                "The uncertainty of Arnoldi is that of the complement's constant, which it has "
                f"with a complement and without refining. Received: complement={self.complement!r},"
                f" refine={self.refine}."
            )
        errors = []
        for batch in self._query_batches(queries):
            rest, _ = remainders(
                self._fitted_basis().vectors, self._gradients(batch, self.query_maps)
            )
            projector = Projector(self.maps, functools.partial(tf.identity, rest))
            rows = self._gather(self.maps.project, train, "projection", projector.directions)
            errors.append(np.abs(rows.T) * found.error * self._per_train())
        return self._scores(queries, train, Steps()), np.concatenate(errors).astype(np.float32)

    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        if self.refine:
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
        yield (
            f"negative eigenvalues: {int((values < 0).sum())}, {self.negative_mass:.1%} of the "
            f"magnitude ({self.negative_eigenvalues}); {self._system()}"
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
            "rank": self.rank,
            "num_iterations": self._iteration.given,
            "tolerance": self._iteration.tolerance,
            "max_vectors": self._iteration.max_vectors,
            "block_size": self._iteration.block_size,
            "complement": self.complement,
            "num_probes": self.num_probes,
            "sketch_size": self.sketch_size,
            "refine": self.refine,
            "negative_eigenvalues": self.negative_eigenvalues,
            "basis": self.basis,
            "basis_dtype": self.basis_dtype,
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
