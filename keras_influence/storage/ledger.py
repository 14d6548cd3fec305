"""Which rows an index has, and of which data sets: what its records say."""

from typing import Any

import numpy as np


class IndexLedger:
    """Rows numbered from 0, each the encoding of an example whose id is its number.

    Rows come in data sets, of which each is added part by part: a part is there when `add` returns,
    and a data set when `end` does. Rows of one that has not ended are not seen.

    Args:
        records: of what was done so far.

    Attributes:
        num_written: rows, of data sets that have ended and of the one that has not.
    """

    def __init__(self, records: list[dict[str, Any]]):
        self.num_written = 0
        self._ended = 0
        self._removed = np.zeros(0, np.int64)
        self._datasets: list[dict[str, Any]] = []
        for record in records:
            self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "rows":
            if not self.unfinished:
                self._datasets.append({"first": record["first"], "start": self._ended})
            self._datasets[-1].update(last=record["last"], ended=False)
            self.num_written = record["stop"]
        elif kind == "end":
            self._datasets[-1]["ended"] = True
            self._ended = self.num_written
        elif kind == "remove":
            self._removed = np.union1d(self._removed, np.array(record["ids"], np.int64))

    def _record(self, **record: Any) -> None:
        self._apply(record)

    @property
    def ids(self) -> np.ndarray:
        """int64 [N], of the rows that are seen."""
        return np.setdiff1d(np.arange(self._ended), self._removed, assume_unique=True)

    def __len__(self) -> int:
        return self._ended - int(np.searchsorted(self._removed, self._ended))

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """The data set that has not ended: fingerprints `first` and `last`, and row `start`."""
        return self._datasets[-1] if self._datasets and not self._datasets[-1]["ended"] else None

    @property
    def num_datasets(self) -> int:
        """Data sets that have ended."""
        return sum(dataset["ended"] for dataset in self._datasets)

    @property
    def first(self) -> str:
        """Fingerprint of the first example of all."""
        return self._datasets[0]["first"]

    @property
    def last_dataset(self) -> dict[str, Any]:
        """The last one that has ended: fingerprints `first` and `last`, and `count`."""
        last = self._datasets[self.num_datasets - 1]
        return {**last, "count": self._ended - last["start"]}

    @property
    def next_id(self) -> int:
        """Of the next example that is added."""
        return self._ended

    @property
    def num_unfinished(self) -> int:
        """Rows of the data set that has not ended."""
        return self.num_written - self._ended

    def end(self) -> None:
        """The data set is whole: its rows are seen from now on."""
        self._record(kind="end")

    def remove(self, ids: np.ndarray) -> None:
        """Rows that are not seen from now on; they keep their place."""
        self._record(kind="remove", ids=ids.tolist())

    def _seen(self, ids: np.ndarray) -> np.ndarray:
        return ~np.isin(ids, self._removed, assume_unique=True)
