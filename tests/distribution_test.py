"""Which strategy a model's work runs under, and what the verbs give. See `conformance` for more."""

import gc
import types
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence import data, distribution
from keras_influence.methods import GradientDot
from tests import cases

STRATEGIES = {
    "none": tf.distribute.get_strategy,
    "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "mirrored": lambda: tf.distribute.MirroredStrategy(["CPU:0"]),
}


@pytest.fixture(params=STRATEGIES)
def model(request):
    with STRATEGIES[request.param]().scope():
        return cases.mlp()


def _batches(num=5, batch_size=2):
    rows = np.arange(num, dtype=np.float32)
    return list(data.batches((rows, rows), batch_size))


@tf.function(autograph=False)
def _products(examples, factor):
    x, _ = examples
    return tf.stack([x * factor, x + factor], axis=1)


@tf.function(autograph=False)
def _weighted(examples, factor, weights):
    x, _ = examples
    return tf.reduce_sum(x * weights)[tf.newaxis] * factor


def test_gather_keeps_the_order_and_drops_the_padding(model):
    factors = []

    def operands(examples):
        factors.append(len(examples[0]))
        return tf.constant(3.0)

    seen = []
    rows = distribution.gather(
        _products, _batches(), model, operands, lambda b, rows: seen.append((b.ids, rows))
    )
    # (3 x, x + 3) of x = 0 to 4.
    np.testing.assert_array_equal(rows, [[0, 3], [3, 4], [6, 5], [9, 6], [12, 7]])
    assert factors == [2, 2, 2]
    assert [ids.tolist() for ids, _ in seen] == [[0, 1], [2, 3], [4]]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in seen]), rows)


def test_total_counts_every_example_once(model):
    # 2 (0 + 1 + 2 + 3 + 4); the last batch is filled up with a copy of 4.
    for batches in (_batches(), iter(_batches()), distribution.place(_batches(), model)):
        result = distribution.total(_weighted, batches, model, tf.constant([2.0]))
        np.testing.assert_array_equal(result, [20.0])
    with pytest.raises(ValueError, match="no batch to sum over"):
        distribution.total(_weighted, [], model, tf.constant([2.0]))


def test_what_is_computed_everywhere_serves_as_an_operand(model):
    @tf.function(autograph=False)
    def twice(x):
        return {"twice": (2 * x, x)}

    assert distribution.here(twice, model, np.float32(4))["twice"][0].numpy() == 8
    made = distribution.everywhere(twice, model, np.float32(4))

    @tf.function(autograph=False)
    def add(examples, operand):
        return examples[0] + operand["twice"][0]

    rows = distribution.gather(add, _batches(3), model, lambda _: made)
    np.testing.assert_array_equal(rows, [8, 9, 10])


def test_a_check_that_fails_ends_the_work(model):
    def check(batch, rows):
        if 2 in batch.ids:
            raise FloatingPointError("example 2")

    with pytest.raises(FloatingPointError, match="example 2"):
        distribution.gather(_products, _batches(), model, lambda _: tf.constant(0.0), check)


def test_the_strategy_of_the_variables_goes_before_that_in_scope():
    first = tf.distribute.MirroredStrategy(["CPU:0"])
    second = tf.distribute.OneDeviceStrategy("CPU:0")
    with first.scope():
        layers = [keras.Input((3,)), keras.layers.Dense(2)]
        inside = keras.Sequential(layers)
    outside = keras.Sequential([keras.Input((3,)), inside.layers[0]])
    plain = cases.mlp()
    assert distribution.strategy_of(inside) is first
    assert distribution.strategy_of(outside) is first
    assert distribution.strategy_of(plain) is None
    with second.scope():
        assert distribution.strategy_of(inside) is first
        assert distribution.strategy_of(outside) is first
        # Variables of no strategy: that in scope serves.
        assert distribution.strategy_of(plain) is second
        unbuilt = keras.Sequential([keras.layers.Dense(2)])
    assert distribution.strategy_of(unbuilt) is second
    assert distribution.strategy_of(plain) is None


def test_a_model_is_freed_with_what_was_traced_for_it():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = cases.mlp()
    method = GradientDot(model).fit(cases.vectors(dtype="float64"))
    method.self_influence(cases.vectors(dtype="float64"))
    alive = [weakref.ref(model), weakref.ref(method.maps)]
    del model, method
    keras.backend.clear_session()
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_parameter_servers_are_refused():
    kind = tf.distribute.experimental.ParameterServerStrategy
    # Never initialised: that would take a cluster.
    model = types.SimpleNamespace(distribute_strategy=kind.__new__(kind))
    with pytest.raises(NotImplementedError, match="workers do not step together"):
        distribution.total(_weighted, _batches(), model, tf.constant([2.0]))


def test_the_chief_writes(model):
    assert distribution.is_chief(model)


def test_without_other_workers_an_error_is_as_it_was():
    model = cases.mlp()
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        strategy = distribution.strategy_of(model)
    with pytest.raises(tf.errors.UnavailableError), distribution._naming_lost_workers(strategy):
        raise tf.errors.UnavailableError(None, None, "gone")
