"""Every rule against whole-network forward mode and tapes of single examples."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence.gradients import Contraction, LossMaps, Outer
from tests import cases

layers = keras.layers


class _Branch(layers.Layer):
    """Uses its layer twice, and multiplies the results."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x) * tf.sigmoid(self.layer(x[..., ::-1]))


class _Tied(layers.Layer):
    """Looks tokens up, and multiplies with the table's transpose, as language models do."""

    def __init__(self, size, width):
        super().__init__()
        self.table = layers.ReversibleEmbedding(size, width, logit_soft_cap=2.0)
        self.mix = layers.Dense(width, "tanh")

    def call(self, tokens):
        return self.table(self.mix(self.table(tokens)), reverse=True)


class _Attention(layers.Layer):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def call(self, x):
        return self.attention(x, x)


class _Positions(layers.Layer):
    """Adds a table of positions that has no batch axis."""

    def __init__(self, length, width):
        super().__init__()
        self.table = layers.Embedding(length, width)
        self.length = length

    def call(self, x):
        return x + self.table(tf.range(self.length))


class _Custom(layers.Layer):
    """Two weights that no rule knows, in a product that is not elementwise."""

    def build(self, input_shape):
        self.matrix = self.add_weight(shape=(input_shape[-1], input_shape[-1]), name="matrix")
        self.gain = self.add_weight(shape=(), name="gain")

    def call(self, x):
        return tf.tanh(tf.tensordot(x, self.matrix, 1) * self.gain) + self.gain


class _Conditional(layers.Layer):
    """A layer inside a branch that is chosen at run time."""

    def __init__(self, positive):
        super().__init__()
        self.inner = layers.Dense(4)
        self.positive = positive

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, x):
        sign = 1.0 if self.positive else -1.0
        return tf.cond(sign * tf.reduce_sum(x * x) > 0, lambda: self.inner(x), lambda: 2.0 * x)


