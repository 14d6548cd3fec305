import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from tests import cases


def regression():
    random = np.random.default_rng(0)
    x = random.standard_normal((7, 3)).astype(np.float32)
    queries = random.standard_normal((2, 3)).astype(np.float32), np.array([1.0, -1], np.float32)
    return x, random.standard_normal(7).astype(np.float32), queries


def expected_run(x, y, queries, rates, batches):
    """The whole run and its sums by hand: squared errors of a linear model, plain SGD."""
    w = np.array([0.3, -0.2, 0.1])
    scores, own, losses = np.zeros((2, 7)), np.zeros(7), []
    for rate, ids in zip(rates, batches, strict=True):
        errors = x[ids] @ w - y[ids]
        gradients = 2 * errors[:, None] * x[ids]
        query_gradients = 2 * (queries[0] @ w - queries[1])[:, None] * queries[0]
        scores[:, ids] += rate / len(ids) * query_gradients @ gradients.T
        own[ids] += rate / len(ids) * (gradients**2).sum(axis=1)
        losses.append(errors**2)
        w -= rate * gradients.mean(axis=0)
    return w, scores, own, losses


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_sums_over_a_run_are_those_by_hand(wrapped):
    x, y, queries = regression()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 0.05])
    if wrapped:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
        trainer = ki.trainers.InfluenceTrainer(
            model, queries=queries, losses=True, self_influence=True
        )
    else:

        class Recorded(ki.trainers.InfluenceTrainerMixin, keras.Model):
            pass

        inputs = keras.Input((3,))
        model = trainer = Recorded(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
        trainer.record(queries, losses=True, self_influence=True)
    trainer.compile(keras.optimizers.SGD(schedule), "mse", jit_compile=False)
    cases.set_weights(model, [[0.3], [-0.2], [0.1]])
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
    trainer.fit(ki.data.with_ids(dataset), epochs=2, verbose=0)
    batches = [[0, 1, 2], [3, 4, 5], [6]] * 2
    rates = [0.1, 0.1, 0.05, 0.05, 0.05, 0.05]
    w, scores, own, losses = expected_run(x, y, queries, rates, batches)
    record = trainer.influence_record
    assert len(record) == 6
    assert [ids.tolist() for ids in record.ids] == batches
    np.testing.assert_allclose(record.learning_rates, rates, rtol=1e-6)
    np.testing.assert_allclose(model.get_weights()[0][:, 0], w, rtol=1e-5)
    np.testing.assert_allclose(record.scores(7), scores, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(record.self_influence(7), own, rtol=1e-4, atol=1e-6)
    for found, expected in zip(record.losses, losses, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="above the largest id, 6"):
        record.scores(6)
    assert trainer.evaluate(x, y, verbose=0) > 0
    assert trainer.predict(x, verbose=0).shape == (7, 1)


def test_recording_changes_nothing_of_the_training():
    x, y = cases.images()
    models = [cases.image_model(), cases.image_model()]
    models[1].set_weights(models[0].get_weights())
    trainer = ki.trainers.InfluenceTrainer(models[1], self_influence=True)
    for model in (models[0], trainer):
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), cases.SPARSE, jit_compile=False)
    models[0].fit(x, y, batch_size=5, shuffle=False, verbose=0)
    trainer.fit(*ki.data.with_ids((x, y)), batch_size=5, shuffle=False, verbose=0)
    for plain, recorded in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_array_equal(plain, recorded)


def test_an_id_stays_with_its_example_through_a_shuffle():
    x, y = np.arange(8.0)[:, None], np.arange(8)
    dataset = ki.data.with_ids(tf.data.Dataset.from_tensor_slices((x, y)).batch(1))
    shuffled = dataset.unbatch().shuffle(8, seed=0).batch(3)
    seen = []
    for identified, labels in shuffled:
        np.testing.assert_array_equal(identified.ids, labels)
        np.testing.assert_array_equal(identified.inputs[:, 0], labels)
        seen += labels.numpy().tolist()
    assert sorted(seen) == list(range(8))
    assert seen != sorted(seen)


def test_what_cannot_be_recorded():
    x, y, _ = regression()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    trainer = ki.trainers.InfluenceTrainer(model)
    trainer.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(ValueError, match="with_ids"):
        trainer.fit(x, y, verbose=0)
    trainer.fit(*ki.data.with_ids((x, y)), verbose=0)
    with pytest.raises(ValueError, match="record with `queries`"):
        trainer.influence_record.scores(7)
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        trainer.compile("sgd", "mse", jit_compile=True)
    trainer.fit(*ki.data.with_ids((x, y)), verbose=0)
    assert not trainer.jit_compile and len(trainer.influence_record) == 2
    with pytest.raises(ValueError, match="unbuilt Sequential"):
        ki.trainers.InfluenceTrainer(keras.Sequential([keras.layers.Dense(1)]))
    reshuffled = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(7).batch(2)
    with pytest.raises(ValueError, match="other examples each time"):
        ki.data.with_ids(reshuffled)
    with pytest.raises(TypeError, match="list"):
        ki.data.with_ids([x, y])
