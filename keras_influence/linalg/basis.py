"""Where an iteration keeps its vectors: in memory, or wherever else their columns can be read."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

# Bytes of a block of columns, few enough to be read from memory once for a subtraction and the
# next inner products.
_BLOCK_BYTES = 2**23


class Basis(Protocol):
    """Vectors [p] as rows, appended one by one, and read in blocks of columns.

    Attributes:
        shape: (rows so far, p).
        dtype: of the entries.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def append(self, vector: np.ndarray) -> None:
        """Adds a row [p]; when this returns, the row is where it stays."""

    def truncate(self, count: int) -> None:
        """Forgets the rows from `count` on."""

    def blocks(self, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Columns and the first `count` rows of them, [count, width], from the first column on."""

    def write(self, columns: slice, values: np.ndarray) -> None:
        """Sets columns of all rows that there is room for, [rows, width]."""

    def combine(self, combination: np.ndarray) -> None:
        """Puts `combination` [m, rows] times the rows in their place. Where rows outlive the
        process, those before are there until a further row is combined.
        """

    def __getitem__(self, rows: slice) -> np.ndarray:
        """[rows, p]."""


class HostBasis:
    """Rows in host memory.

    Args:
        num_rows: rows that there is room for.
        size: p.
        dtype: of the entries.
    """

    def __init__(self, num_rows: int, size: int, dtype: Any):
        self.array = np.empty((num_rows, size), dtype)
        self._count = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self._count, self.array.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def append(self, vector: np.ndarray) -> None:
        self.array[self._count] = vector
        self._count += 1

    def truncate(self, count: int) -> None:
        self._count = min(self._count, count)

    def blocks(self, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        width = max(1, _BLOCK_BYTES // (self.dtype.itemsize * max(count, 1)))
        for start in range(0, self.array.shape[1], width):
            columns = slice(start, min(start + width, self.array.shape[1]))
            yield columns, self.array[:count, columns]

    def write(self, columns: slice, values: np.ndarray) -> None:
        self.array[:, columns] = values
        self._count = len(self.array)

    def combine(self, combination: np.ndarray) -> None:
        for columns, block in self.blocks(self._count):
            self.array[: len(combination), columns] = combination @ block
        self._count = len(combination)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.array[: self._count][rows]
