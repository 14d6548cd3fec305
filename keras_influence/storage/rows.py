"""Vectors on disk, read in blocks of columns: an eigenbasis larger than memory."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import numpy as np

from keras_influence.storage.errors import TornStoreError
from keras_influence.storage.reading import NUM_BUFFERS, ChunkFiles, ahead, shared
from keras_influence.storage.zarr import ArrayFile, readable_errors

T = TypeVar("T")

# Bytes of a block: one that another thread reads ahead, few enough that it is still in a cache; and
# one that a thread reads for itself, enough that calls of the system cost less than what they copy.
_BLOCK_BYTES = 2**22
_MAPPED_BYTES = 2**24

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

    A block is computed with while the next ones are read. What this process wrote, or has checked,
    it then reads from the files themselves: an iteration reads each vector hundreds of times.

    Args:
        file: the array, of shape [rows that there is room for, p].
        array: it, opened.
        count: rows that it has.
    """

    def __init__(self, file: ArrayFile, array: Any, count: int):
        self.file = file
        self._array = array
        self._count = count
        self._filling: np.ndarray | None = None  # A chunk of columns of all rows, in the making.
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
        """Columns of a chunk."""
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
        size = self.file.shape[1]
        first, last, _ = columns.indices(size)
        if self._filling is None or len(self._filling) != len(values):
            self._filling = np.empty((len(values), self.width), self.stored_dtype)
        # In whole chunks, as they are written; columns come in order.
        while first < last:
            chunk = first - first % self.width
            stop = min(chunk + self.width, last)
            taken, values = values[:, : stop - first], values[:, stop - first :]
            self._filling[:, first - chunk : stop - chunk] = taken
            first = stop
            if stop in (chunk + self.width, size):
                filled = self._filling[:, : stop - chunk]
                self._store(slice(0, len(filled)), slice(chunk, stop), filled)
        if last == size:
            self._filling = None
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
        """Columns and the first `count` rows of them; a block holds until the next is asked for."""
        return self._blocks(count, _BLOCK_BYTES)

    def _blocks(self, count: int, most: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The same in blocks of at most so many bytes."""
        width = self.width
        parts, step = self._parts(count, most)
        buffers = [np.empty((count, step), self.stored_dtype) for _ in range(NUM_BUFFERS)]

        def buffer(number: int) -> np.ndarray:
            columns = parts[number]
            return buffers[number % NUM_BUFFERS][:, : columns.stop - columns.start]

        directory = self._files_of(count)
        if directory is not None:
            files = ChunkFiles(directory, count)

            def from_files(number: int) -> np.ndarray:
                column, start = divmod(parts[number].start, width)
                files.read(column, start, buffer(number))
                return buffer(number).astype(self.dtype, copy=False)

            blocks = ahead(from_files, len(parts))
            # The thread ends before the files are closed, also where not all blocks were asked for.
            with contextlib.closing(files), contextlib.closing(blocks):
                yield from zip(parts, blocks, strict=True)
            return
        chunk, chunk_start = np.empty((count, 0), self.stored_dtype), 0

        def through_store(number: int) -> np.ndarray:
            nonlocal chunk, chunk_start
            columns = parts[number]
            if columns.start % width == 0:
                chunk, chunk_start = self._read(count, columns.start), columns.start
            # Into memory like that for files: a sum's bits may depend on where it lies.
            taken = buffer(number)
            taken[...] = chunk[:, columns.start - chunk_start : columns.stop - chunk_start]
            return taken.astype(self.dtype, copy=False)

        with contextlib.closing(ahead(through_store, len(parts))) as blocks:
            yield from zip(parts, blocks, strict=True)
        self._checked = max(self._checked, count)

    def map_blocks(self, count: int, function: Callable[[slice, np.ndarray], T]) -> list[T]:
        """See `Basis.map_blocks`; on all cores, where rows are read from the files themselves."""
        directory = self._files_of(count)
        if directory is None:
            return [function(*each) for each in self._blocks(count, _MAPPED_BYTES)]
        parts, step = self._parts(count, _MAPPED_BYTES)

        def some(numbers: range) -> list[T]:
            buffer = np.empty((count, step), self.stored_dtype)
            found = []
            with contextlib.closing(ChunkFiles(directory, count)) as files:
                for columns in parts[numbers.start : numbers.stop]:
                    block = buffer[:, : columns.stop - columns.start]
                    column, start = divmod(columns.start, self.width)
                    files.read(column, start, block)
                    found.append(function(columns, block.astype(self.dtype, copy=False)))
            return found

        return shared(some, len(parts))

    def _files_of(self, count: int) -> pathlib.Path | None:
        """Directory of the chunks of so many rows, where they are whole and can be read as such."""
        if count > self._checked or self.file.path is None:
            return None
        return self.file.path / "c"

    def _parts(self, count: int, most: int) -> tuple[list[slice], int]:
        """The columns of each block of so many rows, none over two chunks; and the most of one."""
        size, width = self.file.shape[1], self.width
        step = max(1, min(most // (self.stored_dtype.itemsize * max(count, 1)), width))
        parts = [
            slice(start, min(start + step, chunk + width, size))
            for chunk in range(0, size, width)
            for start in range(chunk, min(chunk + width, size), step)
        ]
        return parts, step

    def _read(self, count: int, start: int) -> np.ndarray:
        stop = min(start + self.width, self.file.shape[1])
        with readable_errors(self.file.location):
            return np.asarray(self._array[:count, start:stop].read(order="C").result())

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
