"""An index whose files another process has."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_influence.storage.ledger import IndexLedger


class MirroredIndex(IndexLedger):
    """What a `StoredIndex` of another process holds, in the memory of this one.

    Args:
        directory: of the index, there.
        records: of it.
        rows: [num_written, rank], of it.
    """

    def __init__(
        self, directory: str | os.PathLike, records: list[dict[str, Any]], rows: np.ndarray
    ):
        super().__init__(records)
        self.directory = pathlib.Path(directory)
        self._parts = [rows]

    @property
    def dtype(self) -> np.dtype:
        return self._parts[0].dtype

    @property
    def rank(self) -> int:
        return self._parts[0].shape[1]

    def add(self, rows: np.ndarray, first: str, last: str) -> None:
        self._parts.append(rows)
        self._record(kind="rows", stop=self.num_written + len(rows), first=first, last=last)

    def _rows(self) -> np.ndarray:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self._rows()[ids]

    def blocks(self, num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, self._ended, num_rows):
            ids = np.arange(start, min(start + num_rows, self._ended))
            seen = self._seen(ids)
            yield ids[seen], self._rows()[ids[seen]]
