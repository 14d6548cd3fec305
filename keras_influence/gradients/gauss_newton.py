"""Products with the Gauss-Newton and Fisher matrices; see `convexity` for what they are.

The derivative of the outputs along v is that of <u, outputs>'s slope along v by u, which is linear
in u: forward mode by two reverse passes (Townsend, "A new trick for calculating Jacobian vector
products", 2017). Of the first, which is computed for no value, TensorFlow keeps only what the
second one needs, so that it costs what forward mode would; and it runs wherever the Hessian's
products do, recurrent loops included.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_influence.gradients import convexity
from keras_influence.gradients.coverage import Coverage
from keras_influence.gradients.losses import visited
from keras_influence.gradients.parameters import ParameterVector
from keras_influence.gradients.slope import slope

# (y, outputs[, sample_weight]) -> l_i [B].
OutputLosses = Callable[[Any, Any, Any], tf.Tensor]


def gauss_newton(
    coverage: Coverage,
    parameters: ParameterVector,
    model: Callable[[Any], Any],
    losses: OutputLosses,
    batch: Any,
    vector: tf.Tensor,
    weights: tf.Tensor | None,
    fisher: bool,
) -> list[Any]:
    """sum_i weights_i J_i' L_i J_i vector, by the variables.

    Args:
        model: x -> outputs.
        losses: (y, outputs, sample_weight) -> l_i [B].
        batch: (x, y) or (x, y, sample_weight).
        vector: [p].
        weights: [B]; ones by default.
        fisher: whether L_i is the mean over labels drawn from the model.
    """
    x, y, sample_weight = (*batch, None)[:3]
    points: list[convexity.Point] = []
    cotangents: list[tf.Tensor] = []
    structure: list[Any] = []
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(parameters.values)

        def paired(batch: Any) -> tf.Tensor:
            """<u_i, z_i>, [B]."""
            del batch
            outputs = model(x)
            structure.append(outputs)
            points.extend(points_of(losses, y, outputs, sample_weight))
            products = []
            for point in points:
                cotangent = tf.zeros_like(point.tensor)
                tape.watch(cotangent)
                cotangents.append(cotangent)
                product = tf.reshape(cotangent * point.tensor, [tf.shape(cotangent)[0], -1])
                products.append(tf.cast(tf.reduce_sum(product, axis=1), parameters.dtype))
            return tf.add_n(products)

        along = slope(coverage, parameters, paired, batch, vector, None)
    tangents = tape.gradient(
        along.left,
        cotangents,
        output_gradients=along.right,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )

    products = curvature_product(
        losses, points, tangents, y, structure[0], sample_weight, weights, fisher
    )
    return tape.gradient(
        [point.tensor for point in points], parameters.values, output_gradients=products
    )


def points_of(
    losses: OutputLosses, y: Any, outputs: Any, sample_weight: Any
) -> list[convexity.Point]:
    """Of each output that has a loss."""
    found: dict[int, convexity.Point] = {}

    def visit(loss: keras.Loss, labels: tf.Tensor, output: tf.Tensor, seen: tf.Tensor) -> tf.Tensor:
        point = convexity.point(loss, output, seen)
        known = found.setdefault(id(output), point)
        if known.tensor is not point.tensor:
            raise ValueError(
                f"Two losses of one output, of which {loss.name!r} is one, are convex in different "
                'things: the output, and its logits. Use `curvature="hessian"`.'
            )
        return labels

    with visited(visit):
        losses(y, outputs, sample_weight)
    return list(found.values())


def losses_at(
    losses: OutputLosses,
    points: list[convexity.Point],
    values: list[tf.Tensor],
    y: Any,
    outputs: Any,
    sample_weight: Any,
    fisher: bool,
) -> tf.Tensor:
    """l_i [B] by the points' values; `fisher`: with labels that have the Fisher matrix's L_i."""
    rebuilt = {
        id(point.output): point.rebuilt(value) for point, value in zip(points, values, strict=True)
    }
    replaced = keras.tree.map_structure(lambda leaf: rebuilt.get(id(leaf), leaf), outputs)
    if not fisher:
        return losses(y, replaced, sample_weight)
    with visited(convexity.labels_for_fisher):
        return losses(y, replaced, sample_weight)


def curvature_product(
    losses: OutputLosses,
    points: list[convexity.Point],
    tangents: list[tf.Tensor],
    y: Any,
    outputs: Any,
    sample_weight: Any,
    weights: tf.Tensor | None,
    fisher: bool,
) -> list[tf.Tensor]:
    """L_i times the tangents, for each point: its gradient's gradient, for L_i is symmetric."""

    def total(values: list[tf.Tensor]) -> tf.Tensor:
        examples = losses_at(losses, points, values, y, outputs, sample_weight, fisher)
        if weights is not None:
            examples *= tf.cast(weights, examples.dtype)
        return tf.reduce_sum(examples)

    values = [tf.stop_gradient(point.tensor) for point in points]
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        outer.watch(values)
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(values)
            result = total(values)
        gradients = inner.gradient(
            result, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
    return outer.gradient(
        gradients,
        values,
        output_gradients=tangents,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
