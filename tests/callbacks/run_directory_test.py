"""A directory belongs to one run: what continues it, and what is refused."""

import os

import keras
import numpy as np
import pytest

from keras_influence import checkpoints
from keras_influence.callbacks import TracInCheckpoint
from tests.callbacks.recorded import Stop, StopAt, drift, fit, rates, steps, sums


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
