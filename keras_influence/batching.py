"""Examples in order, cut into batches of few static shapes."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class Batch(NamedTuple):
    """Some examples of one shape; batches of few sizes B, and so of few graphs, make up a dataset.

    Attributes:
        examples: (x, y) or (x, y, sample_weight), nests of arrays [B, ...].
        weights: float32 [B], 1 for an example and 0 for padding, which comes last.
        ids: int64 [n], positions in the dataset of the n <= B examples.
    """

    examples: tuple[Any, ...]
    weights: np.ndarray
    ids: np.ndarray

    @property
    def num_examples(self) -> int:
        return len(self.ids)


class Part(NamedTuple):
    """Some examples of one shape, as they come.

    Attributes:
        examples: as in `Batch`, without padding.
        ids: of each.
        size: of the batches that they are to make up.
    """

    examples: tuple[Any, ...]
    ids: np.ndarray
    size: int


Shape = tuple[tuple[int, ...], ...]


class _Pending:
    """The examples of one shape that wait for their batch to be full."""

    def __init__(self) -> None:
        self.examples: list[tuple[Any, ...]] = []
        self.ids: list[np.ndarray] = []
        self.count = 0
        self.size = 0
        self.used: set[int] = set()
        self.rests = 0

    def add(self, part: Part) -> Iterator[Batch]:
        """Takes the part in; gives the batches that are full."""
        self.examples.append(part.examples)
        self.ids.append(part.ids)
        self.count += len(part.ids)
        self.size = part.size
        while self.count >= self.size:
            examples, ids = concatenate(self.examples), concatenate(self.ids)
            self.used.add(self.size)
            yield padded(take(examples, slice(self.size)), ids[: self.size], self.size)
            self.count -= self.size
            rest = slice(self.size, None)
            self.examples, self.ids = [take(examples, rest)], [ids[rest]]

    def end(self, exact: bool) -> Iterator[Batch]:
        """The rest, in a size that this shape has had, or one of few others.

        The last batch of a dataset, or of a bucket, is as large as those before it. Where rests are
        many, for shapes come in turn, each is less than half padding.

        Args:
            exact: whether it needs no padding where no size fits.
        """
        if not self.count:
            return
        power = min(self.size, 1 << (self.count - 1).bit_length())
        most = power if self.rests else self.size
        fitting = [size for size in self.used if self.count <= size <= most]
        size = min(fitting) if fitting else self.count if exact else power
        self.used.add(size)
        self.rests += 1
        yield padded(concatenate(self.examples), concatenate(self.ids), size)
        self.examples, self.ids, self.count = [], [], 0


def cut(parts: Iterable[Part], ordered: bool = True) -> Iterator[Batch]:
    """Batches of the wanted sizes.

    Args:
        parts: with an example at least, each.
        ordered: whether examples stay in order. Where another shape begins (that of longer
            sequences, say) the batch before then ends short. Else examples wait for others of their
            shape.
    """
    pending: dict[Shape, _Pending] = collections.defaultdict(_Pending)
    last: Shape | None = None
    for part in parts:
        shape = row_shapes(part.examples)
        if ordered and last is not None and shape != last:
            yield from pending[last].end(exact=False)
        last = shape
        yield from pending[shape].add(part)
    # What is smaller than one batch needs no second size. Examples that come in order may be part
    # of more that come later.
    exact = not ordered or len(pending) == 1
    for each in pending.values():
        yield from each.end(exact)


def joined(batches: list[Batch], together: int) -> Iterator[Batch]:
    """The examples of each shape in larger batches: of about as many as `together` had.

    The list is emptied: of what was taken from here nothing is held twice.
    """
    shapes: dict[Any, collections.deque[Batch]] = collections.defaultdict(collections.deque)
    for batch in batches:
        shapes[None if together == 1 else row_shapes(batch.examples)].append(batch)
    batches.clear()
    for alike in shapes.values():
        if together == 1:
            yield from _emptied(alike)
            continue
        size = joined_size(sum(batch.num_examples for batch in alike), len(alike), together)
        yield from cut(
            Part(take(batch.examples, slice(batch.num_examples)), batch.ids, size)
            for batch in _emptied(alike)
        )


def _emptied(batches: collections.deque[Batch]) -> Iterator[Batch]:
    while batches:
        yield batches.popleft()


def joined_size(num_examples: int, num_batches: int, together: int) -> int:
    """Examples of a batch where so many batches are joined to one, as even as can be."""
    return -(-num_examples // -(-num_batches // together))


def row_shapes(examples: Any) -> Shape:
    """Of one example."""
    return tuple(np.shape(leaf)[1:] for leaf in tf.nest.flatten(examples))


def take(examples: Any, rows: Any) -> Any:
    return tf.nest.map_structure(lambda array: array[rows], examples)


def concatenate(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


def padded(examples: tuple[Any, ...], ids: np.ndarray, size: int) -> Batch:
    """Examples as a batch of a size, filled up with copies of the first one, of weight 0."""
    rows = len(ids)
    if rows < size:
        # A copy of an example is as harmless to the model as the example was; zeros may not be.
        filler = np.zeros(size - rows, int)
        examples = tf.nest.map_structure(
            lambda array: np.concatenate([array, array[filler]]), examples
        )
    weights = np.zeros(size, np.float32)
    weights[:rows] = 1
    return Batch(examples, weights, ids)
