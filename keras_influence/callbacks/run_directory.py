"""The directory of one training run, as its one writer sees it. Knows no model."""

import dataclasses
import datetime
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable

from absl import logging

from keras_influence.checkpoints import (
    RUN_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    HistoryEntry,
    Run,
    checkpoint_directories,
    read_checkpoint,
    read_run,
    write_run,
)
from keras_influence.storage import commit_directory

_UNFINISHED = re.compile(r"\.(checkpoint-\d+\.[0-9a-f]{32}\.partial|run\.json\.[0-9a-f]{32})")


class RunDirectory:
    """Begins a run in `path` or takes one up again, and writes its history and checkpoints.

    Args:
        path: new, empty, or the directory of the same run.
        architecture: `architecture_fingerprint` of the model.
        now: the weights that the model has, as the optimizer counts its steps.
        first_step: the step of the optimizer before the first batch.
        save_freq: noted in the record.

    Attributes:
        run: the record, as it is on disk.
        entry: the moment of the run that `now` is.
        continued: whether the run was there before.

    Raises:
        NotADirectoryError: when `path` is a file.
        TornStoreError: when the record is damaged.
        ValueError: when `path` belongs to another run, or holds files of another kind.
    """

    def __init__(
        self,
        path: pathlib.Path,
        architecture: str,
        now: HistoryEntry,
        first_step: int,
        save_freq: str | int,
    ):
        self.path = path
        found = _find_run(path, architecture, now)
        self.continued = found is not None
        if found is None:
            path.mkdir(parents=True, exist_ok=True)
            self.entry = now
            self.run = Run(
                id=uuid.uuid4().hex,
                session="",
                architecture=architecture,
                started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                save_freq=save_freq,
                first_step=first_step,
                history=[now],
            )
        else:
            self.run, self.entry = found
            _supersede(path, self.entry.step)
            self.run.history = [e for e in self.run.history if e.step <= self.entry.step]
            logging.info(
                "TracInCheckpoint: run %s in %s goes on at step %d.",
                self.run.id,
                path,
                self.entry.step,
            )
        for leftover in _leftovers(path):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.run.session = uuid.uuid4().hex
        self.run.save_freq = save_freq
        write_run(path, self.run)

    def append(self, entry: HistoryEntry) -> bool:
        """Adds `entry` to the history; `False` if it says nothing new.

        Raises:
            RuntimeError: when another process has taken over the directory.
        """
        last = self.run.history[-1]
        if (last.step, last.fingerprint) == (entry.step, entry.fingerprint):
            if last.written or not entry.checkpoint:
                return False
            self.run.history.pop()
        self.run.history.append(entry)
        self._write()
        return True

    def commit(
        self, entry: HistoryEntry, fill: Callable[[pathlib.Path], None]
    ) -> Checkpoint | None:
        """Writes the checkpoint of `entry`, all or nothing, unless its step has one.

        Args:
            entry: one of the history.
            fill: writes the checkpoint's files into the directory that it is given.

        Returns:
            The new checkpoint, or `None` where there was one.

        Raises:
            OSError: when it cannot be written, as on a full disk.
        """
        path = self.path / str(entry.checkpoint)
        is_new = not path.exists()
        if is_new:
            try:
                commit_directory(path, fill)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"The checkpoint at step {entry.step} could not be written: {error}. The "
                    f"{len(checkpoint_directories(self.path))} checkpoints in {self.path} are "
                    "whole. Make room, then continue from the last one",
                ) from error
        checkpoint = read_checkpoint(path)
        if checkpoint.fingerprint != entry.fingerprint:
            logging.warning(
                "TracInCheckpoint: %s keeps the first weights of step %d; the model has changed "
                "without a step of its optimizer.",
                path,
                entry.step,
            )
        self.run.history[self.run.history.index(entry)] = dataclasses.replace(entry, written=True)
        self._write()
        return checkpoint if is_new else None

    def _write(self) -> None:
        try:
            session = read_run(self.path).session
        except OSError:
            session = "none"
        if session != self.run.session:
            raise RuntimeError(
                f"{self.path} does not hold the record of this `fit` any more: another one has "
                f"begun to record there, or {RUN_FILE} was replaced or removed. Expected session "
                f"{self.run.session}, found {session}. Give every run a directory of its own."
            )
        write_run(self.path, self.run)


def _find_run(
    path: pathlib.Path, architecture: str, now: HistoryEntry
) -> tuple[Run, HistoryEntry] | None:
    """The run in `path` and the moment of it that `now` is; `None` to begin a run."""
    if not (path / RUN_FILE).exists():
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file. Choose another path to record in.")
        present = set(path.iterdir()) if path.exists() else set()
        foreign = sorted(file.name for file in present.difference(_leftovers(path)))
        if foreign:
            raise ValueError(
                f"{path} holds {foreign[:3]} and no {RUN_FILE}: it is not the directory of a "
                "recorded run. Choose a new or an empty one."
            )
        return None
    run = read_run(path)
    if run.architecture == architecture:
        same = [entry for entry in run.history if entry.fingerprint == now.fingerprint]
        if same:
            return run, next((entry for entry in same if entry.step == now.step), same[-1])
    saved = checkpoint_directories(path)
    if not saved:
        logging.info("TracInCheckpoint: %s has a run without checkpoints; begun anew.", path)
        return None
    strange = run.architecture != architecture
    last = max(saved)
    raise ValueError(
        f"{path} holds run {run.id}, begun {run.started}, last checkpoint at step {last}. The "
        f"model that came, at step {now.step}, has "
        f"{'another architecture' if strange else 'weights that this run never had'}. To record a "
        "new run, choose another directory, or remove this one. To continue the run, first restore "
        f"weights that it has had, as by model.load_weights('{saved[last] / WEIGHTS_FILE}')."
    )


def _supersede(path: pathlib.Path, step: int) -> None:
    """Moves the checkpoints after `step` aside: from `step` on, the run takes another way."""
    late = [saved for at, saved in checkpoint_directories(path).items() if at > step]
    if not late:
        return
    number = 1
    while (path / f"superseded-{number}").exists():
        number += 1
    aside = path / f"superseded-{number}"
    aside.mkdir()
    for saved in late:
        os.rename(saved, aside / saved.name)
    logging.warning(
        "TracInCheckpoint: the run in %s goes on from step %d; its %d later checkpoints are now in "
        "%s.",
        path,
        step,
        len(late),
        aside,
    )


def _leftovers(path: pathlib.Path) -> list[pathlib.Path]:
    """What a killed process left half-written in `path`."""
    if not path.is_dir():
        return []
    return [file for file in path.iterdir() if _UNFINISHED.fullmatch(file.name)]
