import json
import shutil

import keras
import numpy as np
import pytest

from keras_influence import checkpoints
from keras_influence.callbacks import TracInCheckpoint
from keras_influence.storage import TornStoreError

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
Y = X @ np.float32([[1.0], [-2.0], [0.5]])


def build(width=4, dropout=0.0, optimizer="adam"):
    layers = [keras.Input((3,)), keras.layers.Dense(width, "tanh")]
    layers += [keras.layers.Dropout(dropout)] if dropout else []
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


def fit(model, directory, epochs=2):
    """Two steps an epoch, a checkpoint after each epoch."""
    recorder = TracInCheckpoint(directory)
    model.fit(X, Y, batch_size=4, epochs=epochs, verbose=0, callbacks=[recorder])
    return recorder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "run"
    model = build()
    fit(model, directory)
    return model.get_weights(), directory


@pytest.fixture
def recorded(trained, tmp_path):
    weights, directory = trained
    shutil.copytree(directory, tmp_path / "run")
    model = build()
    model.optimizer.build(model.trainable_variables)
    model.set_weights(weights)
    return model, tmp_path / "run"


def edit_json(file, **changes):
    record = json.loads(file.read_text())
    record.update(changes)
    file.write_text(json.dumps({k: v for k, v in record.items() if v != "remove"}))


def test_architecture_does_not_depend_on_counters_in_names():
    first, second = build(), build()
    assert [v.path for v in first.variables] != [v.path for v in second.variables]
    prints = {checkpoints.architecture_fingerprint(model) for model in (first, second)}
    assert len(prints) == 1


def test_architecture_depends_on_shapes_dtypes_and_order():
    half = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, dtype="float16")])
    full = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    prints = {checkpoints.architecture_fingerprint(m) for m in (half, full, build(), build(5))}
    assert len(prints) == 4


def test_weights_fingerprint_sees_one_bit_and_not_the_dropout_state():
    model = build(dropout=0.5)
    before = checkpoints.weights_fingerprint(model)
    state = next(v for v in model.variables if v.name == "seed_generator_state")
    old_state = state.numpy()
    model(X, training=True)
    assert not np.array_equal(state.numpy(), old_state)
    assert checkpoints.weights_fingerprint(model) == before

    bias = model.layers[-1].bias
    bias.assign(np.nextafter(np.float32([0.0]), np.float32(1.0)))
    assert checkpoints.weights_fingerprint(model) != before
    bias.assign([0.0])
    assert checkpoints.weights_fingerprint(model) == before
    # -0.0 == 0.0, but they are different bits: the fingerprint is of bits.
    bias.assign([-0.0])
    assert checkpoints.weights_fingerprint(model) != before


def test_checkpoints_are_listed_by_step(recorded):
    model, directory = recorded
    found = checkpoints.list_checkpoints(str(directory))
    assert [(c.step, c.epoch, c.batch) for c in found] == [(2, 0, 1), (4, 1, 1)]
    assert [c.path.name for c in found] == ["checkpoint-00000002", "checkpoint-00000004"]
    last = found[-1]
    assert last.fingerprint == checkpoints.weights_fingerprint(model)
    assert last.architecture == checkpoints.architecture_fingerprint(model)
    # Dense 3 -> 4 and 4 -> 1, with biases: 12 + 4 + 4 + 1 numbers.
    assert last.num_parameters == 21
    assert last.bytes == (last.path / "model.weights.h5").stat().st_size
    assert (last.optimizer, last.momentum) == ("Adam", None)
    assert last.keras_version == keras.__version__
    for checkpoint in found:
        checkpoint.verify()


def test_the_record_of_the_run_is_read_back_as_written(recorded):
    _, directory = recorded
    run = checkpoints.read_run(directory)
    checkpoints.write_run(directory, run)
    assert checkpoints.read_run(directory) == run
    assert (run.save_freq, run.first_step) == ("epoch", 0)
    # The start, and the two ends of epochs; the end of training has nothing new.
    assert [(e.step, e.checkpoint, e.written) for e in run.history] == [
        (0, None, False),
        (2, "checkpoint-00000002", True),
        (4, "checkpoint-00000004", True),
    ]


