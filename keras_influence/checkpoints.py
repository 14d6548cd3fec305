"""What `TracInCheckpoint` writes and `TracIn` reads: a run's record and its checkpoints.

A run directory holds `run.json` (which weights the run has had, and when) and one directory per
checkpoint, `checkpoint-<step>/`, with `model.weights.h5` and `checkpoint.json`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import keras
import numpy as np

from keras_influence.storage import TornStoreError, arrays_fingerprint, file_sha256, write_json

FORMAT_VERSION = 1
RUN_FILE = "run.json"
CHECKPOINT_FILE = "checkpoint.json"
WEIGHTS_FILE = "model.weights.h5"

_Record = TypeVar("_Record", "Checkpoint", "HistoryEntry", "Run")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One set of weights on disk, and the state of the optimizer that made it.

    Attributes:
        path: the checkpoint's directory.
        step: optimizer steps of the run up to these weights.
        epoch: number of the epoch as Keras counts, from 0.
        batch: number of the last batch of that epoch that these weights have seen, from 0.
        learning_rate: the optimizer's rate at this step, schedules evaluated.
        learning_rate_sum: sum over the run's steps so far of the rate that each used.
        momentum: the optimizer's `momentum`; `None` for one without (Adam and its kin).
        optimizer: class name of the optimizer.
        fingerprint: `weights_fingerprint` of the model at this step.
        architecture: `architecture_fingerprint` of the model.
        num_parameters: how many numbers the model's weights are.
        bytes: size of the weights file; as Keras writes it, it holds the optimizer's state too.
        sha256: SHA-256 of the weights file.
        seconds: time that writing the weights file took.
        keras_version: the Keras that wrote it.
    """

    path: pathlib.Path
    step: int
    epoch: int
    batch: int
    learning_rate: float
    learning_rate_sum: float
    momentum: float | None
    optimizer: str
    fingerprint: str
    architecture: str
    num_parameters: int
    bytes: int
    sha256: str
    seconds: float
    keras_version: str

    def verify(self) -> None:
        """Checks the weights file against the recorded size and SHA-256.

        Raises:
            TornStoreError: naming the file, when it is missing, shortened or altered.
        """
        _check_size(self)
        if file_sha256(self.path / WEIGHTS_FILE) != self.sha256:
            raise TornStoreError(
                f"{self.path / WEIGHTS_FILE} is not the file that {CHECKPOINT_FILE} describes: its "
                f"SHA-256 differs. Remove {self.path}, or restore it from a copy."
            )


@dataclasses.dataclass(frozen=True)
class HistoryEntry:
    """Weights that a run has had: at its start, at each end of an epoch, at each checkpoint.

    Attributes:
        checkpoint: name of the directory that was to hold these weights; `None` if none was due.
        written: whether that directory was completed.
    The others are as in `Checkpoint`.
    """

    step: int
    epoch: int
    batch: int
    learning_rate: float
    learning_rate_sum: float
    fingerprint: str
    checkpoint: str | None = None
    written: bool = False


@dataclasses.dataclass
class Run:
    """The record of one training run.

    Attributes:
        id: unique name of the run; a continuation keeps it.
        session: unique name of the `fit` that writes; each continuation has its own.
        architecture: `architecture_fingerprint` of the model.
        started: UTC time of the run's start, ISO 8601.
        save_freq: `save_freq` of the callback.
        first_step: the optimizer's step when the run began.
        history: oldest first.
    """

    id: str
    session: str
    architecture: str
    started: str
    save_freq: str | int
    first_step: int
    history: list[HistoryEntry]


def weight_values(model: keras.Model) -> list[np.ndarray]:
    """Values of the model's variables, in order, without the states of its random generators."""
    return [variable.numpy() for variable in _weights(model)]


def weights_fingerprint(model: keras.Model) -> str:
    """Fingerprint of the model's variables: shapes, dtypes and every bit, in order.

    The states of seed generators (dropout) are left out: they change with every training step and
    say nothing of the function that the model computes.
    """
    return arrays_fingerprint(weight_values(model))


