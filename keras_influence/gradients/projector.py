"""The same directions, batch after batch."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_influence.gradients.coverage import Coverage
from keras_influence.gradients.linearization import Directions
from keras_influence.gradients.maps import LossMaps


class Projector:
    """Projects batches on k directions, which are laid out once for all batches of a structure.

    Args:
        maps: of the model.
        rows: () -> the directions [k, p]; called again for batches of another structure.
        keep: whether to keep the directions between calls. Without it they are made anew for each,
            so that no two sets need be held at once.
    """

    def __init__(self, maps: LossMaps, rows: Callable[[], Any], keep: bool = True):
        self._maps = maps
        self._rows = rows
        self._keep = keep
        self._kept: dict[Any, Directions] = {}

    @classmethod
    def of_gradients(cls, maps: LossMaps, batch: Any) -> "Projector":
        """On the gradients of the examples of `batch`: products of gradients."""
        projector = cls(maps, lambda: maps.example_gradients(batch))
        projector._kept[maps.coverage(batch).layout] = maps.gradient_directions(batch)
        return projector

    def __call__(self, batch: Any) -> tf.Tensor:
        """<grad l_i, v_j>, [B, k]."""
        return self._maps.project(batch, self._directions(self._maps.coverage(batch)))

    def _directions(self, coverage: Coverage) -> Directions:
        if not self._keep:
            return self._maps.lay_out(self._rows(), coverage)
        key = coverage.layout
        if key not in self._kept:
            # Outside of any graph that is being traced, which would make them anew at each run.
            with tf.init_scope():
                self._kept[key] = self._maps.lay_out(self._rows(), coverage)
        return self._kept[key]
