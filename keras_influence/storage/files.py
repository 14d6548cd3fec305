"""Small files and directories that are whole or absent, whatever kills the process."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from keras_influence.storage.errors import StoreInUseError, TornStoreError

_LOCK = ".lock"
_CHECKSUM = "checksum"


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: pathlib.Path) -> None:
    """Waits until a file or directory is on the disk."""
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
    sync(path.parent)


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its checksum in it, to be written as JSON."""
    return {**record, _CHECKSUM: _checksum(record)}


def unsealed(text: str | bytes, place: str) -> dict[str, Any]:
    """The record that `sealed` was given, from its JSON.

    Raises:
        TornStoreError: what is no such JSON, or was altered.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise TornStoreError(f"{place} is damaged: {error}.") from error
    if not isinstance(record, dict) or _CHECKSUM not in record:
        raise TornStoreError(f"{place} is not one of ours: it holds no checksum.")
    checksum = record.pop(_CHECKSUM)
    if checksum != _checksum(record):
        raise TornStoreError(f"{place} does not match its checksum: it was altered.")
    return record


def _checksum(record: dict[str, Any]) -> str:
    # As JSON gives it back: tuples as lists, keys in any order.
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def writing(directory: pathlib.Path) -> Iterator[None]:
    """Holds `directory` against other processes that write in it; a killed one lets go.

    Raises:
        StoreInUseError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / _LOCK, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise StoreInUseError(
                f"Another process is writing in {directory}. Wait until it ends, or choose another "
                "directory."
            ) from None
        yield
