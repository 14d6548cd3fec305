import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

from keras_influence import checkpoints
from keras_influence.callbacks import TracInCheckpoint, run_directory, tracin_checkpoint

ROOT = pathlib.Path(__file__).parents[2]


def drift(optimizer="sgd", eager=True, batches_at_once=1, built=True):
    """A model whose bias is minus the sum of the learning rates that plain SGD has used.

    The loss of an example is the output, so the bias has gradient 1; the inputs are 0, so the
    kernel has gradient 0.
    """
    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="ones")])
    if built:
        model.build((None, 1))
    model.compile(
        optimizer,
        lambda y, output: output,
        run_eagerly=eager,
        steps_per_execution=batches_at_once,
    )
    return model


def fit(model, *callbacks, batches=2, **arguments):
    x = np.zeros((batches, 1), np.float32)
    model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[*callbacks], **arguments)


def steps(directory):
    return [checkpoint.step for checkpoint in checkpoints.list_checkpoints(directory)]


def rates(directory):
    return [checkpoint.learning_rate for checkpoint in checkpoints.list_checkpoints(directory)]


def sums(directory):
    return [checkpoint.learning_rate_sum for checkpoint in checkpoints.list_checkpoints(directory)]


class Stop(Exception):
    """Stands for a process that dies."""


class StopAt(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.moment = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.moment:
            raise Stop


class BiasAtEpochEnd(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.values = []

    def on_epoch_end(self, epoch, logs=None):
        self.values.append(float(self.model.layers[-1].bias.numpy()[0]))


@pytest.mark.parametrize("eager", [True, False])
def test_a_schedule_is_evaluated_at_the_step(tmp_path, eager):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)  # 0.1 / 2^step
    bias = BiasAtEpochEnd()
    fit(drift(keras.optimizers.SGD(schedule), eager), bias, TracInCheckpoint(tmp_path), epochs=2)
    # Two steps an epoch: the rate at steps 2 and 4; the steps used .1 + .05, then .025 + .0125.
    np.testing.assert_allclose(rates(tmp_path), [0.025, 0.00625], rtol=1e-6)
    np.testing.assert_allclose(sums(tmp_path), [0.15, 0.1875], rtol=1e-6)
    np.testing.assert_allclose(sums(tmp_path), np.negative(bias.values), rtol=1e-6)


def test_a_scheduler_callback_is_followed(tmp_path):
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.4 / 2**epoch)
    bias = BiasAtEpochEnd()
    fit(drift(), TracInCheckpoint(tmp_path), scheduler, bias, epochs=3)
    np.testing.assert_allclose(rates(tmp_path), [0.4, 0.2, 0.1], rtol=1e-6)
    np.testing.assert_allclose(sums(tmp_path), [0.8, 1.2, 1.4], rtol=1e-6)
    np.testing.assert_allclose(sums(tmp_path), np.negative(bias.values), rtol=1e-6)


@pytest.mark.parametrize("recorder_first", [True, False])
def test_the_rate_of_the_next_epoch_does_not_leak(tmp_path, recorder_first):
    # Nothing counts as an improvement but the first value, so the rate is halved after the epochs
    # 1, 2 and 3.
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    callbacks = [TracInCheckpoint(tmp_path), plateau]
    model = drift(keras.optimizers.SGD(0.1))
    fit(model, *(callbacks if recorder_first else callbacks[::-1]), epochs=4)
    np.testing.assert_allclose(rates(tmp_path), [0.1, 0.1, 0.05, 0.025], rtol=1e-6)
    np.testing.assert_allclose(sums(tmp_path)[-1], 2 * (0.1 + 0.1 + 0.05 + 0.025), rtol=1e-6)
    np.testing.assert_allclose(sums(tmp_path)[-1], -model.layers[-1].bias.numpy()[0], rtol=1e-6)


