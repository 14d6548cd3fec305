"""Methods that score through short encodings of examples."""

import abc
from typing import Any

import numpy as np
import tensorflow as tf

from keras_influence.methods.base import InfluenceMethod


class EncodingMethod(InfluenceMethod):
    """A method that encodes an example in a few numbers, whose weighted products are the scores.

    score(z, x) = factor * sum_j metric_j e_j(z) e_j(x), with e(x) = (<grad l(x), u_j>)_j for the
    method's directions u_j.
    """

    @property
    @abc.abstractmethod
    def directions(self) -> tf.Tensor:
        """u, [rank, p]."""

    @property
    @abc.abstractmethod
    def metric(self) -> np.ndarray:
        """Weights of the coordinates' products, float64 [rank]."""

    def encode(self, dataset: Any) -> np.ndarray:
        """<grad l(x), u_j> of every example: [N, rank], float32 (float64 for a float64 model)."""
        self._check_ready()
        directions = self.directions
        return self._gather(
            lambda examples: self.maps.project(examples, directions), dataset, "encoding"
        )

    def scores(self, queries: Any, train: Any) -> np.ndarray:
        self._check_ready()
        weights = self.metric * self._per_train()
        return ((self.encode(queries) * weights) @ self.encode(train).T).astype(np.float32)

    def self_influence(self, dataset: Any) -> np.ndarray:
        self._check_ready()
        self._per_train()  # Complains now, and not after the pass over the data.
        return self.self_influence_of(self.encode(dataset))

    def self_influence_of(self, encoded: np.ndarray) -> np.ndarray:
        """Self-influence from encodings [N, rank]: float32 [N]."""
        weights = self.metric * self._per_train()
        return (np.square(encoded, dtype=np.float64) @ weights).astype(np.float32)