def architecture_fingerprint(model: keras.Model) -> str:
    """Fingerprint of the names, shapes and dtypes of the model's variables, in order.

    Of a name only the last part counts, without a trailing counter, so that a model built twice in
    one process, or again in another, has one fingerprint.
    """
    described = [
        (
            re.sub(r"_\d+$", "", variable.path.rsplit("/", 1)[-1]),
            tuple(variable.shape),
            keras.backend.standardize_dtype(variable.dtype),
        )
        for variable in _weights(model)
    ]
    return hashlib.blake2b(repr(described).encode(), digest_size=16).hexdigest()


def read_run(directory: str | os.PathLike) -> Run:
    """The record of the run in `directory`.

    Raises:
        FileNotFoundError: when there is no such directory.
        TornStoreError: when `run.json` is missing or damaged.
        ValueError: when a newer version of the library wrote it.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"There is no directory at {directory}. Pass the directory that was given to "
            "TracInCheckpoint."
        )
    file = directory / RUN_FILE
    record = _read_json(file)
    version = record.pop("format_version", None)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}; this keras_influence reads up to "
            f"{FORMAT_VERSION}. Upgrade keras_influence."
        )
    entries = record.get("history")
    if not isinstance(entries, list) or not entries:
        raise TornStoreError(f"{file} is damaged: it has no history. Restore it from a copy.")
    record["history"] = [_parse(HistoryEntry, entry, file) for entry in entries]
    return _parse(Run, record, file)


def write_run(directory: str | os.PathLike, run: Run) -> None:
    """Replaces the run's record in `directory`, all or nothing."""
    record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(run)}
    write_json(pathlib.Path(directory) / RUN_FILE, record)