def test_a_loss_scale_optimizer_is_looked_into(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    inner = keras.optimizers.SGD(schedule, momentum=0.9)
    fit(drift(keras.optimizers.LossScaleOptimizer(inner)), TracInCheckpoint(tmp_path))
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path)
    assert (checkpoint.step, checkpoint.optimizer, checkpoint.momentum) == (2, "SGD", 0.9)
    np.testing.assert_allclose(checkpoint.learning_rate, 0.025, rtol=1e-6)
    np.testing.assert_allclose(checkpoint.learning_rate_sum, 0.15, rtol=1e-6)


def test_steps_skipped_by_a_loss_scale_do_not_count(tmp_path):
    # Inputs of 4 give the kernel a gradient of 4; times the scale of 2^127 this is infinite in
    # float32, and so is half of it. Two batches are skipped and halve the scale, two make a step.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 2.0**127)
    model = drift(optimizer)
    x = np.full((4, 1), 4.0, np.float32)
    model.fit(x, x, batch_size=1, verbose=0, callbacks=[TracInCheckpoint(tmp_path)])
    assert steps(tmp_path) == [2]
    np.testing.assert_allclose(sums(tmp_path), [0.2], rtol=1e-6)
    np.testing.assert_allclose(model.layers[-1].bias.numpy(), [-0.2], rtol=1e-6)


def test_accumulated_gradients_make_one_step(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    optimizer = keras.optimizers.SGD(schedule, gradient_accumulation_steps=2)
    model = drift(optimizer)
    fit(model, TracInCheckpoint(tmp_path), batches=4)
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path)
    assert (checkpoint.step, checkpoint.batch) == (2, 3)
    # Keras evaluates the schedule by batches: the steps come at the batches 1 and 3.
    np.testing.assert_allclose(checkpoint.learning_rate_sum, 0.05 + 0.0125, rtol=1e-6)
    np.testing.assert_allclose(0.05 + 0.0125, -model.layers[-1].bias.numpy()[0], rtol=1e-6)
    np.testing.assert_allclose(checkpoint.learning_rate, 0.1 / 2**4, rtol=1e-6)


def test_a_rate_that_a_callable_gives_is_read(tmp_path):
    fit(drift(keras.optimizers.SGD(lambda: 0.25)), TracInCheckpoint(tmp_path))
    assert (rates(tmp_path), sums(tmp_path)) == ([0.25], [0.5])


def test_the_weights_are_those_of_their_epoch(tmp_path):
    model, bias = drift("adam"), BiasAtEpochEnd()
    fit(model, bias, TracInCheckpoint(tmp_path), epochs=3)
    saved = []
    for checkpoint in checkpoints.list_checkpoints(tmp_path):
        checkpoints.load_weights(model, checkpoint)
        saved.append(float(model.layers[-1].bias.numpy()[0]))
    assert saved == bias.values
    assert len(set(saved)) == 3


def test_batches_are_counted_through_epochs(tmp_path):
    recorder = TracInCheckpoint(tmp_path, save_freq=3)
    fit(drift(), recorder, batches=5, epochs=2)
    assert [(c.step, c.epoch, c.batch) for c in recorder.records] == [
        (3, 0, 2),
        (6, 1, 0),
        (9, 1, 3),
    ]
    assert recorder.records == checkpoints.list_checkpoints(tmp_path)
    # The start, the checkpoints, and the ends of epochs.
    assert [e.step for e in checkpoints.read_run(tmp_path).history] == [0, 3, 5, 6, 9, 10]


def test_several_batches_at_once_save_at_the_next_chance(tmp_path):
    model = drift(eager=False, batches_at_once=2)
    fit(model, TracInCheckpoint(tmp_path, save_freq=3), batches=5, epochs=2)
    # Executions end at steps 2 4 5, 7 9 10; multiples of 3 are first passed at 4, 7 and 9.
    assert steps(tmp_path) == [4, 7, 9]
    np.testing.assert_allclose(sums(tmp_path), [0.04, 0.07, 0.09], rtol=1e-6)


