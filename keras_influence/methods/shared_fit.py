"""A fit in a directory, in the hands of one process, or of the first of several workers."""

import functools
import pathlib
import shutil
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from keras_influence import storage
from keras_influence.linalg import Restart, Step
from keras_influence.methods.resumption import (
    SUMS,
    FitDirectory,
    StepJournal,
    step_of,
    step_record,
)
from keras_influence.workers import Workers


class SharedFit:
    """A `FitDirectory` of the chief, which tells the other workers what it holds.

    The others keep what the chief keeps on its disk in memory; or, where the iteration's vectors
    are to be on the disk, in a hidden directory beside the one that was given, on their own disk,
    where nothing is left from before.

    Args:
        path: the directory.
        identity: all that the fit's numbers depend on, as JSON values.
        workers: that fit together; every one calls the same functions in the same order.
    """

    def __init__(self, path: pathlib.Path, identity: dict[str, Any], workers: Workers):
        self._workers = workers
        self._directory: FitDirectory | None = None
        self.place = path if workers.chief else path.with_name(f".{path.name}.{workers.name}")
        workers.agree("fit", identity)

        def open_there() -> None:
            self._directory = FitDirectory(path, identity)

        workers.told(open_there)
        if not workers.chief:
            shutil.rmtree(self.place, ignore_errors=True)

    @property
    def _own(self) -> FitDirectory:
        """Of the chief, who alone asks for it."""
        assert self._directory is not None
        return self._directory

    def begin(self) -> None:
        """See `FitDirectory.begin`."""
        self._workers.told(lambda: self._own.begin())

    @property
    def sums(self) -> pathlib.Path:
        """Where the chief of such a fit keeps what it needs to go on."""
        return self.place / SUMS

    @property
    def finished(self) -> bool:
        return self._workers.told(lambda: self._own.finished)

    def load(self, large: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Manifest and arrays of a fit that is finished; the large ones stay on the disk."""
        loaded: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def manifest() -> dict[str, Any]:
            loaded.append(storage.load_store(self._own.path, large))
            return loaded[0][0]

        def array(name: str) -> np.ndarray:
            return loaded[0][1][name]

        told = self._workers.told(manifest)
        arrays: dict[str, Any] = {}
        for name, described in told["arrays"].items():
            if name not in large:
                arrays[name] = self._workers.given(functools.partial(array, name))
                continue
            if self._workers.chief:
                arrays[name] = loaded[0][1][name]
            else:
                file = storage.ArrayFile(self.place, name, **described)
                arrays[name] = storage.StoredRows(file, file.create(), 0)
            self._follow(arrays[name], len(loaded[0][1][name]) if loaded else 0)
        return told, arrays

    def basis(
        self, num_rows: int, size: int, dtype: Any, budget: float, memory: Any = None
    ) -> storage.StoredRows | None:
        """The vectors that the chief has on its disk.

        Args:
            num_rows, size, dtype, budget: as for `FitDirectory.basis`.
            memory: a basis that the other workers put them into, instead of rows on their disks.

        Returns:
            `None` for those who have them in `memory`.
        """
        stored: list[storage.StoredRows] = []

        def count() -> int:
            stored.append(self._own.basis(num_rows, size, dtype, budget))
            return stored[0].shape[0]

        told = self._workers.told(count)
        if self._workers.chief:
            self._follow(stored[0], told)
            return stored[0]
        rows = None
        if memory is None:
            shape = (num_rows, size)
            width = storage.block_width(shape, dtype, budget)
            rows = storage.StoredRows.create(self.place, "basis", shape, dtype, width)
        self._follow(memory if rows is None else rows, told)
        return rows

    def _follow(self, rows: Any, count: int) -> None:
        """Gives the other workers the chief's rows, one by one."""
        if not self._workers.several:
            return

        def read(row: int) -> np.ndarray:
            return rows[row : row + 1][0]

        for row in range(self._workers.told(lambda: count)):
            given = self._workers.given(functools.partial(read, row))
            if not self._workers.chief:
                rows.append(given)

    def finish(self, manifest: dict[str, Any], arrays: dict[str, Any]) -> None:
        self._workers.told(lambda: self._own.finish(manifest, arrays))
        if not self._workers.chief:
            for place in self.place.glob("basis*"):
                shutil.rmtree(place, ignore_errors=True)

    def journal(self, after: Callable[[], None]) -> "SharedJournal":
        """Of the iteration's steps; `after` is called when one is on the disk."""
        # On SIGTERM the chief leaves when the others know that the step is done.
        own = self._own.journal(lambda: None) if self._workers.chief else None
        return SharedJournal(own, self._workers, after)


class SharedJournal:
    """A `StepJournal` of the chief; see `linalg.Journal`."""

    def __init__(self, own: StepJournal | None, workers: Workers, after: Callable[[], None]):
        self._own = own
        self._workers = workers
        self._after = after
        self._known: list[Step | Restart] | None = None

    def steps(self) -> list[Step | Restart]:
        if self._known is None:

            def records() -> list[dict[str, Any]]:
                assert self._own is not None
                return [step_record(step) for step in self._own.steps()]

            self._known = [step_of(record) for record in self._workers.told(records)]
        return list(self._known)

    def record(self, step: Step | Restart) -> None:
        def write() -> None:
            assert self._own is not None
            self._own.record(step)

        self._workers.told(write)
        self._after()
