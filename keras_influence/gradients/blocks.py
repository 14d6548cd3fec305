"""A function of examples, over some examples at a time, so that what it holds is bounded."""

from collections.abc import Callable, Sequence

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
    if size is not None and size <= block:
        return function(*tensors)
    if size is not None:
        # Blocks of one size, where the number of them allows it.
        block = -(-size // -(-size // block))
    total = tf.shape(tensors[0])[0] if size is None else tf.constant(size)
    num_blocks = (total + block - 1) // block
    shape: list[tf.TensorShape] = []

    def one_block(index: tf.Tensor) -> tf.Tensor:
        start, end = index * block, tf.minimum((index + 1) * block, total)
        rows = function(*(tensor[start:end] for tensor in tensors))
        shape[:] = [rows.shape]
        return rows

    array = tf.TensorArray(tensors[-1].dtype, size=num_blocks, infer_shape=False)

    def body(index: tf.Tensor, array: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        return index + 1, array.write(index, one_block(index))

    _, array = tf.while_loop(
        lambda index, _: index < num_blocks,
        body,
        (tf.constant(0), array),
        parallel_iterations=1,
    )
    rows = array.concat()
    return tf.ensure_shape(rows, [size, *shape[0][1:]])
