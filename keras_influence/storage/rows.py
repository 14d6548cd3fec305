"""Vectors on disk, read in blocks of columns: an eigenbasis larger than memory."""

import concurrent.futures
import os
import shutil
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from keras_influence.storage.errors import TornStoreError
from keras_influence.storage.zarr import ArrayFile, readable_errors

# Entries of a chunk, of one row: not so few that files are many, not so many that a block of them
# from every row fills the memory.
_SMALLEST, _LARGEST = 2**14, 2**20


def block_width(shape: tuple[int, int], dtype: Any, memory_budget: float) -> int:
    """Columns of which two blocks, of all rows, take so many bytes."""
    rows, size = shape
    width = int(memory_budget / (2 * max(rows, 1) * np.dtype(dtype).itemsize))
    return min(max(width, _SMALLEST), _LARGEST, size)


def generation(name: str, number: int) -> str:
    """Name of the array that rows lie in after `number` combinations."""
    return f"{name}.{number}" if number else name


def _generation(name: str) -> tuple[str, int]:
    stem, _, number = name.partition(".")
    return stem, int(number or 0)


class StoredRows:
    """Vectors [p] as rows of an array of a store, appended one by one; see `linalg.Basis`.

    Two blocks are in memory at a time: one is computed with while the next is read. What this
    process wrote, or has checked, it then reads from the files themselves, four times as fast as
    through TensorStore: an iteration reads each vector hundreds of times.

    Args:
        file: the array, of shape [rows that there is room for, p].
        array: it, opened.
        count: rows that it has.
    """

    def __init__(self, file: ArrayFile, array: Any, count: int):
        self.file = file
        self._array = array
        self._count = count
        self._checked = 0  # Rows of which every chunk was compared with its checksum, or made here.
        self.stored_dtype = np.dtype(file.dtype)
        # bfloat16 is for storing, and nothing is computed in it.
        self.dtype = np.dtype("float32" if file.dtype == "bfloat16" else file.dtype)

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike,
        name: str,
        shape: tuple[int, int],
        dtype: Any,
        width: int,
    ) -> Self:
        """A new array, without rows.

        Args:
            directory, name: of the store, and of the array.
            shape: (rows that there is room for, p).
            dtype: of the rows where they lie; those of bfloat16 are given and read as float32.
            width: columns that are read and written at once.
        """
        file = ArrayFile(directory, name, shape, np.dtype(dtype).name, (1, width))
        return cls(file, file.create(), 0)

    @classmethod
    def open(cls, file: ArrayFile) -> Self:
        """An array that is there, with the rows that are whole, from the first on."""
        there = file.chunks()
        columns = -(-file.shape[1] // file.chunk[1])
        count = 0
        while count < file.shape[0] and all((count, c) in there for c in range(columns)):
            count += 1
        return cls(file, file.open(), count)

    @property
    def width(self) -> int:
        """Columns of a block; `write` is whole where it is given such blocks."""
        return self.file.chunk[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self._count, self.file.shape[1]

    def append(self, vector: np.ndarray) -> None:
        self._store(slice(self._count, self._count + 1), slice(None), vector[np.newaxis])
        if self._checked == self._count:
            self._checked += 1
        self._count += 1

    def truncate(self, count: int) -> None:
        self._count = min(self._count, count)
        self._checked = min(self._checked, count)

    def write(self, columns: slice, values: np.ndarray) -> None:
        self._store(slice(0, len(values)), columns, values)
        self._count = len(values)

    def combine(self, combination: np.ndarray) -> None:
        following = self.successor()
        for columns, block in self.blocks(self._count):
            following.write(columns, combination @ block)
        self.become(following)

    def successor(self) -> "StoredRows":
        """A new array, without rows, that these rows may move to.

        It lies beside this one, so that until it is whole nothing is lost. The one before this one
        is removed.
        """
        stem, number = _generation(self.file.name)
        if number and self.file.path is not None:
            before = self.file.path.with_name(generation(stem, number - 1))
            shutil.rmtree(before, ignore_errors=True)
        return self.create(
            self.file.directory,
            generation(stem, number + 1),
            (self.file.shape[0], self.file.shape[1]),
            self.dtype,
            self.width,
        )

    def become(self, other: "StoredRows") -> None:
        """Takes the place of `other`, which is used no more."""
        self.file, self._array = other.file, other._array
        self._count, self._checked = other._count, other._checked

    def blocks(self, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        size, width = self.file.shape[1], self.width
        parts = [slice(start, min(start + width, size)) for start in range(0, size, width)]
        directly = count <= self._checked and self.file.path is not None
        read = self._read_files if directly else self._read
        with concurrent.futures.ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(read, count, parts[0])
            for number, columns in enumerate(parts):
                block = pending.result()
                if number + 1 < len(parts):
                    pending = ahead.submit(read, count, parts[number + 1])
                yield columns, block
        self._checked = max(self._checked, count)

    def _read(self, count: int, columns: slice) -> np.ndarray:
        with readable_errors(self.file.location):
            read = np.asarray(self._array[:count, columns].read(order="C").result())
        return read.astype(self.dtype, copy=False)

    def _read_files(self, count: int, columns: slice) -> np.ndarray:
        assert self.file.path is not None
        block = np.empty((count, columns.stop - columns.start), self.stored_dtype)
        for row in range(count):
            place = self.file.path / "c" / str(row) / str(columns.start // self.width)
            with open(place, "rb", buffering=0) as file:
                if file.readinto(block[row].view(np.uint8)) != block[row].nbytes:
                    raise TornStoreError(f"{place} was shortened while it was in use.")
        return block.astype(self.dtype, copy=False)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(self._count)
        with readable_errors(self.file.location):
            read = np.asarray(self._array[start:stop:step].read(order="C").result())
        return read.astype(self.dtype, copy=False)

    def __len__(self) -> int:
        return self._count

    def check_whole(self) -> None:
        """Raises where rows are absent."""
        if self._count != self.file.shape[0]:
            raise TornStoreError(
                f"{self.file.location} has {self._count} of its {self.file.shape[0]} rows: the "
                "store is incomplete."
            )

    def _store(self, rows: slice, columns: slice, values: np.ndarray) -> None:
        with readable_errors(self.file.location):
            stored = values.astype(self.stored_dtype, copy=False)
            self._array[rows, columns].write(stored).result()