class _Leaky(layers.Layer):
    """Leaves something of its weights behind, where the next layer finds it."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(4)
        self.kept = []

    def call(self, x):
        result = self.inner(x)
        self.kept[:] = [tf.reduce_sum(self.inner.kernel * self.inner.kernel)]
        return result


class _Finder(layers.Layer):
    def __init__(self, source):
        super().__init__()
        self.source = [source]

    def call(self, x):
        return x * self.source[0].kept[0]


def _leaky():
    leaky = _Leaky()
    return [keras.Input((4,)), leaky, _Finder(leaky), layers.Dense(3)]


def _image(*body, channels=4, size=6):
    return [
        keras.Input((size, size, channels)),
        *body,
        layers.Flatten(),
        layers.Dense(3),
    ]


def _sequence(*body, length=6, width=4):
    return [keras.Input((length, width)), *body, layers.Flatten(), layers.Dense(3)]


def _volume(*body):
    return [keras.Input((4, 4, 4, 2)), *body, layers.Flatten(), layers.Dense(3)]


def _tokens(*body, mask_zero=False):
    return [
        keras.Input((5,), dtype="int32"),
        layers.Embedding(7, 4, mask_zero=mask_zero),
        *body,
    ]


def _ends():
    return [layers.Flatten(), layers.Dense(3)]


def _lora(layer, width=4, shape=(6, 6)):
    layer.build((None, *shape, width))
    layer.enable_lora(2)
    return layer


FIRST, WHOLE = "conv", "forward mode, whole network"
ALONE = "forward mode, this layer"

# Name: (layers, the rules that serve beside "dense").
CASES = {
    "dense": (lambda: [keras.Input((4,)), layers.Dense(5, "gelu"), layers.Dense(3)], set()),
    "dense_positions": (lambda: _sequence(layers.Dense(5, "tanh")), set()),
    "dense_no_bias": (lambda: _sequence(layers.Dense(5, "relu", use_bias=False)), set()),
    "dense_layer_as_activation": (
        lambda: _sequence(layers.Dense(5, activation=layers.PReLU())),
        {"prelu"},
    ),
    "dense_lora": (lambda: _image(_lora(layers.Dense(5, "tanh"))), set()),
    "einsum_dense": (
        lambda: _sequence(layers.EinsumDense("abc,cde->abde", (6, 2, 3), bias_axes="de")),
        {"einsum dense"},
    ),
    "einsum_contracts_two": (
        lambda: _sequence(
            layers.EinsumDense("abc,cde->abde", (6, 2, 3), bias_axes="d"),
            layers.EinsumDense("abde,deo->abo", (6, 4), bias_axes="o", activation="tanh"),
        ),
        {"einsum dense"},
    ),
    "einsum_groups": (
        lambda: _sequence(layers.EinsumDense("abc,bcd->abd", (6, 3), bias_axes="bd")),
        {"einsum dense"},
    ),
    "einsum_ellipsis": (
        lambda: _image(layers.EinsumDense("...x,xy->...y", 3, bias_axes="y")),
        {"einsum dense"},
    ),
    "einsum_lora": (
        lambda: _sequence(
            _lora(layers.EinsumDense("abc,cd->abd", (6, 3), bias_axes="d"), shape=(6,))
        ),
        {"einsum dense"},
    ),
    "conv2d": (lambda: _image(layers.Conv2D(3, 3, activation="tanh")), {"conv"}),
    "conv2d_strides": (
        lambda: _image(layers.Conv2D(3, (3, 2), strides=(2, 3), padding="same")),
        {"conv"},
    ),
    "conv2d_dilation": (
        lambda: _image(layers.Conv2D(3, 2, dilation_rate=2, padding="same", use_bias=False)),
        {"conv"},
    ),
    "conv2d_groups": (lambda: _image(layers.Conv2D(6, 3, groups=2, activation="elu")), {"conv"}),
    "conv2d_pointwise": (lambda: _image(layers.Conv2D(3, 1, strides=2)), {"conv"}),
    "conv2d_lora": (lambda: _image(_lora(layers.Conv2D(3, 3))), {"conv"}),
    "conv1d_causal": (
        lambda: _sequence(layers.Conv1D(3, 3, padding="causal", dilation_rate=2)),
        {"conv"},
    ),
    "conv3d": (lambda: _volume(layers.Conv3D(3, 2, padding="same", strides=2)), {"conv"}),
    "conv1d_transpose": (
        lambda: _sequence(layers.Conv1DTranspose(3, 3, strides=2, padding="same")),
        {"conv transpose"},
    ),
    "conv2d_transpose": (
        lambda: _image(layers.Conv2DTranspose(3, 3, strides=2, activation="tanh")),
        {"conv transpose"},
    ),
    "conv2d_transpose_output_padding": (
        lambda: _image(layers.Conv2DTranspose(2, 3, strides=2, padding="same", output_padding=1)),
        {"conv transpose"},
    ),
    "conv3d_transpose": (
        lambda: _volume(layers.Conv3DTranspose(2, 2, strides=2)),
        {"conv transpose"},
    ),
    "depthwise_conv2d": (
        lambda: _image(layers.DepthwiseConv2D(3, depth_multiplier=2, activation="tanh")),
        {"depthwise conv"},
    ),
    "depthwise_conv2d_strides": (
        lambda: _image(layers.DepthwiseConv2D(3, strides=2, padding="same")),
        {"depthwise conv"},
    ),
    "depthwise_conv1d": (lambda: _sequence(layers.DepthwiseConv1D(3)), {"depthwise conv"}),
    "separable_conv2d": (
        lambda: _image(layers.SeparableConv2D(3, 3, depth_multiplier=2, activation="tanh")),
        {"separable conv"},
    ),
    "separable_conv1d": (
        lambda: _sequence(layers.SeparableConv1D(3, 3, strides=2, padding="same")),
        {"separable conv"},
    ),
    "embedding": (lambda: [*_tokens(layers.Activation("tanh")), *_ends()], {"embedding"}),
    "embedding_masked": (
        lambda: [
            *_tokens(layers.Activation("tanh"), mask_zero=True),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ],
        {"embedding"},
    ),
    "embedding_lora": (
        lambda: [
            keras.Input((5,), dtype="int32"),
            _lora(layers.Embedding(7, 4), width=5, shape=()),
            layers.Activation("tanh"),
            *_ends(),
        ],
        {"embedding"},
    ),
    "tied_embedding": (
        lambda: [keras.Input((5,), dtype="int32"), _Tied(7, 4), *_ends()],
        {"reversible embedding"},
    ),
    "positions_without_batch": (
        lambda: [*_tokens(_Positions(5, 4), layers.Activation("tanh")), *_ends()],
        {"embedding"},
    ),
    "batch_normalization": (
        lambda: _image(layers.Conv2D(3, 3), layers.BatchNormalization(), layers.ReLU()),
        {"conv", "batch normalization"},
    ),
    "layer_normalization": (
        lambda: _image(layers.LayerNormalization(), layers.Activation("tanh")),
        {"layer normalization"},
    ),
    "layer_normalization_two_axes": (
        lambda: _image(layers.LayerNormalization(axis=(1, 3)), layers.Activation("tanh")),
        {"layer normalization"},
    ),
    "rms_normalization": (
        lambda: _sequence(layers.RMSNormalization(), layers.Activation("tanh")),
        {"rms normalization"},
    ),
    "group_normalization": (
        lambda: _image(layers.GroupNormalization(2), layers.Activation("tanh")),
        {"group normalization"},
    ),
    "prelu": (lambda: _image(layers.PReLU()), {"prelu"}),
    "prelu_shared": (lambda: _image(layers.PReLU(shared_axes=[1, 2])), {"prelu"}),
    "multi_head_attention": (
        lambda: [*_tokens(_Attention(layers.MultiHeadAttention(2, 3))), *_ends()],
        {"embedding", "einsum dense"},
    ),
    "group_query_attention": (
        lambda: [*_tokens(_Attention(layers.GroupQueryAttention(3, 4, 2))), *_ends()],
        {"embedding", "einsum dense"},
    ),
    "lstm": (
        lambda: [*_tokens(layers.LSTM(3), mask_zero=True), layers.Dense(3)],
        {"embedding", "recurrent"},
    ),
    "lstm_unrolled_backwards": (
        lambda: [
            *_tokens(layers.LSTM(3, unroll=True, go_backwards=True, return_sequences=True)),
            *_ends(),
        ],
        {"embedding", "recurrent"},
    ),
    "gru": (
        lambda: [
            *_tokens(
                layers.GRU(3, return_sequences=True, zero_output_for_mask=True), mask_zero=True
            ),
            layers.Lambda(lambda x: tf.reshape(x, [-1, 15])),
            layers.Dense(3),
        ],
        {"embedding", "recurrent"},
    ),
    "gru_reset_before": (
        lambda: [*_tokens(layers.GRU(3, reset_after=False)), layers.Dense(3)],
        {"embedding", "recurrent"},
    ),
    "simple_rnn": (
        lambda: [*_tokens(layers.SimpleRNN(3, use_bias=False)), layers.Dense(3)],
        {"embedding", "recurrent"},
    ),
    "bidirectional": (
        lambda: [
            *_tokens(layers.Bidirectional(layers.LSTM(3)), mask_zero=True),
            layers.Dense(3),
        ],
        {"embedding", "recurrent"},
    ),
    "rnn_of_a_cell": (
        lambda: [*_tokens(layers.RNN(layers.GRUCell(3))), layers.Dense(3)],
        {"embedding", ALONE},
    ),
    "time_distributed": (
        lambda: _sequence(layers.TimeDistributed(layers.Dense(3, "tanh"))),
        set(),
    ),
    "time_distributed_conv": (
        lambda: [
            keras.Input((2, 5, 5, 2)),
            layers.TimeDistributed(layers.Conv2D(2, 3)),
            *_ends(),
        ],
        {"conv"},
    ),
    "used_twice": (lambda: [keras.Input((4,)), _Branch(layers.Dense(4)), layers.Dense(3)], set()),
    "convolution_used_twice": (
        lambda: _image(_Branch(layers.Conv2D(3, 3))),
        {"conv"},
    ),
    "custom": (lambda: _sequence(_Custom()), {ALONE}),
    "branch_taken": (
        lambda: [keras.Input((4,)), _Conditional(True), layers.Dense(3)],
        {ALONE},
    ),
    "branch_not_taken": (
        lambda: [keras.Input((4,)), _Conditional(False), layers.Dense(3)],
        {ALONE},
    ),
    "leaves_something_behind": (_leaky, {WHOLE, "dense"}),
    "spectral_normalization": (
        lambda: [keras.Input((4,)), layers.SpectralNormalization(layers.Dense(4)), layers.Dense(3)],
        set(),
    ),
}
# Those that try every order of contraction.
ORDERS = (
    "dense_positions",
    "einsum_groups",
    "conv2d",
    "conv2d_groups",
    "convolution_used_twice",
    "embedding",
    "tied_embedding",
    "lstm",
)


def problem(build, dtype, num=4):
    keras.config.set_floatx(dtype)
    try:
        keras.utils.set_random_seed(0)
        model = keras.Sequential(build())
        model.compile("sgd", cases.SPARSE)
        if model.inputs[0].dtype != "int32":
            model(np.ones((1, *model.input_shape[1:]), dtype))  # Builds an activation's weights.
    finally:
        keras.config.set_floatx("float32")
    random = np.random.default_rng(0)
    for variable in model.variables:  # Statistics too, away from their trivial start.
        if variable.dtype == dtype:
            variable.assign(variable + 0.3 * random.uniform(size=variable.shape).astype(dtype))
    if model.inputs[0].dtype == "int32":
        x = random.integers(0, 7, (num, *model.input_shape[1:])).astype("int32")
        x[:, -1] = 0
        x[:, 0] = 1 + x[:, 0] % 6
    else:
        x = random.standard_normal((num, *model.input_shape[1:])).astype(dtype)
    return model, (x, random.integers(0, 3, num))


@pytest.mark.parametrize(
    "name", cases.but_slow(CASES, "bidirectional", "rnn_of_a_cell", "gru_reset_before")
)
def test_layer(name):
    build, rules = CASES[name]
    model, batch = problem(build, "float64")
    maps = LossMaps(model)
    # LoRA weights are float32 in models of any dtype.
    tolerance = 1e-11 if maps.parameters.dtype == tf.float64 else 1e-5
    gradients = cases.dense_gradients(model, cases.cross_entropy, *batch)
    directions = np.random.default_rng(1).standard_normal((5, maps.parameters.size))
    projected = gradients @ directions.T
    close = functools.partial(_assert_close, tolerance=tolerance)
    close(maps.project(batch, directions[:2]), projected[:, :2])
    close(maps.project(batch, maps.prepare(directions, batch)), projected)
    coverage = maps.coverage(batch)
    if coverage.plain:
        close(maps.forward_project(batch, directions[:1]), projected[:, :1])
    close(maps.example_gradients(batch), gradients)
    close(maps.squared_norms(batch), (gradients**2).sum(1))
    # Products with the examples of another batch.
    others = maps.gradient_directions(tf.nest.map_structure(lambda a: a[1:], batch))
    close(maps.project(batch, others), gradients @ gradients[1:].T)
    assert set(coverage.shares()) - {"dense"} == rules - {"dense"}


@pytest.mark.parametrize("order", ("gradient", "left", "right", "factors"))
@pytest.mark.parametrize("name", cases.but_slow(ORDERS, "lstm"))
def test_order_of_contraction(name, order):
    model, batch = problem(CASES[name][0], "float64")
    maps = LossMaps(model, contraction=Contraction(order=order, budget=1000.0))
    gradients = cases.dense_gradients(model, cases.cross_entropy, *batch)
    directions = np.random.default_rng(1).standard_normal((5, maps.parameters.size))
    close = functools.partial(_assert_close, tolerance=1e-11)
    close(maps.project(batch, directions), gradients @ directions.T)
    close(maps.squared_norms(batch), (gradients**2).sum(1))
    others = maps.gradient_directions(tf.nest.map_structure(lambda a: a[1:], batch))
    close(maps.project(batch, others), gradients @ gradients[1:].T)


def _assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_layer_in_float32(name):
    model, batch = problem(CASES[name][0], "float32")
    maps = LossMaps(model)
    gradients = cases.dense_gradients(model, cases.cross_entropy, *batch)
    directions = np.random.default_rng(1).standard_normal((4, maps.parameters.size))
    directions = directions.astype("float32")
    expected = gradients @ directions.T.astype("float64")
    _assert_close(maps.project(batch, directions), expected, 1e-5)


def test_a_large_kernel_passes_some_rows_at_a_time(monkeypatch):
    # B = 4 examples, T = 2 positions, a kernel of 5 x 64: two copies of the left side are 80
    # numbers, of the gradients 2,560. In 1,200 numbers two rows of five fit.
    model, batch = problem(
        lambda: _sequence(layers.Dense(64, "tanh"), length=2, width=5), "float64"
    )
    taken = []
    by_rows = Outer._project_by_rows
    monkeypatch.setattr(
        Outer,
        "_project_by_rows",
        lambda self, directions, rows, how: (
            taken.append((self.shape, rows)) or by_rows(self, directions, rows, how)
        ),
    )
    maps = LossMaps(model, contraction=Contraction(order="gradient", budget=8 * 1200.0))
    gradients = cases.dense_gradients(model, cases.cross_entropy, *batch)
    directions = np.random.default_rng(1).standard_normal((5, maps.parameters.size))
    _assert_close(maps.project(batch, directions), gradients @ directions.T, tolerance=1e-11)
    # And of the 128 x 3 that follow, 1,200 / (2 * 4 * 3) rows.
    assert taken == [((5, 64), 2), ((128, 3), 50)]
