"""Search by FAISS: inner-product indexes, flat and by inverted lists."""

from typing import Any

import numpy as np

from keras_influence.retrieval.exact import BLOCK_ROWS, search
from keras_influence.retrieval.results import Influences, TopExamples
from keras_influence.retrieval.searches import Encodings, Search, Searcher

CODES = ("float32", "int8")
# Rows that k-means is given for each list: beyond, the lists get no better (FAISS's own limit).
_ROWS_OF_LIST = 256
# Fewer rows than this for each list are too few to place its centre; FAISS warns below.
_FEWEST_OF_LIST = 39


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "Searching by FAISS needs the package faiss-cpu: `pip install keras_influence[faiss]`, "
            'or use search="exact".'
        ) from error
    return faiss


class FaissFlat(Search):
    """FAISS's flat index: every encoding is compared with every query, in memory.

    Finds what the exact search finds, but for the choice among equal scores. A copy of the
    encodings (4 N rank bytes) is made when the index is first searched, and again after it has
    changed.

    Raises:
        ImportError: without the package faiss-cpu.
    """

    def __init__(self) -> None:
        _faiss()

    def prepare(self, index: Encodings) -> Searcher:
        flat = _faiss().IndexFlatIP(index.rank)
        for _, rows in index.blocks(BLOCK_ROWS):
            flat.add(np.ascontiguousarray(rows, np.float32))
        return _Ranked(index, flat, 1, stored=True)


