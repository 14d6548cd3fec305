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
# Each has the files of a column of chunks open, and memory is as fast as some cores can read it.
_MOST_THREADS = 8


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


def shared(work: Callable[[range], list[T]], count: int) -> list[T]:
    """`work` of ranges that have each number below `count`, one for each core: joined, in order.

    Each of the threads reads and multiplies by itself, with numpy's products on one core: what is
    read is then multiplied from the cache of the core that read it.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bounds = np.linspace(0, count, min(threads or 1, _MOST_THREADS, count) + 1).astype(int)
    with (
        concurrent.futures.ThreadPoolExecutor(len(bounds)) as pool,
        _blas().limit(limits=1, user_api="blas"),
    ):
        parts = pool.map(work, map(range, bounds[:-1], bounds[1:]))
        return [result for part in parts for result in part]


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
