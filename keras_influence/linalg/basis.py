"""Where an iteration keeps its vectors: in memory, or wherever else their columns can be read."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import ml_dtypes
import numpy as np

T = TypeVar("T")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Bytes of a block of columns, few enough to be read from memory once for a subtraction and the
# next inner products.
_BLOCK_BYTES = 2**23


class Basis(Protocol):
    """Vectors [p] as rows, appended one by one, and read in blocks of columns.

    Attributes:
        shape: (rows so far, p).
        dtype: of the entries as they are given and read.
        stored_dtype: of the entries where they lie; bfloat16 takes half the room of float32, and
            an entry that is read is then the one given to three digits (`rounding_of`).
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def stored_dtype(self) -> np.dtype: ...

    def append(self, vector: np.ndarray) -> None:
        """Adds a row [p]; when this returns, the row is where it stays."""

    def truncate(self, count: int) -> None:
        """Forgets the rows from `count` on."""

    def blocks(self, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Columns and the first `count` rows of them, [count, width], from the first column on.

        A block holds until the next one is asked for.
        """

    def map_blocks(self, count: int, function: Callable[[slice, np.ndarray], T]) -> list[T]:
        """`function` of the columns and rows of each such block, from the first column on.

        Some may be computed at the same time, and a block holds no longer than its own call.
        """

    def write(self, columns: slice, values: np.ndarray) -> None:
        """Sets columns of all rows that there is room for, [rows, width]: in order."""

    def combine(self, combination: np.ndarray) -> None:
        """Puts `combination` [m, rows] times the rows in their place. Where rows outlive the
        process, those before are there until a further row is combined.
        """

    def __getitem__(self, rows: slice) -> np.ndarray:
        """[rows, p]."""


def rounding_of(basis: Any) -> float:
    """The largest share of an entry that storing it changes: 0, or 2^-8 for bfloat16."""
    return 2.0**-8 if getattr(basis, "stored_dtype", None) == BFLOAT16 else 0.0


class HostBasis:
    """Rows in host memory.

    Args:
        num_rows: rows that there is room for.
        size: p.
        dtype: of the entries.
        stored_dtype: of the entries where they lie; `dtype` by default.
    """

    def __init__(self, num_rows: int, size: int, dtype: Any, stored_dtype: Any = None):
        self.array = np.empty((num_rows, size), stored_dtype or dtype)
        self.dtype = np.dtype(dtype)
        self._count = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self._count, self.array.shape[1]

    @property
    def stored_dtype(self) -> np.dtype:
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
            yield columns, self.array[:count, columns].astype(self.dtype, copy=False)

    def map_blocks(self, count: int, function: Callable[[slice, np.ndarray], T]) -> list[T]:
        # One after the other: numpy's products are on all cores by themselves.
        return [function(*each) for each in self.blocks(count)]

    def write(self, columns: slice, values: np.ndarray) -> None:
        self.array[:, columns] = values
        self._count = len(self.array)

    def combine(self, combination: np.ndarray) -> None:
        for columns, block in self.blocks(self._count):
            self.array[: len(combination), columns] = combination @ block
        self._count = len(combination)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.array[: self._count][rows].astype(self.dtype, copy=False)
