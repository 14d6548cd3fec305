"""Encodings of examples on disk: added part by part, removed by id, read in blocks."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_influence.storage.errors import TornStoreError
from keras_influence.storage.journal import Records
from keras_influence.storage.ledger import IndexLedger
from keras_influence.storage.zarr import ArrayFile, readable_errors

_ROWS_OF_CHUNK = 4096
# The array has room for as many as will ever come; only what was written takes space.
_CAPACITY = 2**40


class StoredIndex(IndexLedger):
    """Rows [rank] in a directory; see `IndexLedger`.

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
        super().__init__(self.records())
        chunks = {place[0] for place in self._file.chunks()}
        missing = set(range(-(-self.num_written // self._file.chunk[0]))) - chunks
        if missing:
            raise TornStoreError(
                f"{self._file.location} lacks the chunks {sorted(missing)[:5]} of the "
                f"{self.num_written} rows that were written. Index again, into a new directory."
            )

    @classmethod
    def create(cls, directory: str | os.PathLike, rank: int, dtype: Any) -> dict[str, Any]:
        """Makes place for an index, and returns what describes it."""
        name = np.dtype(dtype).name
        file = ArrayFile(directory, "encodings", (_CAPACITY, rank), name, (_ROWS_OF_CHUNK, rank))
        file.create()
        return file.describe()

    def records(self) -> list[dict[str, Any]]:
        """Of what was done so far."""
        return self._records.read()

    def _record(self, **record: Any) -> None:
        self._records.add(record)
        self._apply(record)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._file.dtype)

    @property
    def rank(self) -> int:
        return self._file.shape[1]

    def add(self, rows: np.ndarray, first: str, last: str) -> None:
        """Adds rows [n, rank] of a data set.

        Args:
            rows: the encodings.
            first, last: fingerprints of the data set's first example and of the last one added.
        """
        stop = self.num_written + len(rows)
        with readable_errors(self._file.location):
            self._array[self.num_written : stop].write(rows).result()
        self._record(kind="rows", stop=stop, first=first, last=last)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [stop - start, rank], whether they are seen or not."""
        with readable_errors(self._file.location):
            return np.asarray(self._array[start:stop].read(order="C").result())

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
            seen = self._seen(ids)
            yield (ids, rows) if seen.all() else (ids[seen], rows[seen])