def test_a_moved_run_is_still_read(recorded):
    _, directory = recorded
    directory.rename(directory.with_name("moved"))
    for checkpoint in checkpoints.list_checkpoints(directory.with_name("moved")):
        checkpoint.verify()


def test_weights_are_loaded_and_the_optimizer_is_left_alone(recorded):
    model, directory = recorded
    first, last = checkpoints.list_checkpoints(directory)
    optimizer_before = [v.numpy() for v in model.optimizer.variables]
    checkpoints.load_weights(model, first)
    assert checkpoints.weights_fingerprint(model) == first.fingerprint != last.fingerprint
    for variable, before in zip(model.optimizer.variables, optimizer_before, strict=True):
        np.testing.assert_array_equal(variable, before)


@pytest.mark.filterwarnings("error:Skipping variable loading")
def test_weights_are_loaded_into_a_model_built_anew(recorded):
    model, directory = recorded
    last = checkpoints.list_checkpoints(directory)[-1]
    for other in (build(), build(optimizer=None)):
        checkpoints.load_weights(other, last)
        for variable, trained in zip(other.variables, model.variables, strict=True):
            np.testing.assert_array_equal(variable, trained)


def test_weights_of_another_architecture_are_refused(recorded):
    _, directory = recorded
    last = checkpoints.list_checkpoints(directory)[-1]
    other = build(width=5)
    before = checkpoints.weights_fingerprint(other)
    # 15 + 5 + 5 + 1 numbers.
    with pytest.raises(ValueError, match=r"another architecture.*21 numbers.*26 numbers"):
        checkpoints.load_weights(other, last)
    assert checkpoints.weights_fingerprint(other) == before


def test_weights_are_refused_by_an_unbuilt_model(recorded):
    _, directory = recorded
    last = checkpoints.list_checkpoints(directory)[-1]
    with pytest.raises(ValueError, match="must be built"):
        checkpoints.load_weights(keras.Sequential([keras.layers.Dense(1)]), last)


def test_a_layer_that_keeps_weights_to_itself_is_found_out(tmp_path):
    class Secretive(keras.layers.Dense):
        def save_own_variables(self, store):
            pass

        def load_own_variables(self, store):
            pass

    def secretive():
        model = keras.Sequential([keras.Input((3,)), Secretive(1)])
        model.compile("sgd", "mse", run_eagerly=True)
        return model

    fit(secretive(), tmp_path)
    last = checkpoints.list_checkpoints(tmp_path)[-1]
    with pytest.raises(ValueError, match="are not those that were recorded"):
        checkpoints.load_weights(secretive(), last)


def test_weights_are_restored_at_the_end_and_on_an_error(recorded):
    model, directory = recorded
    first, last = checkpoints.list_checkpoints(directory)
    with checkpoints.weights_restored(model):
        checkpoints.load_weights(model, first)
        assert checkpoints.weights_fingerprint(model) == first.fingerprint
    assert checkpoints.weights_fingerprint(model) == last.fingerprint

    with pytest.raises(KeyError), checkpoints.weights_restored(model):
        for variable in model.variables:
            variable.assign(variable * 0 + 7)
        raise KeyError
    assert checkpoints.weights_fingerprint(model) == last.fingerprint


def test_restoring_covers_the_states_of_random_generators():
    model = build(dropout=0.5)
    state = next(v for v in model.variables if v.name == "seed_generator_state")
    state.assign([0, 5])
    with checkpoints.weights_restored(model):
        before = model(X, training=True)
    np.testing.assert_array_equal(model(X, training=True), before)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory at .*nowhere"):
        checkpoints.list_checkpoints(tmp_path / "nowhere")


