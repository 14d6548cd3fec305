"""Records the checkpoints that TracIn sums over, while `model.fit` runs."""

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import logging

from keras_influence.callbacks.rate_meter import RateMeter, inner_optimizer
from keras_influence.callbacks.run_directory import RunDirectory
from keras_influence.checkpoints import (
    CHECKPOINT_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    HistoryEntry,
    architecture_fingerprint,
    weight_values,
    weights_fingerprint,
)
from keras_influence.distribution import is_chief
from keras_influence.storage import arrays_fingerprint, file_sha256, write_json


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What the checkpoints of one callback cost.

    Attributes:
        count: checkpoints written.
        bytes_per_checkpoint: median size of a weights file.
        seconds_per_checkpoint: median time until a checkpoint is safely on disk.
        seconds_total: time spent on the checkpoints and on the history of the run.
        share_of_training: `seconds_total` over the time of the finished calls of `fit`.
    """

    count: int
    bytes_per_checkpoint: int
    seconds_per_checkpoint: float
    seconds_total: float
    share_of_training: float


class TracInCheckpoint(keras.callbacks.Callback):
    """Saves weights, step and current learning rate, for TracIn to sum over.

    A checkpoint is complete or absent, whenever the process is killed, and is not written when a
    weight is NaN or infinite (a warning names the step). Under a distribution strategy only the
    chief writes.

    A directory belongs to one run. `fit` continues it when the model has weights that the run has
    had at its start or end, at an epoch's end or at a checkpoint: in a second `fit`, after
    `model.load_weights` of a checkpoint, or after `keras.callbacks.BackupAndRestore`, which must
    back up whole epochs (its default) for that. Every other model is refused. The checkpoints after
    the point where a run is taken up again are moved to `superseded-<n>/`.

    The rate is read after the last batch before a checkpoint, so that a callback which changes it
    at the end of an epoch does not leak the next epoch's rate. A checkpoint also holds the
    optimizer's state, so training can go on from it.

    Args:
        directory: where the run is recorded; new, empty, or of the same run.
        save_freq: `"epoch"`, or n to save every n batches, counted through all epochs. A batch
            counts when the optimizer has made its step: with `gradient_accumulation_steps` or
            `steps_per_execution`, a checkpoint comes at the first step at or after the n-th batch.
        epochs: numbers of the epochs to save at the end of, from 0 as `initial_epoch` counts;
            every epoch by default. Only with `save_freq="epoch"`.

    Raises:
        ValueError: by `fit`, when the directory holds another run or files of another kind.
        RuntimeError: by `fit`, when another process has taken over the directory meanwhile.
        OSError: by `fit`, when a checkpoint cannot be written; those before it stay whole.

    Example:

    ```python
    recorder = ki.callbacks.TracInCheckpoint("runs/mnist")
    model.fit(train, epochs=10, callbacks=[recorder])
    recorder.report().seconds_per_checkpoint
    ```

    Source: Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent",
    NeurIPS 2020, section 3.2 (TracInCP).
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        save_freq: str | int = "epoch",
        epochs: Sequence[int] | None = None,
    ):
        super().__init__()
        by_batch = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0
        if save_freq != "epoch" and not by_batch:
            raise ValueError(
                "`save_freq` must be 'epoch' or a positive number of batches. "
                f"Received: save_freq={save_freq!r}."
            )
        if epochs is not None:
            if save_freq != "epoch":
                raise ValueError(
                    "`epochs` goes only with save_freq='epoch'. Received: "
                    f"save_freq={save_freq}, epochs={epochs}."
                )
            epochs = list(epochs)
            if not epochs or any(int(epoch) != epoch or epoch < 0 for epoch in epochs):
                raise ValueError(
                    "`epochs` must be a list of epoch numbers, counted from 0. Received: "
                    f"epochs={epochs}."
                )
        self.directory = pathlib.Path(directory)
        self.save_freq = save_freq
        self.epochs = None if epochs is None else frozenset(int(epoch) for epoch in epochs)
        self.records: list[Checkpoint] = []
        self._run: RunDirectory | None = None
        self._meter: RateMeter | None = None
        self._offset = 0  # step of the run minus step of the optimizer
        self._periods = 0  # how many times `save_freq` batches have passed
        self._epoch, self._batch = 0, -1
        self._seconds: list[float] = []
        self._seconds_total = self._fit_seconds = self._fit_started = 0.0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        # The run is opened at the first epoch: by then every callback has restored what it does.
        self._run = self._meter = None
        self._fit_started = time.perf_counter()
        planned = (self.params or {}).get("epochs")
        late = sorted(e for e in self.epochs or () if planned is not None and e >= planned)
        if late:
            logging.warning(
                "TracInCheckpoint: epochs %s are not reached; `fit` stops before epoch %d "
                "(counted from 0).",
                late,
                planned,
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not is_chief(self.model):
            return
        self._epoch, self._batch = epoch, -1
        if self._meter is None:
            self._meter = RateMeter(self.model)
        # A model that is not built yet has no weights before its first batch.
        if self._run is None and self.model.built:
            self._run = self._open_run(self._meter)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._meter is None:
            return
        self._meter.advance()
        self._batch = batch
        if self._run is None:
            self._run = self._open_run(self._meter)
        periods = self._count_periods(self._run, self._meter)
        if periods > self._periods:
            self._record(self._run, self._meter, save=True)
        self._periods = periods

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._run is None or self._meter is None:
            return
        chosen = self.epochs is None or epoch in self.epochs
        self._record(self._run, self._meter, save=self.save_freq == "epoch" and chosen)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._run is None or self._meter is None:
            return
        # They may not be the last epoch's (EarlyStopping, moving averages), and a later `fit`
        # continues from them.
        self._record(self._run, self._meter, save=False)
        self._fit_seconds += time.perf_counter() - self._fit_started
        report = self.report()
        logging.info(
            "TracInCheckpoint: %d checkpoints in %s, %.2f MB and %.3f s each, %.1f%% of training.",
            report.count,
            self.directory,
            report.bytes_per_checkpoint / 1e6,
            report.seconds_per_checkpoint,
            100 * report.share_of_training,
        )

    def report(self) -> CheckpointReport:
        """Time and bytes of the checkpoints that this callback has written so far."""
        return CheckpointReport(
            count=len(self._seconds),
            bytes_per_checkpoint=int(statistics.median([r.bytes for r in self.records] or [0])),
            seconds_per_checkpoint=statistics.median(self._seconds or [0.0]),
            seconds_total=self._seconds_total,
            share_of_training=self._seconds_total / self._fit_seconds if self._fit_seconds else 0.0,
        )

    def _open_run(self, meter: RateMeter) -> RunDirectory:
        started = time.perf_counter()
        self._offset = self._periods = 0
        now = self._entry(meter, weights_fingerprint(self.model))
        architecture = architecture_fingerprint(self.model)
        run = RunDirectory(self.directory, architecture, now, meter.first_step, self.save_freq)
        if run.continued:
            self.records = [record for record in self.records if record.step <= run.entry.step]
            # An optimizer that was made anew counts from 0 again; the run's steps go on.
            self._offset = run.entry.step - now.step
            meter.total += run.entry.learning_rate_sum
            self._periods = self._count_periods(run, meter)
            if run.entry.checkpoint and not run.entry.written:
                self._commit(run, run.entry)  # Its process was stopped while it wrote this one.
        self._seconds_total += time.perf_counter() - started
        return run

    def _count_periods(self, run: RunDirectory, meter: RateMeter) -> int:
        if self.save_freq == "epoch":
            return 0
        steps = meter.step + self._offset - run.run.first_step
        return steps * meter.batches_per_step // int(self.save_freq)

    def _entry(self, meter: RateMeter, fingerprint: str) -> HistoryEntry:
        meter.settle()
        return HistoryEntry(
            step=meter.step + self._offset,
            epoch=self._epoch,
            batch=self._batch,
            learning_rate=meter.rate,
            learning_rate_sum=meter.total,
            fingerprint=fingerprint,
        )

    def _record(self, run: RunDirectory, meter: RateMeter, save: bool) -> None:
        started = time.perf_counter()
        values = weight_values(self.model)
        entry = self._entry(meter, arrays_fingerprint(values))
        if save and not all(np.isfinite(value).all() for value in values):
            logging.warning(
                "TracInCheckpoint: no checkpoint at step %d: a weight is NaN or infinite.",
                entry.step,
            )
            save = False
        if save:
            entry = dataclasses.replace(entry, checkpoint=f"checkpoint-{entry.step:08d}")
        # First the history: a run that is killed while it writes a checkpoint knows its weights.
        if run.append(entry) and save:
            self._commit(run, entry)
        self._seconds_total += time.perf_counter() - started

    def _commit(self, run: RunDirectory, entry: HistoryEntry) -> None:
        started = time.perf_counter()
        architecture = run.run.architecture
        checkpoint = run.commit(entry, lambda directory: self._fill(directory, entry, architecture))
        if checkpoint is not None:
            self.records.append(checkpoint)
            self._seconds.append(time.perf_counter() - started)

    def _fill(self, directory: pathlib.Path, entry: HistoryEntry, architecture: str) -> None:
        started = time.perf_counter()
        file = directory / WEIGHTS_FILE
        _reserve(file, self.model)
        self.model.save_weights(file)
        optimizer = inner_optimizer(self.model)
        momentum = getattr(optimizer, "momentum", None)
        record = dataclasses.asdict(entry) | {
            "momentum": None if momentum is None else float(momentum),
            "optimizer": type(optimizer).__name__,
            "architecture": architecture,
            "num_parameters": sum(value.size for value in weight_values(self.model)),
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
            "seconds": time.perf_counter() - started,
            "keras_version": keras.__version__,
        }
        del record["checkpoint"], record["written"]
        write_json(directory / CHECKPOINT_FILE, record)


def _reserve(file: pathlib.Path, model: keras.Model) -> None:
    """Raises OSError when the disk has no room for the weights of `model` in `file`.

    HDF5 itself cannot be asked: when it fails to write while it closes a file, it may end the whole
    process with a segmentation fault.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    variables = [*model.variables, *model.optimizer.variables]
    # HDF5 adds about 1 kB for the name and the layout of each variable.
    size = sum(variable.numpy().nbytes + 2048 for variable in variables) + 16384
    with open(file, "wb") as reserved:
        os.posix_fallocate(reserved.fileno(), 0, size)
    file.unlink()
