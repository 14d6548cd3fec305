"""One run of a model in which a tape watches what leaves the calls of some layers."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from keras_influence.gradients import coverage as coverages
from keras_influence.gradients.calls import LayerCall, Observer, observed


class Capture(Observer):
    """Watches what leaves the calls of `units`.

    Args:
        units: the calls, by the number of the layer in `all_layers`, and of its call.
        tape: that records the run.
        size: of the batch.
        dtype: in which to compute.

    Attributes:
        calls: those of `units`, as they were seen, in the order in which they ended.
    """

    def __init__(
        self,
        units: Mapping[coverages.Key, coverages.Unit],
        tape: tf.GradientTape,
        size: Any,
        dtype: tf.DType,
    ):
        self.units = units
        self.tape = tape
        self.size = size
        self.dtype = dtype
        self.numbers = {id(unit.layer): key[0] for key, unit in units.items()}
        self.counts: collections.Counter[int] = collections.Counter()
        self.calls: dict[coverages.Key, LayerCall] = {}
        self.stack: list[tuple[LayerCall, coverages.Unit | None]] = []

    def run(self, function: Callable[[Any], tf.Tensor], batch: Any) -> tf.Tensor:
        """`function(batch)`, watched.

        Raises:
            RuntimeError: a call of `units` did not happen.
        """
        layers = {id(unit.layer): unit.layer for unit in self.units.values()}
        with observed(list(layers.values()), self):
            values = function(batch)
        missing = self.units.keys() - self.calls.keys()
        if missing:
            names = sorted({self.units[key].layer.name for key in missing})
            raise RuntimeError(
                f"The layers {names} were called otherwise than when the model was surveyed: a "
                "model must call its layers in the same order each time."
            )
        return values

    def call(
        self,
        layer: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        number = self.numbers[id(layer)]
        key = (number, self.counts[number])
        self.counts[number] += 1
        unit = self.units.get(key)
        seen = LayerCall(layer, args, kwargs)
        seen.key = key
        seen.rerun = original
        seen.dtype = self.dtype
        self.stack.append((seen, unit))
        try:
            outputs = original(*args, **kwargs)
        finally:
            self.stack.pop()
        if unit is None:
            return outputs
        if unit.stretch is not None and not seen.linear_outputs:
            outputs = unit.stretch.output(outputs, self.size)
        if len(coverages.floating(outputs)) > 1:
            outputs = tf.nest.map_structure(_departed, outputs)
        seen.outputs = outputs
        for tensor in coverages.floating(outputs):
            self.tape.watch(tensor)
        self.calls[key] = seen
        return outputs

    def activation(self, layer: Any, tensor: tf.Tensor) -> tf.Tensor:
        if not self.stack or self.stack[-1][0].layer is not layer:
            return tensor
        seen, unit = self.stack[-1]
        if unit is None:
            return tensor
        if unit.stretch is not None:
            tensor = unit.stretch.output(tensor, self.size)
        self.tape.watch(tensor)
        seen.linear_outputs.append(tensor)
        return tensor

    @staticmethod
    def has_linear(call: LayerCall) -> bool:
        """Whether the activation's argument is watched beside the outputs."""
        return len(call.linear_outputs) == 1 and call.linear_output is not None

    def watched(self, call: LayerCall) -> list[tf.Tensor]:
        """The outputs, and the activation's argument after them."""
        found = coverages.floating(call.outputs)
        return [*found, call.linear_outputs[0]] if self.has_linear(call) else found


def is_float(leaf: Any) -> bool:
    return tf.is_tensor(leaf) and leaf.dtype.is_floating


def _departed(leaf: Any) -> Any:
    """An output that no other one of its call is made of, so that none is counted in another's."""
    if not is_float(leaf):
        return leaf
    copy = tf.identity(leaf)
    mask = getattr(leaf, "_keras_mask", None)
    if mask is not None:
        copy._keras_mask = mask
    return copy
