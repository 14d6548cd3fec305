"""Records kept one by one, each whole or absent."""

import pathlib
from typing import Any

from keras_influence.storage.errors import TornStoreError
from keras_influence.storage.files import sealed, unsealed, write_json


class Records:
    """JSON records in a directory of their own, numbered from 0, written in order.

    Args:
        directory: made where it is not there.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._count = 0

    def read(self) -> list[dict[str, Any]]:
        """Those that are there, up to the first gap.

        Raises:
            TornStoreError: one that is damaged.
        """
        found: list[dict[str, Any]] = []
        while (file := self._file(len(found))).exists():
            record = unsealed(file.read_bytes(), str(file))
            if record.get("number") != len(found):
                raise TornStoreError(f"{file} is the record of another number: it was moved.")
            found.append(record)
        self._count = len(found)
        return found

    def add(self, record: dict[str, Any]) -> None:
        """Writes the next one; when this returns, it is on the disk."""
        write_json(self._file(self._count), sealed({**record, "number": self._count}))
        self._count += 1

    def _file(self, number: int) -> pathlib.Path:
        return self.directory / f"{number:08d}.json"
