"""The slope of a batch's losses along a direction, in a form that is cheap to differentiate again.

A Hessian-vector product is the gradient of sum_i w_i <grad l_i, v>. Differentiated through the
gradients by weights, each bias of v is spread over all positions by itself, and added. But where a
layer's linear output z is linear in its weights, the layer's share of the sum is <dl/dz, z(v)>,
with z(v) the layer called with v in place of its weights: one operation, bias and all.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_influence.gradients.calls import LayerCall, Observer, observing
from keras_influence.gradients.capture import Capture
from keras_influence.gradients.coverage import Coverage, Key
from keras_influence.gradients.parameters import ParameterVector
from keras_influence.gradients.rules import registry


class Slope(NamedTuple):
    """The slope as sum_j <left_j, right_j>."""

    left: list[tf.Tensor]
    right: list[tf.Tensor]

    def gradient(self, tape: tf.GradientTape, values: Sequence[tf.Variable]) -> list[Any]:
        """Of the slope by `values`, where `tape` recorded how it was made."""
        # Not of the sum itself, whose way back would write each tensor once more.
        return tape.gradient(
            [*self.left, *self.right], values, output_gradients=[*self.right, *self.left]
        )


def slope(
    coverage: Coverage,
    parameters: ParameterVector,
    losses: Callable[[Any], tf.Tensor],
    batch: Any,
    vector: tf.Tensor,
    weights: tf.Tensor | None,
) -> Slope:
    """sum_i weights_i <grad l_i, vector>.

    Args:
        losses: batch -> l_i [B].
        vector: [p].
        weights: [B]; ones by default.
    """
    tangents = parameters.unflatten(vector)
    linear = {position for positions in coverage.linear.values() for position in positions}
    others = [position for position in range(len(tangents)) if position not in linear]
    values = [parameters.values[position] for position in others]
    size = tf.shape(tf.nest.flatten(batch)[0])[0]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        capture = _Tangents(coverage, parameters, tangents, tape, size)
        examples = capture.run(losses, batch)
        if weights is not None:
            examples *= tf.cast(weights, examples.dtype)
        total = tf.reduce_sum(examples)
    sources = [call.linear_output for call in capture.calls.values()]
    gradients = tape.gradient(
        total, [*sources, *values], unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    # The gradient of an embedding table is IndexedSlices.
    left = [tf.convert_to_tensor(gradient) for gradient in gradients]
    right = [*capture.tangents.values(), *(tangents[position] for position in others)]
    right = [tf.cast(r, g.dtype) for r, g in zip(right, left, strict=True)]
    return Slope(left, right)


class _Tangents(Capture):
    """Runs each layer that is linear in weights a second time, with a direction in their place."""

    def __init__(
        self,
        coverage: Coverage,
        parameters: ParameterVector,
        tangents: list[tf.Tensor],
        tape: tf.GradientTape,
        size: Any,
    ):
        units = {key: coverage.units[key] for key in coverage.linear}
        super().__init__(units, tape, size, parameters.dtype)
        self.positions = coverage.linear
        self.variables = parameters.variables
        self.directions = tangents
        self.tangents: dict[Key, tf.Tensor] = {}

    def call(
        self,
        layer: keras.layers.Layer,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        before = len(self.calls)
        outputs = super().call(layer, original, args, kwargs)
        if len(self.calls) > before:
            # Here and not later, for the layer's own precision is in force.
            key = next(reversed(self.calls))
            self.tangents[key] = self._tangent(self.calls[key])
        return outputs

    def _tangent(self, call: LayerCall) -> tf.Tensor:
        # Weights that are not differentiated by stand still.
        mapping = [
            (weight, tf.zeros(weight.shape, weight.dtype))
            for weight in registry.linear_weights(call.layer)
        ]
        mapping += [(self.variables[v], self.directions[v]) for v in self.positions[call.key]]
        seen = _LinearOutput()
        with keras.StatelessScope(state_mapping=mapping), observing({id(call.layer): seen}):
            output = call.rerun(*call.args, **call.kwargs)
        return output if seen.tensor is None else seen.tensor


class _LinearOutput(Observer):
    """What a layer's activation was given."""

    tensor: Any = None

    def activation(self, layer: keras.layers.Layer, tensor: tf.Tensor) -> tf.Tensor:
        self.tensor = tensor
        return tensor
