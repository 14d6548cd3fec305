"""The same directions, batch after batch."""

import contextlib
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

    def use(self, batch: Any, directions: Directions) -> None:
        """Gives the directions for batches like `batch`, laid out by other means than `rows`."""
        self._kept[self._maps.coverage(batch).layout] = directions

    def __call__(self, batch: Any) -> tf.Tensor:
        """<grad l_i, v_j>, [B, k]."""
        return self._maps.project(batch, self.directions(batch))

    def directions(self, batch: Any) -> Directions:
        """Laid out for batches like `batch`; where they are kept, one object for all of them."""
        return self._directions(self._maps.coverage(batch))

    def _directions(self, coverage: Coverage) -> Directions:
        if not self._keep:
            return self._maps.lay_out(self._rows(), coverage)
        key = coverage.layout
        if key not in self._kept:
            # Outside of any graph that is being traced, which would make them anew at each run.
            # Where none is, without that scope: it stops the tapes of rows that are gradients.
            eager = tf.executing_eagerly()
            with contextlib.nullcontext() if eager else tf.init_scope():
                self._kept[key] = self._maps.lay_out(self._rows(), coverage)
        return self._kept[key]
