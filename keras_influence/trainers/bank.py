"""Retraining on subsets of the training set: what attributions are held against."""

import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from numpy.typing import ArrayLike

from keras_influence import data, storage
from keras_influence.trainers import workers
from keras_influence.trainers.bank_directory import Run, StoredBank
from keras_influence.trainers.recipe import (
    MakeModel,
    Measurement,
    Measurements,
    Recipe,
    TrainFunction,
    derived_seed,
    described_function,
    described_model,
    make,
)
from keras_influence.trainers.stacked import Stack, obstacle

SEEDS = ("own", "shared")
# Beyond, the weights of a stack leave the processor's cache at every step: parameters of a stack,
# and models of it.
_STACK_PARAMETERS = 2**23
_STACK_MODELS = 100


class RetrainingBank(StoredBank):
    """Trains one recipe on many subsets, and keeps what each run says of every example.

    The ground truth of attribution: a score that predicts what these runs measured is right, and
    one that does not is decoration. A run is on the disk when its part is written, whole or not at
    all, so that a killed bank goes on with what is missing. Every number of a run follows from its
    seed, which gives the initial weights and the order of the examples.

    Models of layers that `trainers.stacked` knows, in a recipe of `fit`, are trained many at once
    by batched products, and end where one by one they would but for rounding.

    Args:
        directory: new, empty, or of this bank. Another recipe, data set or seed is refused.
        make_model: returns a compiled Keras model; called under the seed of each run.
        train: N labelled examples; see `data.batches` for the forms they may take.
        subsets: bool [subsets, N], True where an example is trained on; see `random_subsets`,
            `leave_one_out` and `leave_group_out`.
        queries: labelled examples to measure as well; measured are the training examples, always.
        fit: arguments of `model.fit` but for the data: `epochs`, `batch_size`, `shuffle`,
            `class_weight`.
        train_fn: in place of `fit`: trains `model` on `examples` (`.arrays` is (x, y), `.ids` are
            positions in `train`), such as by L-BFGS up to the optimum.
        repeats: runs on each subset. Their mean has less of the training's own noise.
        seed: of all runs.
        seeds: `"own"` gives each run a seed of its own; `"shared"` one to all runs of a repeat, so
            that they differ by their examples alone.
        measurements: see `trainers.recipe.Measurements`.
        stack: how many models train at once; `"auto"` goes by their size, 1 is one by one. What
            cannot be stacked is trained one by one.
        verbose: 1 shows progress and the time left, 0 nothing; `"auto"` shows it on a terminal.

    Raises:
        ValueError: the directory holds another bank; masks that do not fit the training set, or
            leave a subset empty; a `make_model` that is not the same twice under one seed.

    Example:

    ```python
    masks = ki.trainers.random_subsets(len(y), num_subsets=100, alpha=0.5)
    bank = ki.trainers.RetrainingBank(
        "banks/mnist", make_model, (x, y), masks, queries=(x_test, y_test),
        fit={"epochs": 20, "batch_size": 32}, repeats=5,
    )
    bank.run()
    losses = bank.losses("loss")  # [subsets, queries], the mean over repeats
    ```
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        make_model: MakeModel,
        train: Any,
        subsets: ArrayLike,
        *,
        queries: Any = None,
        fit: dict[str, Any] | None = None,
        train_fn: TrainFunction | None = None,
        repeats: int = 1,
        seed: int = 0,
        seeds: str = "own",
        measurements: Sequence[str | Measurement] = ("loss", "margin", "correct"),
        stack: int | str = "auto",
        verbose: int | str = "auto",
    ):
        if seeds not in SEEDS or repeats < 1:
            raise ValueError(
                f"`seeds` must be one of {SEEDS}, and `repeats` at least 1. Received: "
                f"seeds={seeds!r}, repeats={repeats}."
            )
        self._arguments = {
            "directory": os.fspath(directory),
            "make_model": make_model,
            "fit": fit,
            "train_fn": train_fn,
            "repeats": repeats,
            "seed": seed,
            "seeds": seeds,
            "measurements": tuple(measurements),
            "stack": stack,
        }
        self._make_model = make_model
        self._recipe = Recipe(fit, train_fn)
        chosen = Measurements(measurements)
        self._train = data.read(train)
        self._queries = None if queries is None else data.read(queries)
        self._verbose = verbose
        masks = _checked_masks(subsets, len(self._train.ids))
        self._seed, self._seeds = seed, seeds
        first = derived_seed(seed, 0, 0)
        model = make(make_model, first)
        described = described_model(model)
        if described != described_model(make(make_model, first)):
            raise ValueError(
                "`make_model` gives another model when it is called again under the same seed "
                "(`keras.utils.set_random_seed`). Draw all that is random from Keras or NumPy."
            )
        record = {
            "make_model": {"name": described_function(make_model)["name"], **described},
            **self._recipe.describe(),
            "names": chosen.names,
            "measurements": chosen.describe(),
            "train": _fingerprint(self._train),
            "queries": _fingerprint(self._queries),
            "num_queries": 0 if self._queries is None else len(self._queries.ids),
            "subsets": storage.arrays_fingerprint([masks]),
            "repeats": repeats,
            "seed": seed,
            "seeds": seeds,
            "stack": _stack_size(stack, model, self._recipe),
        }
        # Takes the weights of each run in turn, to be measured by functions that are traced once.
        self._probe = model
        self._measure = chosen.of(model)
        self.begin(directory, record, masks)
        super().__init__(directory)

    def seed_of(self, run: Run) -> int:
        """Of the run's initial weights and of the order of its examples."""
        return derived_seed(self._seed, run.repeat, run.subset + 1 if self._seeds == "own" else 0)

    def run(self, start: int = 0, stop: int | None = None, processes: int = 1) -> Self:
        """Does the runs that are not done yet.

        Any number of processes may do so at once, in one directory: each takes what no other has
        taken. Machines without a common directory share the work by ranges, and then bring the
        contents of `runs/` together.

        Args:
            start, stop: numbers of runs, of `len(bank.runs)`; what is trained at once is done
                where its first run lies in the range.
            processes: how many to share the work with. They import `make_model`, `train_fn` and
                the measurements by name, so these must be top-level functions of a module, and a
                program's own work must stand under `if __name__ == "__main__":`.

        Raises:
            FloatingPointError: a run whose measurements are not finite.
            RuntimeError: a process of several has failed.
        """
        stop = len(self.runs) if stop is None else stop
        parts = [part for part in self.parts if start <= part[0].number < stop]
        left = [part for part in parts if not self.is_done(part)]
        show = sys.stdout.isatty() if self._verbose == "auto" else bool(self._verbose)
        total = sum(map(len, left))
        # A bar of what is left, so that the time left is right after a restart.
        bar = keras.utils.Progbar(total, unit_name="run") if show and total else None
        if processes > 1 and len(left) > 1:
            self._run_in_processes(start, stop, min(processes, len(left)), left, bar)
            return self
        for part in left:
            try:
                with self.claim(part):
                    if not self.is_done(part):
                        self._do(part)
            except storage.StoreInUseError:
                logging.info("Another process is training run %d.", part[0].number)
            if bar is not None:
                bar.add(len(part))
            if workers.is_orphan():
                break
        return self

    def _run_in_processes(
        self, start: int, stop: int, processes: int, left: list[list[Run]], bar: Any
    ) -> None:
        try:
            pickle.dumps(self._arguments)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                "`make_model`, `train_fn` and the measurements must be functions at the top level "
                f"of a module for other processes to import ({error}). Move them there, or run "
                "with processes=1."
            ) from None
        arguments = {
            **self._arguments,
            "train": self._train.arrays,
            "subsets": self.masks,
            "queries": self._queries and self._queries.arrays,
            "verbose": 0,
        }
        seen = 0

        def progress() -> None:
            nonlocal seen
            done = sum(len(part) for part in left if self.is_done(part))
            if bar is not None and done > seen:
                bar.add(done - seen)
            seen = done

        workers.run(_work, (arguments, start, stop), processes, progress)
        progress()

    def _do(self, part: list[Run]) -> None:
        began = time.perf_counter()
        seeds = [self.seed_of(run) for run in part]
        subsets = [np.flatnonzero(self.masks[run.subset]) for run in part]
        places = {"train": self._train}
        if self._queries is not None:
            places["queries"] = self._queries
        found: dict[str, list[np.ndarray]] = {place: [] for place in places}
        for weights in self._trained_weights(subsets, seeds):
            self._probe.set_weights(weights)
            for place, examples in places.items():
                found[place].append(self._measure(examples))
        arrays = {place: np.stack(values) for place, values in found.items()}
        for name, values in arrays.items():
            self._check_finite(part, seeds, name, values)
        manifest = {
            "runs": [run._asdict() for run in part],
            "seeds": seeds,
            "seconds": time.perf_counter() - began,
            "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
        }
        self.write(part, manifest, arrays)

    def _trained_weights(
        self, subsets: list[np.ndarray], seeds: list[int]
    ) -> Iterator[list[np.ndarray]]:
        """Weights of a model trained on each subset."""
        if self.record["stack"] > 1:
            # Runs of one seed begin alike.
            initial = {seed: make(self._make_model, seed).get_weights() for seed in set(seeds)}
            stack = Stack(self._probe, [initial[seed] for seed in seeds])
            stack.train(self._train.arrays, subsets, seeds, self._recipe)
            for replica in range(len(seeds)):
                yield stack.weights(replica)
            return
        for rows, seed in zip(subsets, seeds, strict=True):
            model = make(self._make_model, seed)
            examples = data.Examples(self._train.take(rows), self._train.ids[rows])
            self._recipe.train(model, examples, seed)
            yield model.get_weights()

    def _check_finite(self, part: list[Run], seeds: list[int], on: str, values: np.ndarray) -> None:
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, measurement, example = bad[0]
            run = part[row]
            raise FloatingPointError(
                f"Run {run.number} (subset {run.subset}, repeat {run.repeat}, seed {seeds[row]}) "
                f"ended with {self.names[measurement]}={values[tuple(bad[0])]} for example "
                f"{example} of {on}: the training diverged, or the data hold what is not finite. "
                "Lower the learning rate in a new bank, or look at that example."
            )