def test_a_directory_without_a_record_is_refused(tmp_path):
    with pytest.raises(TornStoreError, match=r"run\.json is missing"):
        checkpoints.list_checkpoints(tmp_path)


def test_a_run_without_checkpoints_is_refused(tmp_path):
    recorder = TracInCheckpoint(tmp_path, epochs=[5])
    build().fit(X, Y, batch_size=4, verbose=0, callbacks=[recorder])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint \(last step recorded: 2\)"):
        checkpoints.list_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint-00000002", "checkpoint-00000004"])
def test_a_vanished_checkpoint_is_named(recorded, name):
    _, directory = recorded
    shutil.rmtree(directory / name)
    with pytest.raises(TornStoreError, match=f"{name}, which is not there"):
        checkpoints.list_checkpoints(directory)


def test_missing_weights_are_named(recorded):
    _, directory = recorded
    (directory / "checkpoint-00000002" / "model.weights.h5").unlink()
    with pytest.raises(TornStoreError, match=r"00002/model\.weights\.h5 is missing"):
        checkpoints.list_checkpoints(directory)


def test_shortened_weights_are_named(recorded):
    _, directory = recorded
    checkpoint = checkpoints.list_checkpoints(directory)[0]
    file = checkpoint.path / "model.weights.h5"
    file.write_bytes(file.read_bytes()[:-100])
    message = rf"00002/model\.weights\.h5 has {checkpoint.bytes - 100} bytes.*{checkpoint.bytes}"
    with pytest.raises(TornStoreError, match=message):
        checkpoints.list_checkpoints(directory)
    with pytest.raises(TornStoreError, match=message):
        checkpoint.verify()


def test_altered_weights_are_never_loaded(recorded):
    model, directory = recorded
    checkpoint = checkpoints.list_checkpoints(directory)[0]
    file = checkpoint.path / "model.weights.h5"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = checkpoints.weights_fingerprint(model)
    with pytest.raises(TornStoreError, match=r"model\.weights\.h5 .* SHA-256 differs"):
        checkpoints.load_weights(model, checkpoint)
    assert checkpoints.weights_fingerprint(model) == before


@pytest.mark.parametrize("content", ['{"step": 2, "epo', "[]", "", '{"step": 2}'])
def test_a_damaged_checkpoint_record_is_named(recorded, content):
    _, directory = recorded
    (directory / "checkpoint-00000002" / "checkpoint.json").write_text(content)
    with pytest.raises(TornStoreError, match=r"00002/checkpoint\.json is damaged"):
        checkpoints.list_checkpoints(directory)


def test_a_missing_checkpoint_record_is_named(recorded):
    _, directory = recorded
    (directory / "checkpoint-00000002" / "checkpoint.json").unlink()
    with pytest.raises(TornStoreError, match=r"00002/checkpoint\.json is missing"):
        checkpoints.list_checkpoints(directory)


@pytest.mark.parametrize("changes", [{"history": []}, {"id": "remove"}, {"extra": 1}])
def test_a_damaged_run_record_is_named(recorded, changes):
    _, directory = recorded
    edit_json(directory / "run.json", **changes)
    with pytest.raises(TornStoreError, match=r"run\.json is damaged"):
        checkpoints.list_checkpoints(directory)


def test_a_record_of_a_newer_version_is_refused(recorded):
    _, directory = recorded
    edit_json(directory / "run.json", format_version=2)
    with pytest.raises(ValueError, match=r"format version 2.*Upgrade"):
        checkpoints.list_checkpoints(directory)


def test_files_of_others_in_the_directory_are_not_read(recorded):
    _, directory = recorded
    (directory / "checkpoint-notes").mkdir()
    (directory / ".checkpoint-00000009.0123.partial").mkdir()
    (directory / "superseded-1" / "checkpoint-00000009").mkdir(parents=True)
    assert [c.step for c in checkpoints.list_checkpoints(directory)] == [2, 4]
