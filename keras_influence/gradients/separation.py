"""Whether an example's loss is its own: models and losses that mix the examples of a batch."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence.gradients.calls import Observer, all_layers, observed

# Convolutions of other batch sizes add in another order; statistics of the batch change far more.
_TOLERANCE = 1e-3


def check_separate(model: keras.Model, losses: Callable[[Any], tf.Tensor], batch: Any) -> None:
    """Compares the loss of an example by itself with its loss beside another one.

    Args:
        losses: (x, y[, sample_weight]) -> [B].
        batch: of two examples or more; the first two are computed. Of one, there is nothing to do.

    Raises:
        ValueError: when the first example's loss depends on the second, naming the first layer
            whose output does. Influence is a matter of gradients of per-example losses, and there
            are none then.
    """
    leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(batch)]
    if leaves[0].shape[0] < 2:
        return
    first, both = (
        tf.nest.pack_sequence_as(batch, [leaf[:count] for leaf in leaves]) for count in (1, 2)
    )
    try:
        alone, beside = float(losses(first)[0]), float(losses(both)[0])
    except (TypeError, ValueError, tf.errors.InvalidArgumentError):
        return  # A model of one batch size; or a mistake that the work to come will meet again.
    if _close(alone, beside):
        return
    runs = []
    for examples in (first, both):
        outputs = _Outputs()
        with observed(all_layers(model), outputs):
            losses(examples)
        runs.append(outputs.found)
    culprit = next(
        (name for (name, a), (_, b) in zip(*runs, strict=False) if not _first_rows_close(a, b)),
        "the loss",
    )
    raise ValueError(
        f"The examples of a batch are mixed by {culprit}: the loss of the first is {alone:.6g} by "
        f"itself and {beside:.6g} beside another, so that it has no gradient of its own. Layers "
        "must not use statistics of the batch with `training=False`, and the loss must be a sum "
        "over the examples."
    )


class _Outputs(Observer):
    def __init__(self) -> None:
        self.found: list[tuple[str, list[np.ndarray]]] = []

    def call(
        self,
        layer: keras.layers.Layer,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        outputs = original(*args, **kwargs)
        tensors = [leaf for leaf in tf.nest.flatten(outputs) if tf.is_tensor(leaf)]
        if all(hasattr(tensor, "numpy") for tensor in tensors):
            name = f"the layer {layer.name!r} ({type(layer).__name__})"
            self.found.append((name, [tensor.numpy() for tensor in tensors]))
        return outputs


def _close(a: Any, b: Any) -> bool:
    difference, size = np.abs(a - b), np.abs(a) + np.abs(b)
    # NaN is another error, and is met elsewhere.
    return not np.any(difference > _TOLERANCE * np.max(size, initial=1e-6))


def _first_rows_close(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    for one, two in zip(a, b, strict=True):
        if one.ndim == 0 or one.shape[1:] != two.shape[1:] or one.dtype.kind != "f":
            continue
        if not _close(one[0].astype(np.float64), two[0].astype(np.float64)):
            return False
    return True
