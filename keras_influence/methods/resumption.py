"""A fit that a killed process can go on with: what it is a fit of, and the steps that are done."""

import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from keras_influence import data, storage
from keras_influence.linalg import DeviceBasis, Restart, Step

T = TypeVar("T")

_RECORD = "fit.json"
_STEPS = "steps"
_BASIS = "basis"
SUMS = "sums"


class FitDirectory:
    """The directory of one fit, in the hands of this process; see `storage.writing`.

    Args:
        path: a local directory.
        identity: all that the fit's numbers depend on, as JSON values.

    Raises:
        ValueError: the directory holds something else, or a fit of something else.
        storage.TornStoreError: its record is damaged.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any]):
        self.path = pathlib.Path(path)
        self._record = self.path / _RECORD
        if self._record.exists():
            found = storage.unsealed(self._record.read_bytes(), str(self._record))
            check_identity(self.path, "a fit", found["identity"], identity)
            self._basis = found["basis"]
        else:
            others = [file.name for file in self.path.iterdir() if not file.name.startswith(".")]
            if others and others != [_BASIS]:
                raise ValueError(
                    f"{self.path} holds no fit, but {sorted(others)[:3]}. Choose a directory of "
                    "its own for a fit."
                )
            self._basis = None
        self.identity = identity

    def basis(self, num_rows: int, size: int, dtype: Any, budget: float) -> storage.StoredRows:
        """The fit's vectors, new or as they were left."""
        if self._basis is None:
            shape = (num_rows, size)
            width = storage.block_width(shape, dtype, budget)
            rows = storage.StoredRows.create(self.path, _BASIS, shape, dtype, width)
            # Last: without it, what lies there is no fit yet.
            self._basis = rows.file.describe()
            record = {"identity": self.identity, "basis": self._basis}
            storage.write_json(self._record, storage.sealed(record))
            return rows
        name = storage.generation(_BASIS, self._num_restarts())
        return storage.StoredRows.open(storage.ArrayFile(self.path, name, **self._basis))

    def _num_restarts(self) -> int:
        """Times that the basis was moved to another array, with a record of it."""
        steps = self.journal(lambda: None).steps()
        return sum(isinstance(step, Restart) for step in steps)

    def begin(self) -> None:
        """Makes the directory that of this fit, for one that keeps no vectors."""
        if not self._record.exists():
            record = {"identity": self.identity, "basis": None}
            storage.write_json(self._record, storage.sealed(record))

    @property
    def finished(self) -> bool:
        return (self.path / storage.MANIFEST).exists()

    def finish(self, manifest: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Makes the directory a store, and drops what only the fit needed."""
        if not self.finished:
            storage.fill_store(self.path, manifest, arrays)
        for place in (*self.path.glob(f"{_BASIS}*"), self.path / _STEPS, self.path / SUMS):
            shutil.rmtree(place, ignore_errors=True)

    def journal(self, after: Callable[[], None]) -> "StepJournal":
        """Of the iteration's steps; `after` is called when one is on the disk."""
        return StepJournal(storage.Records(self.path / _STEPS), after)


def begun_with(path: pathlib.Path) -> dict[str, Any] | None:
    """The identity of the fit that a directory holds, or None."""
    record = path / _RECORD
    if not record.exists():
        return None
    return storage.unsealed(record.read_bytes(), str(record))["identity"]


def check_identity(
    path: pathlib.Path, what: str, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Refuses to go on with what was begun with something else.

    Raises:
        ValueError: naming what differs.
    """
    if found == wanted:
        return
    names = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    described = "; ".join(
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in names
    )
    raise ValueError(
        f"{path} holds {what} of something else ({described}). Go on with what it was begun with, "
        "choose another directory, or remove this one."
    )


class StepJournal:
    """Steps of an iteration as records; see `linalg.Journal`."""

    def __init__(self, records: storage.Records, after: Callable[[], None]):
        self._records = records
        self._after = after

    def steps(self) -> list[Step | Restart]:
        return [step_of(record) for record in self._records.read()]

    def record(self, step: Step | Restart) -> None:
        self._records.add(step_record(step))
        self._after()


def step_record(step: Step | Restart) -> dict[str, Any]:
    """A step as JSON values: a float's decimal form gives back its bits."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in step._asdict().items()
    }


def step_of(record: dict[str, Any]) -> Step | Restart:
    """The step that `step_record` was given."""
    if "matrix" in record:
        return Restart(np.array(record["matrix"]))
    coefficients = np.array(record["coefficients"])
    return Step(
        coefficients,
        np.reshape(record["rest"], (len(record["rest"]), coefficients.shape[1])),
        record["image_norm"],
        tuple(record["random"]),
        record["exhausted"],
        record["last"],
    )


class DurableBasis:
    """Vectors in memory, each of which is on the disk as well when `append` returns."""

    def __init__(self, memory: Any, stored: storage.StoredRows):
        self._memory = memory
        self._stored = stored
        for row in range(stored.shape[0]):
            memory.append(stored[row : row + 1][0])

    @property
    def shape(self) -> tuple[int, int]:
        return self._memory.shape

    @property
    def dtype(self) -> np.dtype:
        return self._memory.dtype

    @property
    def stored_dtype(self) -> np.dtype:
        return self._memory.stored_dtype

    def append(self, vector: np.ndarray) -> None:
        self._stored.append(vector)
        self._memory.append(vector)

    def truncate(self, count: int) -> None:
        self._stored.truncate(count)
        self._memory.truncate(count)

    def blocks(self, count: int) -> Any:
        return self._memory.blocks(count)

    def map_blocks(self, count: int, function: Callable[[slice, np.ndarray], T]) -> list[T]:
        return self._memory.map_blocks(count, function)

    def write(self, columns: slice, values: np.ndarray) -> None:
        self._memory.write(columns, values)

    def combine(self, combination: np.ndarray) -> None:
        self._memory.combine(combination)
        self._stored = _moved(self._memory, self._stored)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._memory[rows]


class DurableDeviceBasis(DeviceBasis):
    """Vectors on the devices, each of which is on the disk as well when `append` returns."""

    def __init__(self, stored: storage.StoredRows, *arguments: Any):
        super().__init__(*arguments)
        self._stored = stored
        for row in range(stored.shape[0]):
            self.append_row(stored[row : row + 1][0])

    def append(self, vector: Any) -> None:
        super().append(vector)
        self._stored.append(self[-1:][0])

    def truncate(self, count: int) -> None:
        self._stored.truncate(count)
        super().truncate(count)

    def combine(self, combination: np.ndarray) -> None:
        super().combine(combination)
        self._stored = _moved(self, self._stored)


def _moved(rows: Any, stored: storage.StoredRows) -> storage.StoredRows:
    """`rows` in the array that comes after `stored`."""
    following = stored.successor()
    for row in range(rows.shape[0]):
        following.append(rows[row : row + 1][0])
    return following


def examples_fingerprint(batches: Sequence[data.Batch]) -> str:
    """Tells whether these are the examples of another time: their number, the first, the last."""
    first, last = batches[0], batches[-1]
    ends = [
        np.asarray(leaf)[row]
        for batch, row in ((first, 0), (last, last.num_examples - 1))
        for leaf in tf.nest.flatten(batch.examples)
    ]
    count = np.array(sum(batch.num_examples for batch in batches))
    return storage.arrays_fingerprint([count, *ends])
