"""Blocks of rows from the files that they lie in, read ahead of their use."""

import collections
import concurrent.futures
import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Generator
from typing import TypeVar

import numpy as np
import threadpoolctl

from keras_influence.storage.errors import TornStoreError

T = TypeVar("T")

# Parts that are read while one is used. One would do, were reading and using as fast each time.
_AHEAD = 2
# What is used, what was, and what is read.
NUM_BUFFERS = _AHEAD + 2


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    # Once: it looks through all libraries of the process.
    return threadpoolctl.ThreadpoolController()


def ahead(read: Callable[[int], T], count: int) -> Generator[T]:
    """`read(number)` for each number below `count`, by a thread that is some of them ahead.

    Until the last one was used, numpy's products are done by one thread: one core multiplies as
    fast as another reads, and two that multiply wait for each other while one of them reads.
    """
    with (
        concurrent.futures.ThreadPoolExecutor(1) as thread,
        _blas().limit(limits=1, user_api="blas"),
    ):
        pending = collections.deque(
            thread.submit(read, number) for number in range(min(_AHEAD, count))
        )
        for number in range(_AHEAD, count + _AHEAD):
            part = pending.popleft().result()
            if number < count:
                pending.append(thread.submit(read, number))
            yield part


class ChunkFiles:
    """The files of the chunks of rows, those of one column of chunks open at a time.

    Reading into memory that is used again and again is four times as fast as into new memory, which
    the system must first make; and what is few enough stays in the processor's cache until it is
    multiplied.

    Args:
        directory: of the chunks, `ROW/COLUMN`.
        count: rows.
    """

    def __init__(self, directory: pathlib.Path, count: int):
        self._directory = directory
        self._count = count
        self._column: int | None = None
        self._files: list[int] = []

    def read(self, column: int, start: int, block: np.ndarray) -> None:
        """Fills `block` [rows, width] with the entries from `start` on of the chunks of a column.

        Raises:
            TornStoreError: a chunk that is absent, or ends before.
        """
        if column != self._column:
            self.close()
            for row in range(self._count):
                try:
                    self._files.append(os.open(self._place(row, column), os.O_RDONLY))
                except FileNotFoundError as error:
                    message = f"{self._place(row, column)} was removed while it was in use."
                    raise TornStoreError(message) from error
            self._column = column
        offset = start * block.dtype.itemsize
        for row, file in enumerate(self._files):
            entries = block[row].view(np.uint8)
            if os.preadv(file, [memoryview(entries)], offset) != entries.nbytes:
                raise TornStoreError(
                    f"{self._place(row, column)} was shortened while it was in use."
                )

    def _place(self, row: int, column: int) -> pathlib.Path:
        return self._directory / str(row) / str(column)

    def close(self) -> None:
        while self._files:
            with contextlib.suppress(OSError):
                os.close(self._files.pop())
        self._column = None
