"""The curvature of the training loss over a fixed set of examples, as an operator on vectors."""

import time
from typing import Any

import keras
import tensorflow as tf

from keras_influence import data, distribution
from keras_influence.gradients import LossMaps


class FrozenCurvature:
    """H = (1/n) sum_i Hessian(l_i) + l2 I over n examples, the same ones at every product.

    Args:
        maps: of the model.
        model: whose strategy the products run under.
        frozen: the examples' batches. The list is emptied: once they are on the devices the host
            needs no copy.
        l2: coefficient of a penalty (l2/2)|theta|^2 in the training objective.

    Attributes:
        num_examples: n.
        size: p, the length of a vector.
        seconds: spent in products so far.
    """

    def __init__(
        self, maps: LossMaps, model: keras.Model, frozen: list[data.Batch], l2: float = 0.0
    ):
        self.num_examples = sum(batch.num_examples for batch in frozen)
        self.size = maps.parameters.size
        self.seconds = 0.0
        self._maps = maps
        self._model = model
        self._l2 = l2
        self._batches = distribution.place(frozen, model)
        frozen.clear()

    def __call__(self, vector: Any) -> tf.Tensor:
        """H v, [p]: one pass over the examples."""
        start = time.perf_counter()
        summed = distribution.total(self._maps.curvature, self._batches, self._model, vector)
        result = summed / self.num_examples + self._l2 * vector
        self.seconds += time.perf_counter() - start
        return result

    def products(self, vectors: Any) -> tf.Tensor:
        """H v_j of each row, [k, p]."""
        return tf.stack([self(vector) for vector in tf.unstack(vectors)])
