"""An index in a directory: which method it belongs to, and how it grows part by part."""

import concurrent.futures
import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import tensorflow as tf

from keras_influence import data, storage
from keras_influence.methods import EncodingMethod
from keras_influence.methods.preemption import between_steps
from keras_influence.workers import Workers

# Examples of a part, at least. A kill can cost two parts: the one that is computed, and the one
# that is written meanwhile.
_PART_ROWS = 4096
# Rows that another worker is told at once.
_SENT_ROWS = 65536


Index = storage.StoredIndex | storage.MirroredIndex


def open_index(
    path: pathlib.Path,
    method: EncodingMethod,
    manifest: dict[str, Any],
    arrays: dict[str, Any],
    workers: Workers,
) -> Index:
    """The index in a directory that the chief of the workers holds, made where there is none.

    Args:
        path: the directory; see `storage.writing`.
        method: that encodes.
        manifest, arrays: of a scorer with this method.
        workers: all of them. The others than the chief get what its index holds, in memory.

    Raises:
        ValueError: the directory holds something else, or an index of something else.
    """
    if not workers.several:
        return _stored(path, method, manifest, arrays)
    workers.agree("index", _identity(manifest))
    opened: list[storage.StoredIndex] = []

    def records() -> list[dict[str, Any]]:
        opened.append(_stored(path, method, manifest, arrays))
        return opened[0].records()

    known = workers.told(records)
    count = max((record["stop"] for record in known if record["kind"] == "rows"), default=0)
    blocks = [_no_rows(method)]

    def read(start: int) -> np.ndarray:
        return opened[0].read(start, min(start + _SENT_ROWS, count))

    for start in range(0, count, _SENT_ROWS):
        block = workers.given(functools.partial(read, start))
        if not workers.chief:
            blocks.append(block)
    if workers.chief:
        return opened[0]
    return storage.MirroredIndex(path, known, np.concatenate(blocks))


def _no_rows(method: EncodingMethod) -> np.ndarray:
    dtype = method.maps.parameters.dtype.as_numpy_dtype
    return np.zeros((0, len(method.metric)), dtype)


def _stored(
    path: pathlib.Path, method: EncodingMethod, manifest: dict[str, Any], arrays: dict[str, Any]
) -> storage.StoredIndex:
    if (path / storage.MANIFEST).exists():
        found = storage.read_manifest(path)
        if "encodings" not in found or _identity(found) != _identity(manifest):
            raise ValueError(
                f"{path} holds no index by this method and model as they are: the method's "
                "settings, its fit, or the model's weights differ. Choose another directory, or "
                "remove this one."
            )
        return storage.StoredIndex(path, found["encodings"])
    others = [
        file.name
        for file in path.iterdir()
        if not file.name.startswith(".") and file.name not in {"encodings", *arrays}
    ]
    if others:
        raise ValueError(
            f"{path} holds no index, but {sorted(others)[:3]}. Choose a directory of its own."
        )
    described = storage.StoredIndex.create(path, len(method.metric), _no_rows(method).dtype)
    storage.fill_store(path, {**manifest, "encodings": described}, arrays)
    return storage.StoredIndex(path, described)


def _identity(manifest: dict[str, Any]) -> Any:
    """What the encodings of an index depend on."""
    method = manifest["method"]
    config = {
        name: value
        for name, value in method["config"].items()
        if name
        not in (
            "verbose",
            "memory_budget",
            "direction_bytes",
            "basis",
            "batch_size",
            "steps_per_execution",
        )
    }
    # As JSON gives it back: lists for tuples.
    described = json.dumps(config, sort_keys=True)
    return method["kind"], described, method["num_train"], manifest["state"], manifest["weights"]


def add_dataset(index: Index, method: EncodingMethod, examples: Any, workers: Workers) -> None:
    """Adds a data set to an index, or what is missing of the one that was begun.

    A part is written while the next one is computed, and the one after that is read. On SIGTERM the
    part in hand is added, and the process exits.

    Raises:
        ValueError: another data set was begun.
    """
    data.check_order(examples)
    encoders = list(method._query_encoders())
    progress = method._progress("index")
    first, done, begun = "", 0, index.num_unfinished
    with (
        between_steps("the index") as check,
        contextlib.closing(data.prefetched(_parts(examples, method.batch_size))) as parts,
        _Writer(index, workers) as writer,
    ):
        for part in parts:
            first = first or fingerprint(part[0], 0)
            before, done = done, done + sum(batch.num_examples for batch in part)
            last = fingerprint(part[-1], -1)
            if before < begun:
                # Of parts that were added before a kill, the first example and the last of all.
                found = (first, last, done) if done >= begun else (first,)
                _check_begun(index, found)
                continue
            writer.add(method._encoded_rows(part, encoders), first, last)
            progress.add(len(part))
            check()
        if done < begun:
            _check_begun(index, (first, "", done))
        writer.wait()
        workers.each(index.end)
    progress.close()


class _Writer:
    """Adds parts to an index in a thread, one after the other."""

    def __init__(self, index: Index, workers: Workers):
        self._index = index
        self._workers = workers
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future | None = None

    def add(self, rows: np.ndarray, first: str, last: str) -> None:
        """Begins to, when the part before is there."""
        self.wait()
        self._pending = self._thread.submit(self._index.add, rows, first, last)

    def wait(self) -> None:
        """Until all parts are there; raises what went wrong with one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._workers.each(pending.result)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # What was begun is finished, also on the way out of the process.
        self._thread.shutdown()


def _check_begun(index: Index, found: tuple[Any, ...]) -> None:
    begun = index.unfinished
    assert begun is not None
    if (begun["first"], begun["last"], index.num_unfinished)[: len(found)] != found:
        raise ValueError(
            f"{index.directory} holds {index.num_unfinished} rows of a data set that was begun and "
            "is not this one, or not in these batches. Go on with the one that was begun, or "
            "choose another directory."
        )


def _parts(examples: Any, batch_size: int | None) -> Iterator[list[data.Batch]]:
    """Batches, so many together that they have `_PART_ROWS` examples."""
    part: list[data.Batch] = []
    for batch in data.batches(examples, batch_size):
        part.append(batch)
        if sum(each.num_examples for each in part) >= _PART_ROWS:
            yield part
            part = []
    if part:
        yield part


def is_last_dataset(index: Index, examples: Any) -> bool:
    """Whether a data set is the one that was appended last: its size, first and last example."""
    if index.num_datasets < 2 or index.unfinished is not None:
        return False
    last = index.last_dataset
    count, ends = 0, ("", "")
    for batch in data.batches(examples):
        ends = (ends[0] or fingerprint(batch, 0), fingerprint(batch, -1))
        if ends[0] != last["first"]:
            return False
        count += batch.num_examples
    return count == last["count"] and ends[1] == last["last"]


def fingerprint(batch: data.Batch, row: int) -> str:
    """Of one example of a batch, its padding not counted."""
    row = range(batch.num_examples)[row]
    return storage.arrays_fingerprint(
        np.asarray(leaf[row]) for leaf in tf.nest.flatten(batch.examples)
    )
