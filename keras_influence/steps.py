"""Several batches in one execution: the loop over them runs on the device.

A step function is called for one batch, and between two calls the device waits for the host. Here
batches of one shape are stacked, and one program goes through them. A stack that is not full has
copies of its first batch in the empty places; the loop ends before them.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from keras_influence.data import Batch

T = TypeVar("T")

# For each function, its loops: those that last as long as it does.
_summing: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_listing: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def check_steps(steps_per_execution: int) -> None:
    """
    Raises:
        ValueError: fewer than one batch at a time.
    """
    if steps_per_execution < 1:
        raise ValueError(
            f"`steps_per_execution` must be at least 1. Received: {steps_per_execution}."
        )


def groups(batches: Iterable[Batch], steps: int) -> Iterator[list[Batch]]:
    """The batches in order, at most `steps` of one shape at a time."""
    group: list[Batch] = []
    shape: Any = None
    for batch in batches:
        found = [np.shape(leaf) for leaf in tf.nest.flatten(batch.examples)]
        if group and (len(group) == steps or found != shape):
            yield group
            group = []
        shape = found
        group.append(batch)
    if group:
        yield group


def stacked(group: list[T], steps: int) -> T:
    """Nests of arrays, one for each batch, as one nest with an axis more, of length `steps`."""
    full = group + group[:1] * (steps - len(group))
    return tf.nest.map_structure(lambda *leaves: np.stack(leaves), *full)


def summed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The sum of `function(examples, *operands, weights)` over a stack of batches.

    Args:
        function: one that lasts, such as those of `gradients.LossMaps`.

    Returns:
        (examples [steps, B, ...], number of batches, *operands, weights [steps, B]) -> the sum; one
        function for each `function`.
    """
    return _lasting(_summing, function, _sum_of)


def listed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(examples, *operands)` of each batch of a stack.

    Returns:
        (examples [steps, B, ...], number of batches, *operands) -> [steps, B, ...], zeros where
        there is no batch; one function for each `function`.
    """
    return _lasting(_listing, function, _list_of)


def _lasting(
    kept: weakref.WeakKeyDictionary[Any, Any],
    function: Callable[..., Any],
    loop: Callable[..., Any],
) -> Callable[..., Any]:
    if function not in kept:
        wanted = weakref.ref(function)

        def of_stack(*arguments: Any) -> Any:
            return loop(wanted(), *arguments)

        # Compiled where one batch is; a partial, because TensorFlow counts traces by code object.
        kept[function] = tf.function(
            functools.partial(of_stack),
            autograph=False,
            jit_compile=getattr(function, "_jit_compile", None),
        )
    return kept[function]


def _sum_of(function: Any, examples: Any, count: tf.Tensor, *rest: Any) -> Any:
    *operands, weights = rest

    def one(step: Any) -> Any:
        return function(_taken(examples, step), *operands, weights[step])

    def add(step: tf.Tensor, total: Any) -> tuple[tf.Tensor, Any]:
        return step + 1, tf.nest.map_structure(tf.add, total, one(step))

    zeros = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), _results(one))
    return _while(count, add, zeros)


def _list_of(function: Any, examples: Any, count: tf.Tensor, *operands: Any) -> tf.Tensor:
    def one(step: Any) -> Any:
        return function(_taken(examples, step), *operands)

    spec = _results(one)
    steps = tf.nest.flatten(examples)[0].shape[0]
    rows = tf.TensorArray(spec.dtype, steps, element_shape=spec.shape)

    def write(step: tf.Tensor, rows: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        return step + 1, rows.write(step, one(step))

    return _while(count, write, rows).stack()


def _taken(examples: Any, step: Any) -> Any:
    return tf.nest.map_structure(lambda leaf: leaf[step], examples)


def _results(one: Callable[[Any], Any]) -> Any:
    """What a batch gives: its dtypes and its shapes, which are known before it is computed."""
    graph = tf.__internal__.FuncGraph("results")
    with graph.as_default():
        return tf.nest.map_structure(
            lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), one(0)
        )


def _while(count: tf.Tensor, body: Callable[..., Any], state: Any) -> Any:
    # One batch at a time, as the host would have it: so much memory was found to do.
    _, state = tf.while_loop(
        lambda step, _: step < count, body, (tf.constant(0), state), parallel_iterations=1
    )
    return state
