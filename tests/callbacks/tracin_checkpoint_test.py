"""What the callback writes, and when."""

import json

import keras
import numpy as np
import pytest

from keras_influence import checkpoints
from keras_influence.callbacks import TracInCheckpoint, tracin_checkpoint
from tests.callbacks.recorded import BiasAtEpochEnd, drift, fit, rates, steps, sums


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