class FaissIVF(Search):
    """FAISS's inverted lists: encodings in clusters, of which each query visits the nearest.

    For millions of encodings and answers in milliseconds, some of which are missed: `summary()`
    says how many, as measured against the exact search. The lists are made when the index is first
    searched, and again after it has changed (k-means over up to 256 encodings a list).

    Args:
        num_lists: clusters; the square root of the number of encodings by default.
        num_probes: clusters that a query visits, each for its proponents and for its opponents; an
            eighth of all by default. More find more, in proportionally more time.
        candidates: encodings that are taken from the lists for each query, at least k, of which
            the k best by their exact scores are returned; 4 k by default.
        codes: `"float32"`: the lists hold the encodings; `"int8"`: a byte for each number, a
            quarter of the memory, and the candidates' encodings are read from the index.
        seed: of the clusters.

    Raises:
        ImportError: without the package faiss-cpu.
        ValueError: an argument out of its range.

    Example:

    >>> scorer = ki.InfluenceScorer(arnoldi, k=10, search=ki.FaissIVF(num_probes=64))
    >>> scorer.index(train).summary()  # With the share of proponents and opponents that it finds.
    """

    def __init__(
        self,
        num_lists: int | None = None,
        num_probes: int | None = None,
        candidates: int | None = None,
        *,
        codes: str = "float32",
        seed: int = 0,
    ):
        for name, value in (
            ("num_lists", num_lists),
            ("num_probes", num_probes),
            ("candidates", candidates),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {value}.")
        if num_lists is not None and num_probes is not None and num_probes > num_lists:
            raise ValueError(
                f"`num_probes` must be at most `num_lists`={num_lists}. Received: {num_probes}."
            )
        if codes not in CODES:
            raise ValueError(f"`codes` must be one of {CODES}. Received: {codes!r}.")
        _faiss()
        self.num_lists = num_lists
        self.num_probes = num_probes
        self.candidates = candidates
        self.codes = codes
        self.seed = seed

    def prepare(self, index: Encodings) -> Searcher:
        faiss = _faiss()
        ids = index.ids
        num_lists = self.num_lists or max(1, round(len(ids) ** 0.5))
        num_lists = max(1, min(num_lists, len(ids) // _FEWEST_OF_LIST))
        kind = "Flat" if self.codes == "float32" else "SQ8"
        lists = faiss.index_factory(
            index.rank, f"IVF{num_lists},{kind}", faiss.METRIC_INNER_PRODUCT
        )
        lists.nprobe = min(self.num_probes or -(-num_lists // 8), num_lists)
        lists.cp.seed = self.seed + 1  # FAISS takes none below one.
        lists.cp.max_points_per_centroid = _ROWS_OF_LIST
        lists.cp.min_points_per_centroid = 1
        lists.train(self._sample(index, ids, num_lists * _ROWS_OF_LIST))
        for _, rows in index.blocks(BLOCK_ROWS):
            lists.add(np.ascontiguousarray(rows, np.float32))
        if self.codes == "float32":
            lists.make_direct_map()
        return _Ranked(index, lists, self.candidates, stored=self.codes == "float32")

    def _sample(self, index: Encodings, ids: np.ndarray, count: int) -> np.ndarray:
        chosen = np.zeros(len(ids), bool)
        chosen[np.random.default_rng(self.seed).permutation(len(ids))[:count]] = True
        found, start = [], 0
        for _, rows in index.blocks(BLOCK_ROWS):
            found.append(rows[chosen[start : start + len(rows)]])
            start += len(rows)
        return np.ascontiguousarray(np.concatenate(found), np.float32)

    def get_config(self) -> dict[str, Any]:
        return {
            "num_lists": self.num_lists,
            "num_probes": self.num_probes,
            "candidates": self.candidates,
            "codes": self.codes,
            "seed": self.seed,
        }


class _Ranked:
    """FAISS's candidates, ranked by their exact scores; ties go to the smaller id.

    Args:
        index: the encodings.
        found: FAISS's index of them, in the order of their ids.
        candidates: to rank for each query; `None` is four times as many as are asked for.
        stored: whether `found` holds the encodings as they are.
    """

    def __init__(self, index: Encodings, found: Any, candidates: int | None, stored: bool):
        self._index = index
        self._ids = index.ids
        self._found = found
        self._candidates = candidates
        self._stored = stored

    def __call__(self, queries: np.ndarray, k: int) -> Influences:
        queries = np.ascontiguousarray(queries, np.float32)
        wanted = 4 * k if self._candidates is None else max(self._candidates, k)
        wanted = min(wanted, len(self._ids))
        # What speaks against a query speaks for its negative.
        both = np.concatenate([queries, -queries])
        _, positions = self._found.search(both, wanted)
        ids, scores = self._ranked(both, positions, k)
        # Too few in the lists that were visited, or a query that is not finite.
        short = np.flatnonzero((positions >= 0).sum(axis=1) < k) % max(len(queries), 1)
        count = len(queries)
        top = Influences(
            TopExamples(ids[:count], scores[:count]), TopExamples(ids[count:], -scores[count:])
        )
        if len(short):
            short = np.unique(short)
            exact = search(queries[short], self._index.blocks(BLOCK_ROWS), k)
            for mine, right in zip(top, exact, strict=True):
                mine.ids[short], mine.scores[short] = right
        return top

    def _ranked(
        self, queries: np.ndarray, positions: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.zeros((len(queries), k), np.int64)
        scores = np.zeros((len(queries), k), np.float32)
        distinct, inverse = np.unique(positions, return_inverse=True)
        inverse = inverse.reshape(positions.shape)
        there = distinct >= 0
        rows = np.zeros((len(distinct), self._index.rank), np.float32)
        if there.any():
            rows[there] = self._rows(distinct[there])
        for number, query in enumerate(queries):
            real = positions[number] >= 0
            found = self._ids[positions[number][real]]
            exact = rows[inverse[number][real]] @ query
            order = np.lexsort((found, -exact))[:k]
            ids[number, : len(order)], scores[number, : len(order)] = found[order], exact[order]
        return ids, scores

    def _rows(self, positions: np.ndarray) -> np.ndarray:
        if self._stored:
            return self._found.reconstruct_batch(positions)
        return self._index.take(self._ids[positions])
