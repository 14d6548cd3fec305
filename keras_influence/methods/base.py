"""The contract of a method that scores training examples against queries."""

import abc
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, NoReturn, Self, overload

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_influence import checkpoints, data, distribution, storage
from keras_influence.gradients import Contraction, LossMaps
from keras_influence.gradients.measurements import (
    Measurement,
    check_measurement,
    measurement_loss,
)
from keras_influence.gradients.parameters import Variables
from keras_influence.methods.coverage_report import coverage_lines
from keras_influence.methods.planned import Planned
from keras_influence.methods.progress import Progress
from keras_influence.methods.scoring import Steps, resumable
from keras_influence.steps import check_steps
from keras_influence.workers import Workers

SCALES = ("loss", "raw")


class InfluenceMethod(Planned, abc.ABC):
    """A method that attributes a model's losses to its training examples.

    Every score is the change of a query's loss that removing the training example would bring: a
    positive score marks a *proponent* (removing it raises the loss), a negative one an *opponent*.

    Args:
        model: a built Keras model, at the weights that are to be explained.
        loss: as in `model.compile`; defaults to the loss that the model was compiled with.
        variables: what to attribute through: layers, such as the last decoder layers of a
            translator, Keras variables, or a predicate on these; all trainable variables by
            default. `summary()` says which share of the parameters they are.
        sequence_reduction: `"mean"` or `"sum"` of a sequence's token losses.
        batch_size: examples computed together; defaults to the dataset's own batch size. It changes
            speed and memory, and no score beyond rounding. Products with a curvature join batches
            whose tensors take few MB.
        steps_per_execution: batches that one execution goes through on the device, as in
            `model.compile`: more of them where a batch takes the device less time than the host.
        memory_budget: bytes that a job may take at its peak, on the host and on an accelerator
            each, beyond what is held when it begins. `fit` and `plan` then lower `batch_size` and
            `direction_bytes`, and choose a basis's place, so that the job fits, for which they
            compute some batches; or they raise, and say what the least would be.
        direction_bytes: bytes that directions in parameter space (eigenvectors, random directions,
            gradients of queries) may take at once; what does not fit is done in several passes.
        measurement: what of a query is explained: `"loss"`, or a classifier's `"margin"`
            (log-odds of its label), `"logit"` or `"probability"`, or a function (labels, outputs)
            -> [batch]. Scores are then changes of that number when the training example is
            removed, and where more of it is better a helpful example has a negative score.
            Self-influence is always of the loss.
        contraction: how per-example gradients are multiplied, and in which precision; see
            `gradients.Contraction`.
        scale: `"loss"` divides by the number of training examples N, so that scores are changes of
            the loss; `"raw"` does not.
        verbose: 1 shows a progress bar, 0 none; `"auto"` shows one on a terminal.
    """

    _registry: ClassVar[dict[str, type["InfluenceMethod"]]] = {}
    # Whether what `fit` computed holds for the weights of that moment only.
    _bound_to_weights: ClassVar[bool] = False
    # Arrays of `_state` that may be larger than memory.
    _large: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        InfluenceMethod._registry[cls.__name__] = cls

    def __init__(
        self,
        model: keras.Model,
        *,
        loss: Any = None,
        variables: Variables = None,
        sequence_reduction: str = "mean",
        batch_size: int | None = None,
        steps_per_execution: int = 1,
        memory_budget: float | None = None,
        direction_bytes: float = 512 * 2**20,
        measurement: Measurement = "loss",
        contraction: Contraction | None = None,
        scale: str = "loss",
        verbose: int | str = "auto",
    ):
        if scale not in SCALES:
            raise ValueError(f"`scale` must be one of {SCALES}. Received: {scale!r}.")
        self.model = model
        self.maps = LossMaps(model, loss, variables, sequence_reduction, contraction)
        check_measurement(measurement)
        self.measurement = measurement
        # Of queries, with the measurement in the place of the loss.
        self.query_maps = self.maps
        if measurement != "loss":
            measured = measurement_loss(measurement, self.maps.loss)
            self.query_maps = LossMaps(model, measured, variables, sequence_reduction, contraction)
        for name, value in (("memory_budget", memory_budget), ("direction_bytes", direction_bytes)):
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be above zero. Received: {value}.")
        check_steps(steps_per_execution)
        self.batch_size: int | None = batch_size
        self.steps_per_execution: int = steps_per_execution
        self.memory_budget: float | None = memory_budget
        self.direction_bytes: float = direction_bytes
        self.scale = scale
        self.verbose = verbose
        self.num_train: int | None = None
        self.fit_seconds: float | None = None
        self._loss = loss
        self._fitted_weights: str | None = None
        for variable in self.maps.parameters.variables:
            if getattr(variable, "regularizer", None) is not None:
                logging.info(
                    "%r has a regularizer, which is part of no example's loss. Where a method "
                    "takes `l2=`, pass twice the regularizer's l2 coefficient.",
                    variable.path,
                )
                break

    # What a method is.

    def fit(self, dataset: Any) -> Self:
        """Learns from the training set what later scores need.

        Args:
            dataset: the training data; see `data.batches` for the forms it may take.

        Returns:
            The method itself.
        """
        self._choose_sizes(dataset)
        self._timed(dataset, lambda: self._fit(dataset))
        return self

    def _timed(self, dataset: Any, fit: Callable[[], int]) -> None:
        start = time.perf_counter()
        # Before the long work: what will be slow is said now.
        self._survey(dataset)
        # Of the weights that are fitted, should another thread change them meanwhile.
        self._fitted_weights = checkpoints.weights_fingerprint(self.model)
        self.num_train = fit()
        self.fit_seconds = time.perf_counter() - start

    def _survey(self, dataset: Any) -> None:
        """Refuses what has no per-example loss, and finds out which rules serve the layers."""
        examples = next(data.batches(dataset, self.batch_size)).examples
        self.maps.check_separate(examples)
        self.maps.coverage(examples)

    @abc.abstractmethod
    def _fit(self, dataset: Any) -> int:
        """Returns the number of training examples."""

    @overload
    def scores(
        self,
        queries: Any,
        train: Any,
        directory: str | os.PathLike | None = None,
        *,
        return_uncertainty: Literal[False] = False,
    ) -> np.ndarray: ...

    @overload
    def scores(
        self, queries: Any, train: Any, *, return_uncertainty: Literal[True]
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def scores(
        self,
        queries: Any,
        train: Any,
        directory: str | os.PathLike | None = None,
        *,
        return_uncertainty: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Influence of every training example on every query.

        Args:
            queries: Q labelled examples.
            train: N training examples.
            directory: where to keep each finished step: some batches, or some queries' solutions.
                The same call goes on after the last one, to the bits of one that was never
                interrupted; when all are done it reads the scores. On SIGTERM the step in hand is
                finished, and the process exits with code 143.
            return_uncertainty: also return how far each score may be off, where the method can say:
                `LiSSA`, the standard error over its repeats; `Arnoldi`, that of the complement's
                constant; `ConjugateGradient`, a bound by its residual, for a curvature without
                negative eigenvalues.

        Returns:
            float32 [Q, N]; positive for proponents. With `return_uncertainty`, a second array of
            this shape.

        Raises:
            ValueError: the directory holds something else, or scores of something else; a method
                that has no uncertainty to return.
            storage.StoreInUseError: another process is computing there.
        """
        if return_uncertainty:
            if directory is not None:
                raise ValueError("Uncertainties are not kept in a directory: leave it out.")
            self._check_ready()
            return self._scores_with_error(queries, train)
        datasets = {"queries": queries, "train": train}
        return self._scored("scores", datasets, directory, self._scores)

    def self_influence(
        self, dataset: Any, directory: str | os.PathLike | None = None
    ) -> np.ndarray:
        """Influence of each example on its own loss: high for mislabeled, rare, memorised ones.

        Args:
            dataset: N labelled examples.
            directory: as for `scores`.

        Returns:
            float32 [N].
        """
        return self._scored("self_influence", {"dataset": dataset}, directory, self._self_influence)

    def _scores_with_error(self, queries: Any, train: Any) -> tuple[np.ndarray, np.ndarray]:
        """Scores, and how far each may be off."""
        raise ValueError(
            f"{type(self).__name__} cannot say how far its scores are off. LiSSA with repeats, "
            "Arnoldi with a complement and ConjugateGradient can."
        )

    @abc.abstractmethod
    def _scores(self, queries: Any, train: Any, steps: Steps) -> np.ndarray: ...

    @abc.abstractmethod
    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray: ...

    def _scored(
        self,
        what: str,
        datasets: dict[str, Any],
        directory: str | os.PathLike | None,
        compute: Callable[..., np.ndarray],
    ) -> np.ndarray:
        self._check_ready()
        given = tuple(datasets.values())
        if directory is None:
            return compute(*given, Steps())
        return resumable(
            what,
            self._scores_depend_on(),
            datasets,
            self.batch_size,
            directory,
            Workers(self.model),
            lambda steps: compute(*given, steps),
        )

    def _scores_depend_on(self) -> dict[str, Any]:
        """All that the bits of scores depend on, beside the data, as JSON values."""
        small = [array for name, array in self._state().items() if name not in self._large]
        config = {k: v for k, v in self.get_config().items() if k not in ("verbose", "basis")}
        return {
            **config,
            "kind": type(self).__name__,
            "num_train": self.num_train,
            "state": storage.arrays_fingerprint(small),
            "architecture": checkpoints.architecture_fingerprint(self.model),
            "weights": checkpoints.weights_fingerprint(self.model),
        }

    def _state(self) -> dict[str, np.ndarray]:
        """Arrays that `fit` computed, for `save`."""
        return {}

    def _set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes back what `_state` gave."""

    def _report(self) -> Iterator[str]:
        """Lines of `summary` about the method itself."""
        yield from ()

    # What every method does.

    def summary(self, print_fn: Callable[[str], None] | None = None) -> None:
        """Prints what the method computed, and how far to trust it."""
        emit = print_fn or (lambda line: print(line, file=sys.stdout))
        parameters = self.maps.parameters
        total = sum(int(np.prod(v.shape)) for v in self.model.trainable_variables)
        emit(f"{type(self).__name__} of model {self.model.name!r}")
        emit(
            f"  parameters: {parameters.size:,} of {total:,} trainable "
            f"({parameters.size / max(total, 1):.1%}), in "
            f"{len(parameters.variables)} variables"
        )
        if self.num_train is None:
            emit("  not fitted")
        else:
            took = "" if self.fit_seconds is None else f", in {self.fit_seconds:.1f} s"
            emit(f"  fitted on {self.num_train:,} training examples{took}")
        for line in self._report():
            emit(f"  {line}")
        for line in coverage_lines(self.maps.known_coverage):
            emit(f"  {line}")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, but for the model, as JSON values."""
        mine = {id(v) for v in self.maps.parameters.variables}
        config = {
            "loss": _serialized_loss(self._loss),
            "variables": [i for i, v in enumerate(self.model.variables) if id(v) in mine],
            "sequence_reduction": self.maps.loss.sequence_reduction,
            "batch_size": self.batch_size,
            "steps_per_execution": self.steps_per_execution,
            "memory_budget": self.memory_budget,
            "direction_bytes": self.direction_bytes,
            "measurement": _serialized_loss(self.measurement),
            "contraction": self.maps.contraction.get_config(),
            "scale": self.scale,
            "verbose": self.verbose,
        }
        if {id(v) for v in self.model.trainable_variables} == mine:
            config["variables"] = None
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], model: keras.Model) -> Self:
        """The method that `get_config` described, unfitted, on `model`."""
        config = dict(config)
        if config.get("variables") is not None:
            config["variables"] = [model.variables[i] for i in config["variables"]]
        if isinstance(config.get("contraction"), dict):
            config["contraction"] = Contraction.from_config(config["contraction"])
        for name in ("loss", "measurement"):
            if isinstance(config.get(name), dict):
                config[name] = keras.losses.deserialize(config[name])
        return cls(model, **config)

    def save(self, path: str) -> None:
        """Writes the method into the new directory `path`; `load` brings it back.

        Raises:
            FileExistsError: when `path` exists.
        """
        storage.save_store(path, *self._to_store())

    def _to_store(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        manifest = {
            "kind": type(self).__name__,
            "config": self.get_config(),
            "num_train": self.num_train,
            "fit_seconds": self.fit_seconds,
            "architecture": checkpoints.architecture_fingerprint(self.model),
            "weights": self._fitted_weights,
        }
        return manifest, self._state()

    # What methods are made of.

    def _check_ready(self) -> None:
        """Raises where `scores` cannot run yet, before any long work."""

    def _check_fitted(self) -> None:
        if self.num_train is None:
            self._raise_not_fitted()
        self._check_weights()

    def _raise_not_fitted(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} is not fitted: call `fit(train)` with the training set."
        )

    def _check_weights(self) -> None:
        if not self._bound_to_weights:
            return
        if self._fitted_weights != checkpoints.weights_fingerprint(self.model):
            raise ValueError(
                f"The weights of {self.model.name!r} are not those that {type(self).__name__} was "
                "fitted on: the model was trained or loaded since. Fit again, or put the weights "
                "back."
            )

    def _rows_in_budget(self, row_bytes: float) -> int:
        return int(max(self.direction_bytes // row_bytes, 1))

    def _per_train(self) -> float:
        """1/N, or 1 where scores are raw."""
        if self.scale == "raw":
            return 1.0
        if self.num_train is None:
            raise ValueError(
                f"{type(self).__name__} is not fitted: scores in units of the loss are divided by "
                'the number of training examples. Call `fit(train)`, or pass `scale="raw"`.'
            )
        return 1.0 / self.num_train

    def _gather(
        self,
        function: Callable[..., tf.Tensor],
        dataset: Any,
        what: str,
        operands: Callable[[Any], Any] | None = None,
        steps: Steps | None = None,
    ) -> np.ndarray:
        """[N, ...] of `function(examples[, operands])` over an ordered dataset; all finite.

        Args: as of `distribution.gather`; and the steps to do it in.
        """
        data.check_order(dataset)
        progress = self._progress(what)
        steps = steps or Steps()

        def part(batches: Callable[[], Iterable[data.Batch]]) -> np.ndarray:
            return self._rows(function, batches(), what, operands, progress)

        rows = [
            steps.keep(name, functools.partial(part, batches))
            for name, batches in steps.parts(dataset, self.batch_size)
        ]
        progress.close()
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _rows(
        self,
        function: Callable[..., tf.Tensor],
        batches: Iterable[data.Batch],
        what: str,
        operands: Callable[[Any], Any] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """The same, of batches."""

        def check(batch: data.Batch, rows: np.ndarray) -> None:
            self._check_finite(rows, batch, what)
            if progress is not None:
                progress.add(1)

        return distribution.gather(
            function, batches, self.model, operands, check, self.steps_per_execution
        )

    def _check_finite(self, rows: Any, batch: data.Batch, what: str) -> None:
        rows = np.asarray(rows)[: batch.num_examples].reshape(batch.num_examples, -1)
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            self._raise_bad_example(batch, int(bad[0]), what)

    def _raise_bad_example(self, batch: data.Batch, row: int, what: str) -> None:
        losses = distribution.here(self.maps.losses, self.model, batch.examples)
        loss = float(np.asarray(losses)[row])
        label = tf.nest.map_structure(lambda array: array[row], batch.examples[1])
        raise FloatingPointError(
            f"The {what} of example {batch.ids[row]} is not finite: its loss is {loss}, its label "
            f"{_short(label)}. Check that the label is in the range that the loss expects, and "
            "that inputs and weights hold no NaN."
        )

    def _diagnose(self, batches: list[data.Batch]) -> None:
        """Raises for the first example whose loss is not finite, if there is one."""
        for batch in batches:
            self._rows(self.maps.losses, [batch], "loss")

    def _progress(self, what: str, target: int | None = None) -> Progress:
        show = sys.stdout.isatty() if self.verbose == "auto" else bool(self.verbose)
        return Progress(f"{type(self).__name__}: {what}", target, show)


def _short(value: Any) -> str:
    text = np.array2string(np.asarray(value), threshold=8) if not isinstance(value, dict) else None
    return text if text is not None else str({k: _short(v) for k, v in value.items()})


def _serialized_loss(loss: Any) -> Any:
    if loss is None or isinstance(loss, str):
        return loss
    return keras.losses.serialize(loss)
