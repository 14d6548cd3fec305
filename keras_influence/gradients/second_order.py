"""TensorFlow functions whose second derivatives are wrong, or dearer than they need be."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

_lock = threading.RLock()
# Name in `tf.nn`: how many traces want it replaced, and what stood there before.
_replaced: dict[str, tuple[int, Any]] = {}


@contextlib.contextmanager
def _in_place(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    with _lock:
        for name, function in functions.items():
            users, original = _replaced.get(name, (0, getattr(tf.nn, name)))
            _replaced[name] = (users + 1, original)
            setattr(tf.nn, name, function)
    try:
        yield
    finally:
        with _lock:
            for name in functions:
                users, original = _replaced.pop(name)
                if users > 1:
                    _replaced[name] = (users - 1, original)
                else:
                    setattr(tf.nn, name, original)


def twice_differentiable_moments() -> contextlib.AbstractContextManager[None]:
    """Replaces `tf.nn.moments` while a model is traced.

    TensorFlow stops the gradient at the mean inside the variance, since d variance / d mean is
    zero. Its derivative is not: forward over reverse and reverse over reverse alike then lose a
    term of the Hessian, in every LayerNormalization and GroupNormalization. The values and first
    derivatives of the replacement are the same, so that a thread which meets it by chance is
    unharmed.
    """
    return _in_place({"moments": _moments})


def cheap_second_derivatives() -> contextlib.AbstractContextManager[None]:
    """Replaces `tf.nn.relu` and `tf.nn.max_pool` while a Hessian-vector product is traced.

    Their values and their derivatives of any order are the same. But TensorFlow adds a tensor of
    zeros for each second derivative that vanishes, and takes five times as long for the one of
    max-pooling that does not as for the first.
    """
    return _in_place({"relu": _relu, "max_pool": _max_pool})


def _moments(
    x: Any, axes: Any, shift: Any = None, keepdims: bool = False, name: str | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """`tf.nn.moments` without its `stop_gradient` on the mean inside the variance."""
    del shift  # Unused by tf.nn.moments too.
    with tf.name_scope(name or "moments"):
        x = tf.convert_to_tensor(x)
        wide = tf.cast(x, tf.float32) if x.dtype == tf.float16 else x
        mean = tf.reduce_mean(wide, axes, keepdims=True)
        variance = tf.reduce_mean(tf.math.squared_difference(wide, mean), axes, keepdims=True)
        if not keepdims:
            mean, variance = tf.squeeze(mean, axes), tf.squeeze(variance, axes)
        return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


def _relu(features: Any, name: str | None = None) -> tf.Tensor:
    @tf.custom_gradient
    def relu(x: tf.Tensor) -> Any:
        y = tf.raw_ops.Relu(features=x, name=name)
        return y, lambda upstream: relu_grad(upstream, y)

    @tf.custom_gradient
    def relu_grad(upstream: tf.Tensor, y: tf.Tensor) -> Any:
        def back(u: tf.Tensor) -> Any:
            return tf.raw_ops.ReluGrad(gradients=u, features=y), None

        return tf.raw_ops.ReluGrad(gradients=upstream, features=y), back

    return relu(tf.convert_to_tensor(features))


def _max_pool(
    input: Any,
    ksize: int | Sequence[int],
    strides: int | Sequence[int],
    padding: Any,
    data_format: str | None = None,
    name: str | None = None,
) -> tf.Tensor:
    x = tf.convert_to_tensor(input)
    if x.shape.rank != 4 or data_format not in (None, "NHWC") or not isinstance(padding, str):
        return _replaced["max_pool"][1](input, ksize, strides, padding, data_format, name)
    size, step = _of_images(ksize), _of_images(strides)
    options = {"ksize": size, "strides": step, "padding": padding}
    disjoint = padding == "VALID" and all(a <= b for a, b in zip(size, step, strict=True))

    @tf.custom_gradient
    def pool(x: tf.Tensor) -> Any:
        y = tf.raw_ops.MaxPool(input=x, name=name, **options)
        return y, lambda upstream: pool_grad(upstream, x, y)

    @tf.custom_gradient
    def pool_grad(upstream: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> Any:
        def back(u: tf.Tensor) -> Any:
            """Of u, what stands where the windows' largest entries stand."""
            if not disjoint:
                chosen = tf.raw_ops.MaxPoolGradGrad(orig_input=x, orig_output=y, grad=u, **options)
                return chosen, None, None
            # A window's mean of the largest entry alone is that entry by the window's size. The
            # gradient itself tells which it is: where entries tie, another choice is no adjoint.
            largest = tf.raw_ops.MaxPoolGrad(
                orig_input=x, orig_output=y, grad=tf.ones_like(y), **options
            )
            chosen = tf.raw_ops.AvgPool(value=largest * u, **options)
            return chosen * math.prod(size), None, None

        gradient = tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=upstream, **options)
        return gradient, back

    return pool(x)


def _of_images(value: int | Sequence[int]) -> list[int]:
    """One number for each axis of images."""
    values = [value] if isinstance(value, int) else list(value)
    if len(values) == 4:
        return values
    height, width = values * 2 if len(values) == 1 else values
    return [1, height, width, 1]
