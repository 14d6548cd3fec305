"""A directory of arrays with a manifest: whole, or not there.

On a local disk everything is first written into a hidden sibling directory, flushed, and then
renamed, so that a process killed at any instant leaves either no store or a complete one. In a
bucket, which renames nothing, the manifest is written last, and what has none is no store. Arrays
are Zarr 3 with a checksum in every chunk, and the manifest has one too, so that a torn or edited
file is found out when it is read, not when its numbers have been used.
"""

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from keras_influence.storage.errors import TornStoreError
from keras_influence.storage.files import commit_directory, sealed, unsealed, write_json
from keras_influence.storage.rows import StoredRows
from keras_influence.storage.zarr import (
    ArrayFile,
    is_local,
    key_value_store,
    readable_errors,
    url,
)

FORMAT_VERSION = 2
MANIFEST = "manifest.json"

# Rows of an array that is not in memory are copied so many bytes at a time.
_COPY_BYTES = 2**26


class _Rows(Protocol):
    """An array, or what gives its rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice) -> np.ndarray: ...


def save_store(
    path: str | os.PathLike, manifest: Mapping[str, Any], arrays: Mapping[str, _Rows]
) -> None:
    """Writes `arrays` and then `manifest` into the new directory `path`.

    Args:
        path: a directory that does not exist yet; its parents are made. Or the URL of a place in a
            bucket, `gs://...` or `s3://...`.
        manifest: JSON values; the keys `format_version` and `arrays` are added.
        arrays: name -> array, or what gives slices of its rows.

    Raises:
        FileExistsError: when `path` exists.
        OSError: when the disk is full or the place cannot be written; no partial store is left.
    """

    if is_local(path):
        commit_directory(path, lambda directory: fill_store(directory, manifest, arrays))
        return
    with readable_errors(url(path)):
        if key_value_store(url(path)).list().result():
            raise FileExistsError(
                f"{path} is not empty and is not overwritten. Remove it, or choose another place."
            )
    fill_store(path, manifest, arrays)


def fill_store(
    path: str | os.PathLike, manifest: Mapping[str, Any], arrays: Mapping[str, _Rows]
) -> None:
    """Writes `arrays`, and then `manifest`, into a directory that may hold other things.

    `StoredRows` of this directory by their own name stay where they are.
    """
    listing = {}
    for name, array in arrays.items():
        as_stored = (
            (array.file.dtype, array.file.chunk)
            if isinstance(array, StoredRows)
            else (np.dtype(array.dtype).name,)
        )
        file = ArrayFile(path, name, array.shape, *as_stored)
        if not (isinstance(array, StoredRows) and array.file.location == file.location):
            _write(file, array)
        listing[name] = file.describe()
    whole = sealed({**manifest, "format_version": FORMAT_VERSION, "arrays": listing})
    if is_local(path):
        write_json(pathlib.Path(path) / MANIFEST, whole)
        return
    with readable_errors(url(path)):
        key_value_store(url(path)).write(MANIFEST, json.dumps(whole).encode()).result()


def _write(file: ArrayFile, array: _Rows) -> None:
    stored = file.create()
    with readable_errors(file.location):
        if isinstance(array, np.ndarray):
            stored.write(array).result()
            return
        rows = max(1, _COPY_BYTES // (array.shape[1] * array.dtype.itemsize))
        rows = -(-rows // file.chunk[0]) * file.chunk[0]
        for start in range(0, array.shape[0], rows):
            stop = min(start + rows, array.shape[0])
            stored[start:stop].write(array[start:stop]).result()


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the store at `path`.

    Raises:
        FileNotFoundError: when there is no store at `path`.
        TornStoreError: when the manifest is missing, or is not what was written.
        ValueError: when another version of the library wrote it.
    """
    place = f"{path}/{MANIFEST}"
    if is_local(path):
        if not pathlib.Path(path).is_dir():
            raise FileNotFoundError(f"There is no directory at {path}.")
        file = pathlib.Path(path) / MANIFEST
        text = file.read_bytes() if file.exists() else None
    else:
        with readable_errors(url(path)):
            value = key_value_store(url(path)).read(MANIFEST).result()
        text = value.value if value.state == "value" else None
    if text is None:
        raise TornStoreError(
            f"{path} has no {MANIFEST}: it was not written by `save`, or is incomplete."
        )
    version = _version(text, place)
    if version != FORMAT_VERSION:
        advice = "Upgrade keras_influence." if version > FORMAT_VERSION else "Save it anew."
        raise ValueError(
            f"{path} has format version {version}; this keras_influence reads {FORMAT_VERSION}. "
            f"{advice}"
        )
    return unsealed(text, place)


def _version(text: bytes, place: str) -> int:
    # Before the checksum, which another version may reckon otherwise.
    try:
        version = json.loads(text).get("format_version")
    except (ValueError, AttributeError) as error:
        raise TornStoreError(f"{place} is damaged: {error}.") from error
    if not isinstance(version, int):
        raise TornStoreError(f"{place} names no format_version: not one of ours.")
    return version


def load_store(
    path: str | os.PathLike, in_place: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and arrays of the store at `path`, every chunk checked.

    Args:
        path: as `save_store` was given.
        in_place: names of arrays that are not read now: their rows are, when they are asked for,
            and checked then.

    Raises:
        FileNotFoundError, TornStoreError, ValueError: as `read_manifest`; `TornStoreError` also
            when a chunk of an array is missing, shortened or altered.
    """
    manifest = read_manifest(path)
    arrays: dict[str, Any] = {}
    for name, described in manifest["arrays"].items():
        file = ArrayFile(path, name, **described)
        if name in in_place:
            arrays[name] = StoredRows.open(file)
            arrays[name].check_whole()
        else:
            arrays[name] = file.read()
    return manifest, arrays
