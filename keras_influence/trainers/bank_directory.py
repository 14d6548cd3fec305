"""What a bank of retrainings is on the disk: its recipe, its subsets, and one store a part."""

import json
import os
import pathlib
import shutil
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keras_influence import storage

_RECORD = "bank.json"
_SUBSETS = "subsets"
_RUNS = "runs"
_CLAIMS = "claims"
# How long another process may take to begin the same bank.
_PATIENCE_SECONDS = 60.0


class Run(NamedTuple):
    """One training run of a bank.

    Attributes:
        number: its place among the bank's runs: all subsets once, then all once more.
        subset: row of the masks that it trains on.
        repeat: how many times that subset was trained on before.
    """

    number: int
    subset: int
    repeat: int


class StoredBank:
    """A bank of retrainings as it lies on the disk, for what only reads it.

    Args:
        directory: of a `RetrainingBank`.

    Raises:
        FileNotFoundError: when there is no bank.
        storage.TornStoreError: when a file of it was altered.

    Example:

    ```python
    bank = ki.trainers.StoredBank("banks/mnist")
    losses = bank.losses("margin")  # [subsets, queries]
    score = ki.evaluation.linear_datamodeling_score(scores, bank.masks, losses)
    ```
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        record = self.directory / _RECORD
        if not record.exists():
            raise FileNotFoundError(
                f"There is no bank at {directory}: make one with `RetrainingBank`."
            )
        self.record = storage.unsealed(record.read_bytes(), str(record))
        self.masks: NDArray[np.bool_] = storage.load_store(self.directory / _SUBSETS)[1]["masks"]

    @staticmethod
    def begin(
        directory: str | os.PathLike, record: dict[str, Any], masks: NDArray[np.bool_]
    ) -> None:
        """Makes the bank that `record` describes, where it is not there yet.

        Raises:
            ValueError: when another bank, or something else, is there.
        """
        path = pathlib.Path(directory)
        record = json.loads(json.dumps(record))
        file = path / _RECORD
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not file.exists():
            try:
                with storage.writing(path):
                    if not file.exists():
                        _fill(path, record, masks)
            except storage.StoreInUseError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        found = storage.unsealed(file.read_bytes(), str(file))
        if found != record:
            names = sorted(
                key for key in found.keys() | record.keys() if found.get(key) != record.get(key)
            )
            described = "; ".join(
                f"{name}: {found.get(name)!r} there, {record.get(name)!r} now" for name in names
            )
            raise ValueError(
                f"{directory} holds a bank of something else ({described}). Go on with what it "
                "was begun with, choose another directory, or remove this one."
            )

    @property
    def names(self) -> list[str]:
        """Of the measurements."""
        return self.record["names"]

    @property
    def repeats(self) -> int:
        """How many times each subset is trained on."""
        return self.record["repeats"]

    @property
    def runs(self) -> list[Run]:
        """All runs, those that are done and those that are not."""
        count = len(self.masks)
        return [Run(n, n % count, n // count) for n in range(count * self.repeats)]

    @property
    def parts(self) -> list[list[Run]]:
        """Runs that are trained and written at once: in a row, on as many examples each."""
        sizes = self.masks.sum(axis=1)
        parts: list[list[Run]] = []
        for run in self.runs:
            last = parts[-1] if parts else []
            same = last and sizes[last[0].subset] == sizes[run.subset]
            if same and len(last) < self.record["stack"]:
                last.append(run)
            else:
                parts.append([run])
        return parts

    def is_done(self, part: list[Run]) -> bool:
        return self._path(part).exists()

    @property
    def num_done(self) -> int:
        """Runs that are on the disk."""
        return sum(len(part) for part in self.parts if self.is_done(part))

    def outputs(self, name: str = "loss", on: str = "queries") -> NDArray[np.float32]:
        """What was measured after every run.

        Args:
            name: of the measurement.
            on: `"queries"`, or `"train"` for all training examples, those left out included.

        Returns:
            float32 [subsets, repeats, examples].

        Raises:
            ValueError: when runs are still to be done, or the bank has no such measurement.
        """
        if name not in self.names or on not in ("queries", "train"):
            raise ValueError(
                f"The bank measured {self.names} on queries and train. Received: {name!r} on "
                f"{on!r}."
            )
        if on == "queries" and not self.record["num_queries"]:
            raise ValueError('The bank has no queries: ask for those on="train".')
        parts = self.parts
        left = sum(len(part) for part in parts if not self.is_done(part))
        if left:
            raise ValueError(
                f"{left} of the {len(self.runs)} runs of {self.directory} are still to be done: "
                "call `run()`."
            )
        row = self.names.index(name)
        rows = [
            values[row] for part in parts for values in storage.load_store(self._path(part))[1][on]
        ]
        return np.stack(rows).reshape(self.repeats, len(self.masks), -1).swapaxes(0, 1)

    def losses(self, name: str = "loss", on: str = "queries") -> NDArray[np.float32]:
        """What was measured, the mean over repeats, so that more is worse.

        Margins change their sign, and correctness becomes error; a measurement of one's own is
        taken to be a loss.

        Args: as of `outputs`.

        Returns:
            float32 [subsets, examples].
        """
        values = self.outputs(name, on).mean(axis=1)
        return {"margin": -values, "correct": 1 - values}.get(name, values)

    def seconds(self) -> float:
        """What the runs that are done took, summed."""
        return sum(
            storage.read_manifest(self._path(part))["seconds"]
            for part in self.parts
            if self.is_done(part)
        )

    def claim(self, part: list[Run]) -> Any:
        """Holds a part against other processes; see `storage.writing`."""
        return storage.writing(self.directory / _CLAIMS / self._path(part).name)

    def write(
        self, part: list[Run], manifest: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> None:
        """Makes a part done. Only who has claimed it may."""
        path = self._path(part)
        for torn in path.parent.glob(f".{path.name}.*.partial"):
            shutil.rmtree(torn)
        storage.save_store(path, manifest, arrays)

    def _path(self, part: list[Run]) -> pathlib.Path:
        return self.directory / _RUNS / f"{part[0].number:08d}"


def _fill(path: pathlib.Path, record: dict[str, Any], masks: NDArray[np.bool_]) -> None:
    others = [file.name for file in path.iterdir() if not file.name.startswith(".")]
    if others and others != [_SUBSETS]:
        raise ValueError(
            f"{path} holds no bank, but {sorted(others)[:3]}. Choose a directory of its own."
        )
    shutil.rmtree(path / _SUBSETS, ignore_errors=True)
    storage.save_store(path / _SUBSETS, {}, {"masks": masks})
    # Last: without it, what lies there is no bank yet.
    storage.write_json(path / _RECORD, storage.sealed(record))
