"""What an example's loss is made of: the outputs by the parameters, and the loss by the outputs.

With z_i what example i's loss is convex in (see `convexity`), m numbers, J_i their derivatives by
the parameters, u_i and B_i the first and second derivatives of the loss by them, its gradient is
J_i'u_i, and its Hessian J_i'B_i J_i where z_i is linear in the parameters.
"""

import math
from typing import Any

import tensorflow as tf

from keras_influence.gradients.gauss_newton import losses_at, points_of
from keras_influence.gradients.linearization import linearize
from keras_influence.gradients.maps import LossMaps


class OutputMaps:
    """`gradients` and `derivatives` of one model and loss, as of its `LossMaps`.

    Args:
        maps: of the model.
        fisher: whether B_i is the mean over labels drawn from the model.
    """

    def __init__(self, maps: LossMaps, fisher: bool = False):
        self._maps = maps
        self._fisher = fisher
        self.gradients = maps.compiled(self._gradients)
        self.derivatives = maps.compiled(self._derivatives)

    def width(self, batch: Any) -> int:
        """m, of batches like this one; nothing is run."""
        maps, found = self._maps, []

        def trace(batch: Any) -> tf.Tensor:
            x, y, sample_weight = (*batch, None)[:3]
            points = points_of(maps.output_losses, y, maps.outputs(x), sample_weight)
            found.append(sum(math.prod(point.tensor.shape[1:]) for point in points))
            return tf.zeros([])

        leaves = tf.nest.map_structure(tf.convert_to_tensor, batch)
        tf.function(trace, autograph=False).get_concrete_function(leaves)
        return found[-1]

    def _gradients(self, batch: Any, number: tf.Tensor) -> tf.Tensor:
        """The row `number` of each J_i, [batch, p]."""
        maps = self._maps

        def one(batch: Any) -> tf.Tensor:
            x, y, sample_weight = (*batch, None)[:3]
            points = points_of(maps.output_losses, y, maps.outputs(x), sample_weight)
            values = _flat([point.tensor for point in points], maps.parameters.dtype)
            return tf.gather(values, number, axis=1)

        linearized = linearize(maps.coverage(batch), maps.parameters, one, batch, maps.contraction)
        return tf.concat(
            [
                tf.reshape(gradient, [-1, size])
                for gradient, size in zip(
                    linearized.gradients(), maps.parameters.sizes, strict=True
                )
            ],
            axis=1,
        )

    def _derivatives(self, batch: Any) -> tf.Tensor:
        """u_i, and below it B_i: [batch, 1 + m, m]."""
        maps = self._maps
        x, y, sample_weight = (*batch, None)[:3]
        outputs = maps.outputs(x)
        points = points_of(maps.output_losses, y, outputs, sample_weight)
        sizes = [math.prod(point.tensor.shape[1:]) for point in points]

        def losses(values: tf.Tensor, fisher: bool) -> tf.Tensor:
            parts = [
                tf.cast(tf.reshape(part, tf.shape(point.tensor)), point.tensor.dtype)
                for part, point in zip(tf.split(values, sizes, axis=1), points, strict=True)
            ]
            return losses_at(maps.output_losses, points, parts, y, outputs, sample_weight, fisher)

        at = tf.stop_gradient(_flat([point.tensor for point in points], maps.parameters.dtype))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(at)
            own = losses(at, fisher=False)
        slopes = tape.gradient(own, at)
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch(at)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(at)
                curved = losses(at, self._fisher)
            gradients = inner.gradient(curved, at)
        second = outer.batch_jacobian(gradients, at)
        return tf.concat([slopes[:, tf.newaxis], second], axis=1)


def _flat(tensors: list[tf.Tensor], dtype: tf.DType) -> tf.Tensor:
    """[batch, m]."""
    count = tf.shape(tensors[0])[0]
    rows = [
        tf.cast(tf.reshape(tensor, [count, math.prod(tensor.shape[1:])]), dtype)
        for tensor in tensors
    ]
    return tf.concat(rows, axis=1)
