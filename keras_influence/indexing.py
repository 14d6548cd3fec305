"""An index in a directory: which method it belongs to, and how it grows part by part."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_influence import data, storage
from keras_influence.methods import EncodingMethod
from keras_influence.methods.preemption import between_steps

# Examples that are taken at once, at least: what a kill can cost.
_PART_ROWS = 4096


def open_index(
    path: pathlib.Path, method: EncodingMethod, manifest: dict[str, Any], arrays: dict[str, Any]
) -> storage.StoredIndex:
    """The index in a directory that this process holds, made where there is none.

    Args:
        path: the directory; see `storage.writing`.
        method: that encodes.
        manifest, arrays: of a scorer with this method.

    Raises:
        ValueError: the directory holds something else, or an index of something else.
    """
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
    dtype = method.maps.parameters.dtype.as_numpy_dtype
    described = storage.StoredIndex.create(path, len(method.metric), dtype)
    storage.fill_store(path, {**manifest, "encodings": described}, arrays)
    return storage.StoredIndex(path, described)


def _identity(manifest: dict[str, Any]) -> Any:
    """What the encodings of an index depend on."""
    method = manifest["method"]
    config = {
        name: value
        for name, value in method["config"].items()
        if name not in ("verbose", "memory_budget", "basis", "batch_size", "steps_per_execution")
    }
    # As JSON gives it back: lists for tuples.
    described = json.dumps(config, sort_keys=True)
    return method["kind"], described, method["num_train"], manifest["state"], manifest["weights"]


def add_dataset(index: storage.StoredIndex, method: EncodingMethod, examples: Any) -> None:
    """Adds a data set to an index, or what is missing of the one that was begun.

    On SIGTERM the part in hand is added, and the process exits.

    Raises:
        ValueError: another data set was begun.
    """
    data.check_order(examples)
    encoders = list(method._query_encoders())
    progress = method._progress("index")
    first, done = "", 0
    with between_steps("the index") as check:
        for part in _parts(examples, method.batch_size):
            first = first or fingerprint(part[0], 0)
            before, done = done, done + sum(batch.num_examples for batch in part)
            last = fingerprint(part[-1], -1)
            if before < index.num_unfinished:
                # Of parts that were added before a kill, the first example and the last of all.
                found = (first, last, done) if done >= index.num_unfinished else (first,)
                _check_begun(index, found)
                continue
            index.add(method._encoded_rows(part, encoders), first, last)
            progress.add(len(part))
            check()
        if done < index.num_unfinished:
            _check_begun(index, (first, "", done))
        index.end()
    progress.close()


def _check_begun(index: storage.StoredIndex, found: tuple[Any, ...]) -> None:
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


def is_last_dataset(index: storage.StoredIndex, examples: Any) -> bool:
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
