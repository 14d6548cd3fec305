"""A directory of arrays with a manifest: whole, or not there.

Everything is first written into a hidden sibling directory, flushed to disk, and then renamed, so
that a process killed at any instant leaves either no store or a complete one. Arrays are `.npy`
files; the manifest lists each one's size and SHA-256, so that a torn or edited file is found out
when it is read, not when its numbers have been used.
"""

import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"


class TornStoreError(OSError):
    """A store or checkpoint on disk is incomplete or does not match its manifest."""


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON so that `path` holds the old content or the new, never a part."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def commit_directory(path: str | os.PathLike, fill: Callable[[pathlib.Path], None]) -> None:
    """Creates directory `path` with the files that `fill(directory)` writes, all or nothing.

    Raises:
        FileExistsError: when `path` exists; nothing is touched.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise FileExistsError(
            f"{path} exists and is not overwritten. Remove it, or choose another path."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    temporary.mkdir()
    try:
        fill(temporary)
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def save_store(
    path: str | os.PathLike, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes `arrays` and then `manifest` into the new directory `path`.

    Args:
        path: a directory that does not exist yet; its parents are made.
        manifest: JSON values; the key `format_version` and `arrays` are added.
        arrays: name -> array.

    Raises:
        FileExistsError: when `path` exists.
        OSError: when the disk is full or the place cannot be written; no partial store is left.
    """

    def fill(directory: pathlib.Path) -> None:
        listing = {}
        for name, array in arrays.items():
            file = directory / f"{name}.npy"
            np.save(file, array, allow_pickle=False)
            listing[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        write_json(
            directory / _MANIFEST,
            {**manifest, "format_version": FORMAT_VERSION, "arrays": listing},
        )

    commit_directory(path, fill)


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the store at `path`.

    Raises:
        FileNotFoundError: when there is no store at `path`.
        TornStoreError: when the manifest is missing or is not JSON.
        ValueError: when a newer version of the library wrote it.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no directory at {path}.")
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TornStoreError(
            f"{path} has no {_MANIFEST}: it was not written by `save`, or is incomplete."
        ) from None
    except ValueError as error:
        raise TornStoreError(f"{path / _MANIFEST} is damaged: {error}.") from error
    version = manifest.get("format_version")
    if not isinstance(version, int):
        raise TornStoreError(f"{path / _MANIFEST} names no format_version: not one of ours.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this keras_influence reads up to "
            f"{FORMAT_VERSION}. Upgrade keras_influence."
        )
    return manifest


def load_store(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Manifest and arrays of the store at `path`, each array checked against the manifest.

    Raises:
        FileNotFoundError, TornStoreError, ValueError: as `read_manifest`; `TornStoreError` also
            when an array's file is missing, shortened or altered.
    """
    path = pathlib.Path(path)
    manifest = read_manifest(path)
    arrays = {}
    for name, expected in manifest["arrays"].items():
        file = path / f"{name}.npy"
        if not file.exists():
            raise TornStoreError(f"{file} is missing: the store is incomplete. Save it again.")
        if file.stat().st_size != expected["bytes"] or file_sha256(file) != expected["sha256"]:
            raise TornStoreError(
                f"{file} does not match the manifest (truncated or altered). Save it again."
            )
        arrays[name] = np.load(file, allow_pickle=False)
    return manifest, arrays