def test_batches_count_also_where_several_make_a_step(tmp_path):
    model = drift(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    fit(model, TracInCheckpoint(tmp_path, save_freq=3), batches=8)
    # Steps come at batches 2 4 6 8; 3 and 6 batches are first passed at the steps 2 and 3.
    assert steps(tmp_path) == [2, 3]


def test_batches_count_from_the_start_of_the_run(tmp_path):
    model = drift()
    fit(model, batches=4)
    fit(model, TracInCheckpoint(tmp_path, save_freq=3), batches=7)
    assert steps(tmp_path) == [4 + 3, 4 + 6]


def test_only_the_chosen_epochs_are_saved(tmp_path):
    fit(drift(), TracInCheckpoint(tmp_path, epochs=[0, 2]), epochs=4)
    assert [c.epoch for c in checkpoints.list_checkpoints(tmp_path)] == [0, 2]
    assert [e.step for e in checkpoints.read_run(tmp_path).history] == [0, 2, 4, 6, 8]


def test_epochs_are_numbered_as_keras_does(tmp_path):
    fit(drift(), TracInCheckpoint(tmp_path, epochs=[3]), initial_epoch=2, epochs=4)
    assert [c.epoch for c in checkpoints.list_checkpoints(tmp_path)] == [3]


def test_an_epoch_that_is_not_reached_is_warned_of(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        tracin_checkpoint.logging, "warning", lambda text, *values: warnings.append(text % values)
    )
    fit(drift(), TracInCheckpoint(tmp_path, epochs=[1, 2]), epochs=2)
    assert "epochs [2] are not reached" in warnings[0]


def test_a_model_that_is_built_by_its_first_batch(tmp_path):
    model = drift(built=False)
    assert not model.built
    fit(model, TracInCheckpoint(tmp_path, save_freq=3), batches=7)
    assert steps(tmp_path) == [3, 6]
    np.testing.assert_allclose(sums(tmp_path), [0.03, 0.06], rtol=1e-6)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        tracin_checkpoint.logging, "warning", lambda text, *values: warnings.append(text % values)
    )
    blow_up = keras.callbacks.LearningRateScheduler(lambda epoch: [0.1, np.inf][epoch])
    fit(drift(), blow_up, TracInCheckpoint(tmp_path), epochs=2)
    assert steps(tmp_path) == [2]
    assert "no checkpoint at step 4" in warnings[0]


