"""The training examples of greatest influence, out of as many as there are."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

# Rows compared at a time: their scores of a hundred queries stay in a processor's cache.
BLOCK_ROWS = 8192


class TopExamples(NamedTuple):
    """The training examples of greatest influence of one sign.

    Attributes:
        ids: int64 [Q, k], positions in the training set, the greatest influence first.
        scores: float32 [Q, k].
    """

    ids: Any
    scores: Any


class Influences(NamedTuple):
    """Who speaks for each of Q predictions, and who against it.

    Attributes:
        proponents: `TopExamples` of the largest scores: without them the query's loss would rise.
        opponents: `TopExamples` of the smallest scores: without them it would fall.
    """

    proponents: TopExamples
    opponents: TopExamples


def top_influences(scores: Any, k: int) -> Influences:
    """The k largest and the k smallest scores of each query; ties go to the smaller id.

    Args:
        scores: [Q, N], as a method's `scores` returns it.
        k: examples of each kind, at most N.
    """
    scores = tf.convert_to_tensor(scores)
    if scores.shape[1] is not None and not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"`k` must be between 1 and the number of training examples, {scores.shape[1]}. "
            f"Received: k={k}."
        )
    # tf.math.top_k puts the lower index first where values are equal.
    best, best_ids = tf.math.top_k(scores, k)
    worst, worst_ids = tf.math.top_k(-scores, k)
    return Influences(
        TopExamples(tf.cast(best_ids, tf.int64), best),
        TopExamples(tf.cast(worst_ids, tf.int64), -worst),
    )


def search(
    queries: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> Influences:
    """The same, of products of encodings, without the score matrix; ties go to the smaller id.

    Args:
        queries: float32 [Q, rank], weighted, so that products with encodings are scores.
        blocks: ids [n] and encodings [n, rank], in the order of the ids.
        k: examples of each kind.
    """
    best, worst = _Best(len(queries), k), _Best(len(queries), k)
    for ids, encodings in blocks:
        scores = queries @ encodings.T.astype(np.float32, copy=False)
        best.add(ids, scores)
        worst.add(ids, np.negative(scores, out=scores))
    return Influences(TopExamples(best.ids, best.scores), TopExamples(worst.ids, -worst.scores))


class _Best:
    """The k largest of each row of what was added, largest first."""

    def __init__(self, num_rows: int, k: int):
        self.k = k
        self.ids = np.zeros((num_rows, 0), np.int64)
        self.scores = np.zeros((num_rows, 0), np.float32)

    def add(self, ids: np.ndarray, scores: np.ndarray) -> None:
        if self.ids.shape[1] < self.k:
            # Few so far, so that all are candidates. A stable sort keeps the smaller id first.
            order = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
            merged = [
                self._merged(row, ids[chosen], scores[row, chosen])
                for row, chosen in enumerate(order)
            ]
            self.ids = np.stack([each[0] for each in merged])
            self.scores = np.stack([each[1] for each in merged])
            return
        # Later ids are larger: those that equal the last one lose. NaN is kept, to be found.
        candidates = ~(scores <= self.scores[:, -1:])
        for row in np.flatnonzero(candidates.any(axis=1)).tolist():
            chosen = np.flatnonzero(candidates[row])
            self.ids[row], self.scores[row] = self._merged(row, ids[chosen], scores[row, chosen])

    def _merged(
        self, row: int, ids: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.concatenate([self.ids[row], ids])
        scores = np.concatenate([self.scores[row], scores])
        order = np.argsort(-scores, kind="stable")[: self.k]
        return ids[order], scores[order]


class HostIndex:
    """Encodings in memory.

    Args:
        encodings: [N, rank].
        ids: int64 [N], rising; positions by default.
        next_id: the id of the next example that is added; one more than the last by default.
    """

    def __init__(
        self, encodings: np.ndarray, ids: np.ndarray | None = None, next_id: int | None = None
    ):
        self.encodings = encodings
        self.ids = np.arange(len(encodings)) if ids is None else ids
        self.next_id = next_id if next_id is not None else int(self.ids[-1]) + 1

    def __len__(self) -> int:
        return len(self.encodings)

    @property
    def rank(self) -> int:
        return self.encodings.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.encodings.dtype

    def append(self, encodings: np.ndarray) -> None:
        """Encodings [n, rank] of more examples, with the ids that follow."""
        ids = np.arange(self.next_id, self.next_id + len(encodings))
        self.next_id += len(encodings)
        self.encodings = np.concatenate([self.encodings, encodings])
        self.ids = np.concatenate([self.ids, ids])

    def remove(self, ids: np.ndarray) -> None:
        """Forgets the examples of these ids."""
        kept = ~np.isin(self.ids, ids)
        self.encodings, self.ids = self.encodings[kept], self.ids[kept]

    def blocks(self, num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and encodings, some rows at a time."""
        for start in range(0, len(self), num_rows):
            yield self.ids[start : start + num_rows], self.encodings[start : start + num_rows]
