"""Products of the curvature over fixed examples, however many batches they come in."""

import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from keras_influence import data
from keras_influence.gradients import LossMaps
from keras_influence.methods import curvature
from keras_influence.methods.curvature import FrozenCurvature
from tests import cases, texts


def _bytes_of(maps, batch, kind="hessian"):
    return maps.curvature_bytes(batch.examples, kind)


@pytest.mark.parametrize("together, sizes", [(1, [4] * 8), (3, [10] * 3), (4, [15, 15]), (9, [29])])
def test_small_batches_are_joined(monkeypatch, together, sizes):
    model, (x, y) = cases.mlp(), cases.vectors(29, dtype="float64")
    maps, batches = LossMaps(model), list(data.batches((x, y), 4))
    room = together * _bytes_of(maps, batches[0])
    monkeypatch.setattr(curvature, "_JOINED_BYTES", room)
    fingerprint = curvature.batches_fingerprint(batches)
    operator = FrozenCurvature(maps, model, batches, l2=0.5)
    placed = operator._batches
    assert [len(batch.weights) for batch in placed] == sizes
    # Each example once, and none for the padding.
    real = [np.asarray(tf.nest.flatten(b.examples)[0])[b.weights.numpy() > 0] for b in placed]
    np.testing.assert_array_equal(np.concatenate(real), x)
    assert operator.num_examples == 29 and operator.fingerprint == fingerprint
    assert not batches
    dense = cases.dense_hessian(model, cases.cross_entropy, x, y) + 0.5 * np.eye(operator.size)
    vectors = np.random.default_rng(0).standard_normal((3, operator.size))
    np.testing.assert_allclose(operator(tf.constant(vectors[0])), dense @ vectors[0], atol=1e-12)
    np.testing.assert_allclose(operator.products(vectors), vectors @ dense, atol=1e-12)


def test_sentences_are_joined_with_those_of_their_length(monkeypatch):
    model = texts.classifier()
    parts = [texts.reading(texts.sentences([n - 1] * count), n) for n, count in ((3, 6), (5, 3))]
    maps = LossMaps(model)
    batches = [batch for part in parts for batch in data.batches(part, 2)]
    assert len(batches) == 5
    wanted = FrozenCurvature(maps, model, list(batches), steps_per_execution=2)
    monkeypatch.setattr(curvature, "_JOINED_BYTES", 2.5 * _bytes_of(maps, batches[-1]))
    operator = FrozenCurvature(maps, model, list(batches))
    lengths = [tuple(tf.nest.flatten(b.examples)[0].shape) for b in operator._batches]
    assert lengths == [(3, 3), (3, 3), (3, 5)]
    vector = tf.random.stateless_normal([operator.size], [0, 0], dtype=tf.float64)
    np.testing.assert_allclose(operator(vector), wanted(vector), rtol=1e-10, atol=1e-12)


def test_a_plan_counts_the_joined_batches(monkeypatch):
    model, train = cases.image_model(), cases.images(23)
    batches = list(data.batches(train, 3))
    maps = LossMaps(model)
    monkeypatch.setattr(curvature, "_JOINED_BYTES", 3 * _bytes_of(maps, batches[0]))
    operator = FrozenCurvature(maps, model, batches)
    # Eight batches of 3 make three of 8.
    assert len(operator._batches) == 3
    method = ki.Arnoldi(model, 2, 5, batch_size=3, damping=0.1)
    (stage,) = (s for s in method.plan(train).stages if s.name == "Hessian products, a batch")
    assert stage.repetitions == 5 * 3 and stage.hessian_products == 5