def test_a_run_goes_on_in_a_new_process(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    fit(drift(keras.optimizers.SGD(schedule)), TracInCheckpoint(tmp_path), epochs=2)
    begun = checkpoints.read_run(tmp_path)

    model = drift(keras.optimizers.SGD(schedule))
    model.optimizer.build(model.trainable_variables)
    last = checkpoints.list_checkpoints(tmp_path)[-1]
    model.load_weights(last.path / "model.weights.h5")
    recorder = TracInCheckpoint(tmp_path)
    fit(model, recorder, initial_epoch=2, epochs=4)

    assert steps(tmp_path) == [2, 4, 6, 8]
    assert [c.step for c in recorder.records] == [6, 8]
    run = checkpoints.read_run(tmp_path)
    assert run.id == begun.id
    assert run.session != begun.session
    np.testing.assert_allclose(sums(tmp_path)[-1], 0.1 * (2 - 0.5**7), rtol=1e-6)
    assert not (tmp_path / "superseded-1").exists()


def test_steps_go_on_when_the_optimizer_is_made_anew(tmp_path):
    fit(drift(), TracInCheckpoint(tmp_path), epochs=2)
    model = drift()
    checkpoints.load_weights(model, checkpoints.list_checkpoints(tmp_path)[-1])
    fit(model, TracInCheckpoint(tmp_path, save_freq=3), batches=5)
    # At 2 and 4 from the first; 6 is the second multiple of 3, and 9 the third.
    assert steps(tmp_path) == [2, 4, 6, 9]
    np.testing.assert_allclose(sums(tmp_path), [0.02, 0.04, 0.06, 0.09], rtol=1e-6)


@pytest.mark.parametrize("recorder_first", [True, False])
@pytest.mark.parametrize("save_freq", ["epoch", 1])
def test_a_run_goes_on_after_backup_and_restore(tmp_path, recorder_first, save_freq):
    def callbacks():
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        recorder = TracInCheckpoint(tmp_path / "run", save_freq)
        return [recorder, backup] if recorder_first else [backup, recorder]

    with pytest.raises(Stop):
        fit(drift(), *callbacks(), StopAt(1, 0), epochs=3)
    model = drift()
    fit(model, *callbacks(), epochs=3)

    per_batch = save_freq == 1
    found = checkpoints.list_checkpoints(tmp_path / "run")
    assert [c.step for c in found] == ([1, 2, 3, 4, 5, 6] if per_batch else [2, 4, 6])
    np.testing.assert_allclose(found[-1].learning_rate_sum, 0.06, rtol=1e-6)
    assert found[-1].fingerprint == checkpoints.weights_fingerprint(model)
    # The step after the backup was lost with its process, and is done again.
    aside = [path.name for path in (tmp_path / "run").glob("superseded-*/*")]
    assert aside == (["checkpoint-00000003"] if per_batch else [])


def test_checkpoints_of_an_abandoned_way_are_moved_aside(tmp_path):
    fit(drift(), TracInCheckpoint(tmp_path), epochs=3)
    first = checkpoints.list_checkpoints(tmp_path)[0]
    for number, rate in ((1, 0.5), (2, 0.25)):
        model = drift(keras.optimizers.SGD(rate))
        checkpoints.load_weights(model, first)
        fit(model, TracInCheckpoint(tmp_path), initial_epoch=1, epochs=3)
        assert steps(tmp_path) == [2, 4, 6]
        assert rates(tmp_path)[1:] == [rate, rate]
        aside = tmp_path / f"superseded-{number}"
        assert sorted(os.listdir(aside)) == ["checkpoint-00000004", "checkpoint-00000006"]
    # What was moved last is what the continuation before had written.
    old = checkpoints.read_checkpoint(tmp_path / "superseded-2" / "checkpoint-00000006")
    old.verify()
    assert old.learning_rate == 0.5


def test_the_same_callback_serves_a_second_fit(tmp_path):
    model, recorder = drift(), TracInCheckpoint(tmp_path, save_freq=3)
    fit(model, recorder, batches=4)
    fit(model, recorder, batches=4)
    assert steps(tmp_path) == [3, 6]
    np.testing.assert_allclose(sums(tmp_path), [0.03, 0.06], rtol=1e-6)
    assert [c.step for c in recorder.records] == [3, 6]


def test_a_second_fit_goes_on_from_averaged_weights(tmp_path):
    # With moving averages Keras changes the weights once more after the last epoch.
    model = drift(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5))
    recorder = TracInCheckpoint(tmp_path)
    fit(model, recorder)
    assert checkpoints.weights_fingerprint(model) != recorder.records[0].fingerprint
    fit(model, recorder)
    assert steps(tmp_path) == [2, 4]


def test_another_set_of_weights_is_refused(tmp_path):
    fit(drift(), TracInCheckpoint(tmp_path), epochs=2)
    before = sorted(tmp_path.rglob("*"))
    run = checkpoints.read_run(tmp_path)
    other = drift()
    other.layers[-1].bias.assign([1.0])
    message = rf"(?s){tmp_path} holds run {run.id}.*step 4.*step 0, has weights.*To continue"
    with pytest.raises(ValueError, match=message):
        fit(other, TracInCheckpoint(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    assert checkpoints.read_run(tmp_path) == run


def test_another_architecture_is_refused(tmp_path):
    fit(drift(), TracInCheckpoint(tmp_path))
    other = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)])
    other.compile("sgd", lambda y, output: output, run_eagerly=True)
    with pytest.raises(ValueError, match="has another architecture"):
        fit(other, TracInCheckpoint(tmp_path))


