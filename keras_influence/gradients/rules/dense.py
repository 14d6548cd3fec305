"""Dense and EinsumDense: a kernel that multiplies, and a bias."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_influence.gradients.calls import LayerCall
from keras_influence.gradients.factors import Explicit, Factor, Layout, Outer
from keras_influence.gradients.rules.registry import register_rule

Explanation = Iterator[tuple[keras.Variable, Factor]]


@register_rule(keras.layers.Dense, linear_in=["_kernel", "bias"])
def dense(call: LayerCall) -> Explanation:
    """z = x (K + s A B) + b, with A and B where the layer has LoRA weights."""
    layer, delta = call.layer, call.linear_gradient
    if delta is None or layer.quantization_mode is not None:
        return
    if call.uses(layer._kernel):
        yield layer._kernel, Outer.dense(call.inputs, delta)
    yield from lora(call, call.inputs, delta)
    yield from bias(call, delta, [-1])


def lora(call: LayerCall, left: tf.Tensor, right: tf.Tensor) -> Explanation:
    """K + s A B: dA = s left (right B')', dB = s (left A) right'."""
    layer = call.layer
    if not getattr(layer, "lora_enabled", False):
        return
    scale = layer.lora_alpha / layer.lora_rank
    a, b = (call.cast(each.value) for each in (layer.lora_kernel_a, layer.lora_kernel_b))
    a = tf.reshape(a, [-1, a.shape[-1]])
    if call.uses(layer.lora_kernel_a):
        through = scale * tf.tensordot(right, b, axes=[[-1], [1]])
        yield layer.lora_kernel_a, Outer.dense(left, through)
    if call.uses(layer.lora_kernel_b):
        through = scale * tf.tensordot(left, a, axes=[[-1], [0]])
        yield layer.lora_kernel_b, Outer.dense(through, right)


def bias(call: LayerCall, delta: tf.Tensor, axes: Sequence[int]) -> Explanation:
    """b added along `axes` of the linear output: the sum of delta over all the others."""
    variable = getattr(call.layer, "bias", None)
    if variable is None or not call.uses(variable):
        return
    rank = delta.shape.rank
    kept = {axis % rank for axis in axes}
    others = [axis for axis in range(1, rank) if axis not in kept]
    total = tf.reduce_sum(delta, axis=others) if others else delta
    yield variable, Explicit(tf.reshape(total, [-1, *variable.shape]))


@register_rule(keras.layers.EinsumDense, linear_in=["_kernel", "bias"])
def einsum_dense(call: LayerCall) -> Explanation:
    """z = einsum(equation, x, K) + b: dK sums x d over the letters that K lacks."""
    layer, delta = call.layer, call.linear_gradient
    if delta is None or layer.quantization_mode is not None:
        return
    x = call.inputs
    inputs, kernel, outputs = einsum_letters(layer.equation, x.shape.rank, delta.shape.rank)
    if not call_supported(inputs, kernel, outputs):
        return
    if call.uses(layer._kernel):
        yield layer._kernel, einsum_outer(x, delta, inputs, kernel, outputs, layer._kernel.shape)
    if getattr(layer, "lora_enabled", False):
        # A B stands for the kernel with its last axis made of B's.
        scale = layer.lora_alpha / layer.lora_rank
        a, b = (call.cast(each.value) for each in (layer.lora_kernel_a, layer.lora_kernel_b))
        wide = einsum_outer(x, delta, inputs, kernel, outputs, layer.kernel.shape)
        gradient = wide.gradients()  # [B, ..., c]
        if call.uses(layer.lora_kernel_a):
            values = scale * tf.tensordot(gradient, b, axes=[[-1], [1]])
            yield layer.lora_kernel_a, Explicit(values)
        if call.uses(layer.lora_kernel_b):
            rank, width = b.shape
            flat = tf.reshape(gradient, [-1, math.prod(layer.kernel.shape[:-1]), width])
            values = scale * tf.einsum("pr,bpc->brc", tf.reshape(a, [-1, rank]), flat)
            yield layer.lora_kernel_b, Explicit(values)
    variable = layer.bias
    if call.uses(variable):
        # The bias has the output's trailing axes, those that it lacks as ones.
        extra = len(outputs) - len(variable.shape)
        shape = [1] * extra + list(variable.shape)
        others = [axis for axis in range(1, len(outputs)) if shape[axis] == 1]
        total = tf.reduce_sum(delta, axis=others) if others else delta
        yield variable, Explicit(tf.reshape(total, [-1, *variable.shape]))


def einsum_letters(equation: str, input_rank: int, output_rank: int) -> tuple[str, str, str]:
    """The letters of inputs, kernel and outputs, with those of an ellipsis written out."""
    left, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    spare = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in equation]

    def written_out(letters: str, rank: int) -> str:
        if "..." not in letters:
            return letters
        count = rank - len(letters.replace("...", ""))
        return letters.replace("...", "".join(spare[:count]))

    return written_out(inputs, input_rank), kernel, written_out(outputs, output_rank)


def call_supported(inputs: str, kernel: str, outputs: str) -> bool:
    """Whether examples come first in both, and no letter stands twice or in the inputs alone."""
    once = all(len(set(letters)) == len(letters) for letters in (inputs, kernel, outputs))
    return (
        once
        and inputs[0] == outputs[0]
        and inputs[0] not in kernel
        and set(inputs) <= set(kernel) | set(outputs)
        and set(kernel) <= set(inputs) | set(outputs)
    )


def einsum_outer(
    x: tf.Tensor, delta: tf.Tensor, inputs: str, kernel: str, outputs: str, shape: Any
) -> Outer:
    """The kernel's gradient: letters in all three are groups, those that K lacks are positions."""
    shape = tuple(shape)
    groups = [c for c in kernel if c in inputs and c in outputs]
    rows = [c for c in kernel if c in inputs and c not in outputs]
    columns = [c for c in kernel if c not in inputs]
    positions = [c for c in outputs[1:] if c not in kernel]
    order = tuple(kernel.index(c) for c in [*groups, *rows, *columns])
    sizes = [math.prod(shape[kernel.index(c)] for c in part) for part in (groups, rows, columns)]
    known = [delta.shape[outputs.index(c)] for c in positions]
    count = None if None in known else math.prod(known)
    layout = Layout(shape, shape, order, (sizes[0], sizes[1], sizes[2]))
    left_order = [inputs.index(c) for c in [inputs[0], *groups, *rows, *positions]]
    right_order = [outputs.index(c) for c in [outputs[0], *groups, *positions, *columns]]

    def expand(x: tf.Tensor, delta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        number = -1 if count is None else count
        left = tf.reshape(_transposed(x, left_order), [tf.shape(x)[0], *sizes[:2], number])
        right = _transposed(delta, right_order)
        right = tf.reshape(right, [tf.shape(x)[0], sizes[0], number, sizes[2]])
        return left, right

    return Outer(layout, (x, delta), expand, count)


def _transposed(tensor: tf.Tensor, order: Sequence[int]) -> tf.Tensor:
    if list(order) == list(range(len(order))):
        return tensor
    return tf.transpose(tensor, order)
