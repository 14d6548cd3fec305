"""The curvature of the training loss over a fixed set of examples, as an operator on vectors."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence import data, distribution, storage
from keras_influence.gradients import LossMaps, gram, num_roots

# Random vectors that estimate a trace.
NUM_PROBES = 8
# Bytes of all tensors of a product with a vector that batches are joined up to: where there are
# fewer, calling the graph takes longer than computing it.
_JOINED_BYTES = 2**26


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
        steps_per_execution: batches that one execution goes through. With 1, small batches are
            joined to larger ones.

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
        self.fingerprint = batches_fingerprint(frozen)
        self._completed = functools.partial(self._complete)
        self._taken = functools.partial(tf.gather)
        self._stacked = functools.partial(_stack)
        # The largest: of sequences, the longest.
        self._largest: Any = max((batch.examples for batch in frozen), key=_bytes)
        self._batches: list[Any] = []
        if steps_per_execution > 1:
            self._batches += distribution.place(frozen, model, steps_per_execution)
            frozen.clear()
            return
        together = batches_together(maps, model, kind, self._largest, len(frozen))
        for batch in data.joined(frozen, together):
            self._largest = max(self._largest, batch.examples, key=_bytes)
            self._batches += distribution.place([batch], model)

    def __call__(self, vector: Any) -> tf.Tensor:
        """H v, [p]: one pass over the examples."""
        start = time.perf_counter()
        summed = distribution.total(self._product, self._batches, self._model, vector)
        result = summed / self.num_examples + self._l2 * vector
        self.seconds += time.perf_counter() - start
        return result

    def on_replicas(self, vectors: Any) -> Any:
        """H v, or of each row, of a copy on each replica: nothing of it passes the host."""
        *several, _ = _shape_of(vectors)
        if several and self._rows(several[0]) < several[0]:
            each = [
                self.on_replicas(
                    distribution.everywhere(self._taken, self._model, vectors, np.int32(number))
                )
                for number in range(several[0])
            ]
            return distribution.everywhere(self._stacked, self._model, *each)
        start = time.perf_counter()
        product = self._products if several else self._product
        summed = distribution.total(product, self._batches, self._model, vectors, on_replicas=True)
        result = distribution.everywhere(self._completed, self._model, summed, vectors)
        self.seconds += time.perf_counter() - start
        return result

    def _complete(self, summed: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
        return distribution.all_reduced(summed) / self.num_examples + self._l2 * vector

    def products(self, vectors: Any, damping: float = 0.0) -> tf.Tensor:
        """(H + damping I) v_j of each row, [k, p]: as many rows at a time as the budget holds."""
        start = time.perf_counter()
        rows = self._rows(len(vectors))
        blocks = []
        for first in range(0, len(vectors), rows):
            block = vectors[first : first + rows]
            if rows == 1:
                summed = distribution.total(self._product, self._batches, self._model, block[0])
                summed = summed[tf.newaxis]
            else:
                summed = distribution.total(self._products, self._batches, self._model, block)
            mean, shift = summed / self.num_examples, self._l2 + damping
            blocks.append(mean + shift * block if shift else mean)
        self.seconds += time.perf_counter() - start
        return blocks[0] if len(blocks) == 1 else tf.concat(blocks, axis=0)

    def num_roots(self) -> int:
        """Of each example, in `grams`; 0 where products are the better way, or the only one."""
        return num_roots(self._maps, self._largest, self._kind)

    def num_grams(self, num_roots: int) -> int:
        """How many `grams` there are."""
        return len(self._batches) * len(self._terms(num_roots))

    def grams(self, num_roots: int) -> Iterator[np.ndarray]:
        """Matrices [p, p] of which H - l2 I is the sum / n: of batches and some of the roots."""
        start = time.perf_counter()
        function = self._maps.compiled(functools.partial(gram, self._maps))
        for batch in self._batches:
            for terms in self._terms(num_roots):
                part = distribution.total(function, [batch], self._model, tf.constant(terms))
                self.seconds += time.perf_counter() - start
                yield part.numpy()
                start = time.perf_counter()

    def _terms(self, num_roots: int) -> list[np.ndarray]:
        """The roots' numbers, as many together as the budget holds."""
        examples = len(tf.nest.flatten(self._largest)[0])
        bytes_each = examples * self.size * self._maps.parameters.dtype.size
        together = int(np.clip(self._budget // bytes_each, 1, num_roots))
        return np.array_split(np.arange(num_roots), -(-num_roots // together))

    def _rows(self, count: int) -> int:
        """Rows of one block: as even as can be, so that few graphs serve."""
        if self._block is None:
            bytes_each = _product_bytes(self._maps, self._model, self._kind, self._largest)
            self._block = int(max(1, self._budget // bytes_each))
        return -(-count // -(-count // self._block))


def batches_together(
    maps: LossMaps, model: keras.Model, kind: str, example: Any, num_batches: int
) -> int:
    """How many of the batches are joined to one.

    Args:
        maps, model, kind: as in `FrozenCurvature`.
        example: the examples of the largest batch.
        num_batches: n.

    Returns:
        A number from 1 to n.
    """
    if num_batches == 1:
        return 1
    bytes_each = _product_bytes(maps, model, kind, example)
    return int(np.clip(_JOINED_BYTES // bytes_each, 1, num_batches))


def _product_bytes(maps: LossMaps, model: keras.Model, kind: str, example: Any) -> int:
    """Of a product on a batch, traced on a replica: variables are nowhere else to be had."""
    sizes = []

    def trace() -> tf.Tensor:
        sizes.append(maps.curvature_bytes(example, kind))
        return tf.zeros([])

    distribution.everywhere(trace, model)
    return sizes[0]


def _bytes(examples: Any) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in tf.nest.flatten(examples))


def _stack(*rows: tf.Tensor) -> tf.Tensor:
    return tf.stack(rows)


def _shape_of(copies: Any) -> tuple[int, ...]:
    """Of what each replica has."""
    return tuple(tf.nest.flatten(copies, expand_composites=True)[0].shape)


def batches_fingerprint(batches: Sequence[data.Batch]) -> str:
    """Of every example in them."""
    return storage.arrays_fingerprint(
        np.asarray(leaf)[: batch.num_examples]
        for batch in batches
        for leaf in tf.nest.flatten(batch.examples)
    )


def hutchinson_trace(
    operator: Any, dtype: Any, seed: int, num_probes: int = NUM_PROBES, block: int = NUM_PROBES
) -> tuple[float, float]:
    """The trace of a symmetric operator and its standard error, by random signs z: E z'Hz = tr H.

    Args:
        operator: with `size` p and `products` of rows [k, p].
        dtype: of the rows.
        seed: of the signs.
        num_probes: products, at least 2.
        block: of them that are held and computed together.
    """
    forms = np.empty(num_probes)
    for start in range(0, num_probes, block):
        stop = min(start + block, num_probes)
        # Of a seed for each, so that the size of a block changes none.
        signs = [
            np.random.default_rng([seed, 1, probe]).choice(
                np.array([-1, 1], np.int8), operator.size
            )
            for probe in range(start, stop)
        ]
        probes = tf.cast(tf.convert_to_tensor(np.stack(signs)), dtype)
        products = operator.products(probes)
        forms[start:stop] = np.einsum("kp,kp->k", probes, products, dtype=np.float64)
    if not np.isfinite(forms).all():
        raise FloatingPointError("A product of the curvature is not finite.")
    return float(forms.mean()), float(forms.std(ddof=1) / np.sqrt(num_probes))
