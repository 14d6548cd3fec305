"""Datasets as `model.fit` takes them, as batches of static shapes with an id for every example.

An example's id is its position in the dataset. Batches are cut anew to one size, so that nothing
depends on how the dataset was batched; the last one is filled up with copies of its first example,
of weight 0. Sequences of several lengths, in buckets, make such batches for each length.
"""

import collections
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np
import tensorflow as tf

from keras_influence.batching import Batch as Batch
from keras_influence.batching import Part, concatenate, cut, row_shapes, take
from keras_influence.batching import joined as joined
from keras_influence.batching import joined_size as joined_size
from keras_influence.batching import padded as padded

DEFAULT_BATCH_SIZE = 128
# Python's buffers know no other ones of TensorFlow's.
_SHARED = (tf.float32, tf.float64, tf.int32, tf.int64, tf.uint8)

_T = TypeVar("_T")


class Identified(NamedTuple):
    """Inputs of a model with the ids of their examples beside them; see `with_ids`.

    Attributes:
        inputs: what the model takes.
        ids: int64 [batch].
    """

    inputs: Any
    ids: Any


class Examples(NamedTuple):
    """A dataset held in memory, in order.

    Attributes:
        arrays: (x, y) or (x, y, sample_weight), nests of arrays [N, ...].
        ids: int64 [N], positions in the dataset.
    """

    arrays: tuple[Any, ...]
    ids: np.ndarray

    def take(self, rows: np.ndarray) -> tuple[Any, ...]:
        """(x, y[, sample_weight]) of the given rows."""
        return tf.nest.map_structure(lambda array: array[rows], self.arrays)


def batches(dataset: Any, batch_size: int | None = None, ordered: bool = True) -> Iterator[Batch]:
    """The examples of `dataset` in order, in batches of one size for each shape.

    Sequences come in few lengths if they are to be compiled for few: as batches are made by
    `tf.data.Dataset.bucket_by_sequence_length` with `pad_to_bucket_boundary=True`.
    A batch holds one length, and is filled up to a size that its length has had before.

    Args:
        dataset: a batched `tf.data.Dataset` of (x, y) or (x, y, sample_weight); a
            `keras.utils.PyDataset`; or a tuple of arrays (x, y) or (x, y, sample_weight). x and y
            may be dicts, lists or tuples of arrays. Ids beside the inputs, as `with_ids` puts them
            there, are left out.
        batch_size: defaults to the size of the dataset's first batch of each shape, or 128 for
            arrays.
        ordered: whether the examples stay in order, or batches are as full as can be; see
            `in_order`.

    Raises:
        ValueError: an empty or unbatched dataset, a missing label, rows that do not match.
        TypeError: something that is no dataset, such as a generator (which can be read only once).
    """
    return cut(_parts(dataset, batch_size), ordered)


def in_order(rows: Sequence[np.ndarray], ids: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of a dataset's batches, as one array in the order of the dataset.

    Args:
        rows: of each batch, [n, ...].
        ids: of its examples, [n].
    """
    return np.concatenate(rows)[np.argsort(np.concatenate(ids))]


def prefetched(items: Iterable[_T]) -> Generator[_T, None, None]:
    """The items, each made in a thread while the one before it is in use.

    Close it (`contextlib.closing`) where it may be left before its end: the thread ends then.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)
    closed = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The dataset without TensorFlow's tuning of it as it is read; what it gives is the same.

    Where processors are busy, the tuner's thread can miss that an iterator ends, and the end then
    waits for its timer: for up to a minute, and up to as long as the pass itself took. Without it
    `tf.data.AUTOTUNE` stands for as many calls at once as there are processors (16 at most).
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def with_ids(dataset: Any) -> Any:
    """The dataset with each example's id, its position, put beside its inputs.

    For training by a `trainers.InfluenceTrainer`, which takes the ids away before the model is
    called. Shuffle afterwards, so that an id stays with its example:
    `with_ids(examples.batch(1)).unbatch().shuffle(10_000).batch(64)`.

    Args:
        dataset: a batched `tf.data.Dataset` of (x, y) or (x, y, sample_weight), in the same order
            each time it is read; or a tuple of arrays.

    Returns:
        The same with `Identified(x, ids)` for x; a tuple of arrays for arrays, as in
        `model.fit(*with_ids((x, y)))`.

    Raises:
        ValueError: a dataset that gives other examples each time it is read.
        TypeError: something else.

    Example:

    ```python
    trainer.fit(ki.data.with_ids(train), epochs=10)
    ```
    """
    if isinstance(dataset, tuple):
        examples, rows = _checked(dataset)
        return (Identified(examples[0], np.arange(rows)), *examples[1:])
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            "Expected a batched tf.data.Dataset or a tuple of arrays. Received: "
            f"{type(dataset).__name__}."
        )
    check_order(dataset)

    def identify(position: tf.Tensor, element: Any) -> tuple[tf.Tensor, Any]:
        x, *others = element
        end = position + tf.shape(tf.nest.flatten(x)[0], tf.int64)[0]
        return end, (Identified(x, tf.range(position, end)), *others)

    return dataset.scan(tf.zeros([], tf.int64), identify)


