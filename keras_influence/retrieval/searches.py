"""Ways to search among encodings: what a scorer may be given, and how much one finds."""

import abc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import numpy as np

from keras_influence.retrieval.exact import BLOCK_ROWS, search
from keras_influence.retrieval.results import Influences

# Of indexed examples that recall is measured with.
_SAMPLE = 64


class Encodings(Protocol):
    """An index: encodings of examples, in memory or on disk."""

    def __len__(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def ids(self) -> np.ndarray:
        """int64 [N], rising."""

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Encodings [n, rank] of examples in the index."""

    def blocks(self, num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and encodings, some rows at a time, by id."""


# (queries [Q, rank], k) -> who speaks for them and against.
Searcher = Callable[[np.ndarray, int], Influences]


class Search(abc.ABC):
    """A way to search, which `prepare` makes ready for the encodings that an index holds."""

    _registry: ClassVar[dict[str, type["Search"]]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        Search._registry[cls.__name__] = cls

    @abc.abstractmethod
    def prepare(self, index: Encodings) -> Searcher:
        """What searches `index` as it is now."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON values."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What `search_from` makes it anew from, as JSON values."""
        return {"kind": type(self).__name__, "config": self.get_config()}


class ExactSearch(Search):
    """Every encoding is compared with every query, block by block: nothing is missed."""

    def prepare(self, index: Encodings) -> Searcher:
        return lambda queries, k: search(queries, index.blocks(BLOCK_ROWS), k)


def search_from(given: Any) -> Search:
    """A search from what a user gives, or from what `describe` gave.

    Raises:
        ValueError: neither a search nor `"exact"`.
    """
    if isinstance(given, Search):
        return given
    if given == "exact":
        return ExactSearch()
    if isinstance(given, dict) and given.get("kind") in Search._registry:
        return Search._registry[given["kind"]](**given["config"])
    raise ValueError(
        f'`search` must be "exact", or a `FaissFlat` or `FaissIVF`. Received: {given!r}.'
    )


def recall(
    index: Encodings, searcher: Searcher, metric: np.ndarray, k: int, seed: int = 0
) -> float:
    """Share of the k proponents and k opponents of a sample of queries that a searcher finds.

    The queries are 64 examples of the index, drawn by `seed`; none counts in its own answer.

    Args:
        index: what is searched.
        searcher: of it.
        metric: float32 [rank], the weights that turn an encoding into a query.
        k: examples of each kind.
        seed: of the draw.
    """
    ids = index.ids
    count = min(_SAMPLE, len(ids))
    drawn = np.sort(np.random.default_rng(seed).choice(ids, count, replace=False))
    queries = index.take(drawn).astype(np.float32) * metric
    found, expected = searcher(queries, k), ExactSearch().prepare(index)(queries, k)
    hits, total = 0, 0
    for answers, truths in zip(found, expected, strict=True):
        for own, answer, truth in zip(drawn, answers.ids, truths.ids, strict=True):
            wanted = np.setdiff1d(truth, own)
            hits += len(np.intersect1d(answer, wanted))
            total += len(wanted)
    return hits / total if total else 1.0
