"""Encodings of examples on disk: added part by part, removed by id, read in blocks."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_influence.storage.errors import TornStoreError
from keras_influence.storage.journal import Records
from keras_influence.storage.zarr import ArrayFile, readable_errors

_ROWS_OF_CHUNK = 4096
# The array has room for as many as will ever come; only what was written takes space.
_CAPACITY = 2**40


class StoredIndex:
    """Rows [rank] numbered from 0, each the encoding of an example whose id is its number.

    Rows come in data sets, of which each is added part by part: a part is there when `add` returns,
    and a data set when `end` does. Rows of one that has not ended are not seen.

    Args:
        directory: of the index.
        described: what `describe` gave.

    Raises:
        TornStoreError: a record that is damaged, or rows that are not there.
    """

    def __init__(self, directory: str | os.PathLike, described: dict[str, Any]):
        self.directory = pathlib.Path(directory)
        self._file = ArrayFile(directory, "encodings", **described)
        self._records = Records(self.directory / "records")
        self._array = self._file.open()
        self._written = 0  # Rows, of data sets that have ended and of the one that has not.
        self._ended = 0
        self._removed = np.zeros(0, np.int64)
        self._datasets: list[dict[str, Any]] = []
        for record in self._records.read():
            self._apply(record)
        chunks = {place[0] for place in self._file.chunks()}
        missing = set(range(-(-self._written // self._file.chunk[0]))) - chunks
        if missing:
            raise TornStoreError(
                f"{self._file.location} lacks the chunks {sorted(missing)[:5]} of the "
                f"{self._written} rows that were written. Index again, into a new directory."
            )

    @classmethod
    def create(cls, directory: str | os.PathLike, rank: int, dtype: Any) -> dict[str, Any]:
        """Makes place for an index, and returns what describes it."""
        name = np.dtype(dtype).name
        file = ArrayFile(directory, "encodings", (_CAPACITY, rank), name, (_ROWS_OF_CHUNK, rank))
        file.create()
        return file.describe()

    def _apply(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "rows":
            if not self.unfinished:
                self._datasets.append({"first": record["first"], "start": self._ended})
            self._datasets[-1].update(last=record["last"], ended=False)
            self._written = record["stop"]
        elif kind == "end":
            self._datasets[-1]["ended"] = True
            self._ended = self._written
        elif kind == "remove":
            self._removed = np.union1d(self._removed, np.array(record["ids"], np.int64))

    def _record(self, **record: Any) -> None:
        self._records.add(record)
        self._apply(record)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._file.dtype)

    @property
    def rank(self) -> int:
        return self._file.shape[1]

    @property
    def ids(self) -> np.ndarray:
        """int64 [N], of the rows that are seen."""
        return np.setdiff1d(np.arange(self._ended), self._removed, assume_unique=True)

    def __len__(self) -> int:
        return self._ended - int(np.searchsorted(self._removed, self._ended))

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """The data set that has not ended: fingerprints `first` and `last`, and row `start`."""
        return self._datasets[-1] if self._datasets and not self._datasets[-1]["ended"] else None

    @property
    def num_datasets(self) -> int:
        """Data sets that have ended."""
        return sum(dataset["ended"] for dataset in self._datasets)

    @property
    def first(self) -> str:
        """Fingerprint of the first example of all."""
        return self._datasets[0]["first"]

    @property
    def last_dataset(self) -> dict[str, Any]:
        """The last one that has ended: fingerprints `first` and `last`, and `count`."""
        last = self._datasets[self.num_datasets - 1]
        return {**last, "count": self._ended - last["start"]}

    @property
    def next_id(self) -> int:
        """Of the next example that is added."""
        return self._ended

    @property
    def num_unfinished(self) -> int:
        """Rows of the data set that has not ended."""
        return self._written - self._ended

    def add(self, rows: np.ndarray, first: str, last: str) -> None:
        """Adds rows [n, rank] of a data set.

        Args:
            rows: the encodings.
            first, last: fingerprints of the data set's first example and of the last one added.
        """
        stop = self._written + len(rows)
        with readable_errors(self._file.location):
            self._array[self._written : stop].write(rows).result()
        self._record(kind="rows", stop=stop, first=first, last=last)

    def end(self) -> None:
        """The data set is whole: its rows are seen from now on."""
        self._record(kind="end")

    def remove(self, ids: np.ndarray) -> None:
        """Rows that are not seen from now on; they keep their place on the disk."""
        self._record(kind="remove", ids=ids.tolist())

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Rows [n, rank] of these ids; whole chunks are read and checked for them."""
        with readable_errors(self._file.location):
            return np.asarray(self._array[np.asarray(ids, np.int64)].read(order="C").result())

    def blocks(self, num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids [n] and rows [n, rank] of those that are seen, by id; one block is read ahead."""
        starts = range(0, self._ended, num_rows)
        reads = (
            self._array[start : min(start + num_rows, self._ended)].read(order="C")
            for start in starts
        )
        pending = next(reads, None)
        for start in starts:
            assert pending is not None
            with readable_errors(self._file.location):
                rows = np.asarray(pending.result())
            pending = next(reads, None)
            ids = np.arange(start, start + len(rows))
            seen = ~np.isin(ids, self._removed, assume_unique=True)
            yield (ids, rows) if seen.all() else (ids[seen], rows[seen])
