"""Scores that are interrupted, and go on."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import keras_influence as ki
from keras_influence import storage
from keras_influence.methods import scoring
from tests import cases
from tests.conformance.methods_test import GOLDENS

# 163 parameters of four bytes: two queries, or directions, at a time.
TWO_ROWS = 2 * 163 * 4


class _Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def parts_of_two_batches(monkeypatch):
    monkeypatch.setattr(scoring, "_PART_BATCHES", 2)


@pytest.fixture
def dies(monkeypatch):
    """Lets the process end as it writes the n-th step from now on; its result is the last."""
    written = []
    fill = storage.fill_store
    left = []

    def dying(path, *args):
        if left and left[0] == len(written):
            raise _Killed
        fill(path, *args)
        written.append(path)

    monkeypatch.setattr(storage, "fill_store", dying)

    def after(steps):
        written.clear()
        left[:] = [] if steps is None else [steps]
        return written

    return after


def _golden(name, directory, **kwargs):
    model, train = cases.image_model(), cases.images(23)
    kwargs = {"batch_size": 5, "direction_bytes": TWO_ROWS, "verbose": 0, **kwargs}
    return GOLDENS[name](model, directory, **kwargs).fit(train), train


@pytest.mark.parametrize("name", GOLDENS)
def test_a_kill_at_each_step_changes_no_bit(name, tmp_path, dies):
    method, train = _golden(name, tmp_path)
    queries = cases.images(3, seed=5)
    for verb, args in (("scores", (queries, train)), ("self_influence", (train,))):
        call = getattr(method, verb)
        expected = call(*args)
        written = dies(None)
        np.testing.assert_array_equal(call(*args, directory=tmp_path / f"{verb}-whole"), expected)
        steps = len(written)
        assert steps > 2
        for _ in range(steps - 1):
            dies(1)
            with pytest.raises(_Killed):
                call(*args, directory=tmp_path / verb)
        assert len(dies(None)) == 0
        np.testing.assert_array_equal(call(*args, directory=tmp_path / verb), expected)
        assert len(written) == 1
        assert sorted(os.listdir(tmp_path / verb)) == [
            ".lock",
            "manifest.json",
            "scores",
            "scoring.json",
        ]
        # When all is done, it is read.
        dies(0)
        np.testing.assert_array_equal(call(*args, directory=tmp_path / verb), expected)


def test_what_is_done_is_not_computed_again(tmp_path, dies):
    # A query with all that a recursion holds of it is a block; 23 examples are five batches, and so
    # three parts. A block's steps: the solution, and three parts.
    method, train = _golden("lissa", tmp_path)
    queries = cases.images(3, seed=5)
    calls = {"_inverse_products": 0, "project": 0}

    def counted(owner, name):
        function = getattr(owner, name)

        def counting(*args):
            calls[name] += 1
            return function(*args)

        setattr(owner, name, counting)

    counted(method, "_inverse_products")
    counted(method.maps, "project")
    dies(2)
    with pytest.raises(_Killed):
        method.scores(queries, train, tmp_path / "scores")
    # The first block; two batches of a part, and two that were lost.
    assert calls == {"_inverse_products": 1, "project": 4}
    dies(None)
    method.scores(queries, train, tmp_path / "scores")
    assert calls == {"_inverse_products": 3, "project": 4 + 3 + 5 + 5}


def test_what_only_a_cosine_asks_for(tmp_path, dies):
    method, train = _golden("gradient_dot", tmp_path, similarity="cosine")
    queries = cases.images(3, seed=5)
    expected = method.scores(queries, train)
    # Products of two blocks, three parts each; norms of one part and of three.
    dies(8)
    with pytest.raises(_Killed):
        method.scores(queries, train, tmp_path / "scores")
    written = dies(None)
    np.testing.assert_array_equal(method.scores(queries, train, tmp_path / "scores"), expected)
    assert len(written) == 3


def test_another_job_is_refused(tmp_path, dies):
    method, train = _golden("gradient_dot", tmp_path)
    queries, place = cases.images(3, seed=5), tmp_path / "scores"
    dies(2)
    with pytest.raises(_Killed):
        method.scores(queries, train, place)
    x, y = train
    corrected = (x, np.where(np.arange(23) == 11, (y + 1) % 3, y))  # A label in the middle.
    dies(0)
    for difference, call in {
        r"train: '23 examples, \w+' there, '23 examples": lambda: method.scores(
            queries, corrected, place
        ),
        r"queries: '3 examples": lambda: method.scores(cases.images(2, seed=5), train, place),
        r"what: 'scores' there, 'self_influence'": lambda: method.self_influence(train, place),
        r"scale: 'loss' there, 'raw' now": lambda: ki.GradientDot(
            method.model, batch_size=5, direction_bytes=TWO_ROWS, scale="raw"
        ).scores(queries, train, place),
    }.items():
        with pytest.raises(ValueError, match=r"holds scores of something else \(.*" + difference):
            call()
    weights = method.model.get_weights()
    method.model.set_weights([2 * array for array in weights])
    with pytest.raises(ValueError, match=r"something else \(weights: "):
        method.scores(queries, train, place)
    method.model.set_weights(weights)
    # Nothing was lost by it; and what is whole is not taken for something else either.
    assert len(dies(None)) == 0
    method.scores(queries, train, place)
    with pytest.raises(ValueError, match=r"something else \(train: "):
        method.scores(queries, corrected, place)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no scores, but \['notes.txt'\]"):
        method.scores(queries, train, tmp_path / "mine")


def test_what_a_fit_in_memory_holds_counts(tmp_path, dies):
    # LiSSA's directions come from the examples that it was fitted on.
    method, (x, y) = _golden("lissa", tmp_path)
    queries = cases.images(3, seed=5)
    dies(1)
    with pytest.raises(_Killed):
        method.scores(queries, (x, y), tmp_path / "scores")
    method.fit((x[::-1], y[::-1]))
    with pytest.raises(ValueError, match=r"something else \(fitted on: "):
        method.scores(queries, (x, y), tmp_path / "scores")


def test_checkpoints_serve_a_model_that_is_built_anew(tmp_path, dies):
    method, train = _golden("tracin", tmp_path)
    expected = method.self_influence(train)
    dies(3)
    with pytest.raises(_Killed):
        method.self_influence(train, tmp_path / "own")
    again = ki.TracIn(
        cases.image_model(), tmp_path / "run", batch_size=5, direction_bytes=TWO_ROWS
    ).fit(train)
    dies(None)
    np.testing.assert_array_equal(again.self_influence(train, tmp_path / "own"), expected)


@pytest.mark.parametrize("file", ["steps/batch0/scores/c/0", "scoring.json"])
def test_what_was_altered_is_named(tmp_path, dies, file):
    method, train = _golden("gradient_dot", tmp_path)
    dies(2)
    with pytest.raises(_Killed):
        method.self_influence(train, tmp_path / "own")
    place = tmp_path / "own" / file
    intact = place.read_bytes()
    place.write_bytes(intact[:12] + bytes([intact[12] ^ 1]) + intact[13:])
    with pytest.raises(storage.TornStoreError, match=file.split("/")[0]):
        method.self_influence(train, tmp_path / "own")


def test_sigterm_finishes_the_step(tmp_path):
    method, train = _golden("gradient_dot", tmp_path)
    norms = method.maps.squared_norms
    batches = []

    def signalled(*args):
        batches.append(1)
        if len(batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return norms(*args)

    method.maps.squared_norms = signalled
    with pytest.raises(SystemExit) as ended:
        method.self_influence(train, tmp_path / "own")
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(batches) == 2  # A step is two batches.
    assert os.listdir(tmp_path / "own/steps") == ["batch0"]


# A process that is killed begins here: the parent has imported what takes long.
KILLED = """
    import os, pathlib, signal, sys, time
    import numpy as np
    import keras
    import keras_influence as ki
    from keras_influence import checkpoints
    from keras_influence.methods import scoring
    from tests import cases

    scoring._PART_BATCHES = 1
    root = pathlib.Path(sys.argv[1])
    EPOCHS = 6

    def train_model(directory, train):
        keras.utils.set_random_seed(0)
        model = cases.image_model()
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), cases.SPARSE)
        run = directory / "run"
        written = []
        if run.exists():
            try:
                written = checkpoints.list_checkpoints(run)
            except FileNotFoundError:
                pass
        first = 0
        if written:
            # Its momentum is loaded where there are variables for it.
            model.optimizer.build(model.trainable_variables)
            model.load_weights(written[-1].path / "model.weights.h5")
            first = written[-1].epoch + 1
        recorder = ki.callbacks.TracInCheckpoint(run)
        model.fit(
            *train, batch_size=8, epochs=EPOCHS, initial_epoch=first, shuffle=False, verbose=0,
            callbacks=[recorder],
        )
        return model

    def work(directory):
        train, queries = cases.images(47), cases.images(5, seed=5)
        model = train_model(directory, train)
        found = checkpoints.list_checkpoints(directory / "run")
        assert [each.epoch for each in found] == list(range(EPOCHS))
        kwargs = dict(batch_size=8, direction_bytes=2 * 163 * 4, verbose=0)
        tracin = ki.TracIn(model, directory / "run", **kwargs)
        lissa = ki.LiSSA(model, 20, 0.1, 20.0, **kwargs).fit(train)
        np.savez(
            directory / "result.npz",
            tracin.scores(queries, train, directory / "tracin"),
            tracin.self_influence(train, directory / "own"),
            lissa.scores(queries, train, directory / "lissa"),
            *(array for each in found for array in weights(model, each)),
        )

    def weights(model, checkpoint):
        checkpoints.load_weights(model, checkpoint)
        return model.get_weights()

    def child(directory):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(directory)
                code = 0
            finally:
                os._exit(code)
        return pid

    (root / "whole").mkdir()
    start = time.perf_counter()
    assert os.waitpid(child(root / "whole"), 0)[1] == 0
    seconds = time.perf_counter() - start
    expected = np.load(root / "whole/result.npz")
    random = np.random.default_rng(int(sys.argv[3]))
    kills, run = 0, 0
    while kills < int(sys.argv[2]):
        directory = root / f"run{run}"
        directory.mkdir()
        run += 1
        while kills < int(sys.argv[2]):
            pid = child(directory)
            # Over all of the run: what is done is skipped, and the setting up is not.
            time.sleep(random.uniform(0.2, 1.0) * seconds)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if (directory / "run/run.json").exists():
                # What can be read is whole.
                for each in directory.glob("run/checkpoint-*"):
                    checkpoints.read_checkpoint(each).verify()
            if status == 0:
                break  # It was through before.
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            kills += 1
        assert os.waitpid(child(directory), 0)[1] == 0
        found = np.load(directory / "result.npz")
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name])
    print(kills, run)
"""


@pytest.mark.slow
def test_kills_over_checkpoints_and_scores_change_no_bit(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), "24", "0"],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    kills, runs = map(int, ended.stdout.split())
    assert kills == 24
    assert runs > 1
