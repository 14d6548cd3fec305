"""Kills, full disks and strategies: a checkpoint is whole or absent, and written once."""

import errno
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from keras_influence import checkpoints
from keras_influence.callbacks import TracInCheckpoint, run_directory, tracin_checkpoint
from tests.callbacks.recorded import Stop, drift, fit, steps

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("broken", ["rename", "save_weights"])
def test_a_write_that_is_broken_off_leaves_nothing_to_read(tmp_path, monkeypatch, broken):
    model = drift()
    calls = []

    def break_off(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    owner = os if broken == "rename" else model
    original = getattr(owner, broken)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, broken, break_off)
        fit(model, TracInCheckpoint(tmp_path), epochs=3)
    assert steps(tmp_path) == [2]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-00000002", "run.json"]

    # The weights that should have been saved are still there, and are saved first.
    recorder = TracInCheckpoint(tmp_path)
    fit(model, recorder, initial_epoch=2, epochs=3)
    assert [(c.step, c.epoch) for c in recorder.records] == [(4, 1), (6, 2)]
    assert steps(tmp_path) == [2, 4, 6]


def test_a_checkpoint_that_was_not_noted_is_kept(tmp_path, monkeypatch):
    # The process dies between the checkpoint and the note in the record that it is complete.
    model = drift()

    def die(path):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(run_directory, "read_checkpoint", die)
        fit(model, TracInCheckpoint(tmp_path))
    assert steps(tmp_path) == [2]
    file = tmp_path / "checkpoint-00000002" / "model.weights.h5"
    written = file.stat().st_mtime_ns
    recorder = TracInCheckpoint(tmp_path)
    fit(model, recorder, initial_epoch=1, epochs=2)
    assert file.stat().st_mtime_ns == written
    assert steps(tmp_path) == [2, 4]
    assert all(e.written for e in checkpoints.read_run(tmp_path).history if e.checkpoint)
    assert [c.step for c in recorder.records] == [4]


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    partial = tmp_path / f".checkpoint-00000002.{'0' * 32}.partial"
    partial.mkdir()
    (partial / "model.weights.h5").write_text("half")
    (tmp_path / f".run.json.{'0' * 32}").write_text("{")
    fit(drift(), TracInCheckpoint(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-00000002", "run.json"]


def test_a_full_disk_is_reported_and_costs_no_earlier_checkpoint(tmp_path, monkeypatch):
    model = drift()
    save_weights = model.save_weights

    def full(file):
        if "00000004" in str(file):
            pathlib.Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_weights(file)

    monkeypatch.setattr(model, "save_weights", full)
    message = r"step 4 could not be written: .*No space left.*The 1 checkpoints.*are whole"
    with pytest.raises(OSError, match=message) as raised:
        fit(model, TracInCheckpoint(tmp_path), epochs=3)
    assert raised.value.errno == errno.ENOSPC
    for checkpoint in checkpoints.list_checkpoints(tmp_path):
        checkpoint.verify()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-00000002", "run.json"]


def test_a_refusal_of_the_file_system_is_reported(tmp_path):
    # No file may grow beyond 4,000 bytes; the weights file has more. Where HDF5 itself finds out,
    # as it closes the file, it ends the process.
    model = drift()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(OSError, match="step 2 could not be written"):
            fit(model, TracInCheckpoint(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["run.json"]


def run_python(program, *arguments):
    """Runs `program`, with this module as `test`, in a process of its own."""
    prelude = "import sys; sys.path[:0] = sys.argv[1:3]; import tracin_checkpoint_test as test\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(program)]
        + [str(a) for a in (ROOT, pathlib.Path(__file__).parent, *arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_process_that_is_killed_while_it_saves(tmp_path):
    program = """
        import os, signal
        model = test.drift()
        whole = model.save_weights

        def save_weights(file):
            whole(file)
            if "00000004" in str(file):
                os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        model.save_weights = save_weights
        test.fit(model, test.TracInCheckpoint(sys.argv[3]), epochs=3)
    """
    ended = run_python(program, tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list(tmp_path.glob(".checkpoint-00000004.*.partial"))) == 1
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path)
    checkpoint.verify()

    model = drift()
    model.load_weights(checkpoint.path / "model.weights.h5")
    fit(model, TracInCheckpoint(tmp_path), initial_epoch=1, epochs=3)
    assert steps(tmp_path) == [2, 4, 6]
    assert not list(tmp_path.glob(".*"))


def test_only_the_chief_touches_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tracin_checkpoint, "is_chief", lambda model: False)
    recorder = TracInCheckpoint(tmp_path / "run", save_freq=1)
    fit(drift(), recorder, epochs=2)
    assert recorder.records == []
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_two_mirrored_replicas_write_once(tmp_path):
    program = """
        import keras
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        half = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [half, half])
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
            model = test.drift(keras.optimizers.SGD(schedule), eager=False)
        x = test.np.zeros((8, 1), "float32")
        recorder = test.TracInCheckpoint(sys.argv[3])
        model.fit(x, x, batch_size=4, epochs=2, verbose=0, callbacks=[recorder])
        model.fit(x, x, batch_size=4, epochs=2, verbose=0, callbacks=[recorder])
        assert len(recorder.records) == 4
    """
    ended = run_python(program, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert sorted(os.listdir(tmp_path)) == [f"checkpoint-0000000{n}" for n in (2, 4, 6, 8)] + [
        "run.json"
    ]
    model = drift()
    for number, checkpoint in enumerate(checkpoints.list_checkpoints(tmp_path), start=1):
        checkpoints.load_weights(model, checkpoint)
        # Two steps an epoch; the sum of 0.1 / 2^i for i below n is 0.2 (1 - 1 / 2^n).
        total = 0.2 * (1 - 0.25**number)
        np.testing.assert_allclose(checkpoint.learning_rate_sum, total, rtol=1e-6)
        np.testing.assert_allclose(model.layers[-1].bias.numpy(), [-total], rtol=1e-6)
