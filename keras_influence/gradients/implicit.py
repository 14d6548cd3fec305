"""Gradients of a call that no rule explains: by differentiating that call alone."""

import contextlib
import logging as std_logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_influence.gradients.blocks import over_examples
from keras_influence.gradients.factors import Contraction

# A direction in forward mode costs about two runs of the call; the gradient of each example by
# itself, six to ten once for all directions, which is cheaper beyond this many.
_MAX_FORWARD_DIRECTIONS = 3


class Implicit:
    """Per-example gradients of some variables through one call: a layer's, or the whole network's.

    With z the call's outputs and d the losses' gradients by them, <gradient_i, V> is
    <d_i, (dz_i/dw) V>: forward mode through the call. For many directions, each example's gradient
    is taken by itself instead, some at a time.

    Args:
        function: of `arguments` -> floating-point outputs, a list of [B, ...] (or without the batch
            axis, where they are the same for all examples).
        arguments: tensors; those of `batched` [B, ...].
        batched: for each argument, whether it has the batch axis.
        gradients: d, for each output, [B, ...].
        values: the `tf.Variable`s.
        plain: whether forward mode and `tf.vectorized_map` work; see `graphs.is_plain`.
    """

    def __init__(
        self,
        function: Callable[..., list[tf.Tensor]],
        arguments: Sequence[tf.Tensor],
        batched: Sequence[bool],
        gradients: Sequence[tf.Tensor],
        values: Sequence[tf.Variable],
        plain: bool,
        dtype: tf.DType,
    ):
        self.function = function
        self.arguments = list(arguments)
        self.batched = list(batched)
        self.output_gradients = list(gradients)
        self.values = list(values)
        self.plain = plain
        self.dtype = dtype
        self.sizes = [int(value.shape.num_elements()) for value in values]

    def project(self, directions: Sequence[tf.Tensor], how: Contraction) -> tf.Tensor:
        """[B, k] of directions [k, *shape], one tensor for each variable."""
        count = directions[0].shape[0]
        if self.plain and count is not None and count <= _MAX_FORWARD_DIRECTIONS:
            return self._forward(directions)
        flat = tf.concat(
            [tf.reshape(d, [-1, size]) for d, size in zip(directions, self.sizes, strict=True)], 1
        )
        return self._over_examples(
            lambda gradients: tf.matmul(gradients, flat, transpose_b=True), how
        )

    def squared_norms(self, how: Contraction) -> tf.Tensor:
        """[B], over all the variables."""
        return self._over_examples(lambda g: tf.reduce_sum(g * g, axis=1), how)

    def gradients(self, how: Contraction) -> list[tf.Tensor]:
        """[B, *shape] for each variable."""
        flat = self._over_examples(lambda gradients: gradients, how)
        return [
            tf.reshape(part, [-1, *value.shape])
            for part, value in zip(tf.split(flat, self.sizes, axis=1), self.values, strict=True)
        ]

    def _forward(self, directions: Sequence[tf.Tensor]) -> tf.Tensor:
        columns = []
        for direction in zip(*(tf.unstack(each) for each in directions), strict=True):
            tangents = [
                tf.cast(tangent, value.dtype)
                for tangent, value in zip(direction, self.values, strict=True)
            ]
            with tf.autodiff.ForwardAccumulator(self.values, tangents) as accumulator:
                outputs = self.function(*self.arguments)
            column: Any = 0.0
            for output, gradient in zip(outputs, self.output_gradients, strict=True):
                tangent = accumulator.jvp(
                    output, unconnected_gradients=tf.UnconnectedGradients.ZERO
                )
                product = tf.cast(tangent, self.dtype) * gradient
                column += tf.reduce_sum(product, axis=list(range(1, product.shape.rank)))
            columns.append(column)
        return tf.stack(columns, axis=1)

    def _over_examples(
        self, function: Callable[[tf.Tensor], tf.Tensor], how: Contraction
    ) -> tf.Tensor:
        """`function` of per-example gradients [examples, p], over some examples at a time."""
        moving = [a for a, batched in zip(self.arguments, self.batched, strict=True) if batched]
        count = len(moving)

        def one_block(*tensors: tf.Tensor) -> tf.Tensor:
            return function(self._block(tensors[:count], tensors[count:]))

        # A gradient, and as much again for what the backward pass holds.
        each = 3.0 * sum(self.sizes) * self.dtype.size
        return over_examples(one_block, [*moving, *self.output_gradients], each, how.budget)

    def _block(self, moving: Sequence[tf.Tensor], gradients: Sequence[tf.Tensor]) -> tf.Tensor:
        def one_example(example: Any) -> tf.Tensor:
            moving, gradients = example
            rows = iter(tensor[tf.newaxis] for tensor in moving)
            arguments = [
                next(rows) if batched else argument
                for argument, batched in zip(self.arguments, self.batched, strict=True)
            ]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(self.values)
                outputs = self.function(*arguments)
                total = tf.add_n(
                    [
                        tf.reduce_sum(tf.cast(output, self.dtype) * gradient[tf.newaxis])
                        for output, gradient in zip(outputs, gradients, strict=True)
                    ]
                )
            parts = tape.gradient(
                total, self.values, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            return tf.concat(
                [tf.reshape(tf.cast(tf.convert_to_tensor(p), self.dtype), [-1]) for p in parts], 0
            )

        example = (tuple(moving), tuple(gradients))
        if not self.plain:
            specification = tf.TensorSpec([sum(self.sizes)], self.dtype)
            return tf.map_fn(one_example, example, fn_output_signature=specification)
        with _quiet_vectorized_map():
            return tf.vectorized_map(one_example, example)


@contextlib.contextmanager
def _quiet_vectorized_map() -> Iterator[None]:
    """Drops TensorFlow's remark to its own developers about operations that it maps by a loop."""

    def keep(record: std_logging.LogRecord) -> bool:
        return "uses a while_loop" not in record.getMessage()

    logger = std_logging.getLogger("tensorflow")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
