"""Weights of which each output entry meets one: scales and biases, after a normalisation or not."""

from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from keras_influence.gradients.calls import LayerCall, unobserved
from keras_influence.gradients.factors import Explicit, Factor
from keras_influence.gradients.rules.registry import Rule, register_rule

Explanation = Iterator[tuple[keras.Variable, Factor]]


def elementwise(call: LayerCall, variable: keras.Variable, axes: Sequence[int]) -> Explanation:
    """The gradients of a weight that lies along `axes` of the output.

    Each entry of the output must depend on one entry of the weight only. Its derivative is then
    what forward mode gives for a direction of ones, whatever the layer computes.

    Args:
        call: the layer's call, with one output [B, ...].
        variable: the weight.
        axes: of the output, in the order of the weight's axes. The weight may have axes of one.
    """
    if not call.uses(variable):
        return
    value = variable.value
    with unobserved():
        with tf.autodiff.ForwardAccumulator([value], [tf.ones_like(value)]) as accumulator:
            output = call.rerun(*call.args, **call.kwargs)
        slope = accumulator.jvp(output, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    products = call.output_gradient * tf.cast(slope, call.dtype)
    rank = products.shape.rank
    kept = [axis % rank for axis in axes]
    others = [axis for axis in range(1, rank) if axis not in kept]
    total = tf.reduce_sum(products, axis=others) if others else products
    ranks = sorted(kept)
    if ranks != kept:
        total = tf.transpose(total, [0, *(ranks.index(axis) + 1 for axis in kept)])
    yield variable, Explicit(tf.reshape(total, [-1, *variable.shape]))


def _along(
    names: Sequence[str], axes: Callable[[keras.layers.Layer], Sequence[int]], rule_name: str
) -> Rule:
    def rule(call: LayerCall) -> Explanation:
        for name in names:
            variable = getattr(call.layer, name, None)
            if isinstance(variable, keras.Variable):
                yield from elementwise(call, variable, axes(call.layer))

    rule.__name__ = rule_name
    return rule


def _listed(axis: int | Sequence[int]) -> list[int]:
    return [axis] if isinstance(axis, int) else list(axis)


# The statistics of a BatchNormalization, which are frozen, are no scale: they are left alone.
register_rule(keras.layers.BatchNormalization)(
    _along(["gamma", "beta"], lambda layer: _listed(layer.axis), "batch_normalization")
)
register_rule(keras.layers.LayerNormalization)(
    _along(["gamma", "beta"], lambda layer: _listed(layer.axis), "layer_normalization")
)
register_rule(keras.layers.RMSNormalization)(
    _along(["scale"], lambda layer: _listed(layer.axis), "rms_normalization")
)
register_rule(keras.layers.GroupNormalization)(
    _along(["gamma", "beta"], lambda layer: _listed(layer.axis), "group_normalization")
)


@register_rule(keras.layers.PReLU)
def prelu(call: LayerCall) -> Explanation:
    """alpha [*output axes], of size one along shared axes."""
    variable = call.layer.alpha
    if not call.uses(variable):
        return
    axes = [i + 1 for i, size in enumerate(variable.shape) if size != 1]
    yield from elementwise(call, variable, axes)


# RMS normalisations and layer scales of model libraries: one weight along the last axis.
register_rule(
    "keras>LayerScale",
    "keras_hub>GemmaRMSNormalization",
    "keras_hub>LlamaLayerNorm",
    "keras_hub>MistralLayerNormalization",
    "keras_hub>T5LayerNorm",
)(_along(["gamma", "scale", "weight"], lambda layer: [-1], "scale"))
