"""Inverses of the Fisher matrix in blocks: what diagonal and Kronecker-factored ones share."""

import abc
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from keras_influence import checkpoints, data, distribution
from keras_influence.gradients.fisher_blocks import (
    DIAGONAL,
    ROWS,
    Basis,
    Block,
    Spectrum,
    find_blocks,
    read,
    written,
)
from keras_influence.gradients.kronecker import inverse_products, quadratic_forms
from keras_influence.gradients.labels import LABELS
from keras_influence.methods.inverse import InverseMethod
from keras_influence.methods.means import Sums, with_ids
from keras_influence.methods.preemption import between_steps
from keras_influence.methods.resumption import examples_fingerprint
from keras_influence.methods.scoring import Steps
from keras_influence.methods.shared_fit import SharedFit
from keras_influence.methods.work import Job, Load, Work
from keras_influence.workers import Workers

# Of a block's mean eigenvalue (Grosse et al., 2023, section 5).
_DAMPING_SHARE = 0.1


class FisherMethod(InverseMethod):
    """Influence functions with the Fisher matrix in place of the curvature, in blocks.

    Args:
        model: a built Keras model, trained.
        labels: whose gradients' mean square it is. `"sampled"`: labels drawn from the model, the
            true Fisher matrix, which is the Gauss-Newton one for cross-entropies and squared
            errors. `"expected"`: the same without the noise of the draw, at the price of one
            backward pass a class. `"empirical"`: the data's own, which vanish where the model fits.
        num_samples: labels to draw for each example.
        damping: a number is added to all eigenvalues, in units of the loss per squared parameter.
            `"auto"`: where `run` is given, 1 / (sum of the run's learning rates); else a tenth of
            the mean eigenvalue of each block by itself.
        **kwargs: see `InverseMethod`; there is no `curvature`.

    Attributes:
        blocks: after `fit`, the blocks, a `Block` each: kind, layer and sizes.
        dampings: after `fit`, of each block, float64.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        labels: str = "sampled",
        num_samples: int = 1,
        damping: float | str = "auto",
        **kwargs: Any,
    ):
        super().__init__(model, damping=damping, **kwargs)
        if labels not in LABELS:
            raise ValueError(f"`labels` must be one of {LABELS}. Received: {labels!r}.")
        if num_samples < 1 or (num_samples > 1 and labels != "sampled"):
            raise ValueError(
                "`num_samples` must be at least 1, and above it only where labels are sampled. "
                f"Received: num_samples={num_samples}, labels={labels!r}."
            )
        self.labels = labels
        self.num_samples = num_samples
        self.blocks: list[Block] = []
        self.dampings: np.ndarray | None = None
        self._bases: list[Basis] = []
        self._spectra: list[Spectrum] = []
        # Of each group: directions that what the left basis leaves out counts as.
        self._spreads: list[np.ndarray] = []
        self._inverses: list[Spectrum] | None = None
        self._forms = self.maps.compiled(self._form_map)

    @abc.abstractmethod
    def _passes(self, sums: Sums) -> tuple[list[Basis], list[Spectrum]]:
        """The blocks' bases, and their eigenvalues there: means over examples."""

    @property
    def _max_columns(self) -> int:
        """Of a block that is no diagonal."""
        return 0

    def fit(self, dataset: Any, directory: str | os.PathLike | None = None) -> Self:
        """Takes the means over the training set.

        Args:
            dataset: the training data; see `data.batches` for the forms it may take.
            directory: where to keep the sums so far. A fit of the same model, weights, data and
                settings with the same directory goes on with them, to the bits of a fit that was
                never interrupted; when it is done the directory is what `save` writes. On SIGTERM
                the batches in hand are finished, and the process exits with code 143.

        Raises:
            ValueError: the directory holds another fit, or something else.
            storage.StoreInUseError: another process is fitting there.
        """
        if directory is None:
            return super().fit(dataset)
        path, workers = pathlib.Path(directory), Workers(self.model)
        self._choose_sizes(dataset, path)
        with workers.writing(path), between_steps("the fit") as check:
            self._timed(dataset, lambda: self._fit_in(path, dataset, check, workers))
        return self

    def _fit(self, dataset: Any) -> int:
        return self._fit_with(dataset, None)

    def _fit_in(
        self, path: pathlib.Path, dataset: Any, check: Callable[[], None], workers: Workers
    ) -> int:
        frozen, num_train = self._frozen(dataset)
        directory = SharedFit(path, self._identity(frozen, num_train), workers)
        if directory.finished:
            manifest, arrays = directory.load(())
            self._set_state(arrays)
            directory.finish(manifest, arrays)
            return num_train
        directory.begin()
        self.num_train = self._fit_with(dataset, Sums.durable(directory.sums, check, workers))
        manifest, arrays = self._to_store()
        directory.finish(manifest, arrays)
        return num_train

    def _fit_with(self, dataset: Any, durable: Any) -> int:
        frozen, num_train = self._frozen(dataset)
        draws = self._find_blocks(frozen[0].examples)
        progress = self._progress("batches")
        sums = Sums(
            self.model,
            frozen,
            draws,
            self.labels == "expected",
            durable,
            progress.add,
            self.steps_per_execution,
        )
        try:
            self._bases, self._spectra = self._passes(sums)
        except FloatingPointError:
            self._diagnose(frozen)
            raise
        progress.close()
        self._settle()
        return num_train

    def _find_blocks(self, examples: Any) -> int:
        """Finds the blocks; the number of draws of labels."""
        self.blocks = find_blocks(self.maps.coverage(examples), self._max_columns)
        if self.labels == "expected":
            return self.maps.label_terms(examples).size
        return self.num_samples

    def _identity(self, batches: Sequence[data.Batch], num_train: int) -> dict[str, Any]:
        """All that the bits of the result depend on."""
        config = self.get_config()
        for name in (
            "verbose",
            "memory_budget",
            "direction_bytes",
            "scale",
            "damping",
            "run",
            "l2",
            "leverage",
            "measurement",
        ):
            del config[name]
        return {
            **config,
            "kind": type(self).__name__,
            "architecture": checkpoints.architecture_fingerprint(self.model),
            "weights": self._fitted_weights,
            "data": examples_fingerprint(batches),
            "num_train": num_train,
        }

    def _linearize(self, packed: Any, draw: tf.Tensor, weights: tf.Tensor) -> Any:
        """For use in a graph: gradients by the labels of a draw; see `Sums` for the arguments."""
        examples, ids = packed
        self._check_blocks(examples)
        return self.maps.linearize_labels(examples, ids, weights, draw, self.labels, self.seed)

    def _check_blocks(self, examples: Any) -> None:
        found = find_blocks(self.maps.coverage(examples), self._max_columns)
        if found != self.blocks:
            raise ValueError(
                "Rules serve the layers otherwise for these examples, of shapes "
                f"{[leaf.shape for leaf in tf.nest.flatten(examples)]}, than for those that "
                f"{type(self).__name__} was fitted on. Bring all to one shape."
            )

    def _settle(self) -> None:
        """Damping, and the inverses that follow from it."""
        means = np.array([self._mean(number) for number in range(len(self.blocks))])
        sizes = [np.prod(block.sizes) for block in self.blocks]
        if not isinstance(self.damping, str):
            self.dampings = np.full(len(means), float(self.damping))
        elif self.run is not None:
            rate = checkpoints.effective_rate_sum(self.run, self.model)
            self.dampings = np.full(len(means), 1.0 / rate)
        else:
            # Some parameters have no gradient but rounding, such as the biases of attention's keys.
            # Divided by itself it would count as much as any other.
            epsilon = np.finfo(self.maps.parameters.dtype.as_numpy_dtype).eps
            floor = epsilon * np.average(means, weights=sizes)
            self.dampings = _DAMPING_SHARE * np.maximum(means, floor)
        self.used_damping = float(np.average(self.dampings, weights=sizes))
        self._invert()

    def _mean(self, number: int) -> float:
        """Mean eigenvalue of a block."""
        spectrum = self._spectra[number]
        rest = self._spreads[number] @ np.sum(spectrum.rest, axis=1, dtype=np.float64)
        total = float(np.sum(spectrum.values, dtype=np.float64)) + float(rest)
        return total / float(np.prod(self.blocks[number].sizes))

    def _invert(self) -> None:
        assert self.dampings is not None

        def inverse(values: Any, damping: float) -> tf.Tensor:
            damped = np.asarray(values, np.float64) + (damping + self.l2)
            # A direction without curvature or damping, such as a dead unit's, counts for nothing.
            inverted = np.divide(1.0, damped, out=np.zeros_like(damped), where=damped > 0)
            return tf.cast(inverted, self.maps.parameters.dtype)

        self._inverses = [
            Spectrum(*(inverse(values, damping) for values in spectrum))
            for spectrum, damping in zip(self._spectra, self.dampings, strict=True)
        ]

    @property
    def _operands(self) -> tuple[list[Basis], list[Spectrum]]:
        if self._inverses is None:
            self._raise_not_fitted()
        return self._bases, self._inverses

    def _inverse_products(self, vectors: tf.Tensor) -> tf.Tensor:
        return self._products(vectors, self._operands)

    def _products(self, vectors: tf.Tensor, operands: Any) -> tf.Tensor:
        parameters = self.maps.parameters
        parts = [
            tf.reshape(part, [-1, *shape])
            for part, shape in zip(
                tf.split(vectors, parameters.sizes, axis=1), parameters.shapes, strict=True
            )
        ]
        found = inverse_products(parts, self.blocks, *operands)
        flat = [tf.reshape(p, [-1, n]) for p, n in zip(found, parameters.sizes, strict=True)]
        return tf.concat(flat, axis=1)

    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        if self.leverage:
            return super()._self_influence(dataset, steps)
        factor = self._per_train()
        operands = self._operands
        forms = self._gather(self._forms, dataset, "self-influence", lambda _: operands, steps)
        return (forms * factor).astype(np.float32)

    def _form_map(self, examples: Any, operands: Any) -> tf.Tensor:
        self._check_blocks(examples)
        return quadratic_forms(self.maps.linearize(examples), self.blocks, *operands)

    # For plans.

    def _fit_work(self, job: Job) -> Iterator[Work]:
        frozen = job.frozen(self.num_examples)
        draws = self._find_blocks(frozen.sample[0].examples)
        yield job.freezing(self.num_examples)
        basis = self._place_holders(job)[0]
        for name, function, operands in self._sums_in_graphs(basis):
            # What a batch gives, what there is so far, and both together.
            held = 3 * job.dtype.itemsize * self._numbers()
            unit = job.once(name, functools.partial(self._sum_once, frozen, function, operands))
            count = draws * frozen.num_batches
            yield Work(name, unit, count, host=held, device=frozen.bytes)

    def _sum_once(self, frozen: Load, function: Any, operands: Sequence[Any]) -> Any:
        (placed,) = distribution.place(map(with_ids, frozen.sample[:1]), self.model)
        return distribution.total(function, [placed], self.model, *operands, tf.constant(0))

    @abc.abstractmethod
    def _sums_in_graphs(self, bases: list[Basis]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        """The functions that are summed over the examples: name, function, operands."""

    def _numbers(self) -> int:
        """That the sums of all blocks hold."""
        return self.maps.parameters.size

    def _place_holders(self, job: Job) -> tuple[list[Basis], list[Spectrum]]:
        """Bases and inverses of the sizes that the fit will find."""
        widths = [self._width(block) for block in self.blocks]
        shapes = [block.sizes for block in self.blocks]
        bases = [Basis(*(np.zeros([0, 0, 0], job.dtype) for _ in range(2)))] * len(shapes)
        spectra = []
        for number, ((groups, rows, columns), width) in enumerate(zip(shapes, widths, strict=True)):
            kind = self.blocks[number].kind
            if kind != DIAGONAL:
                left = 0 if kind == ROWS else groups
                bases[number] = Basis(
                    np.zeros([left, rows, width], job.dtype),
                    np.zeros([groups, columns, columns], job.dtype),
                )
            values = np.zeros([groups, width, columns], job.dtype)
            spectra.append(Spectrum(values, np.zeros([groups, columns], job.dtype)))
        return bases, spectra

    def _width(self, block: Block) -> int:
        """Directions of the left basis."""
        return block.sizes[1]

    def _solve_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        vectors, operands = job.vectors(blocks.batch_size), self._place_holders(job)
        unit = job.once("inverse products", lambda: self._products(vectors, operands).numpy())
        held = 3 * blocks.batch_size * job.vector_bytes
        yield Work("products with the inverse", unit, blocks.num_batches, host=held)

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        if self.leverage:
            yield from super()._self_influence_work(job, load)
            return
        self._find_blocks(load.sample[0].examples)
        operands = self._place_holders(job)
        yield job.reading(load)

        def forms() -> np.ndarray:
            return self._rows(self._forms, load.sample[:1], "self-influence", lambda _: operands)

        yield Work(
            "quadratic forms",
            job.once("quadratic forms", forms),
            load.num_batches,
            host=8.0 * load.num_examples,
        )

    def _report(self) -> Iterator[str]:
        if self.dampings is None:
            return
        size = self.maps.parameters.size
        kinds: dict[str, int] = {}
        for block in self.blocks:
            kinds[block.kind] = kinds.get(block.kind, 0) + int(np.prod(block.sizes))
        shares = ", ".join(f"{count / size:.1%} {kind}" for kind, count in kinds.items())
        drawn = f", {self.num_samples} an example" if self.labels == "sampled" else ""
        yield f"parameters in blocks: {shares}; {self.labels} labels{drawn}; l2 {self.l2:g}"
        width = max(len(block.layer) for block in self.blocks)
        for number, block in enumerate(self.blocks):
            spectrum = self._spectra[number]
            values = np.asarray(spectrum.values)
            sizes = " x ".join(str(each) for each in block.sizes if each != 1)
            line = (
                f"  {block.layer or '-':{width}}  {block.kind} {sizes}: eigenvalues "
                f"{values.min():.3g} to {values.max():.3g}, mean {self._mean(number):.3g}, damping "
                f"{self.dampings[number]:.3g}"
            )
            left_out = block.sizes[1] - values.shape[1]
            if left_out:
                line += f"; {left_out} of {block.sizes[1]} input directions alike"
            yield line
        yield self._verdict(kinds.get(DIAGONAL, 0) / size)

    def _verdict(self, diagonal: float) -> str:
        del diagonal
        return "verdict: no parameter is seen together with another one"

    def get_config(self) -> dict[str, Any]:
        own = {"labels": self.labels, "num_samples": self.num_samples}
        config = {**super().get_config(), **own}
        del config["curvature"]
        return config

    def _state(self) -> dict[str, np.ndarray]:
        if self.dampings is None:
            return {}
        arrays = {
            **super()._state(),
            "blocks": np.frombuffer(written(self.blocks), np.uint8),
            "dampings": self.dampings,
        }
        for number, (basis, spectrum) in enumerate(zip(self._bases, self._spectra, strict=True)):
            for name, array in {**basis._asdict(), **spectrum._asdict()}.items():
                if np.size(array):
                    arrays[f"{name}_{number}"] = np.asarray(array)
            arrays[f"spread_{number}"] = self._spreads[number]
        return arrays

    def _set_state(self, arrays: dict[str, np.ndarray]) -> None:
        super()._set_state(arrays)
        if not arrays:
            return
        self.blocks = read(np.asarray(arrays["blocks"]).tobytes())
        self.dampings = arrays["dampings"]
        empty = np.zeros([0, 0, 0], self.maps.parameters.dtype.as_numpy_dtype)

        def of_block(kind: Any, number: int) -> Any:
            names = (f"{name}_{number}" for name in kind._fields)
            return kind(*(tf.convert_to_tensor(arrays.get(name, empty)) for name in names))

        numbers: Iterable[int] = range(len(self.blocks))
        self._spreads = [np.asarray(arrays[f"spread_{number}"]) for number in numbers]
        self._bases = [of_block(Basis, number) for number in numbers]
        self._spectra = [of_block(Spectrum, number) for number in numbers]
        self._invert()