def count(dataset: Any) -> int:
    """The number of examples of `dataset`; reads all of it where its size is not known."""
    if isinstance(dataset, tuple):
        return _checked(dataset)[1] or next(batches(dataset)).num_examples
    return sum(batch.num_examples for batch in batches(dataset))


def estimated_count(dataset: Any) -> int:
    """The number of examples, as far as it can be told without reading them all.

    The last batch of a dataset that knows the number of its batches is taken to be a full one.
    """
    num_batches = None
    if isinstance(dataset, tf.data.Dataset):
        num_batches = int(dataset.cardinality())
    elif isinstance(dataset, keras.utils.PyDataset):
        num_batches = dataset.num_batches
    if num_batches is None or num_batches <= 0:
        return count(dataset)
    return num_batches * next(batches(dataset)).num_examples


def freeze(
    dataset: Any,
    batch_size: int | None = None,
    num_examples: int | None = None,
    seed: int = 0,
) -> tuple[list[Batch], int]:
    """The same examples in the same batches for as often as they are asked for, in host memory.

    Args:
        dataset, batch_size: as in `batches`.
        num_examples: examples to keep, drawn without replacement; all by default.
        seed: of the draw.

    Returns:
        The batches, and the number of examples of the whole dataset.
    """
    if num_examples is None:
        frozen = list(batches(dataset, batch_size, ordered=False))
        return frozen, sum(batch.num_examples for batch in frozen)
    total = count(dataset)
    if not 1 <= num_examples <= total:
        raise ValueError(
            f"`num_examples` must be between 1 and the dataset's {total} examples. "
            f"Received: {num_examples}."
        )
    chosen = np.random.default_rng(seed).permutation(total)[:num_examples]
    kept = np.zeros(total, bool)
    kept[chosen] = True

    def subset() -> Iterator[Part]:
        for part in _parts(dataset, batch_size):
            rows = np.flatnonzero(kept[part.ids])
            if len(rows):
                yield Part(take(part.examples, rows), part.ids[rows], part.size)

    return list(cut(subset(), ordered=False)), total


def read(dataset: Any) -> Examples:
    """All of `dataset` in memory, for methods that draw examples at random.

    Raises:
        ValueError: as `batches`; also when the examples are not all of one shape.
    """
    found = read_shapes(dataset)
    if len(found) > 1:
        shapes = [row_shapes(examples.arrays) for examples in found]
        raise ValueError(
            f"The examples must all have one shape to be drawn at random. Received: {shapes}."
        )
    return found[0]


def read_shapes(dataset: Any) -> list[Examples]:
    """The same, by the examples' shapes."""
    parts: dict[Any, list[Part]] = collections.defaultdict(list)
    for part in _parts(dataset, None):
        parts[row_shapes(part.examples)].append(part)
    return [
        Examples(concatenate([p.examples for p in alike]), np.concatenate([p.ids for p in alike]))
        for alike in parts.values()
    ]


