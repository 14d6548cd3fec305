"""How an eigenbasis is found: from which vectors, in how much room, and until when."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_influence import data
from keras_influence.gradients import LossMaps
from keras_influence.linalg import (
    ArnoldiResult,
    Basis,
    DeviceBasis,
    Eigenbasis,
    Journal,
    Space,
    arnoldi,
    basis_rows,
    check_limits,
)
from keras_influence.methods.curvature import FrozenCurvature
from keras_influence.methods.progress import Progress
from keras_influence.methods.sums import weighted_sum

# Products at most for each wanted pair, where a tolerance ends the iteration; with restarts.
_PRODUCTS_PER_PAIR = 10
_PRODUCTS_PER_PAIR_RESTARTED = 20


class Outcome(NamedTuple):
    """What an iteration took.

    Attributes:
        num_products: products with H.
        num_restarts: times that the basis was cut down to its best part.
        from_queries: whether it started from gradients of queries.
    """

    num_products: int
    num_restarts: int
    from_queries: bool


class Iteration:
    """The settings of an Arnoldi iteration, checked.

    Args: see `Arnoldi`.

    Attributes:
        num_iterations: products with H, of a start from random vectors.
        outcome: after `run`, an `Outcome`.

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(
        self,
        rank: int,
        num_iterations: int | None,
        tolerance: float | None,
        max_vectors: int | None,
        block_size: int,
    ):
        if block_size < 1:
            raise ValueError(f"`block_size` must be at least 1. Received: {block_size}.")
        self.rank = rank
        self.tolerance = tolerance
        self.max_vectors = max_vectors
        self.block_size = block_size
        self.given = num_iterations
        self.num_iterations = self._products(False)
        if not 1 <= rank <= self.num_iterations // block_size * block_size:
            raise ValueError(
                f"`rank` must be between 1 and `num_iterations`={self.num_iterations}"
                + (f", in whole blocks of {block_size}" if block_size > 1 else "")
                + f": an iteration yields one eigenpair at most. Received: rank={rank}."
            )
        check_limits(self.num_iterations, block_size, rank, tolerance, max_vectors)
        self.outcome: Outcome | None = None

    def _products(self, from_queries: bool) -> int:
        if self.given is not None:
            return self.given
        if self.tolerance is None:
            # A space that queries span is kept whole: its small eigenvalues are theirs too.
            each = 1 if from_queries else 2
        else:
            each = _PRODUCTS_PER_PAIR
            if self.max_vectors is not None:
                each = _PRODUCTS_PER_PAIR_RESTARTED
        return -(-each * self.rank // self.block_size) * self.block_size

    def rows(self, size: int) -> int:
        """Vectors [size] that a basis needs room for."""
        return basis_rows(size, self.num_iterations, self.max_vectors)

    def most_products(self, size: int) -> int:
        """Products that will be made at most."""
        if self.max_vectors is not None and self.max_vectors < size:
            return self.num_iterations
        return self.rows(size)

    def target(self, size: int) -> int | None:
        """Products that will be made, where that is known."""
        return None if self.tolerance is not None else self.most_products(size)

    def run(
        self,
        operator: FrozenCurvature,
        dtype: tf.DType,
        progress: Progress,
        *,
        seed: int,
        start: np.ndarray | None = None,
        basis: Basis | Space | None = None,
        journal: Journal | None = None,
    ) -> ArnoldiResult:
        """The iteration; see `linalg.arnoldi`.

        Args:
            start: [block_size, p], combinations of queries' gradients; random vectors by default.
        """
        if journal is not None:
            progress.add(sum(step.num_products for step in journal.steps()))

        single = self.block_size == 1

        def product(vectors: Any) -> Any:
            if isinstance(basis, DeviceBasis):
                images = operator.on_replicas(vectors)
            else:
                images = (operator(vectors) if single else operator.products(vectors)).numpy()
            progress.add(self.block_size)
            return images

        from_queries = start is not None
        shape = [operator.size] if single else [self.block_size, operator.size]
        vectors = (
            tf.random.stateless_normal(shape, [seed, 0], dtype=dtype)
            if start is None
            else tf.reshape(tf.convert_to_tensor(start, dtype), shape)
        )

        limited = self.tolerance is not None or self.max_vectors is not None
        result = arnoldi(
            product,
            vectors,
            self._products(from_queries),
            rank=self.rank if limited else None,
            tolerance=self.tolerance,
            max_vectors=self.max_vectors,
            seed=seed,
            basis=basis,
            journal=journal,
        )
        progress.close()
        self.outcome = Outcome(result.num_products, result.num_restarts, from_queries)
        return result

    def check_converged(self, pairs: Eigenbasis) -> None:
        """Warns where the products ended before the tolerance was met."""
        if self.tolerance is None or self.outcome is None:
            return
        converged = self._num_converged(pairs)
        if converged < len(pairs.values):
            logging.warning(
                "%d of %d pairs have converged to the tolerance %g in %d products. Raise "
                "`num_iterations` or `tolerance`, or lower `rank`.",
                converged,
                len(pairs.values),
                self.tolerance,
                self.outcome.num_products,
            )

    def _num_converged(self, pairs: Eigenbasis) -> int:
        largest = np.abs(pairs.values[:1])
        return int(np.sum(pairs.residuals <= (self.tolerance or 0.0) * largest))

    def report(self, pairs: Eigenbasis) -> Iterator[str]:
        """Lines of a summary."""
        if self.outcome is not None:
            start = "random vectors"
            if self.outcome.from_queries:
                start = "combinations of the queries' gradients"
            restarts = ""
            if self.max_vectors is not None:
                restarts = (
                    f", {self.outcome.num_restarts} restarts of a basis of {self.max_vectors} "
                    "vectors"
                )
            yield (
                f"iteration: {self.outcome.num_products} products from {self.block_size} {start}"
                f"{restarts}"
            )
        if self.tolerance is not None:
            yield (
                f"pairs within the tolerance (|Hu - lambda u| within {self.tolerance:g} of the "
                f"largest lambda): {self._num_converged(pairs)} of {len(pairs.values)}"
            )


def query_start(
    maps: LossMaps, model: keras.Model, batches: list[data.Batch], count: int, seed: int
) -> np.ndarray:
    """Combinations of examples' gradients with normal weights, [count, p].

    They span what the gradients do, where there are no more of them than `count`; of more, most of
    what most of them have in common (Halko, Martinsson & Tropp 2011, section 4.1).

    Raises:
        ValueError: gradients that are all zero.
    """
    num = sum(batch.num_examples for batch in batches)
    weights = np.random.default_rng([seed, 4]).standard_normal([count, num]).astype(np.float32)
    sums = np.stack([weighted_sum(maps, model, batches, row) for row in weights])
    if not sums.any():
        raise ValueError(
            f"The gradients of the {num} queries are all zero: no space starts from them. Leave "
            "`queries` out."
        )
    return sums
