"""Convolutions: the kernel's gradient is a sum over positions of windows times what came back."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_influence.gradients.calls import LayerCall
from keras_influence.gradients.factors import Contraction, Explicit, Factor, Layout, Outer
from keras_influence.gradients.rules.dense import bias, lora
from keras_influence.gradients.rules.registry import register_rule

Explanation = Iterator[tuple[keras.Variable, Factor]]

_FEWEST_CHANNELS = 16


class Windows:
    """The windows of a convolution: which input entries each output position sees.

    Args:
        kernel_size, strides, dilation: one number for each spatial axis.
        padding: "valid", "same" or "causal".
        outputs: positions along each spatial axis.
        inputs: entries along each spatial axis.
    """

    def __init__(
        self,
        kernel_size: Sequence[int],
        strides: Sequence[int],
        dilation: Sequence[int],
        padding: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
    ):
        self.kernel_size = tuple(kernel_size)
        self.strides = tuple(strides)
        self.dilation = tuple(dilation)
        self.outputs = tuple(outputs)
        self.pads = []
        for axis, size in enumerate(inputs):
            reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            # What the last window needs; what lies behind it is cut off.
            needed = (self.outputs[axis] - 1) * self.strides[axis] + reach
            total = max(needed - size, 0)
            before = {"valid": 0, "same": total // 2, "causal": reach - 1}[padding]
            self.pads.append((before, max(total - before, 0)))

    @property
    def num_taps(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def positions(self) -> int:
        return math.prod(self.outputs)

    def taps(self, x: tf.Tensor, first: int) -> list[tf.Tensor]:
        """For each entry of the kernel, the input that meets it at each position.

        Args:
            x: [B, ...] with the spatial axes from axis `first` on.
        """
        axes = range(len(self.kernel_size))
        rank = x.shape.rank
        if any(any(pad) for pad in self.pads):
            before, after = first, rank - first - len(self.pads)
            x = tf.pad(x, [(0, 0)] * before + self.pads + [(0, 0)] * after)
        phases = self._phases(x, first)
        found = []
        for index in range(self.num_taps):
            slices = [slice(None)] * rank
            phase: list[int] = []
            rest = index
            for axis in reversed(axes):
                rest, tap = divmod(rest, self.kernel_size[axis])
                start, within = divmod(tap * self.dilation[axis], self.strides[axis])
                phase.insert(0, within)
                slices[first + axis] = slice(start, start + self.outputs[axis])
            found.append(phases[tuple(phase)][tuple(slices)])
        return found

    def _phases(self, x: tf.Tensor, first: int) -> dict[tuple[int, ...], tf.Tensor]:
        """Every s-th entry of x along each axis, from each of the first s on.

        A slice with a stride copies number by number: one transposition, and slices without, take
        a tenth of the time.
        """
        if all(stride == 1 for stride in self.strides):
            return {(0,) * len(self.strides): x}
        rank, axes = x.shape.rank, range(len(self.strides))
        counts = [-(-x.shape[first + axis] // self.strides[axis]) for axis in axes]
        pads = [(0, 0)] * rank
        for axis in axes:
            pads[first + axis] = (0, counts[axis] * self.strides[axis] - x.shape[first + axis])
        shape = [-1, *x.shape[1:first]]
        for axis in axes:
            shape += [counts[axis], self.strides[axis]]
        shape += list(x.shape[first + len(axes) :])
        x = tf.reshape(tf.pad(x, pads), shape)
        inner = [first + 2 * axis + 1 for axis in axes]
        x = tf.transpose(x, [*inner, *(i for i in range(len(shape)) if i not in inner)])
        return {phase: x[phase] for phase in itertools.product(*(range(s) for s in self.strides))}

    def outer(self, layout: Layout, x: tf.Tensor, delta: tf.Tensor, groups: int = 1) -> Outer:
        """sum_t window_t(x) delta_t', channels last: x [B, ..., C], delta [B, ..., F]."""
        channels, filters = x.shape[-1], delta.shape[-1]
        rank, count = x.shape.rank, self.positions

        def expand(x: tf.Tensor, delta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            # Channels before positions, so that the product that follows reads rows. The windows
            # are made of slices, which are moved by rows too.
            x = tf.transpose(x, [0, rank - 1, *range(1, rank - 1)])
            if self.num_taps == 1:
                windows = tf.reshape(self.taps(x, 2)[0], [-1, groups, channels // groups, count])
            else:
                windows = tf.stack(self.taps(x, 2), axis=1)  # [B, taps, C, ...]
                windows = tf.reshape(
                    windows, [-1, self.num_taps, groups, channels // groups, count]
                )
                windows = tf.transpose(windows, [0, 2, 1, 3, 4]) if groups > 1 else windows
            left = tf.reshape(windows, [-1, groups, self.num_taps * channels // groups, count])
            right = tf.reshape(delta, [-1, count, groups, filters // groups])
            right = tf.transpose(right, [0, 2, 1, 3]) if groups > 1 else right
            return left, tf.reshape(right, [-1, groups, count, filters // groups])

        def form(how: Contraction, x: tf.Tensor, delta: tf.Tensor) -> tf.Tensor:
            right = tf.reshape(delta, [-1, count, filters])
            return tf.stack(
                [
                    how.matmul(tf.reshape(tap, [-1, count, channels]), right, transpose_a=True)
                    for tap in self.taps(x, 1)
                ],
                axis=1,
            )

        # A product for each entry of the kernel, and no windows, which are the larger part of the
        # work; but with few channels its rows are too few.
        by_taps = groups == 1 and channels >= _FEWEST_CHANNELS
        return Outer(layout, (x, delta), expand, count, form if by_taps else None)


@register_rule(
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    linear_in=["_kernel", "bias"],
)
def conv(call: LayerCall) -> Explanation:
    """Any strides, padding, dilation, groups, and channels first."""
    layer, (x, delta) = call.layer, _channels_last_sides(call)
    if x is None:
        return
    windows = _windows(layer, x, delta)
    if call.uses(layer._kernel):
        yield (
            layer._kernel,
            windows.outer(_conv_layout(layer._kernel.shape, layer.groups), x, delta, layer.groups),
        )
    if getattr(layer, "lora_enabled", False):
        if layer.groups != 1:
            return
        left, right = windows.outer(_conv_layout(layer._kernel.shape, 1), x, delta).sides()
        for variable, factor in lora(call, tf.transpose(left[:, 0], [0, 2, 1]), right[:, 0]):
            yield variable, _as(factor, variable)
    yield from bias(call, delta, [-1])


def _as(factor: Factor, variable: keras.Variable) -> Factor:
    """A factor of a matrix, as one of a variable whose leading axes are the matrix's rows."""
    assert isinstance(factor, Outer)
    shape = tuple(variable.shape)
    matrix = (math.prod(shape[:-1]), shape[-1])
    layout = Layout(shape, matrix, (0, 1), (1, *matrix))
    return Outer(layout, factor.tensors, factor.expand, factor.positions)


@register_rule(
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    linear_in=["kernel", "bias"],
)
def conv_transpose(call: LayerCall) -> Explanation:
    """The adjoint of a convolution: windows of what came back, times what entered."""
    layer, (x, delta) = call.layer, _channels_last_sides(call)
    if x is None:
        return
    variable = layer.kernel  # [*kernel, filters, channels]
    if call.uses(variable):
        windows = Windows(
            layer.kernel_size,
            layer.strides,
            layer.dilation_rate,
            layer.padding,
            delta.shape[1:-1],
            x.shape[1:-1],
        )
        yield variable, windows.outer(_conv_layout(variable.shape, 1), delta, x)
    yield from bias(call, delta, [-1])


@register_rule(
    keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D, linear_in=["kernel", "bias"]
)
def depthwise_conv(call: LayerCall) -> Explanation:
    """Each channel by itself: its windows times what came back to it."""
    layer, (x, delta) = call.layer, _channels_last_sides(call)
    if x is None:
        return
    if call.uses(layer.kernel):
        yield layer.kernel, Explicit(_depthwise_gradients(_windows(layer, x, delta), x, delta))
    yield from bias(call, delta, [-1])


@register_rule(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
def separable_conv(call: LayerCall) -> Explanation:
    """A depthwise convolution, and a 1 x 1 convolution of its result."""
    layer, (x, delta) = call.layer, _channels_last_sides(call)
    if x is None:
        return
    windows = _windows(layer, x, delta)
    depthwise, pointwise = (
        call.cast(each.value) for each in (layer.depthwise_kernel, layer.pointwise_kernel)
    )
    channels, multiplier = depthwise.shape[-2:]
    if call.uses(layer.pointwise_kernel):
        taps = tf.reshape(depthwise, [windows.num_taps, channels, multiplier])
        between: Any = 0.0
        for number, tap in enumerate(windows.taps(x, 1)):
            between += tap[..., tf.newaxis] * taps[number]
        between = tf.reshape(between, [-1, windows.positions, channels * multiplier])
        right = tf.reshape(delta, [-1, windows.positions, delta.shape[-1]])
        yield layer.pointwise_kernel, _as(Outer.dense(between, right), layer.pointwise_kernel)
    if call.uses(layer.depthwise_kernel):
        matrix = tf.reshape(pointwise, pointwise.shape[-2:])
        back = tf.tensordot(delta, matrix, axes=[[-1], [1]])
        yield layer.depthwise_kernel, Explicit(_depthwise_gradients(windows, x, back))
    yield from bias(call, delta, [-1])


def _depthwise_gradients(windows: Windows, x: tf.Tensor, delta: tf.Tensor) -> tf.Tensor:
    """x [B, ..., C], delta [B, ..., C M] -> [B, *kernel, C, M]."""
    channels = x.shape[-1]
    multiplier = delta.shape[-1] // channels
    delta = tf.reshape(delta, [-1, windows.positions, channels, multiplier])
    sums = []
    for tap in windows.taps(x, 1):
        tap = tf.reshape(tap, [-1, windows.positions, channels, 1])
        sums.append(tf.reduce_sum(tap * delta, axis=1))
    return tf.reshape(tf.stack(sums, axis=1), [-1, *windows.kernel_size, channels, multiplier])


def _conv_layout(shape: Sequence[int], groups: int) -> Layout:
    """[*kernel, C / groups, F] as groups of [taps C / groups, F / groups]."""
    rows, columns = math.prod(shape[:-1]), shape[-1] // groups
    sizes = (groups, rows, columns)
    if groups == 1:
        return Layout(tuple(shape), (rows, columns), (0, 1), sizes)
    return Layout(tuple(shape), (rows, groups, columns), (1, 0, 2), sizes)


def _windows(layer: keras.layers.Layer, x: tf.Tensor, delta: tf.Tensor) -> Windows:
    def of_rank(value: Any) -> Sequence[int]:
        return [value] * (x.shape.rank - 2) if isinstance(value, int) else value

    return Windows(
        of_rank(layer.kernel_size),
        of_rank(layer.strides),
        of_rank(layer.dilation_rate),
        layer.padding,
        x.shape[1:-1],
        delta.shape[1:-1],
    )


def _channels_last_sides(call: LayerCall) -> tuple[Any, Any]:
    """What entered and what came back, channels last; twice None where a rule cannot serve."""
    layer = call.layer
    if call.linear_gradient is None or getattr(layer, "quantization_mode", None) is not None:
        return None, None
    sides = [
        _channels_last(each, layer.data_format) for each in (call.inputs, call.linear_gradient)
    ]
    return (sides[0], sides[1]) if _static(*sides) else (None, None)


def _channels_last(tensor: tf.Tensor, data_format: str) -> tf.Tensor:
    if data_format == "channels_last":
        return tensor
    return tf.transpose(tensor, [0, *range(2, tensor.shape.rank), 1])


def _static(*tensors: tf.Tensor) -> bool:
    return all(tensor.shape[1:].is_fully_defined() for tensor in tensors)