def test_a_run_without_checkpoints_gives_way(tmp_path):
    with pytest.raises(Stop):
        fit(drift(), TracInCheckpoint(tmp_path), StopAt(0, 0))
    begun = checkpoints.read_run(tmp_path)
    other = drift()
    other.layers[-1].bias.assign([1.0])
    fit(other, TracInCheckpoint(tmp_path))
    assert checkpoints.read_run(tmp_path).id != begun.id
    assert steps(tmp_path) == [2]


def test_a_directory_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds \['thesis\.tex'\].*Choose a new"):
        fit(drift(), TracInCheckpoint(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        fit(drift(), TracInCheckpoint(tmp_path / "file"))


def test_the_first_of_two_live_runs_is_stopped(tmp_path):
    # The second has the initial weights of the first, as a script that is started twice would.
    class Intruder(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                fit(drift(), TracInCheckpoint(tmp_path))

    with pytest.raises(RuntimeError, match="another one has begun to record there"):
        fit(drift(), TracInCheckpoint(tmp_path), Intruder(), epochs=2)
    # Left are the checkpoint of the second, and aside that of the first.
    assert steps(tmp_path) == [2]
    assert os.listdir(tmp_path / "superseded-1") == ["checkpoint-00000002"]


def test_a_record_that_is_removed_meanwhile_stops_the_run(tmp_path):
    remove = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epoch and (tmp_path / "run.json").unlink()
    )
    with pytest.raises(RuntimeError, match=r"run\.json was replaced or removed"):
        fit(drift(), TracInCheckpoint(tmp_path), remove, epochs=2)


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


def test_time_and_bytes_are_reported(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        tracin_checkpoint.logging, "info", lambda text, *values: lines.append(text % values)
    )
    recorder = TracInCheckpoint(tmp_path)
    assert recorder.report() == tracin_checkpoint.CheckpointReport(0, 0, 0.0, 0.0, 0.0)
    fit(drift(), recorder, epochs=3)
    report = recorder.report()
    assert report.count == 3
    sizes = [p.stat().st_size for p in tmp_path.glob("checkpoint-*/model.weights.h5")]
    assert report.bytes_per_checkpoint == sorted(sizes)[1]
    written = [checkpoint.seconds for checkpoint in recorder.records]
    assert 0 < sorted(written)[1] <= report.seconds_per_checkpoint
    assert sum(written) < report.seconds_total
    assert 0 < report.share_of_training < 1
    assert f"3 checkpoints in {tmp_path}" in lines[-1]


def test_nothing_is_written_twice(tmp_path):
    fit(drift(), TracInCheckpoint(tmp_path, save_freq=2), batches=4)
    # The checkpoint at the last batch is also the end of the epoch and of training.
    history = json.loads((tmp_path / "run.json").read_text())["history"]
    assert [(entry["step"], entry["checkpoint"]) for entry in history] == [
        (0, None),
        (2, "checkpoint-00000002"),
        (4, "checkpoint-00000004"),
    ]


def test_the_first_weights_of_a_step_are_kept(tmp_path):
    # A user's callback changes the weights between two saves that no step lies between.
    class Change(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.layers[-1].bias.assign([5.0])
                self.model.optimizer.iterations.assign(0)

    fit(drift(), TracInCheckpoint(tmp_path), Change(), epochs=2)
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path)
    np.testing.assert_allclose(checkpoint.learning_rate_sum, 0.02, rtol=1e-6)
    assert checkpoint.epoch == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_freq": 0}, "positive number of batches"),
        ({"save_freq": "batch"}, "positive number of batches"),
        ({"save_freq": True}, "positive number of batches"),
        ({"save_freq": 1.5}, "positive number of batches"),
        ({"save_freq": 2, "epochs": [1]}, "only with save_freq='epoch'"),
        ({"epochs": []}, "counted from 0"),
        ({"epochs": [-1]}, "counted from 0"),
        ({"epochs": [0.5]}, "counted from 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        TracInCheckpoint(tmp_path, **arguments)


def test_a_model_without_an_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compiled with one optimizer"):
        fit(drift(None), TracInCheckpoint(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
