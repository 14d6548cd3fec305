"""Hessian-vector products against two plain tapes, through layers linear in weights and others."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence import gradients
from keras_influence.gradients import LossMaps
from tests import cases
from tests.gradients import rules_test

layers = keras.layers


def hessian_product(model, values, x, y, vector, weights):
    """Reverse over reverse through the gradients, with nothing of the package: [p]."""
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        outer.watch(values)
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(values)
            losses = cases.cross_entropy(y, model(x, training=False))
            total = tf.reduce_sum(losses * tf.cast(weights, losses.dtype))
        found = inner.gradient(total, values, unconnected_gradients="zero")
        flat = tf.concat([tf.reshape(tf.convert_to_tensor(g), [-1]) for g in found], axis=0)
        slope = tf.reduce_sum(flat * tf.cast(vector, flat.dtype))
    rows = outer.gradient(slope, values, unconnected_gradients="zero")
    return np.concatenate([np.reshape(tf.convert_to_tensor(row), -1) for row in rows])


def check(model, batch, maps=None, tolerance=1e-11):
    maps = maps or LossMaps(model)
    random = np.random.default_rng(2)
    vector, weights = (
        random.standard_normal(maps.parameters.size),
        random.uniform(size=len(batch[1])),
    )
    expected = hessian_product(model, maps.parameters.values, *batch, vector, weights)
    assert np.abs(expected).max() > 1e-3
    found = maps.curvature(batch, tf.cast(vector, maps.parameters.dtype), weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    return maps


def paths(maps, batch):
    """Of the variables that are served as weights of linear calls."""
    linear = maps.coverage(batch).linear.values()
    return {maps.parameters.variables[v].path for positions in linear for v in positions}


# Name: whether all variables are weights of linear calls.
CASES = {
    "dense_positions": True,
    "einsum_contracts_two": True,
    "einsum_groups": True,
    "conv2d_strides": True,
    "conv2d_dilation": True,
    "conv2d_groups": True,
    "conv1d_causal": True,
    "conv3d": True,
    "conv2d_transpose_output_padding": True,
    "depthwise_conv2d_strides": True,
    "time_distributed_conv": True,
    "convolution_used_twice": True,
    "spectral_normalization": True,
    "multi_head_attention": False,  # The embedding that feeds it.
    "separable_conv2d": False,  # The product of two kernels.
    "tied_embedding": False,
    "positions_without_batch": False,
    "bidirectional": False,
    "custom": False,
    "branch_taken": False,
}


@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    model, batch = rules_test.problem(rules_test.CASES[name][0], "float64")
    maps = check(model, batch)
    everything = {variable.path for variable in maps.parameters.variables}
    assert (paths(maps, batch) == everything) == CASES[name]
    assert paths(maps, batch)  # The last layer at least.


def _dense_pair():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(3)], name="pair"
    )
    model.compile("sgd", cases.SPARSE)
    return model


def _batch(shape, num=5):
    random = np.random.default_rng(0)
    return random.standard_normal((num, *shape)), random.integers(0, 3, num)


@pytest.fixture
def double():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def test_weights_that_were_not_chosen_stand_still(double):
    model = _dense_pair()
    for variable in model.variables:
        variable.assign(variable + 0.5)
    maps = LossMaps(model, variables=lambda v: v.name == "kernel")
    check(model, _batch((4,)), maps)
    assert len(paths(maps, _batch((4,)))) == 2


def test_low_rank_weights_are_not_linear():
    # LoRA weights are float32 in models of any dtype.
    model, batch = rules_test.problem(rules_test.CASES["dense_lora"][0], "float32")
    maps = check(model, batch, tolerance=1e-5)
    assert len(paths(maps, batch)) == 2  # The dense layer behind.


def test_a_weight_used_outside_of_its_layer_is_not_linear(double):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers.Dense(4, "tanh"), layers.Dense(3)

        def call(self, x):
            hidden = self.first(x)
            return self.last(hidden + tf.matmul(hidden, self.first.kernel))

    model, batch = Model(), _batch((4,))
    model(batch[0])
    model.compile("sgd", cases.SPARSE)
    maps = check(model, batch)
    assert sorted(path.rsplit("/", 1)[1] for path in paths(maps, batch)) == [
        "bias",
        "bias",
        "kernel",
    ]


POOLS = {
    "disjoint": {"pool_size": 2},
    "with_gaps": {"pool_size": 2, "strides": 3},
    "oblong": {"pool_size": (2, 3)},
    "overlapping": {"pool_size": 3, "strides": 2},
    "padded": {"pool_size": 2, "padding": "same"},
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_max_pooling(name, ties, double):
    model = keras.Sequential(
        [
            keras.Input((9, 9, 2)),
            layers.Conv2D(3, 3, activation="tanh"),
            layers.MaxPooling2D(**POOLS[name]),
            layers.Conv2D(2, 2, activation="relu"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    model.compile("sgd", cases.SPARSE)
    x, y = _batch((9, 9, 2))
    if ties:  # All windows alike, in pairs of rows.
        x[:, :, :, :] = x[:, :1, :1, :]
    maps = LossMaps(model)
    vector = np.random.default_rng(1).standard_normal(maps.parameters.size)
    found = maps.curvature((x, y), vector)
    # TensorFlow's own second derivatives, forward over reverse.
    expected = maps.forward_curvature((x, y), vector)
    np.testing.assert_allclose(found, expected, atol=1e-11 * np.abs(expected).max())


def test_max_pooling_of_sequences_is_left_to_tensorflow(double):
    model = keras.Sequential(
        [
            keras.Input((9, 2)),
            layers.Conv1D(3, 3, activation="relu"),
            layers.MaxPooling1D(2),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    model.compile("sgd", cases.SPARSE)
    check(model, _batch((9, 2)))


def test_a_product_is_symmetric_where_entries_tie():
    # Zeros behind a relu tie in nearly every window.
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    model.compile("sgd", cases.SPARSE)
    x, y = _batch((8, 8, 1))
    maps = LossMaps(model)
    a, b = np.random.default_rng(1).standard_normal((2, maps.parameters.size)).astype("float32")
    batch = (x.astype("float32"), y)
    left, right = np.dot(b, maps.curvature(batch, a)), np.dot(a, maps.curvature(batch, b))
    np.testing.assert_allclose(left, right, rtol=1e-5)


def test_half_precision_agrees_with_full():
    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.Conv2D(4, 3, activation="tanh"),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        model.compile("sgd", cases.SPARSE)
        return LossMaps(model)

    full = build()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = build()
    finally:
        keras.config.set_dtype_policy("float32")
    x, y = _batch((6, 6, 2))
    batch = (x.astype("float32"), y)
    vector = np.random.default_rng(1).standard_normal(full.parameters.size).astype("float32")
    expected = full.curvature(batch, vector).numpy()
    found = half.curvature(batch, vector)
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())
    assert len(paths(half, batch)) == 4


def test_a_rule_of_the_users_own_may_be_linear(monkeypatch, double):
    for name in ("_rules", "_linear"):
        registry = dict(getattr(gradients.rules.registry, name))
        monkeypatch.setattr(f"keras_influence.gradients.rules.registry.{name}", registry)

    class Scale(layers.Layer):
        def build(self, shape):
            self.gain = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return x * self.gain

    @gradients.register_rule(Scale, linear_in=["gain"])
    def scale(call):
        yield call.layer.gain, gradients.Explicit(call.output_gradient * call.inputs)

    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, "tanh"), Scale(), layers.Dense(3)])
    model.compile("sgd", cases.SPARSE)
    batch = _batch((4,))
    assert len(paths(check(model, batch), batch)) == 5


def test_tensorflow_is_left_as_it_was():
    before = [tf.nn.relu, tf.nn.max_pool, tf.nn.moments]
    model = _dense_pair()
    x, y = _batch((4,))
    vector = np.zeros(LossMaps(model).parameters.size, "float32")
    threads = [
        threading.Thread(target=lambda: LossMaps(model).curvature((x, y), vector)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [tf.nn.relu, tf.nn.max_pool, tf.nn.moments] == before
    with pytest.raises(ValueError, match="incompatible"):
        LossMaps(model).curvature((x[:, :3], y), vector)
    assert [tf.nn.relu, tf.nn.max_pool, tf.nn.moments] == before
