"""Searches by FAISS, against the exact one."""

import sys

import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from keras_influence.retrieval import ExactSearch, HostIndex, recall, search_from
from keras_influence.retrieval.exact import search as exact_search
from tests import cases

N, RANK, K = 4000, 6, 5


def _clustered(num, seed=0):
    """Encodings in twenty clusters, which lists can follow."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((20, RANK)) * 3
    rows = centres[random.integers(0, 20, num)] + random.standard_normal((num, RANK))
    return rows.astype(np.float32)


def _assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)


@pytest.fixture(scope="module")
def index():
    # Ids with gaps, as they are after a removal.
    return HostIndex(_clustered(N), np.arange(N) * 3 + 1)


def _exact(index, queries):
    return ExactSearch().prepare(index)(queries, K)


@pytest.mark.parametrize(
    "search",
    [
        ki.FaissFlat(),
        ki.FaissIVF(num_lists=12, num_probes=12),  # All lists: nothing can be missed.
        # Codes of a byte rank the near ones wrongly; enough candidates hold the right ones.
        ki.FaissIVF(num_lists=12, num_probes=12, candidates=200, codes="int8"),
    ],
    ids=["flat", "lists", "bytes"],
)
def test_what_looks_everywhere_finds_everything(index, search):
    queries = _clustered(40, seed=1)
    _assert_same(search.prepare(index)(queries, K), _exact(index, queries))
    again = search_from(search.describe())
    assert again.describe() == search.describe()
    assert recall(index, search.prepare(index), np.ones(RANK, np.float32), K) == 1.0


def test_recall_is_the_share_that_is_found(index):
    queries = _clustered(40, seed=1)
    search = ki.FaissIVF(num_lists=40, num_probes=2)
    found, expected = search.prepare(index)(queries, K), _exact(index, queries)
    shares = [
        np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(x.ids, y.ids, strict=True)])
        for x, y in zip(found, expected, strict=True)
    ]
    assert min(shares) > 0.3 and max(shares) < 1
    # Its queries are others, of the same distribution, and the query itself does not count.
    share = recall(index, search.prepare(index), np.ones(RANK, np.float32), K)
    assert share == pytest.approx(np.mean(shares), abs=0.15)
    for each in found:
        assert (np.diff(np.abs(each.scores)) <= 0).all()
    # What is found has its own scores, by whichever list.
    rows = index.take(found.opponents.ids.ravel()).reshape(40, K, RANK)
    np.testing.assert_allclose(
        np.einsum("qr,qkr->qk", queries, rows), found.opponents.scores, rtol=1e-5
    )
    # The same lists each time.
    _assert_same(search.prepare(index)(queries, K), found)


def test_lists_with_too_few_in_them(index):
    # Of 79 examples two lists: one of them has fewer than the 70 that are wanted, so that such
    # queries are answered exactly.
    few = HostIndex(index.encodings[:79])
    queries = _clustered(9, seed=2)
    found = ki.FaissIVF(num_lists=5, num_probes=1).prepare(few)(queries, 70)
    _assert_same(found, ExactSearch().prepare(few)(queries, 70))
    # One example, and a query that is not finite.
    one = HostIndex(index.encodings[:1])
    top = ki.FaissIVF().prepare(one)(queries[:1], 1)
    np.testing.assert_array_equal(top.proponents.ids, [[0]])
    queries[3] = np.nan
    top = ki.FaissFlat().prepare(few)(queries, 2)
    assert np.isnan(top.proponents.scores[3]).all()
    _assert_same(
        tf.nest.map_structure(lambda array: np.delete(array, 3, axis=0), top),
        ExactSearch().prepare(few)(np.delete(queries, 3, axis=0), 2),
    )


@pytest.mark.parametrize("kind", ["drawn", "ties", "rising", "falling"])
@pytest.mark.parametrize("rows", [7, 32, 100])  # Below k, in whole folds, and with a last one.
def test_the_exact_search_is_a_sort_of_all_scores(kind, rows):
    random = np.random.default_rng(0)
    queries = random.standard_normal((5, RANK)).astype(np.float32)
    encodings = random.standard_normal((500, RANK)).astype(np.float32)
    if kind == "ties":  # Of a few values, and so of a few scores.
        queries, encodings = (np.sign(array) for array in (queries, encodings))
    elif kind != "drawn":  # Every block has k better ones than all before it, on one side.
        queries = np.eye(5, RANK, dtype=np.float32)
        encodings = np.sort(encodings, axis=0)[:: 1 if kind == "rising" else -1]
    ids = np.arange(0, 1000, 2)
    blocks = [
        (ids[start : start + rows], encodings[start : start + rows])
        for start in range(0, 500, rows)
    ]
    found = exact_search(queries, blocks, 10)
    scores = queries @ encodings.T
    for top, sign in zip(found, (1, -1), strict=True):
        order = np.argsort(-sign * scores, axis=1, kind="stable")[:, :10]
        np.testing.assert_array_equal(top.ids, ids[order])
        np.testing.assert_allclose(top.scores, np.take_along_axis(scores, order, 1), rtol=1e-6)


def test_a_score_that_is_not_a_number_loses_to_any_number():
    encodings = np.arange(64, dtype=np.float32)[:, None]
    encodings[:16] = np.nan
    blocks = [(np.arange(start, start + 16), encodings[start : start + 16]) for start in (0, 16)]
    # The first block has nothing else; few maxima of the second one are looked at by themselves.
    for k in (4, 16):
        top = exact_search(np.ones((1, 1), np.float32), blocks, k)
        np.testing.assert_array_equal(top.proponents.ids, [range(31, 31 - k, -1)])
        np.testing.assert_array_equal(top.opponents.ids, [range(16, 16 + k)])


def test_equal_scores_go_by_id():
    rows = np.ones((6, RANK), np.float32)
    top = ki.FaissFlat().prepare(HostIndex(rows, np.array([2, 3, 5, 7, 11, 13])))(rows[:1], 6)
    np.testing.assert_array_equal(top.proponents.ids, [[2, 3, 5, 7, 11, 13]])
    np.testing.assert_array_equal(top.opponents.ids, [[2, 3, 5, 7, 11, 13]])


@pytest.mark.parametrize("place", ["memory", "directory"])
def test_a_scorer_that_searches_by_faiss(tmp_path, place):
    model, train, more = cases.image_model(), cases.images(80), cases.images(20, seed=4)
    method = ki.Arnoldi(model, 4, 8, batch_size=10, verbose=0).fit(train)
    directory = None if place == "memory" else tmp_path / "index"
    queries = cases.images(6, seed=9)
    for search in (ki.FaissFlat(), ki.FaissIVF(2, 2, candidates=60, codes="int8")):
        scorer = ki.InfluenceScorer(method, k=3, search=search).index(train, directory)
        exact = ki.InfluenceScorer(method, k=3).index(train)
        _assert_same(scorer(queries), exact(queries))
        inside = tf.function(lambda x, y, scorer=scorer: scorer((x, y)))(*queries)
        _assert_same(inside, exact(queries))
        gone = np.unique(exact(queries).proponents.ids)[:5]
        for each in (scorer, exact):
            each.append(more).remove(gone)
        _assert_same(scorer(queries), exact(queries))
        path = directory
        if directory is None:
            path = tmp_path / type(search).__name__
            scorer.save(path)
        loaded = ki.load(path, model)
        assert loaded.search.describe() == search.describe()
        _assert_same(loaded(queries), exact(queries))
        lines = []
        loaded.summary(lines.append)
        assert lines[1] == (
            f"  {type(search).__name__}: finds 100.0% of the proponents and opponents of a sample "
            "of the indexed examples"
        )
        if directory is not None:
            directory = tmp_path / "another"


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r'`search` must be "exact", or .* Received: \'fast\''):
        search_from("fast")
    for kwargs, message in (
        ({"num_lists": 0}, r"`num_lists` must be at least 1"),
        ({"candidates": 0}, r"`candidates` must be at least 1"),
        ({"num_lists": 3, "num_probes": 4}, r"`num_probes` must be at most `num_lists`=3"),
        ({"codes": "int4"}, r"`codes` must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            ki.FaissIVF(**kwargs)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for make in (ki.FaissFlat, ki.FaissIVF):
        with pytest.raises(ImportError, match=r"pip install keras_influence\[faiss\]"):
            make()
