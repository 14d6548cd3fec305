"""A mean and variance that can be differentiated twice."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_lock = threading.RLock()
_users = 0
_original: Any = None


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


@contextlib.contextmanager
def twice_differentiable_moments() -> Iterator[None]:
    """Replaces `tf.nn.moments` while a model is traced.

    TensorFlow stops the gradient at the mean inside the variance, since d variance / d mean is
    zero. Its derivative is not: forward over reverse and reverse over reverse alike then lose a
    term of the Hessian, in every LayerNormalization and GroupNormalization. The values and first
    derivatives of the replacement are the same, so that a thread which meets it by chance is
    unharmed.
    """
    global _users, _original
    with _lock:
        if _users == 0:
            _original, tf.nn.moments = tf.nn.moments, _moments
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                tf.nn.moments = _original
