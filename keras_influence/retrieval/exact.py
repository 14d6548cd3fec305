"""Every encoding compared with every query, block by block."""

from collections.abc import Iterable

import numpy as np

from keras_influence.retrieval.results import Influences, TopExamples

# Rows compared at a time: their scores of a hundred queries stay in a processor's cache.
BLOCK_ROWS = 8192


def search(
    queries: np.ndarray, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> Influences:
    """`top_influences` of products of encodings, without the score matrix.

    Ties go to the smaller id.

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
