"""Every encoding compared with every query, block by block."""

from collections.abc import Iterable

import numpy as np

from keras_influence.retrieval.results import Influences, TopExamples

# Rows compared at a time: their scores of a hundred queries stay in a processor's cache.
BLOCK_ROWS = 8192
# Columns that one maximum stands for, so that most are never looked at by themselves.
_FOLDS = 16
# Maxima above a query's k-th score, in units of k, from which on all columns are looked at.
_MANY = 4


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
        if len(ids):
            scores = queries @ encodings.T.astype(np.float32, copy=False)
            best.add(ids, scores, 1)
            worst.add(ids, scores, -1)
    return Influences(TopExamples(best.ids, best.scores), TopExamples(worst.ids, -worst.scores))


class _Best:
    """The k largest of each row of what was added, largest first; NaN comes last."""

    def __init__(self, num_rows: int, k: int):
        self.k = k
        self.ids = np.zeros((num_rows, 0), np.int64)
        self.scores = np.zeros((num_rows, 0), np.float32)

    def add(self, ids: np.ndarray, scores: np.ndarray, sign: int) -> None:
        """Adds sign * scores [rows, n]."""
        num_rows, count = scores.shape
        if self.ids.shape[1] < self.k:
            self._merge(self._largest(sign * scores), ids, scores, sign)
            return
        floors = self.scores[:, -1]
        folds = 1 if count % _FOLDS else _FOLDS
        # [rows, folds, n / folds]: the maximum over the folds is one of long contiguous rows.
        folded = scores.reshape(num_rows, folds, -1)
        extremes = folded.max(axis=1) if sign > 0 else -folded.min(axis=1)
        # Later ids are larger: those that equal the last one lose, and NaN loses to any number.
        rows, places = np.nonzero(~(extremes <= floors[:, None]))
        if len(rows) > _MANY * self.k * num_rows:
            self._merge(self._largest(sign * scores), ids, scores, sign)
            return
        cells, fold = np.nonzero(~(sign * folded[rows, :, places] <= floors[rows, None]))
        if len(cells):
            columns = fold * (count // folds) + places[cells]
            self._merge((rows[cells], columns), ids, scores, sign)

    def _largest(self, scores: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rows and columns of the k largest of each row, and of those that equal the k-th."""
        if scores.shape[1] <= self.k:
            return np.nonzero(np.ones(scores.shape, bool))
        last = -np.partition(-scores, self.k - 1, axis=1)[:, self.k - 1, None]
        return np.nonzero(~(scores < last))

    def _merge(
        self, places: tuple[np.ndarray, ...], ids: np.ndarray, scores: np.ndarray, sign: int
    ) -> None:
        """Takes in the entries of `sign * scores` at some rows and columns."""
        rows, columns = places
        held = self.ids.shape[1]
        changed, owners = np.unique(rows, return_inverse=True)
        owners = np.concatenate([np.repeat(np.arange(len(changed)), held), owners])
        merged = np.concatenate([self.scores[changed].ravel(), sign * scores[rows, columns]])
        merged_ids = np.concatenate([self.ids[changed].ravel(), ids[columns]])
        order = np.lexsort((merged_ids, -merged, owners))
        counts = np.bincount(owners)
        kept = min(self.k, int(counts.min()))
        best = order[(np.cumsum(counts) - counts)[:, None] + np.arange(kept)]
        if held < kept:  # Every row has grown.
            self.ids, self.scores = merged_ids[best], merged[best]
        else:
            self.ids[changed], self.scores[changed] = merged_ids[best], merged[best]