def checkpoint_directories(directory: str | os.PathLike) -> dict[int, pathlib.Path]:
    """Step -> directory of each checkpoint under `directory`, by step; nothing is opened."""
    paths = pathlib.Path(directory).glob("checkpoint-*")
    numbered = {int(p.name[11:]): p for p in paths if re.fullmatch(r"\d{8,}", p.name[11:])}
    return dict(sorted(numbered.items()))


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint in directory `path`; the size of its weights is checked, not the content.

    Raises:
        TornStoreError: naming the file that is missing, shortened or damaged.
    """
    path = pathlib.Path(path)
    file = path / CHECKPOINT_FILE
    checkpoint = _parse(Checkpoint, {**_read_json(file), "path": path}, file)
    _check_size(checkpoint)
    return checkpoint


def list_checkpoints(directory: str | os.PathLike) -> list[Checkpoint]:
    """The checkpoints of the run in `directory`, by step.

    Example:

    ```python
    late = [c for c in list_checkpoints("runs/mnist") if c.epoch >= 5]
    ```

    Raises:
        FileNotFoundError: when there is no such directory, or no checkpoint in it.
        TornStoreError: when one of them is torn, or was written and is gone.
        ValueError: when a newer version of the library wrote it.
    """
    directory = pathlib.Path(directory)
    run = read_run(directory)
    found = checkpoint_directories(directory)
    names = {path.name for path in found.values()}
    gone = [e.checkpoint for e in run.history if e.written and e.checkpoint not in names]
    if gone:
        raise TornStoreError(
            f"The run in {directory} wrote {', '.join(map(str, gone))}, which is not there any "
            "more: a sum over the others would not be the run's. Restore it, or choose from the "
            "others with `read_checkpoint` and pass the list."
        )
    if not found:
        raise FileNotFoundError(
            f"The run in {directory} has no checkpoint (last step recorded: "
            f"{run.history[-1].step}). Train with TracInCheckpoint up to its first save."
        )
    return [read_checkpoint(path) for path in found.values()]


def effective_rate_sum(directory: str | os.PathLike, model: keras.Model) -> float:
    """Sum over a run's steps of the learning rate, momentum counted, up to the model's weights.

    With momentum m, a step of rate r moves the weights by r / (1 - m) in the end. A gradient flow
    stopped at this time t fits, of an eigendirection of eigenvalue lambda, the share
    1 - exp(-lambda t): roughly what damping by 1/t fits.

    Raises:
        ValueError: the run never had these weights, or its optimizer is none whose steps are the
            rate times the gradient.
    """
    run = read_run(directory)
    fingerprint = weights_fingerprint(model)
    entries = [entry for entry in run.history if entry.fingerprint == fingerprint]
    if not entries:
        raise ValueError(
            f"The run in {directory} recorded no such weights as {model.name!r} has now: it was "
            "trained or loaded since. Put the weights of one of its epochs or checkpoints back."
        )
    checkpoint = next(iter(list_checkpoints(directory)))
    if checkpoint.optimizer != "SGD":
        raise ValueError(
            f"The run in {directory} was trained by {checkpoint.optimizer}, whose steps are not "
            "the learning rate times the gradient. Pass the damping as a number, or without `run`."
        )
    total = entries[-1].learning_rate_sum / (1.0 - (checkpoint.momentum or 0.0))
    if total <= 0:
        raise ValueError(
            f"The run in {directory} had made no step when it had the weights of {model.name!r}."
        )
    return total


def load_weights(model: keras.Model, checkpoint: Checkpoint) -> None:
    """Gives `model` the weights of `checkpoint`; the model's optimizer is left as it is.

    Raises:
        TornStoreError: when the weights file is not the one that was written.
        ValueError: when the model is not built, or not of the checkpoint's architecture.
    """
    if not model.built:
        raise ValueError(
            f"`model` must be built before {checkpoint.path} is loaded. Received an unbuilt "
            f"{type(model).__name__}: call it on a batch first."
        )
    if architecture_fingerprint(model) != checkpoint.architecture:
        parameters = sum(int(np.prod(variable.shape)) for variable in _weights(model))
        raise ValueError(
            f"{checkpoint.path} was written by a model of another architecture: its variables "
            f"({checkpoint.num_parameters} numbers) differ in name, shape, dtype or order from "
            f"those of {model.name!r} ({parameters} numbers). Pass the model that was trained."
        )
    checkpoint.verify()
    # Without the optimizer: TracIn must not set back the step and momenta of the user's own.
    skip = [] if getattr(model, "optimizer", None) is None else [model.optimizer]
    model.load_weights(checkpoint.path / WEIGHTS_FILE, objects_to_skip=skip)
    if weights_fingerprint(model) != checkpoint.fingerprint:
        raise ValueError(
            f"After loading {checkpoint.path} the weights of {model.name!r} are not those that "
            "were recorded: a layer keeps weights that its `save_own_variables` and "
            "`load_own_variables` leave out, or the layers are connected in another way."
        )


@contextlib.contextmanager
def weights_restored(model: keras.Model) -> Iterator[None]:
    """On leaving the block, also by an error, every variable of `model` has its old value again.

    Example:

    ```python
    with weights_restored(model):
        for checkpoint in list_checkpoints("runs/mnist"):
            load_weights(model, checkpoint)
            ...
    ```
    """
    # Copies: on the CPU, what TensorFlow hands out may be the variable's own memory.
    values = [(v, np.array(v.numpy())) for v in model.variables]
    try:
        yield
    finally:
        for variable, value in values:
            variable.assign(value)


def _weights(model: keras.Model) -> list[keras.Variable]:
    return [v for v in model.variables if v.path.rsplit("/", 1)[-1] != "seed_generator_state"]


def _check_size(checkpoint: Checkpoint) -> None:
    file = checkpoint.path / WEIGHTS_FILE
    size = file.stat().st_size if file.exists() else None
    if size != checkpoint.bytes:
        state = "is missing" if size is None else f"has {size} bytes"
        raise TornStoreError(
            f"{file} {state}; {CHECKPOINT_FILE} says {checkpoint.bytes} bytes. Remove "
            f"{checkpoint.path}, or restore it from a copy."
        )


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TornStoreError(
            f"{file} is missing: TracInCheckpoint did not write {file.parent}, or it is not whole."
        ) from None
    except ValueError as error:
        raise TornStoreError(f"{file} is damaged: {error}. Restore it from a copy.") from error
    if not isinstance(record, dict):
        raise TornStoreError(f"{file} is damaged: not a JSON object. Restore it from a copy.")
    return record


def _parse(record_type: type[_Record], record: dict[str, Any], file: pathlib.Path) -> _Record:
    try:
        return record_type(**record)
    except TypeError as error:
        raise TornStoreError(f"{file} is damaged: {error}. Restore it from a copy.") from error