def check_order(dataset: Any) -> None:
    """Refuses a dataset whose first batch differs from one pass to the next.

    Rows and columns of scores are positions in the dataset: if a shuffle gives each pass another
    order, they name nothing.
    """
    if not isinstance(dataset, tf.data.Dataset):
        return
    first, second = (next(iter(dataset.take(1).as_numpy_iterator()), None) for _ in range(2))
    leaves = zip(tf.nest.flatten(first), tf.nest.flatten(second), strict=True)
    if not all(np.array_equal(a, b, equal_nan=_is_float(a)) for a, b in leaves):
        raise ValueError(
            "The dataset gives other examples each time it is read (a shuffle, or a random "
            "augmentation), so that positions in it name no example. Pass it without these, or "
            "shuffle with `reshuffle_each_iteration=False`."
        )


def _is_float(array: Any) -> bool:
    return np.issubdtype(np.asarray(array).dtype, np.floating)


def _parts(dataset: Any, batch_size: int | None) -> Iterator[Part]:
    """What a dataset yields, with ids; see `batches`."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: {batch_size}.")
    sizes: dict[Any, int] = {}
    position = 0
    for element in _elements(dataset, batch_size):
        examples, rows = _checked(element)
        if rows == 0:
            continue
        size = batch_size or sizes.setdefault(row_shapes(examples), rows)
        yield Part(examples, np.arange(position, position + rows, dtype=np.int64), size)
        position += rows
    if position == 0:
        raise ValueError("The dataset is empty: it yields no example.")


def _elements(dataset: Any, batch_size: int | None) -> Iterator[Any]:
    if isinstance(dataset, tf.data.Dataset):
        yield from untuned(dataset)
    elif isinstance(dataset, keras.utils.PyDataset):
        if dataset.num_batches is None:
            raise ValueError("A PyDataset of unknown length never ends: give it a `__len__`.")
        for index in range(dataset.num_batches):
            yield dataset[index]
    elif isinstance(dataset, tuple):
        examples, rows = _checked(dataset)
        size = batch_size or min(DEFAULT_BATCH_SIZE, max(rows, 1))
        for start in range(0, rows, size):
            yield take(examples, slice(start, start + size))
    else:
        raise TypeError(
            "Expected a batched tf.data.Dataset, a keras.utils.PyDataset, or a tuple of arrays "
            f"(x, y) or (x, y, sample_weight). Received: {type(dataset).__name__}. A generator "
            "can be read only once; wrap it with tf.data.Dataset.from_generator."
        )


def _checked(element: Any) -> tuple[tuple[Any, ...], int]:
    """An element as numpy arrays, without ids or a `None` weight, and its number of rows."""
    if not isinstance(element, (tuple, list)) or len(element) not in (2, 3):
        raise ValueError(
            "Each element must be (x, y) or (x, y, sample_weight): influence needs the labels. "
            f"Received: {type(element).__name__}"
            f"{f' of length {len(element)}' if isinstance(element, (tuple, list)) else ''}."
        )
    if element[-1] is None:
        element = element[:-1]
    if isinstance(element[0], Identified):
        element = (element[0].inputs, *element[1:])
    for leaf in tf.nest.flatten(element):
        if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
            raise ValueError(
                f"Ragged and sparse tensors have no static shape. Received: {type(leaf).__name__}. "
                "Pad to dense tensors, with sample weights or a mask."
            )
    examples = tf.nest.map_structure(_array, tuple(element))
    leaves = tf.nest.flatten(examples)
    if any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError(
            "The dataset's elements have no batch axis: call `.batch(batch_size)` on it."
        )
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(
            "x, y and sample_weight must have the same number of rows. Received: "
            f"{[leaf.shape for leaf in leaves]}."
        )
    return examples, sizes.pop()


def _array(leaf: Any) -> np.ndarray:
    """As NumPy sees it: of a tensor's numbers no copy, which is not to be written to."""
    if isinstance(leaf, tf.Tensor) and leaf.dtype in _SHARED:
        return np.asarray(memoryview(leaf))
    return np.asarray(leaf)
