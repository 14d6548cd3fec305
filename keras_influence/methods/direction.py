"""Methods that score through directions in parameter space."""

import abc
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_influence import data, distribution
from keras_influence.gradients import LossMaps, Projector
from keras_influence.methods.base import InfluenceMethod


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
        for projector, count in self._projectors(queries):
            projected = self._gather(self.maps.project, train, "projection", projector.directions)
            rows.append(projected.T[:count])
        return (np.concatenate(rows) * factor).astype(np.float32)

    @abc.abstractmethod
    def _projectors(self, queries: Any) -> Iterator[tuple[Projector, int]]:
        """The queries' directions, some at a time, and how many of them are no padding."""

    def _query_batches(self, queries: Any) -> Iterator[data.Batch]:
        """The queries, as many at a time as the memory budget holds gradients."""
        data.check_order(queries)
        parameters = self.maps.parameters
        return data.batches(queries, self._rows_in_budget(parameters.size * parameters.dtype.size))


class GradientMethod(DirectionMethod):
    """A method whose directions are the queries' gradients themselves."""

    def _projectors(self, queries: Any) -> Iterator[tuple[Projector, int]]:
        for batch in self._query_batches(queries):
            self._rows(self.query_maps.squared_norms, [batch], "gradient")
            projector = Projector(self.maps, functools.partial(self._gradients, batch.examples))
            if self.query_maps is self.maps:
                directions = distribution.everywhere(
                    self.maps.gradient_directions, self.model, batch.examples
                )
                projector.use(batch.examples, directions)
            yield projector, batch.num_examples

    def _gradients(self, examples: Any) -> tf.Tensor:
        return distribution.here(self.query_maps.example_gradients, self.model, examples)

    def _squared_norms(self, dataset: Any, maps: LossMaps | None = None) -> np.ndarray:
        return self._gather((maps or self.maps).squared_norms, dataset, "gradient norm")
