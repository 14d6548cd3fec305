"""The three maps against dense oracles, and over Keras's layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence.gradients import Contraction, LossMaps
from tests import cases

layers = keras.layers


def _oracle_problem():
    model = cases.mlp((3, 7, 2))
    x, y = cases.vectors(8, 3, 2, dtype="float64")
    return model, x, y, LossMaps(model)


def test_gradient_projection_and_curvature_of_an_mlp():
    model, x, y, maps = _oracle_problem()
    size = maps.parameters.size
    assert size == 3 * 7 + 7 + 7 * 2 + 2
    random = np.random.default_rng(0)
    gradients = cases.dense_gradients(model, cases.cross_entropy, x, y)
    weights = random.uniform(size=8)
    np.testing.assert_allclose(maps.gradient((x, y), weights), weights @ gradients, rtol=1e-12)
    np.testing.assert_allclose(maps.example_gradients((x, y)), gradients, atol=1e-14)
    np.testing.assert_allclose(maps.squared_norms((x, y)), (gradients**2).sum(1), rtol=1e-12)
    for count in (1, 20):
        directions = random.standard_normal((count, size))
        np.testing.assert_allclose(
            maps.project((x, y), directions), gradients @ directions.T, atol=1e-12
        )
    hessian = 8 * cases.dense_hessian(model, cases.cross_entropy, x, y)
    vector = random.standard_normal(size)
    np.testing.assert_allclose(maps.curvature((x, y), vector), hessian @ vector, atol=1e-12)
    np.testing.assert_allclose(maps.forward_curvature((x, y), vector), hessian @ vector, atol=1e-12)


def test_padding_of_weight_zero_adds_nothing():
    _, x, y, maps = _oracle_problem()
    vector = np.linspace(-1, 1, maps.parameters.size)
    weights = np.float32([1] * 5 + [0] * 3)
    for padded, plain in (
        (maps.curvature((x, y), vector, weights), maps.curvature((x[:5], y[:5]), vector)),
        (maps.gradient((x, y), weights), maps.gradient((x[:5], y[:5]))),
    ):
        np.testing.assert_allclose(padded, plain, atol=1e-13)


def test_a_choice_of_variables_is_a_block_of_the_whole():
    model, x, y, whole = _oracle_problem()
    last = model.layers[-1].trainable_variables
    hessian = 8 * cases.dense_hessian(model, cases.cross_entropy, x, y)
    for chosen in (last, lambda v: any(v is w for w in last)):
        maps = LossMaps(model, variables=chosen)
        assert maps.parameters.size == 16
        vector = np.linspace(-1, 1, 16)
        np.testing.assert_allclose(
            maps.curvature((x, y), vector), hessian[-16:, -16:] @ vector, atol=1e-12
        )
        np.testing.assert_allclose(
            maps.example_gradients((x, y)), whole.example_gradients((x, y))[:, -16:], atol=1e-13
        )


def test_many_examples_pass_in_blocks():
    """A budget of one byte: blocks of one example each."""
    model, x, y, _ = _oracle_problem()
    maps = LossMaps(model, contraction=Contraction(budget=1.0))
    gradients = cases.dense_gradients(model, cases.cross_entropy, x, y)
    np.testing.assert_allclose(maps.squared_norms((x, y)), (gradients**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(maps.example_gradients((x, y)), gradients, atol=1e-14)
    directions = np.eye(44)[:5]
    np.testing.assert_allclose(maps.project((x, y), directions), gradients[:, :5], atol=1e-14)


def _image(*body):
    return [keras.Input((6, 6, 4)), *body, layers.GlobalAveragePooling2D(), layers.Dense(3)]


def _tokens(*body, mask_zero=False):
    return [
        keras.Input((5,), dtype="int32"),
        layers.Embedding(7, 4, mask_zero=mask_zero),
        *body,
        layers.GlobalAveragePooling1D(),
        layers.Dense(3),
    ]


def _recurrent(layer):
    return [
        keras.Input((5,), dtype="int32"),
        layers.Embedding(7, 4, mask_zero=True),
        layer,
        layers.Dense(3),
    ]


class _SelfAttention(layers.Layer):
    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(num_heads=2, key_dim=3)

    def call(self, x):
        return self.attention(x, x)


ARCHITECTURES = {
    "conv2d": lambda: _image(layers.Conv2D(3, 3, activation="tanh")),
    "conv2d_groups": lambda: _image(layers.Conv2D(4, 3, groups=2, activation="tanh")),
    "depthwise_conv2d": lambda: _image(layers.DepthwiseConv2D(3, activation="tanh")),
    "separable_conv2d": lambda: _image(layers.SeparableConv2D(3, 3, activation="tanh")),
    "batch_normalization": lambda: _image(
        layers.Conv2D(3, 3), layers.BatchNormalization(), layers.Activation("tanh")
    ),
    "layer_normalization": lambda: _image(
        layers.Conv2D(3, 3), layers.LayerNormalization(), layers.Activation("tanh")
    ),
    "group_normalization": lambda: _image(
        layers.Conv2D(4, 3), layers.GroupNormalization(2), layers.Activation("tanh")
    ),
    "max_pooling2d": lambda: _image(layers.Conv2D(3, 3, activation="tanh"), layers.MaxPooling2D(2)),
    "gelu": lambda: _image(layers.Conv2D(3, 3, activation="gelu")),
    "dropout": lambda: _image(layers.Conv2D(3, 3, activation="tanh"), layers.Dropout(0.5)),
    "embedding": lambda: _tokens(layers.Activation("tanh")),
    "embedding_masked": lambda: _tokens(layers.Activation("tanh"), mask_zero=True),
    "multi_head_attention": lambda: _tokens(_SelfAttention()),
    "lstm_rolled": lambda: _recurrent(layers.LSTM(3)),
    "lstm_unrolled": lambda: _recurrent(layers.LSTM(3, unroll=True)),
    "gru_rolled": lambda: _recurrent(layers.GRU(3)),
    "gru_unrolled": lambda: _recurrent(layers.GRU(3, unroll=True)),
}


@pytest.fixture
def double_precision():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer(name, double_precision):
    """Curvature against central differences of gradients, and against forward over reverse."""
    model = keras.Sequential(ARCHITECTURES[name]())
    model.compile("sgd", cases.SPARSE)
    random = np.random.default_rng(0)
    for variable in model.variables:  # Statistics too, away from their trivial start.
        if variable.dtype == "float64":
            variable.assign(variable + 0.3 * random.uniform(size=variable.shape))
    if len(model.input_shape) == 2:
        x = random.integers(0, 7, (4, 5)).astype("int32")
        x[:, -1] = 0
        x[:, 0] = 1 + x[:, 0] % 6
    else:
        x = random.standard_normal((4, *model.input_shape[1:]))
    y = random.integers(0, 3, 4)
    maps = LossMaps(model)
    vector = random.standard_normal(maps.parameters.size)
    vector /= np.linalg.norm(vector)
    product = maps.curvature((x, y), vector).numpy()

    # Error of the quotient: step^2 / 6 times the fourth derivative, plus rounding / step.
    step = 1e-4
    values = maps.parameters.values
    tangents = maps.parameters.unflatten(tf.constant(vector))
    moved = []
    for sign in (1, -2):
        for value, tangent in zip(values, tangents, strict=True):
            value.assign_add(sign * step * tangent)
        moved.append(maps.gradient((x, y)).numpy())
    for value, tangent in zip(values, tangents, strict=True):
        value.assign_add(step * tangent)
    quotient = (moved[0] - moved[1]) / (2 * step)
    assert np.abs(product).max() > 1e-3
    np.testing.assert_allclose(product, quotient, atol=1e-5 * np.abs(quotient).max())

    if not name.endswith("_rolled") and name != "conv2d_groups":
        forward = maps.forward_curvature((x, y), vector)
        np.testing.assert_allclose(forward, product, atol=1e-11 * np.abs(product).max())


def test_mixed_precision_sums_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        keras.utils.set_random_seed(1)
        half = cases.mlp((3, 7, 2), dtype=None)
    finally:
        keras.config.set_dtype_policy("float32")
    full = cases.mlp((3, 7, 2), dtype="float32")
    full.set_weights(half.get_weights())
    x, y = cases.vectors(8)
    maps = LossMaps(half)
    directions = np.eye(maps.parameters.size, dtype=np.float32)[:6]
    projected = maps.project((x, y), directions)
    assert projected.dtype == tf.float32
    # bfloat16 keeps 8 bits: relative errors of about 2^-8 a rounding.
    np.testing.assert_allclose(projected, LossMaps(full).project((x, y), directions), atol=2e-2)


def test_several_inputs_and_outputs():
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    hidden = layers.Dense(4, "tanh")(layers.Concatenate()([a, b]))
    model = keras.Model(
        {"a": a, "b": b},
        {"c": layers.Dense(3, name="c")(hidden), "r": layers.Dense(1, name="r")(hidden)},
    )
    model.compile("sgd", {"c": cases.SPARSE, "r": "mse"}, loss_weights={"c": 1.0, "r": 0.5})
    random = np.random.default_rng(0)
    x = {"a": random.standard_normal((4, 3)).astype("f"), "b": np.ones((4, 2), "f")}
    y = {"c": np.array([0, 1, 2, 1]), "r": random.standard_normal((4, 1)).astype("f")}
    outputs = model(x)
    expected = cases.cross_entropy(y["c"], outputs["c"]) + 0.5 * cases.squared_error(
        y["r"], outputs["r"]
    )
    maps = LossMaps(model)
    np.testing.assert_allclose(maps.losses((x, y)), expected, rtol=1e-6)
    # The mean of the per-example losses is what Keras trains on.
    np.testing.assert_allclose(
        tf.reduce_mean(expected), model.evaluate(x, y, verbose=0, return_dict=True)["loss"], 1e-6
    )
    directions = np.random.default_rng(1).standard_normal((5, maps.parameters.size)).astype("f")
    np.testing.assert_allclose(
        maps.project((x, y), directions),
        maps.example_gradients((x, y)).numpy() @ directions.T,
        atol=1e-5,
    )
