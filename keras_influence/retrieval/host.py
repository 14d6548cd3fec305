"""Encodings of examples in memory."""

from collections.abc import Iterator

import numpy as np


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

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Encodings [n, rank] of examples in the index."""
        return self.encodings[np.searchsorted(self.ids, ids)]
