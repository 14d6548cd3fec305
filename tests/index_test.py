"""Indexes in a directory: as the one in memory, begun and ended by different processes."""

import os
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from keras_influence import storage
from keras_influence.retrieval import search
from tests import cases

RANK = 4


def _method(model, train):
    return ki.Arnoldi(model, RANK, 8, complement=None, batch_size=5, verbose=0).fit(train)


@pytest.fixture(scope="module")
def problem():
    keras.utils.set_random_seed(0)
    model, train = cases.image_model(), cases.images(47)
    return model, train, _method(model, train)


@pytest.fixture(autouse=True)
def parts_of_ten(monkeypatch):
    monkeypatch.setattr("keras_influence.indexing._PART_ROWS", 10)


def _same(a, b, tolerance=0.0):
    queries = cases.images(6, seed=9)
    for found, expected in zip(
        tf.nest.flatten(a(queries)), tf.nest.flatten(b(queries)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_allclose(a.encodings, b.encodings, rtol=0, atol=tolerance)


class _Killed(BaseException):
    pass


def _dies_after(monkeypatch, parts):
    """The process ends when so many parts are on the disk."""
    added = []
    add = storage.StoredIndex.add

    def dying(self, *args):
        if len(added) == parts:
            raise _Killed
        added.append(add(self, *args))

    monkeypatch.setattr(storage.StoredIndex, "add", dying)
    return added


def test_a_directory_is_as_good_as_memory(tmp_path, problem):
    model, train, method = problem
    memory = ki.InfluenceScorer(method, k=3).index(train)
    disk = ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    _same(disk, memory)
    np.testing.assert_array_equal(disk.self_influence(), memory.self_influence())
    _same(ki.load(tmp_path / "index", model), memory)
    # In a graph, too.
    x, y = cases.images(6, seed=9)
    inside = tf.function(lambda x, y: disk((x, y)))(x, y)
    assert inside.proponents.ids.shape == (6, 3)
    for found, expected in zip(tf.nest.flatten(inside), tf.nest.flatten(disk((x, y))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    lines = []
    disk.summary(lines.append)
    assert (
        lines[0]
        == f"InfluenceScorer, k=3: 47 examples in 4 numbers each, 0.0 MiB in {tmp_path / 'index'}"
    )
    disk.save(tmp_path / "copy")
    _same(ki.load(tmp_path / "copy", model), memory)


@pytest.mark.parametrize("parts", [0, 1, 4])
def test_an_index_goes_on_where_it_ended(tmp_path, problem, monkeypatch, parts):
    model, train, method = problem
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _dies_after(patch, parts)
        ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    with pytest.raises(ValueError, match=f"is not whole: {10 * parts} examples so far"):
        ki.load(tmp_path / "index", model)
    added = _dies_after(monkeypatch, 5)
    scorer = ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    assert len(added) == 5 - parts
    _same(scorer, ki.InfluenceScorer(method, k=3).index(train))


def test_only_what_was_begun_goes_on(tmp_path, problem, monkeypatch):
    model, train, method = problem
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _dies_after(patch, 2)
        ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    x, y = train
    for other in (
        (x[1:], y[1:]),  # Another first example.
        (np.concatenate([x[:15], x[25:]]), np.concatenate([y[:15], y[25:]])),  # Another part.
        (x[:12], y[:12]),  # Fewer than there are.
    ):
        with pytest.raises(ValueError, match=r"holds 20 rows of a data set that was begun"):
            ki.InfluenceScorer(method, k=3).index(other, tmp_path / "index")
    wider = ki.Arnoldi(model, RANK - 1, 8, complement=None, batch_size=5).fit(train)
    with pytest.raises(ValueError, match=r"holds no index by this method and model"):
        ki.InfluenceScorer(wider, k=3).index(train, tmp_path / "index")
    added = _dies_after(monkeypatch, 5)
    ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    assert len(added) == 3
    with pytest.raises(ValueError, match=r"the index of another data set"):
        ki.InfluenceScorer(method, k=3).index((x[1:], y[1:]), tmp_path / "index")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no index, but \['notes.txt'\]"):
        ki.InfluenceScorer(method, k=3).index(train, tmp_path / "mine")


@pytest.mark.parametrize("place", ["memory", "directory"])
def test_examples_come_and_go_without_a_fit(tmp_path, problem, place):
    model, train, method = problem
    more = cases.images(13, seed=5)
    both = tuple(np.concatenate(pair) for pair in zip(train, more, strict=True))
    directory = None if place == "memory" else tmp_path / "index"
    scorer = ki.InfluenceScorer(method, k=3).index(train, directory)
    scorer.append(more)
    whole = ki.InfluenceScorer(method, k=3).index(both)
    _same(scorer, whole, 1e-5)  # What was added makes batches of its own.
    queries = cases.images(6, seed=9)
    gone = np.unique(scorer(queries).proponents.ids)
    scorer.remove(gone)
    scores = method.scores(queries, both)
    scores[:, gone] = -np.inf
    expected = ki.top_influences(scores, 3)
    top = scorer(queries)
    np.testing.assert_array_equal(top.proponents.ids, expected.proponents.ids)
    np.testing.assert_allclose(
        top.proponents.scores, expected.proponents.scores, rtol=1e-4, atol=1e-7
    )
    assert not np.isin(gone, top.opponents.ids).any()
    assert len(scorer.self_influence()) == len(scorer.ids) == 60 - len(gone)
    # Ids are not given again.
    scorer.append(cases.images(2, seed=6))
    np.testing.assert_array_equal(scorer.ids[-2:], [60, 61])
    if directory is None:
        scorer.save(tmp_path / "saved")
        _same(ki.load(tmp_path / "saved", model), scorer)
    else:
        _same(ki.load(directory, model), scorer)
    with pytest.raises(ValueError, match=r"no examples of the ids \[" + str(gone[0])):
        scorer.remove(gone[:1])
    with pytest.raises(ValueError, match=r"too few to retrieve k=3"):
        scorer.remove(scorer.ids[2:])


def test_an_append_goes_on_and_is_not_done_twice(tmp_path, problem, monkeypatch):
    model, train, method = problem
    more = cases.images(23, seed=5)
    ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _dies_after(patch, 1)
        ki.load(tmp_path / "index", model).append(more)
    scorer = ki.load(tmp_path / "index", model)
    assert len(scorer.ids) == 47  # What has not ended is not seen.
    with pytest.raises(ValueError, match=r"holds 10 rows of a data set that was begun"):
        scorer.append(cases.images(23, seed=6))
    added = _dies_after(monkeypatch, 99)
    scorer.append(more)
    assert len(added) == 2
    np.testing.assert_array_equal(scorer.ids, np.arange(70))
    scorer.append(more)
    assert len(added) == 2
    both = tuple(np.concatenate(pair) for pair in zip(train, more, strict=True))
    queries = cases.images(6, seed=9)
    expected = ki.InfluenceScorer(method, k=3).index(both)(queries)
    np.testing.assert_array_equal(scorer(queries).proponents.ids, expected.proponents.ids)


def test_an_index_that_lost_rows_is_refused(tmp_path, problem):
    model, train, method = problem
    ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    chunk = tmp_path / "index/encodings/c/0/0"
    intact = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(storage.TornStoreError, match=r"lacks the chunks \[0\] of the 47 rows"):
        ki.load(tmp_path / "index", model)
    chunk.write_bytes(intact[:100] + b"!" + intact[101:])
    with pytest.raises(storage.TornStoreError, match=r"encodings/ .*c/0/0"):
        ki.load(tmp_path / "index", model)(train)


def test_fewer_pairs_than_were_asked_for(tmp_path):
    # Three distinct examples: their gradients span what the Hessian does not map to nothing.
    model = cases.linear_regression(3, "float32")
    x = np.eye(3, dtype=np.float32)[np.arange(12) % 2]
    train = (x, np.arange(12, dtype=np.float32))
    method = ki.Arnoldi(model, 3, 3, batch_size=5, verbose=0).fit(train)
    assert len(method.eigenbasis.values) <= 3
    disk = ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    memory = ki.InfluenceScorer(method, k=3).index(train)
    np.testing.assert_array_equal(disk.encodings, memory.encodings)


def test_fewer_directions_than_blocks_of_them():
    # Inputs along one axis: the Hessian of the squared error has rank one, and the iteration ends.
    model = cases.linear_regression(4, "float32")
    x = np.zeros((12, 4), np.float32)
    x[:, 0] = 1
    train = (x, np.arange(12, dtype=np.float32))
    method = ki.Arnoldi(model, 4, 4, complement=None, verbose=0).fit(train)
    found = len(method.eigenbasis.values)
    assert found < 4
    whole = method.encode(train)
    assert whole.shape == (12, found)
    method.direction_bytes = 1  # A direction at a time.
    np.testing.assert_allclose(method.encode(train), whole, rtol=1e-5, atol=1e-6)


def test_two_writers(tmp_path, problem):
    _, train, method = problem
    scorer = ki.InfluenceScorer(method, k=3).index(train, tmp_path / "index")
    program = f"""
        import pathlib
        from keras_influence import storage
        with storage.writing(pathlib.Path({str(tmp_path / "index")!r})):
            print("ready", flush=True)
            input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "ready\n"
        for write in (lambda: scorer.append(cases.images(3)), lambda: scorer.remove([1])):
            with pytest.raises(storage.StoreInUseError, match=r"Another process is writing"):
                write()
        scorer(train)  # Readers are welcome.
        other.kill()


def test_search_against_the_score_matrix():
    random = np.random.default_rng(0)
    encodings = random.integers(-2, 3, (500, 3)).astype(np.float32)  # Many ties.
    queries = random.integers(-2, 3, (20, 3)).astype(np.float32)
    for rows in (1, 7, 100, 500):
        blocks = [
            (np.arange(start, min(start + rows, 500)), encodings[start : start + rows])
            for start in range(0, 500, rows)
        ]
        found, expected = search(queries, blocks, 9), ki.top_influences(queries @ encodings.T, 9)
        for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
            np.testing.assert_array_equal(a, b)


# A process that is killed begins here: the parent has imported what takes long.
KILLED = """
    import os, pathlib, signal, sys, time
    import numpy as np
    import keras
    import keras_influence as ki
    from keras_influence import indexing
    from tests import cases

    indexing._PART_ROWS = 10
    root = pathlib.Path(sys.argv[1])

    def work(directory):
        keras.utils.set_random_seed(0)
        model = cases.image_model()
        train, more = cases.images(47), cases.images(31, seed=5)
        method = ki.Arnoldi(model, 4, 12, batch_size=5, verbose=0)
        method.fit(train, directory=directory / "fit")
        scorer = ki.InfluenceScorer(method, k=3)
        scorer.index(train, directory / "index")
        scorer.append(more)
        return model

    def result(directory):
        scorer = ki.load(directory / "index", work(directory))
        np.savez(
            directory / "result.npz",
            scorer.method.eigenbasis.values,
            scorer.method.eigenbasis.vectors,
            scorer.encodings,
        )

    def child(function, *args):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                function(*args)
                code = 0
            finally:
                os._exit(code)
        return pid

    (root / "whole").mkdir()
    start = time.perf_counter()
    assert os.waitpid(child(work, root / "whole"), 0)[1] == 0
    seconds = time.perf_counter() - start
    assert os.waitpid(child(result, root / "whole"), 0)[1] == 0
    expected = np.load(root / "whole/result.npz")
    random = np.random.default_rng(int(sys.argv[3]))
    kills, run = 0, 0
    while kills < int(sys.argv[2]):
        directory = root / f"run{run}"
        directory.mkdir()
        run += 1
        while kills < int(sys.argv[2]):
            pid = child(work, directory)
            # Over all of the run: what is done is skipped, and the setting up is not.
            time.sleep(random.uniform(0.3, 1.0) * seconds)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if status == 0:
                break  # It was through before.
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            kills += 1
        assert os.waitpid(child(result, directory), 0)[1] == 0
        found = np.load(directory / "result.npz")
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name])
    print(kills, run)
"""


@pytest.mark.slow
def test_forty_kills_change_no_bit(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), "40", "0"],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    kills, runs = map(int, ended.stdout.split())
    assert kills == 40
    assert runs > 1


def test_sigterm_finishes_the_part(tmp_path):
    program = f"""
        import os, signal
        import keras_influence as ki
        from keras_influence import indexing
        from tests import cases, index_test

        indexing._PART_ROWS = 10
        model, train = cases.image_model(), cases.images(47)
        method = index_test._method(model, train)
        scorer = ki.InfluenceScorer(method, k=3)
        project, batches = method.maps.project, []

        def signalled(*args):
            batches.append(1)
            if len(batches) == 3:  # In the second part of two batches each.
                os.kill(os.getpid(), signal.SIGTERM)
            return project(*args)

        method.maps.project = signalled
        scorer.index(train, {str(tmp_path / "index")!r})
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert len(os.listdir(tmp_path / "index/records")) == 2