def _work(arguments: dict[str, Any], start: int, stop: int) -> None:
    """In a process of its own."""
    RetrainingBank(**arguments).run(start, stop)


def _checked_masks(subsets: ArrayLike, num_train: int) -> np.ndarray:
    masks = np.asarray(subsets)
    if masks.ndim != 2 or masks.shape[1] != num_train or masks.dtype != bool:
        raise ValueError(
            f"`subsets` must be boolean, [subsets, {num_train}]. Received: {masks.dtype} "
            f"{list(masks.shape)}."
        )
    empty = np.flatnonzero(~masks.any(axis=1))
    if len(empty) or not len(masks):
        raise ValueError(
            "There must be subsets, and examples in each. Received: "
            f"{f'no example in subset {empty[0]}' if len(empty) else 'no subset'}."
        )
    return masks


def _fingerprint(examples: data.Examples | None) -> str | None:
    if examples is None:
        return None
    return storage.arrays_fingerprint(tf.nest.flatten(examples.arrays))


def _stack_size(stack: int | str, model: keras.Model, recipe: Recipe) -> int:
    if stack != "auto" and not (isinstance(stack, int) and stack >= 1):
        raise ValueError(f'`stack` must be "auto" or at least 1. Received: {stack!r}.')
    if stack == 1:
        return 1
    reason = obstacle(model, recipe)
    if reason is not None:
        logging.info("The bank trains its models one by one: %s.", reason)
        return 1
    if isinstance(stack, int):
        return stack
    return min(max(_STACK_PARAMETERS // max(model.count_params(), 1), 1), _STACK_MODELS)
