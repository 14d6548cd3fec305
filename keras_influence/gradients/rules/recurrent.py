"""LSTM, GRU, SimpleRNN: the gates' gradients, by running the recurrence once more."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_influence.gradients.calls import LayerCall, unobserved
from keras_influence.gradients.factors import Explicit, Factor, Outer
from keras_influence.gradients.rules.registry import register_rule

Explanation = Iterator[tuple[keras.Variable, Factor]]

# (input part, state, shift of the recurrent part) -> (output, new state, what the recurrent kernel
# was multiplied with: for each part of its columns).
Step = Callable[[tf.Tensor, Sequence[tf.Tensor], tf.Tensor], tuple[Any, ...]]


@register_rule(keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN)
def recurrent(call: LayerCall) -> Explanation:
    """Kernel: inputs times gates; recurrent kernel: states times gates; bias: sums of gates.

    The recurrence is run again with zeros added to the gates' arguments at each step, whose
    gradients are those of the gates.
    """
    layer, cell = call.layer, call.layer.cell
    if layer.stateful or getattr(cell, "quantization_mode", None) is not None:
        return
    steps = {keras.layers.LSTM: _lstm, keras.layers.GRU: _gru, keras.layers.SimpleRNN: _simple}
    step = next(step for cls, step in steps.items() if isinstance(layer, cls))
    arguments = _arguments(call)
    if arguments is None:
        return
    sequences, initial, mask = arguments
    if layer.go_backwards:
        sequences = tf.reverse(sequences, [1])
        mask = None if mask is None else tf.reverse(mask, [1])
    kernel, recurrent_kernel = (
        call.cast(each.value) for each in (cell.kernel, cell.recurrent_kernel)
    )
    inner = step(cell, recurrent_kernel, call)
    batch, length = tf.shape(sequences)[0], tf.shape(sequences)[1]
    shift = tf.zeros([length, batch, *_width(kernel)], call.dtype)
    # Two shifts: a reset gate of a GRU stands between the input's part and the recurrent one.
    shifts = (shift, tf.zeros_like(shift))
    with tf.GradientTape(watch_accessed_variables=False) as tape, unobserved():
        tape.watch(shifts)
        part = tf.tensordot(sequences, kernel, axes=[[2], [0]]) + _input_bias(cell, call)
        part = tf.transpose(part, [1, 0, 2]) + shifts[0]
        outputs, states, entering = _scan(layer, inner, part, shifts[1], initial, mask)
        result = tf.transpose(outputs, [1, 0, 2]) if layer.return_sequences else outputs[-1]
        results = [result, *(state[-1] for state in states)] if layer.return_state else [result]
        wanted = tf.nest.flatten(call.output_gradients)
        total = tf.add_n([tf.reduce_sum(r * w) for r, w in zip(results, wanted, strict=True)])
    gates, recurrent_gates = (
        tf.transpose(g, [1, 0, 2])
        for g in tape.gradient(total, shifts, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    )
    entering = [tf.transpose(each, [1, 0, 2]) for each in entering]
    if call.uses(cell.kernel):
        yield cell.kernel, Outer.dense(sequences, gates)
    if call.uses(cell.recurrent_kernel):
        yield cell.recurrent_kernel, _recurrent_factor(entering, recurrent_gates, cell)
    if call.uses(cell.bias):
        total = tf.reduce_sum(gates, axis=1)
        if len(cell.bias.shape) == 2:  # A GRU with `reset_after` has one for each part.
            total = tf.stack([total, tf.reduce_sum(recurrent_gates, axis=1)], axis=1)
        yield cell.bias, Explicit(total)


def _recurrent_factor(
    entering: Sequence[tf.Tensor], gates: tf.Tensor, cell: keras.layers.Layer
) -> Factor:
    if len(entering) == 1:
        return Outer.dense(entering[0], gates)
    # A GRU without `reset_after`: its last columns meet the reset state. Both states side by side,
    # each with the gates of its own columns, sum to the one gradient.
    width = 2 * cell.units
    zeros = tf.zeros_like(gates)
    first = tf.concat([gates[..., :width], zeros[..., width:]], axis=-1)
    second = tf.concat([zeros[..., :width], gates[..., width:]], axis=-1)
    return Outer.dense(tf.concat(entering, axis=1), tf.concat([first, second], axis=1))


def _arguments(call: LayerCall) -> tuple[tf.Tensor, list[tf.Tensor], Any] | None:
    names = ("sequences", "initial_state", "mask", "training")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    sequences = call.cast(given["sequences"])
    if sequences.shape.rank != 3:
        return None
    initial = given.get("initial_state")
    if initial is None:
        initial = call.layer.get_initial_state(tf.shape(sequences)[0])
    initial = [call.cast(state) for state in tf.nest.flatten(initial)]
    mask = given.get("mask")
    if isinstance(mask, (list, tuple)):
        mask = mask[0]
    return sequences, initial, None if mask is None else tf.cast(mask, tf.bool)


def _width(kernel: tf.Tensor) -> list[int]:
    return [kernel.shape[1]]


def _input_bias(cell: keras.layers.Layer, call: LayerCall) -> Any:
    if not cell.use_bias:
        return tf.zeros([], call.dtype)
    bias = call.cast(cell.bias.value)
    return bias[0] if bias.shape.rank == 2 else bias


def _scan(
    layer: keras.layers.Layer,
    step: Step,
    part: tf.Tensor,
    shift: tf.Tensor,
    initial: list[tf.Tensor],
    mask: tf.Tensor | None,
) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor]]:
    """Outputs and states after each step, [T, B, ...], and what met the recurrent kernel."""
    batch = tf.shape(part)[1]
    initial = [tf.broadcast_to(state, [batch, state.shape[-1]]) for state in initial]
    _, _, entering = step(part[0], initial, shift[0])
    start = (tf.zeros_like(initial[0]), initial, [tf.zeros_like(each) for each in entering])
    elements: tuple[tf.Tensor, ...] = (part, shift)
    if mask is not None:
        elements += (tf.transpose(mask, [1, 0])[..., tf.newaxis],)

    def one_step(previous: Any, element: Any) -> Any:
        output, states, _ = previous
        new_output, new_states, entering = step(element[0], states, element[1])
        if mask is not None:
            # A masked step repeats the output before it, or gives zeros, and keeps the state.
            other = tf.zeros_like(output) if layer.zero_output_for_mask else output
            new_output = tf.where(element[2], new_output, other)
            new_states = [
                tf.where(element[2], new, old) for new, old in zip(new_states, states, strict=True)
            ]
        return new_output, list(new_states), list(entering)

    return tf.scan(one_step, elements, initializer=start, parallel_iterations=1)


def _lstm(cell: keras.layers.Layer, recurrent_kernel: tf.Tensor, call: LayerCall) -> Step:
    def step(part: tf.Tensor, states: Sequence[tf.Tensor], shift: tf.Tensor) -> tuple[Any, ...]:
        hidden, carry = states
        i, f, c, o = tf.split(part + tf.matmul(hidden, recurrent_kernel) + shift, 4, axis=-1)
        gate = cell.recurrent_activation
        carry = gate(f) * carry + gate(i) * cell.activation(c)
        output = gate(o) * cell.activation(carry)
        return output, [output, carry], [hidden]

    return step


def _gru(cell: keras.layers.Layer, recurrent_kernel: tf.Tensor, call: LayerCall) -> Step:
    units = cell.units

    def step(part: tf.Tensor, states: Sequence[tf.Tensor], shift: tf.Tensor) -> tuple[Any, ...]:
        (hidden,) = states
        x_z, x_r, x_h = tf.split(part, 3, axis=-1)
        if cell.reset_after:
            inner = tf.matmul(hidden, recurrent_kernel) + shift
            if cell.use_bias:
                inner += call.cast(cell.bias.value)[1]
            r_z, r_r, r_h = tf.split(inner, 3, axis=-1)
            r = cell.recurrent_activation(x_r + r_r)
            candidate, entering = x_h + r * r_h, [hidden]
        else:
            inner = tf.matmul(hidden, recurrent_kernel[:, : 2 * units]) + shift[:, : 2 * units]
            r_z, r_r = tf.split(inner, 2, axis=-1)
            r = cell.recurrent_activation(x_r + r_r)
            reset = r * hidden
            candidate = x_h + tf.matmul(reset, recurrent_kernel[:, 2 * units :])
            candidate += shift[:, 2 * units :]
            entering = [hidden, reset]
        z = cell.recurrent_activation(x_z + r_z)
        output = z * hidden + (1 - z) * cell.activation(candidate)
        return output, [output], entering

    return step


def _simple(cell: keras.layers.Layer, recurrent_kernel: tf.Tensor, call: LayerCall) -> Step:
    def step(part: tf.Tensor, states: Sequence[tf.Tensor], shift: tf.Tensor) -> tuple[Any, ...]:
        (hidden,) = states
        output = part + tf.matmul(hidden, recurrent_kernel) + shift
        if cell.activation is not None:
            output = cell.activation(output)
        return output, [output], [hidden]

    return step
