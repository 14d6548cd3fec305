"""A function of examples, over some examples at a time, so that what it holds is bounded."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def over_examples(
    function: Callable[..., tf.Tensor],
    tensors: Sequence[tf.Tensor],
    bytes_each: float,
    budget: float,
) -> tf.Tensor:
    """`function(*tensors)`, rows of the result computed for as many examples as `budget` holds.

    Args:
        function: of tensors [b, ...] -> [b, ...], row by row, of the dtype of the last of them.
        tensors: [B, ...].
        bytes_each: that `function` takes for one example.
        budget: bytes to take at once.
    """
    size = tensors[0].shape[0]
    block = max(1, int(budget // max(bytes_each, 1.0)))
    if size is None:
        total = tf.shape(tensors[0])[0]

        def some(index: tf.Tensor) -> tf.Tensor:
            start, end = index * block, tf.minimum((index + 1) * block, total)
            return function(*(tensor[start:end] for tensor in tensors))

        return _by_turns(some, (total + block - 1) // block, tensors[-1].dtype)
    if size <= block:
        return function(*tensors)
    # Blocks of one size, where the number of them allows it.
    block = -(-size // -(-size // block))
    # XLA knows no slice whose length a tensor tells: what the equal blocks leave over is a block
    # after the loop, and not its last turn.
    num_blocks, rest = divmod(size, block)

    def slices(start: tf.Tensor | int, length: int) -> list[tf.Tensor]:
        return [some_of(tensor, start, length) for tensor in tensors]

    rows = _by_turns(
        lambda index: function(*slices(index * block, block)),
        tf.constant(num_blocks),
        tensors[-1].dtype,
    )
    if rest:
        with tf.control_dependencies([rows]):  # So that no two blocks are held at once.
            rows = tf.concat([rows, function(*slices(size - rest, rest))], axis=0)
    return of_shape(rows, [size, *rows.shape[1:]])


def summed_over_examples(
    function: Callable[..., Any],
    tensors: Sequence[tf.Tensor],
    bytes_each: float,
    budget: float,
) -> Any:
    """The sum of `function` over blocks of examples, as many at a time as `budget` holds.

    Args:
        function: of tensors [b, ...] -> a nest of tensors, sums over the examples.
        tensors, bytes_each, budget: as in `over_examples`.
    """
    size = tensors[0].shape[0]
    block = max(1, int(budget // max(bytes_each, 1.0)))
    if size is not None and size <= block:
        return function(*tensors)
    total = tf.shape(tensors[0])[0]
    if size is not None:
        block = -(-size // -(-size // block))
    num_blocks = total // block

    def some(start: tf.Tensor, length: Any) -> Any:
        return function(*(some_of(tensor, start, length) for tensor in tensors))

    # What the equal blocks leave over comes first, so that the rest is one loop.
    first = some(num_blocks * block, total - num_blocks * block if size is None else size % block)

    def body(index: tf.Tensor, sums: Any) -> Any:
        added = some(index * block, block)
        return index + 1, tf.nest.map_structure(lambda a, b: a + b, sums, added)

    _, sums = tf.while_loop(
        lambda index, _: index < num_blocks,
        body,
        (tf.constant(0), first),
        parallel_iterations=1,
    )
    return sums


def some_of(tensor: tf.Tensor, start: tf.Tensor | int, length: int, axis: int = 0) -> tf.Tensor:
    """`length` entries along an axis from `start` on, of a shape that is known where it can be."""
    begin: list[Any] = [0] * tensor.shape.rank
    begin[axis] = start
    sizes = [-1 if n is None else n for n in tensor.shape]
    sizes[axis] = length
    return tf.slice(tensor, begin, sizes)


def of_shape(tensor: tf.Tensor, shape: Sequence[int | None]) -> tf.Tensor:
    """The tensor, whose shape is this one by construction, though TensorFlow cannot tell.

    `tf.ensure_shape` would look at run time, which makes the sizes dynamic for XLA.
    """
    tensor.set_shape(shape)
    return tensor


def _by_turns(
    some: Callable[[tf.Tensor], tf.Tensor], num_blocks: tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
    """`some(0)`, `some(1)` ..., one after the other, concatenated."""
    shape: list[tf.TensorShape] = []

    def body(index: tf.Tensor, array: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        rows = some(index)
        shape[:] = [rows.shape[1:]]
        return index + 1, array.write(index, rows)

    _, array = tf.while_loop(
        lambda index, _: index < num_blocks,
        body,
        (tf.constant(0), tf.TensorArray(dtype, size=num_blocks, infer_shape=False)),
        parallel_iterations=1,
    )
    return of_shape(array.concat(), [None, *shape[0]])
