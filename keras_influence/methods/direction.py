"""Methods that score through directions in parameter space."""

import abc
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_influence import data
from keras_influence.methods.base import InfluenceMethod

# Bytes of query directions held at once.
_DIRECTION_BYTES = 512 * 2**20
_MAX_DIRECTIONS = 256


class DirectionMethod(InfluenceMethod):
    """A method that turns a query's gradient into a direction, and projects training examples.

    scores = factor * <grad l(x), direction(grad l(z))>, one pass over the training set for each
    block of queries.
    """

    def scores(self, queries: Any, train: Any) -> np.ndarray:
        self._check_ready()
        return self._direction_scores(queries, train)

    def _direction_scores(self, queries: Any, train: Any) -> np.ndarray:
        factor = self._per_train()
        rows = []
        for gradients in self._gradient_blocks(queries):
            project = functools.partial(self.maps.project, directions=self._directions(gradients))
            rows.append(self._gather(project, train, "projection").T)
        return (np.concatenate(rows) * factor).astype(np.float32)

    def _gradient_blocks(self, queries: Any) -> Iterator[tf.Tensor]:
        """Gradients of the queries, [b, p], as many at a time as memory should hold."""
        data.check_order(queries)
        parameters = self.maps.parameters
        row_bytes = parameters.size * parameters.dtype.size
        rows = int(np.clip(_DIRECTION_BYTES // row_bytes, 1, _MAX_DIRECTIONS))
        for batch in data.batches(queries, rows):
            gradients = self.maps.example_gradients(batch.examples)
            self._check_finite(gradients, batch, "gradient")
            yield gradients[: batch.num_examples]

    @abc.abstractmethod
    def _directions(self, gradients: tf.Tensor) -> tf.Tensor:
        """Query gradients [b, p] -> directions [b, p]."""
