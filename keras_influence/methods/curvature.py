"""The curvature of the training loss over a fixed set of examples, as an operator on vectors."""

import functools
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence import data, distribution, storage
from keras_influence.gradients import LossMaps


class FrozenCurvature:
    """H = (1/n) sum_i Hessian(l_i) + l2 I over n examples, the same ones at every product.

    Or the Gauss-Newton or Fisher matrix in the place of the Hessians; see `gradients.convexity`.

    Args:
        maps: of the model.
        model: whose strategy the products run under.
        frozen: the examples' batches. The list is emptied: once they are on the devices the host
            needs no copy.
        l2: coefficient of a penalty (l2/2)|theta|^2 in the training objective.
        budget: bytes that the tensors of several products at once may take.
        kind: one of `gradients.CURVATURES`.
        steps_per_execution: batches that one execution goes through.

    Attributes:
        num_examples: n.
        size: p, the length of a vector.
        seconds: spent in products so far.
        fingerprint: of the examples.
    """

    def __init__(
        self,
        maps: LossMaps,
        model: keras.Model,
        frozen: list[data.Batch],
        l2: float = 0.0,
        budget: float = 512 * 2**20,
        kind: str = "hessian",
        steps_per_execution: int = 1,
    ):
        self.num_examples = sum(batch.num_examples for batch in frozen)
        self.size = maps.parameters.size
        self.seconds = 0.0
        self._maps = maps
        self._kind = kind
        self._product, self._products = maps.products(kind)
        self._model = model
        self._l2 = l2
        self._budget = budget
        self._block: int | None = None
        self._example: Any = frozen[0].examples
        self.fingerprint = storage.arrays_fingerprint(
            np.asarray(leaf)[: batch.num_examples]
            for batch in frozen
            for leaf in tf.nest.flatten(batch.examples)
        )
        self._completed = functools.partial(self._complete)
        self._batches = distribution.place(frozen, model, steps_per_execution)
        frozen.clear()

    def __call__(self, vector: Any) -> tf.Tensor:
        """H v, [p]: one pass over the examples."""
        start = time.perf_counter()
        summed = distribution.total(self._product, self._batches, self._model, vector)
        result = summed / self.num_examples + self._l2 * vector
        self.seconds += time.perf_counter() - start
        return result

    def on_replicas(self, vector: Any) -> Any:
        """H v where a vector is a copy on each replica, and nothing of it passes the host."""
        start = time.perf_counter()
        summed = distribution.total(
            self._product, self._batches, self._model, vector, on_replicas=True
        )
        result = distribution.everywhere(self._completed, self._model, summed, vector)
        self.seconds += time.perf_counter() - start
        return result

    def _complete(self, summed: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
        return distribution.all_reduced(summed) / self.num_examples + self._l2 * vector

    def products(self, vectors: Any) -> tf.Tensor:
        """H v_j of each row, [k, p]: as many rows at a time as the budget holds."""
        start = time.perf_counter()
        rows = self._rows(len(vectors))
        blocks = []
        for first in range(0, len(vectors), rows):
            block = vectors[first : first + rows]
            if rows == 1:
                blocks.append(self(block[0])[tf.newaxis])
                continue
            summed = distribution.total(self._products, self._batches, self._model, block)
            blocks.append(summed / self.num_examples + self._l2 * block)
        self.seconds += time.perf_counter() - start
        return tf.concat(blocks, axis=0)

    def _rows(self, count: int) -> int:
        """Rows of one block: as even as can be, so that few graphs serve."""
        if self._block is None:
            size = self._maps.curvature_bytes(self._example, self._kind)
            self._block = int(max(1, self._budget // size))
            self._example = None
        return -(-count // -(-count // self._block))
