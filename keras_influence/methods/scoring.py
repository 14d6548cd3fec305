"""Scores in steps, which a killed process need not do again."""

import functools
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_influence import data, storage
from keras_influence.methods.preemption import between_steps
from keras_influence.methods.resumption import check_identity
from keras_influence.workers import Workers

_RECORD = "scoring.json"
_STEPS = "steps"
_SCORES = "scores"
# Batches of a step: what a kill can cost.
_PART_BATCHES = 32


class Steps:
    """The steps of a scoring, of which nothing is kept."""

    def within(self, name: str) -> "Steps":
        """For the steps of a part of the work, whose names need differ from no other part's."""
        del name
        return self

    def keep(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """What `compute()` gives, or gave when this step was done."""
        del name
        return compute()

    def drop(self, name: str) -> None:
        """Forgets a step that no other one will ask for again."""

    def parts(
        self, dataset: Any, batch_size: int | None
    ) -> Iterator[tuple[str, Callable[[], Iterator[data.Batch]]]]:
        """The batches of a dataset in runs, each a step of its name; read when it is called."""
        yield "all", lambda: data.batches(dataset, batch_size)


class Survey(NamedTuple):
    """What one reading of a dataset tells.

    Attributes:
        dataset: itself.
        fingerprint: of every example.
        num_examples, num_batches: of it.
    """

    dataset: Any
    fingerprint: str
    num_examples: int
    num_batches: int

    @classmethod
    def of(cls, dataset: Any, batch_size: int | None) -> "Survey":
        data.check_order(dataset)
        sizes: list[int] = []

        def leaves() -> Iterator[np.ndarray]:
            for batch in data.batches(dataset, batch_size):
                sizes.append(batch.num_examples)
                for leaf in tf.nest.flatten(batch.examples):
                    yield np.asarray(leaf)[: batch.num_examples]

        return cls(dataset, storage.arrays_fingerprint(leaves()), sum(sizes), len(sizes))


class DurableSteps(Steps):
    """Steps in a directory that this process holds: each is on the disk when `keep` returns.

    Args:
        path: of the steps.
        surveys: of the datasets that `parts` will be asked for.
        workers: that compute together, of which the chief writes.
        after: called after each step.
    """

    def __init__(
        self,
        path: pathlib.Path,
        surveys: Sequence[Survey],
        workers: Workers,
        after: Callable[[], None],
    ):
        self._path = path
        self._surveys = surveys
        self._workers = workers
        self._after = after

    def within(self, name: str) -> "DurableSteps":
        return DurableSteps(self._path / name, self._surveys, self._workers, self._after)

    def keep(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        place = self._path / name
        if self._workers.told((place / storage.MANIFEST).exists):
            return self._workers.given(lambda: storage.load_store(place)[1][_SCORES])
        array = compute()

        def write() -> None:
            place.mkdir(parents=True, exist_ok=True)
            storage.fill_store(place, {"kind": "Step"}, {_SCORES: array})

        self._workers.told(write)
        self._after()
        return array

    def drop(self, name: str) -> None:
        if self._workers.chief:
            shutil.rmtree(self._path / name, ignore_errors=True)

    def parts(
        self, dataset: Any, batch_size: int | None
    ) -> Iterator[tuple[str, Callable[[], Iterator[data.Batch]]]]:
        (total,) = {each.num_batches for each in self._surveys if each.dataset is dataset}
        batches = data.batches(dataset, batch_size)
        position = 0

        def part(start: int) -> Iterator[data.Batch]:
            nonlocal position
            skipped, position = start - position, start + _PART_BATCHES
            return itertools.islice(batches, skipped, skipped + _PART_BATCHES)

        for start in range(0, total, _PART_BATCHES):
            yield f"batch{start}", functools.partial(part, start)


def resumable(
    what: str,
    identity: Mapping[str, Any],
    datasets: Mapping[str, Any],
    batch_size: int | None,
    directory: str | os.PathLike,
    workers: Workers,
    compute: Callable[[Steps], np.ndarray],
) -> np.ndarray:
    """`compute(steps)`, whose steps outlive this process; or what the directory holds of it.

    Args:
        what: is computed.
        identity: all that its bits depend on beside the data, as JSON values.
        datasets: name -> dataset, as `compute` will read it.
        batch_size: in which it will.
        directory: where the steps go, and in the end the result.
        workers: that compute together; the directory is the chief's, and it tells the others what
            it holds.
        compute: see `Steps`.

    Raises:
        ValueError: the directory holds something else, or scores of something else.
        storage.TornStoreError: a damaged record or step.
        storage.StoreInUseError: another process is computing there.
    """
    path = pathlib.Path(directory)
    surveys = {name: Survey.of(dataset, batch_size) for name, dataset in datasets.items()}
    whole = {"what": what, **identity}
    for name, survey in surveys.items():
        whole[name] = f"{survey.num_examples} examples, {survey.fingerprint}"
    # As JSON gives it back: lists for tuples.
    whole = json.loads(json.dumps(whole))
    workers.agree("scoring", whole)
    with workers.writing(path), between_steps("the scoring") as check:
        workers.told(lambda: _claim(path, whole))
        if not workers.told((path / storage.MANIFEST).exists):
            steps = DurableSteps(path / _STEPS, list(surveys.values()), workers, check)
            result = compute(steps)
            manifest = {"kind": "Scores", "identity": whole}
            workers.told(lambda: storage.fill_store(path, manifest, {_SCORES: result}))
        if workers.chief:
            shutil.rmtree(path / _STEPS, ignore_errors=True)
        return workers.given(lambda: storage.load_store(path)[1][_SCORES])


def _claim(path: pathlib.Path, identity: dict[str, Any]) -> None:
    """Writes into an empty directory what it is for, or compares with what it is for."""
    record = path / _RECORD
    if record.exists():
        found = storage.unsealed(record.read_bytes(), str(record))
        check_identity(path, "scores", found["identity"], identity)
        return
    others = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    if others:
        raise ValueError(
            f"{path} holds no scores, but {others[:3]}. Choose a directory of its own for them."
        )
    storage.write_json(record, storage.sealed({"identity": identity}))
