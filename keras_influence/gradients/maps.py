"""The linear maps of a model's per-example loss: everything that a method asks of a model.

With l_i the loss of example i at the model's current parameters:

    gradient(batch, weights)       sum_i w_i grad l_i                  [p]
    project(batch, directions)     <grad l_i, v_j>                     [batch, k]
    curvature(batch, v, weights)   sum_i w_i Hessian(l_i) v            [p]

The model runs with `training=False`. Vectors are flat; see `ParameterVector`.
"""

import contextlib
import functools
import logging as std_logging
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from keras_influence.gradients.losses import PerExampleLoss
from keras_influence.gradients.moments import twice_differentiable_moments
from keras_influence.gradients.parameters import ParameterVector, Variables, select_variables

FORWARD_OVER_REVERSE = "forward over reverse"
REVERSE_OVER_REVERSE = "reverse over reverse"

# A direction in forward mode costs about two forward passes of the network; the gradient of each
# example by itself, six to ten once for all directions, which is cheaper beyond this many.
_MAX_FORWARD_DIRECTIONS = 3
# Bytes of per-example gradients held at once.
_GRADIENT_BYTES = 256 * 2**20


class LossMaps:
    """`gradient`, `project` and `curvature` of one model, one loss and one choice of variables.

    A batch is what `model.fit` sees: a tuple (x, y) or (x, y, sample_weight) of tensors or nests of
    tensors. The model's weights are read at each call, so one `LossMaps` serves every checkpoint.

    Args:
        model: a built Keras model.
        loss: as in `model.compile`; defaults to the compiled loss.
        variables: the variables to differentiate by, or a predicate; see `select_variables`.
        sequence_reduction: `"mean"` or `"sum"` of the tokens' losses; see `PerExampleLoss`.

    Attributes:
        parameters: the `ParameterVector`.
        curvature_mode: how `curvature` differentiates: "forward over reverse", or "reverse over
            reverse" where forward mode cannot go (a recurrent layer's loop); `None` before the
            first call.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: Any = None,
        variables: Variables = None,
        sequence_reduction: str = "mean",
    ):
        self.model = model
        self.parameters = ParameterVector(select_variables(model, variables))
        self.loss = PerExampleLoss(model, loss, sequence_reduction)
        self.curvature_mode: str | None = None
        self._forward_project = True
        self._vectorize: bool | None = None
        self.losses = _compiled(self._losses)
        self.gradient = _compiled(self._gradient)
        self.project = _compiled(self._project)
        self.curvature = _compiled(self._curvature)
        self.squared_norms = _compiled(self._squared_norms)
        self.example_gradients = _compiled(self._example_gradients)

    def _losses(self, batch: Any) -> tf.Tensor:
        """(x, y[, sample_weight]) -> l_i [batch]."""
        x, y, sample_weight = (*batch, None)[:3]
        with twice_differentiable_moments():
            outputs = self.model(x, training=False)
        losses = self.loss(y, outputs, sample_weight)
        if losses is None or losses.shape.rank != 1:
            raise ValueError(
                "The loss must give one number for each example. It gave "
                f"{'nothing' if losses is None else f'shape {losses.shape}'}."
            )
        return losses

    def _gradient(self, batch: Any, weights: tf.Tensor | None = None) -> tf.Tensor:
        """sum_i weights_i grad l_i, [p]; weights [batch] default to ones."""
        return self.parameters.flatten(self._reverse(batch, weights))

    def _reverse(self, batch: Any, weights: tf.Tensor | None) -> list[Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.parameters.values)
            losses = self._losses(batch)
            if weights is not None:
                losses *= tf.cast(weights, losses.dtype)
            total = tf.reduce_sum(losses)
        return [
            None if gradient is None else tf.convert_to_tensor(gradient)
            for gradient in tape.gradient(total, self.parameters.values)
        ]

    def _curvature(
        self, batch: Any, vector: tf.Tensor, weights: tf.Tensor | None = None
    ) -> tf.Tensor:
        """sum_i weights_i Hessian(l_i) vector, [p], vector [p]."""
        if self.curvature_mode != REVERSE_OVER_REVERSE:
            try:
                product = self._forward_over_reverse(batch, vector, weights)
                self.curvature_mode = FORWARD_OVER_REVERSE
                return product
            except Exception as error:
                # Whatever stopped forward mode, reverse mode is tried; if the fault was the user's
                # (a wrong shape, a wrong loss), it shows there again, and is raised.
                reason = error
        product = self._reverse_over_reverse(batch, vector, weights)
        if self.curvature_mode is None:
            logging.warning(
                "Forward mode cannot pass through %r (%s); curvature products run reverse over "
                "reverse. A recurrent layer with `unroll=True` would run in forward mode.",
                self.model.name,
                type(reason).__name__,
            )
        self.curvature_mode = REVERSE_OVER_REVERSE
        return product

    def _forward_over_reverse(
        self, batch: Any, vector: tf.Tensor, weights: tf.Tensor | None
    ) -> tf.Tensor:
        tangents = self.parameters.unflatten(vector)
        with tf.autodiff.ForwardAccumulator(self.parameters.values, tangents) as accumulator:
            gradients = self._reverse(batch, weights)
        return self.parameters.flatten(
            [None if g is None else accumulator.jvp(g) for g in gradients]
        )

    def _reverse_over_reverse(
        self, batch: Any, vector: tf.Tensor, weights: tf.Tensor | None
    ) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.parameters.values)
            gradient = self._gradient(batch, weights)
            product = tf.reduce_sum(gradient * vector)
        return self.parameters.flatten(tape.gradient(product, self.parameters.values))

    def _project(self, batch: Any, directions: tf.Tensor) -> tf.Tensor:
        """<grad l_i, directions_j>: [batch, k] of directions [k, p].

        Exact by either of two routes, of which the cheaper is taken: forward mode over the
        unreduced loss, a direction at a time; or each example's gradient by itself, some examples
        at a time.
        """
        count = directions.shape[0]
        if self._forward_project and count is not None and count <= _MAX_FORWARD_DIRECTIONS:
            try:
                return self._forward_projections(batch, directions)
            except Exception as error:
                logging.info("Forward mode: %s. Per-example gradients serve instead.", error)
                self._forward_project = False
        return self._over_examples(
            batch, lambda gradients: tf.matmul(gradients, directions, transpose_b=True), [count]
        )

    def _forward_projections(self, batch: Any, directions: tf.Tensor) -> tf.Tensor:
        def one_direction(vector: tf.Tensor) -> tf.Tensor:
            tangents = self.parameters.unflatten(vector)
            with tf.autodiff.ForwardAccumulator(self.parameters.values, tangents) as accumulator:
                losses = self._losses(batch)
            tangent = accumulator.jvp(losses, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return tf.cast(tangent, self.parameters.dtype)

        columns = [one_direction(vector) for vector in tf.unstack(directions)]
        return tf.stack(columns, axis=1)

    def _squared_norms(self, batch: Any) -> tf.Tensor:
        """|grad l_i|^2, [batch]."""
        return self._over_examples(batch, lambda g: tf.reduce_sum(g * g, axis=1), [])

    def _example_gradients(self, batch: Any) -> tf.Tensor:
        """grad l_i of each example, [batch, p]. For few examples: it holds them all."""
        return self._over_examples(batch, lambda gradients: gradients, [self.parameters.size])

    def _over_examples(
        self,
        batch: Any,
        function: Callable[[tf.Tensor], tf.Tensor],
        row_shape: list[int | None],
    ) -> tf.Tensor:
        """`function` of per-example gradients [examples, p], over a few examples at a time."""
        size = tf.shape(tf.nest.flatten(batch)[0])[0]
        row_bytes = self.parameters.size * self.parameters.dtype.size
        block = tf.clip_by_value(_GRADIENT_BYTES // row_bytes, 1, size)
        num_blocks = (size + block - 1) // block
        # The last block is filled up with copies of the last example, cut off again below.
        rows = tf.reshape(
            tf.minimum(tf.range(num_blocks * block), size - 1), tf.stack([num_blocks, block])
        )

        def one_block(indices: tf.Tensor) -> tf.Tensor:
            examples = tf.nest.map_structure(lambda t: tf.gather(t, indices), batch)
            return function(self._block_gradients(examples))

        blocks = tf.map_fn(
            one_block,
            rows,
            fn_output_signature=tf.TensorSpec([None, *row_shape], self.parameters.dtype),
            parallel_iterations=1,
        )
        flat_shape = tf.concat([[-1], tf.shape(blocks)[2:]], axis=0)
        return tf.ensure_shape(tf.reshape(blocks, flat_shape)[:size], [None, *row_shape])

    def _block_gradients(self, examples: Any) -> tf.Tensor:
        def one_example(example: Any) -> tf.Tensor:
            return self._gradient(tf.nest.map_structure(lambda t: t[tf.newaxis], example))

        if self._vectorize is None:
            self._vectorize = not self._has_loop(examples)
        if self._vectorize:
            with _quiet_vectorized_map():
                return tf.vectorized_map(one_example, examples)
        specification = tf.TensorSpec([self.parameters.size], self.parameters.dtype)
        return tf.map_fn(one_example, examples, fn_output_signature=specification)

    def _has_loop(self, examples: Any) -> bool:
        """Whether the model loops (a rolled recurrent layer): vectorized_map fails on its gradient
        only when it runs."""
        graph = tf.function(self._losses).get_concrete_function(examples).graph.as_graph_def()
        nodes = [
            *graph.node,
            *(n for function in graph.library.function for n in function.node_def),
        ]
        return any(node.op in ("While", "StatelessWhile") for node in nodes)


def _compiled(method: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    # Retracing is reduced, so that the batches of a scorer may have any size. A partial, because
    # TensorFlow counts traces by code object, and would blame one LossMaps for those of another.
    return tf.function(functools.partial(method), reduce_retracing=True)


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
