"""Loops over stacked batches: the numbers of one batch at a time, and so many executions."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from keras_influence import data, distribution, steps
from tests import cases


@tf.function(autograph=False)
def _weighted(examples, factor, weights):
    x, _ = examples
    return tf.reduce_sum(x * weights)[tf.newaxis] * factor


@tf.function(autograph=False)
def _products(examples, factor):
    x, _ = examples
    return tf.stack([x * factor, x + factor], axis=1)


def _batches(num=9, batch_size=2):
    rows = np.arange(num, dtype=np.float32)
    return list(data.batches((rows, rows), batch_size))


def test_a_stack_that_is_not_full_ends_where_its_batches_do():
    calls = []

    @tf.function(autograph=False)
    def doubled(examples):
        tf.py_function(lambda: calls.append(1), [], [])
        return 2 * examples[0]

    examples = (np.array([[1.0, 2], [3, 4], [1, 2], [1, 2]], np.float32),)
    found = steps.listed(doubled)(examples, tf.constant(2))
    np.testing.assert_array_equal(found, [[2, 4], [6, 8], [0, 0], [0, 0]])
    assert len(calls) == 2
    assert steps.listed(doubled) is steps.listed(doubled)


@pytest.mark.parametrize("per_execution", [1, 2, 3, 4, 5, 8])
def test_so_many_batches_are_one_execution(per_execution):
    # Five batches of 0 to 8, the last one filled up.
    executions = -(-5 // per_execution)
    placed = distribution.place(_batches(), keras.Sequential(), per_execution)
    assert len(placed) == executions
    # As even as can be: with four in an execution, there are two of three.
    width = {1: 1, 2: 2, 3: 3, 4: 3, 5: 5, 8: 5}[per_execution]
    shape = tf.nest.flatten(placed[0].examples)[0].shape
    assert tuple(shape) == ((2,) if per_execution == 1 else (width, 2))
    result = distribution.total(_weighted, placed, keras.Sequential(), tf.constant([2.0]))
    np.testing.assert_array_equal(result, [72.0])
    asked = []
    rows = distribution.gather(
        _products,
        _batches(),
        keras.Sequential(),
        lambda examples: asked.append(1) or tf.constant(3.0),
        steps_per_execution=per_execution,
    )
    np.testing.assert_array_equal(rows, [[3 * x, x + 3] for x in range(9)])
    assert len(asked) == executions


def test_batches_of_several_shapes_are_stacked_apart():
    short, long = np.ones((4, 3), np.float32), np.ones((3, 5), np.float32)
    elements = [(short, np.zeros(4)), (long, np.zeros(3))]
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(elements),
        output_signature=(tf.TensorSpec([None, None]), tf.TensorSpec([None])),
    )

    @tf.function(autograph=False)
    def widths(examples):
        return tf.reduce_sum(examples[0], axis=1)

    batches = data.batches(dataset, 2)
    rows = distribution.gather(widths, batches, keras.Sequential(), steps_per_execution=3)
    np.testing.assert_array_equal(rows, [3, 3, 3, 3, 5, 5, 5])


def test_a_loop_is_forgotten_with_its_function():
    def made():
        return tf.function(lambda examples: examples[0], autograph=False)

    function = made()
    steps.listed(function)((np.ones((2, 3)),), tf.constant(2))
    before = len(steps._listing)
    del function
    gc.collect()
    assert len(steps._listing) == before - 1


def test_what_arnoldi_and_its_index_give_is_the_same():
    model = cases.image_model()
    train = cases.images(23)
    one, several = (
        ki.Arnoldi(model, 3, 8, batch_size=4, steps_per_execution=steps).fit(train)
        for steps in (1, 4)
    )
    np.testing.assert_allclose(several.eigenbasis.values, one.eigenbasis.values, rtol=1e-5)
    np.testing.assert_allclose(several.encode(train), one.encode(train), atol=1e-4)
    # A projection's rows are those of a batch by itself.
    np.testing.assert_array_equal(
        several._gather(one.maps.squared_norms, train, "norm"),
        one._gather(one.maps.squared_norms, train, "norm"),
    )
    assert several.get_config()["steps_per_execution"] == 4
    x = train[0].copy()
    x[17] = np.nan
    with pytest.raises(FloatingPointError, match=r"encoding of example 17 is not finite"):
        several.encode((x, train[1]))
    with pytest.raises(ValueError, match=r"`steps_per_execution` must be at least 1. Received: 0"):
        ki.Arnoldi(model, steps_per_execution=0)


@pytest.mark.parametrize("kind", ["curvature", "project"])
def test_xla_compiles_a_loop_whole(kind):
    model = cases.image_model()
    maps = ki.gradients.LossMaps(model)
    batches = list(data.batches(cases.images(11), 4))
    examples, weights, count = distribution._stack(batches, 4)
    rows = np.random.default_rng(0).standard_normal((2, maps.parameters.size)).astype(np.float32)
    if kind == "curvature":
        loop, rest = steps.summed(maps.curvature), (tf.constant(rows[0]), weights)
    else:
        loop, rest = steps.listed(maps.project), (maps.prepare(rows, batches[0].examples),)
    compiled = tf.function(loop, autograph=False, jit_compile=True)
    expected = loop(examples, count, *rest).numpy()
    found = compiled(examples, count, *rest)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
