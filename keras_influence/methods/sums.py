"""Weighted sums of examples' gradients."""

from collections.abc import Iterator, Sequence

import keras
import numpy as np

from keras_influence import data, distribution
from keras_influence.gradients import LossMaps


def weighted_sum(
    maps: LossMaps, model: keras.Model, batches: Sequence[data.Batch], weights: np.ndarray
) -> np.ndarray:
    """sum_i weights_i grad l_i, [p].

    Args:
        maps: of the model.
        model: whose strategy the sum is made under.
        batches: of the examples.
        weights: [examples].
    """

    def weighted() -> Iterator[data.Batch]:
        start = 0
        for batch in batches:
            mine = batch.weights.copy()
            mine[: batch.num_examples] *= weights[start : start + batch.num_examples]
            start += batch.num_examples
            yield batch._replace(weights=mine)

    return distribution.total(maps.gradient, weighted(), model).numpy()
