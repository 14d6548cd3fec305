"""Every method's golden under every strategy: the numbers of one device."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from tests import cases
from tests.conformance import strategies_program

ROOT = pathlib.Path(__file__).parents[2]


_started = []


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test():
    yield
    for process, log in _started:
        process.kill()
        process.wait()
        log.close()
    _started.clear()


def _start(cluster=None, index=0, directory=None, program="strategies_program", **settings):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    if cluster is not None:
        environment["TF_CONFIG"] = json.dumps(
            {"cluster": {"worker": cluster}, "task": {"type": "worker", "index": index}}
        )
    # A file, and no pipe: one that is full would hold up a worker while another is waited for.
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.conformance.{program}", json.dumps(settings)],
        cwd=directory or ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    _started.append((process, log))
    return process


def _finish(process, seconds=240):
    """The exit code and what was printed; a process that hangs fails the test."""
    log = next(log for each, log in _started if each is process)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = None
    log.seek(0)
    text = log.read()
    if code is None:
        pytest.fail(f"No end after {seconds} seconds:\n{text[-4000:]}")
    return code, text


def _cluster(workers=2):
    sockets = [socket.socket() for _ in range(workers)]
    for each in sockets:
        each.bind(("localhost", 0))
    names = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return names


def _only(results, *names):
    """Those of some methods, of which one is Arnoldi."""
    return {k: v for k, v in results.items() if k.startswith((*names, "eigenvalues"))}


def _assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype.kind == "U":
            np.testing.assert_array_equal(found[name], value)
        else:
            scale = np.abs(value).max()
            np.testing.assert_allclose(
                found[name], value, rtol=1e-5, atol=1e-5 * scale, err_msg=name
            )


@pytest.fixture(scope="module")
def reference():
    """Of this process, which has no strategy."""
    scope = tf.distribute.get_strategy().scope
    return strategies_program.golden_results(scope)


@pytest.fixture(scope="module")
def looped():
    """Of this process, a batch at a time, with the vectors in its memory."""
    return strategies_program.looped_results(tf.distribute.get_strategy().scope, "host", 1)


@pytest.mark.parametrize(
    ("kind", "replicas", "inside"),
    [
        ("mirrored", 2, False),
        pytest.param("mirrored", 4, True, marks=pytest.mark.slow),
        pytest.param("one device", 1, True, marks=pytest.mark.slow),
    ],
)
def test_one_process(reference, looped, tmp_path, kind, replicas, inside):
    output = tmp_path / "found.npz"
    process = _start(kind=kind, output=str(output), replicas=replicas, inside=inside, whole=inside)
    scope = tf.distribute.get_strategy().scope
    expected = reference | looped
    if inside:
        expected |= strategies_program.mixed_results(scope)
    errors = strategies_program.complaints(scope)
    assert errors["not finite"].startswith("FloatingPointError: The gradient norm of example 17")
    code, text = _finish(process)
    assert code == 0, text
    _assert_close(dict(np.load(output)), expected)
    assert json.loads(output.with_suffix(".json").read_text()) == errors


@pytest.mark.parametrize(
    "build",
    [cases.image_model, pytest.param(strategies_program.OwnCall, marks=pytest.mark.slow)],
)
def test_xla_compiles_every_step(build):
    """What a TPU asks for: static shapes, and operations that XLA knows."""
    model = build()
    batch = tuple(tf.constant(array) for array in cases.images(6))
    model(batch[0])
    model.compile("sgd", cases.SPARSE)
    maps = ki.gradients.LossMaps(model)
    rows = np.random.default_rng(0).standard_normal((5, maps.parameters.size)).astype(np.float32)
    for function, operands in (
        (maps.project, (batch, maps.prepare(rows, batch))),
        (maps.curvature, (batch, tf.constant(rows[0]), tf.ones([6]))),
        (maps.squared_norms, (batch,)),
        (maps.example_gradients, (batch,)),
        (maps.gradient_directions, (batch,)),
    ):
        compiled = tf.function(functools.partial(function), jit_compile=True, autograph=False)
        found, expected = (tf.nest.flatten(each(*operands)) for each in (compiled, function))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def _trained_on_one_device():
    """Weights and self-influence after what the document's program does."""
    keras.utils.set_random_seed(0)
    model = cases.image_model()
    train = tf.data.Dataset.from_tensor_slices(cases.images()).batch(8)
    model.fit(train, epochs=2, verbose=0)
    return {
        "document: weights": np.concatenate([w.ravel() for w in model.get_weights()]),
        "document: self-influence": ki.Arnoldi(model, rank=4).fit(train).self_influence(train),
    }


def _recorded_run(directory):
    """A run as the golden of TracIn trains it, for workers whose `fit` cannot."""
    keras.utils.set_random_seed(0)
    strategies_program.GOLDENS["tracin"](cases.image_model(), directory)
    return str(directory / "run")


@pytest.mark.slow
def test_two_workers(reference, looped, tmp_path):
    run = _recorded_run(tmp_path)
    cluster = _cluster()
    processes = []
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        processes.append(
            _start(
                cluster,
                index,
                # Each has a directory of its own: nothing but `run` is shared.
                tmp_path / str(index),
                kind="workers",
                output=str(tmp_path / str(index) / "found.npz"),
                run=run,
                whole=True,
            )
        )
    expected = reference | _trained_on_one_device() | looped
    for process in processes:
        code, text = _finish(process)
        assert code == 0, text
    found = [dict(np.load(tmp_path / str(index) / "found.npz")) for index in range(2)]
    for worker in found:
        _assert_close(worker, expected)
    for name in expected:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
    # The first worker alone writes checkpoints, two of them.
    written = [list((tmp_path / str(i)).glob("runs/several/checkpoint-*")) for i in range(2)]
    assert [len(paths) for paths in written] == [2, 0]

    errors = [json.loads((tmp_path / str(index) / "found.json").read_text()) for index in range(2)]
    for each in errors:
        assert "is empty" in each["empty"]
        assert "must read the same examples" in each["other order"]
        assert "4 batches of 23 examples" in each["other order"]
        assert "differ in content" in each["other order"]
        assert "4 batches of 23 examples, 2 batches of 7 examples" in each["shard"]
        assert each["device"].startswith("A basis on the devices is split over the replicas of one")
    # Example 17 is the last of a batch of 6, and so the second worker's.
    assert "gradient norm of example 17 is not finite" in errors[1]["not finite"]
    assert errors[0]["not finite"].startswith("FloatingPointError: Worker 1 found a result")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_ends_the_others_and_all_can_start_again(
    reference, looped, tmp_path, victim
):
    def start(cluster, index, **settings):
        return _start(
            cluster,
            index,
            kind="workers",
            output=str(tmp_path / f"found{index}.npz"),
            names=["arnoldi"],
            **settings,
        )

    cluster = _cluster()
    processes = [
        start(cluster, index, dies_at=15 if index == victim else None) for index in range(2)
    ]
    assert _finish(processes[victim])[0] == -9
    started = time.monotonic()
    code, text = _finish(processes[1 - victim], seconds=90)
    assert time.monotonic() - started < 60
    assert code != 0
    assert "WorkerLostError: A worker of the cluster ended, restarted, or cannot be" in text
    assert not list(tmp_path.iterdir())

    # The same addresses again, and one worker comes late.
    first = start(cluster, 0)
    time.sleep(6)
    second = start(cluster, 1)
    for process in (first, second):
        code, text = _finish(process)
        assert code == 0, text
    for index in range(2):
        found = dict(np.load(tmp_path / f"found{index}.npz"))
        _assert_close(found, _only(reference, "arnoldi") | looped)
