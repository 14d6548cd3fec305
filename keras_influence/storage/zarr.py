"""Arrays on disk or in a bucket: Zarr 3 by TensorStore, each chunk with its checksum (CRC-32C)."""

import contextlib
import errno
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore

from keras_influence.storage.errors import TornStoreError

# What a chunk holds where nothing else is asked for: large enough for a disk to be fast.
_CHUNK_BYTES = 2**22


def url(path: str | os.PathLike) -> str:
    """A directory's URL, with a slash at its end: `gs://` and `s3://` as they are, else a file."""
    text = os.fspath(path)
    if "://" not in text:
        text = pathlib.Path(text).absolute().as_uri()
    return text.rstrip("/") + "/"


def is_local(path: str | os.PathLike) -> bool:
    return "://" not in os.fspath(path)


class ArrayFile:
    """One array of a store.

    Args:
        directory: of the store; see `url`.
        name: of the array in it.
        shape: of the array.
        dtype: a name that Zarr knows: float32, float64, int64, bool, bfloat16.
        chunk: shape of what is read and written at once; runs of rows by default.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        name: str,
        shape: Sequence[int],
        dtype: str,
        chunk: Sequence[int] | None = None,
    ):
        self.directory = directory
        self.name = name
        self.location = f"{url(directory)}{name}/"
        self.path = pathlib.Path(directory) / name if is_local(directory) else None
        self.shape = tuple(int(size) for size in shape)
        self.dtype = dtype
        self.chunk = tuple(chunk) if chunk is not None else _rows(self.shape, dtype)

    def describe(self) -> dict[str, Any]:
        """What `ArrayFile` needs to know of the array, as JSON values."""
        return {"shape": self.shape, "dtype": self.dtype, "chunk": self.chunk}

    def _spec(self) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": self.location,
            "metadata": {
                "shape": self.shape,
                "data_type": self.dtype,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": self.chunk},
                },
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
                "fill_value": False if self.dtype == "bool" else 0,
            },
            # A chunk of zeros is written too: one that is absent is lost.
            "store_data_equal_to_fill_value": True,
        }

    def create(self) -> tensorstore.TensorStore:
        """The array, new; one that is there is emptied."""
        with readable_errors(self.location):
            return tensorstore.open(
                self._spec(), create=True, delete_existing=True, context=context()
            ).result()

    def open(self) -> tensorstore.TensorStore:
        """The array as it is there.

        Raises:
            TornStoreError: one that is absent, or of another shape or kind.
        """
        with readable_errors(self.location):
            return tensorstore.open(self._spec(), open=True, context=context()).result()

    def chunks(self) -> set[tuple[int, ...]]:
        """Places in the grid of the chunks that are there."""
        with readable_errors(self.location):
            keys = key_value_store(self.location).list().result()
        pattern = re.compile(r"c((?:/\d+)*)")
        found = (pattern.fullmatch(key.decode()) for key in keys)
        return {tuple(map(int, match[1].split("/")[1:])) for match in found if match}

    def read(self) -> np.ndarray:
        """All of the array, every chunk checked.

        Raises:
            TornStoreError: a chunk that is absent or does not match its checksum.
        """
        self.check_whole()
        with readable_errors(self.location):
            return np.asarray(self.open().read().result())

    def check_whole(self) -> None:
        """Raises where a chunk is absent."""
        grid = [math.ceil(size / part) for size, part in zip(self.shape, self.chunk, strict=True)]
        expected, there = math.prod(grid), len(self.chunks())
        if there != expected:
            raise TornStoreError(
                f"{self.location} has {there} of its {expected} chunks: the store is incomplete."
            )


def _rows(shape: Sequence[int], dtype: str) -> tuple[int, ...]:
    if not shape:
        return ()
    row_bytes = max(1, math.prod(shape[1:]) * np.dtype(_numpy_name(dtype)).itemsize)
    rows = min(max(1, _CHUNK_BYTES // row_bytes), max(1, shape[0]))
    return (rows, *(max(1, size) for size in shape[1:]))


def _numpy_name(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


# What TensorStore says of an array that is absent, cut, altered, or of another kind.
_DAMAGE = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT")

_contexts: list[tensorstore.Context] = []


def context() -> tensorstore.Context:
    """Of all that this process opens, so that they share threads. No cache: it doubles memory."""
    if not _contexts:
        _contexts.append(tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}}))
    return _contexts[0]


def key_value_store(place: str) -> tensorstore.KvStore:
    """The files, or the objects of a bucket, under a URL."""
    return tensorstore.KvStore.open(place, context=context()).result()


@contextlib.contextmanager
def readable_errors(place: str) -> Iterator[None]:
    """TensorStore's errors as `TornStoreError`, or as the `OSError` that the system gave."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        system = re.search(r"os_error_code='(\d+)'", text)
        if system and int(system[1]) != errno.ENOENT:
            raise OSError(int(system[1]), os.strerror(int(system[1])), place) from error
        if not text.startswith(_DAMAGE):
            raise
        reason = text.split(" [tensorstore_spec=")[0]
        raise TornStoreError(f"{place} is missing, damaged or not ours: {reason}") from error
