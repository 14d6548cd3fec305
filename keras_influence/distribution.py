"""How a function of one batch runs over a dataset. The only module that names tf.distribute."""

from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from keras_influence.data import Batch


def is_chief(model: keras.Model) -> bool:
    """Whether this process is the one that writes files for `model`'s training run."""
    strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
    return bool(strategy.extended.should_checkpoint)


def gather(function: Callable[[Batch], tf.Tensor], batches: Iterable[Batch]) -> np.ndarray:
    """Rows of `function(batch)` [B, ...] for every example, in order, without the padding's."""
    rows = [np.asarray(function(batch))[: batch.num_examples] for batch in batches]
    return np.concatenate(rows)


def total(function: Callable[[Batch], tf.Tensor], batches: Iterable[Batch]) -> tf.Tensor:
    """Sum over the batches of `function(batch)`, which weighs its padding by zero."""
    result = None
    for batch in batches:
        part = function(batch)
        result = part if result is None else result + part
    if result is None:
        raise ValueError("There is no batch to sum over.")
    return result
