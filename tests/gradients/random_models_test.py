"""Random small models: projections and norms against tapes of single examples.

The rules' own tests take layers one by one; here they meet each other, used once or twice, in
branches and in sequence, with sizes that nobody chose. In float64 and without kinks, so that
nothing but a wrong gradient can exceed the tolerance.
"""

from random import Random

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from keras_influence.gradients import LossMaps
from tests import cases

layers = keras.layers

CLASSES, VOCABULARY = 3, 7
_ACTIVATIONS = (None, "tanh", "gelu", "softplus", "elu", "sigmoid", "silu")


def _coin(random):
    return random.random() < 0.5


def _common(random):
    return {"activation": random.choice(_ACTIVATIONS), "use_bias": _coin(random)}


def _dense(random, x):
    return layers.Dense(random.randint(2, 5), **_common(random))(x)


def _einsum_dense(random, x):
    units, activation = random.randint(2, 4), random.choice(_ACTIVATIONS)
    if len(x.shape) != 3 or x.shape.count(None) != 1:
        bias = random.choice([None, "y"])
        # Keras 3.15 mistakes the order of several axes that an ellipsis stands for, and the layers
        # that follow are built for another shape than they get.
        swapped = len(x.shape) == 4 and x.shape[1] != x.shape[2]
        equation, shape = (
            ("abcx,xy->abcy", (*x.shape[1:-1], units)) if swapped else ("...x,xy->...y", units)
        )
        return layers.EinsumDense(equation, shape, activation, bias_axes=bias)(x)
    _, length, _ = x.shape
    equation, shape, biases = random.choice(
        [
            ("abc,cd->abd", (length, units), (None, "d", "bd")),
            ("abc,bcd->abd", (length, units), (None, "b", "bd")),
            ("abc,bcde->ade", (2, units), (None, "e", "de")),
            ("abc,bd->adc", (units, x.shape[-1]), (None, "d", "dc")),
        ]
    )
    layer = layers.EinsumDense(equation, shape, activation, bias_axes=random.choice(biases))
    return layer(x)


def _spacing(random, smallest, paddings):
    """Kernel size, padding, and strides or dilation, of which only one may exceed one."""
    kernel = random.randint(1, min(3, smallest))
    spacing = {"kernel_size": kernel, "padding": random.choice(paddings)}
    reach = kernel
    if kernel > 1 and _coin(random):
        spacing["dilation_rate"] = 2
        reach = 2 * kernel - 1
    else:
        spacing["strides"] = random.randint(1, 3)
    if reach > smallest and spacing["padding"] == "valid":
        spacing["padding"] = "same"
    return spacing


def _smallest(x):
    return min(x.shape[1:-1])


def _conv(random, x):
    cls = layers.Conv1D if len(x.shape) == 3 else layers.Conv2D
    paddings = ["valid", "same", "causal"] if cls is layers.Conv1D else ["valid", "same"]
    channels = x.shape[-1]
    groups = random.choice([g for g in (1, 2, 3) if channels % g == 0])
    filters = groups * random.randint(1, 2) if groups > 1 else random.randint(2, 4)
    return cls(
        filters, groups=groups, **_spacing(random, _smallest(x), paddings), **_common(random)
    )(x)


def _depthwise_conv(random, x):
    cls = layers.DepthwiseConv1D if len(x.shape) == 3 else layers.DepthwiseConv2D
    spacing = _spacing(random, _smallest(x), ["valid", "same"])
    return cls(depth_multiplier=random.randint(1, 2), **spacing, **_common(random))(x)


def _separable_conv(random, x):
    cls = layers.SeparableConv1D if len(x.shape) == 3 else layers.SeparableConv2D
    spacing = _spacing(random, _smallest(x), ["valid", "same"])
    multiplier = random.randint(1, 2)
    return cls(random.randint(2, 4), depth_multiplier=multiplier, **spacing, **_common(random))(x)


def _conv_transpose(random, x):
    cls = layers.Conv1DTranspose if len(x.shape) == 3 else layers.Conv2DTranspose
    layer = cls(
        random.randint(2, 3),
        random.randint(1, 3),
        strides=random.randint(1, 2),
        padding=random.choice(["valid", "same"]),
        **_common(random),
    )
    return layer(x)


def _normalization(random, x):
    axes = [-1] if len(x.shape) == 2 else [-1, (1, len(x.shape) - 1)]
    kinds = [
        lambda: layers.BatchNormalization(scale=_coin(random)),
        lambda: layers.LayerNormalization(axis=random.choice(axes), center=_coin(random)),
        layers.RMSNormalization,
        lambda: layers.GroupNormalization(1),
        lambda: layers.GroupNormalization(x.shape[-1] // 2 if x.shape[-1] % 2 == 0 else 1),
    ]
    return random.choice(kinds)()(x)


def _prelu(random, x):
    spatial = list(range(1, len(x.shape) - 1))
    return layers.PReLU(shared_axes=random.choice([None, spatial or None]))(x)


def _activation(random, x):
    return layers.Activation(random.choice(_ACTIVATIONS))(x)


def _attention(random, x):
    heads, width = random.randint(1, 2), random.randint(2, 3)
    layer = random.choice(
        [
            lambda: layers.MultiHeadAttention(heads, width, use_bias=_coin(random)),
            lambda: layers.GroupQueryAttention(width, 2 * heads, heads),
        ]
    )()
    return layer(x, x, use_causal_mask=_coin(random))


def _recurrent(random, x, return_sequences=None):
    cls = random.choice([layers.LSTM, layers.GRU, layers.SimpleRNN])
    if return_sequences is None:
        return_sequences = _coin(random)
    options = {"reset_after": _coin(random)} if cls is layers.GRU else {}
    layer = cls(
        random.randint(2, 3),
        use_bias=_coin(random),
        return_sequences=return_sequences,
        unroll=_coin(random),
        **options,
    )
    way = random.choice(["forwards", "backwards", "both ways", "with states"])
    if way == "both ways":
        return layers.Bidirectional(layer)(x)
    layer.go_backwards = way == "backwards"
    layer.return_state = way == "with states"
    if not layer.return_state:
        return layer(x)
    output, *states = layer(x)
    if return_sequences:
        states = [layers.RepeatVector(output.shape[1])(state) for state in states]
    return layers.Concatenate()([output, *states])


def _pooling(random, x):
    rank, padding = len(x.shape) - 2, random.choice(["valid", "same"])
    kinds = {
        1: [layers.AveragePooling1D, layers.MaxPooling1D],
        2: [layers.AveragePooling2D, layers.MaxPooling2D],
    }
    return random.choice(kinds[rank])(min(2, _smallest(x)), padding=padding)(x)


def _used_twice(random, x):
    """One layer called on its own output, or on two inputs whose results are multiplied."""
    width, common = x.shape[-1], _common(random)
    choices = [lambda: layers.Dense(width, **common)]
    if len(x.shape) == 3:
        choices.append(lambda: layers.Conv1D(width, 2, padding="same", **common))
        choices.append(lambda: layers.LayerNormalization())
    if len(x.shape) == 4:
        choices.append(lambda: layers.Conv2D(width, 2, padding="same", **common))
        choices.append(lambda: layers.DepthwiseConv2D(2, padding="same", **common))
    layer = random.choice(choices)()
    if _coin(random):
        return layer(layers.Activation("tanh")(layer(x)))
    return layers.Multiply()([layer(x), layers.Activation("sigmoid")(layer(-x))])


def _branch(random, x):
    """A block beside its input, added, multiplied or concatenated."""
    y = random.choice(_BLOCKS[len(x.shape)])(random, x)
    merge = random.choice([layers.Add, layers.Multiply, layers.Concatenate])
    if y.shape[1:-1] != x.shape[1:-1] or len(y.shape) != len(x.shape):
        y = layers.Dense(x.shape[-1], "tanh")(x)
    if merge is not layers.Concatenate and y.shape != x.shape:
        y = layers.Dense(x.shape[-1])(y)
    return merge()([x, y])


def _to_sequence(random, x):
    return layers.Reshape((-1, x.shape[-1]))(x)


_ANYWHERE = [_dense, _einsum_dense, _normalization, _prelu, _activation, _used_twice]
_SPATIAL = [_conv, _depthwise_conv, _separable_conv, _conv_transpose, _pooling]
# What a tensor of each rank may go through, without and with the branches that hold such a block.
_BLOCKS = {
    2: _ANYWHERE,
    3: [*_ANYWHERE, *_SPATIAL, _attention, _recurrent],
    4: [*_ANYWHERE, *_SPATIAL],
}
_STEPS = {
    2: [*_BLOCKS[2], _branch],
    3: [*_BLOCKS[3], _branch],
    4: [*_BLOCKS[4], _branch, _to_sequence],
}


# Axes between the examples and the channels; tokens have no channels.
KINDS = {"vector": 0, "sequence": 1, "image": 2, "tokens": 1}


def problem(seed, kind):
    """A model with weights away from their initial values, and a batch."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(seed % 2**32)
    random = Random(seed)
    width = random.randint(2, 4)
    axes = [random.randint(2, 5) for _ in range(KINDS[kind])]
    if kind == "tokens":
        inputs = keras.Input(axes, dtype="int32")
        masked = _coin(random)
        x = layers.Embedding(VOCABULARY, width, mask_zero=masked)(inputs)
        if masked:  # Most layers do not hand masks on: they end here.
            x = _recurrent(random, x, False) if _coin(random) else _pooled(x)
    else:
        inputs = x = keras.Input((*axes, width))
    for _ in range(random.randint(1, 4)):
        x = random.choice(_STEPS[len(x.shape)])(random, x)
    if len(x.shape) > 2:
        x = _pooled(x) if _coin(random) else layers.Flatten()(x)
    model = keras.Model(inputs, layers.Dense(CLASSES)(x))
    model.compile("sgd", cases.SPARSE)
    numbers = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.dtype == "float64":  # Not the state of a generator of random numbers.
            variable.assign(variable + 0.3 * numbers.uniform(size=variable.shape))
    shape = (random.randint(1, 5), *inputs.shape[1:])
    if kind == "tokens":
        values = numbers.integers(0, VOCABULARY, shape).astype("int32")
        values[:, 0] = 1  # No example is all mask, which has no mean.
    else:
        values = numbers.standard_normal(shape)
    return model, (values, numbers.integers(0, CLASSES, shape[0]))


def _pooled(x):
    cls = layers.GlobalAveragePooling1D if len(x.shape) == 3 else layers.GlobalAveragePooling2D
    return cls()(x)


def check(model, batch):
    """Projections and norms equal those of one tape an example."""
    maps = LossMaps(model)
    gradients = cases.dense_gradients(model, cases.cross_entropy, *batch)
    directions = np.random.default_rng(1).standard_normal((3, maps.parameters.size))
    _assert_close(maps.project(batch, directions), gradients @ directions.T, 1e-11)
    _assert_close(maps.squared_norms(batch), (gradients**2).sum(1), 1e-10)
    assert maps.coverage(batch).reason is None
    assert not maps.coverage(batch).network


def _assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.fixture(autouse=True, scope="module")
def _float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def _check_drawn(kind, num):
    # Without shrinking, which would build hundreds of models of a second or two each: what failed
    # is printed as it is.
    @settings(
        max_examples=num,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.integers(0, 2**64 - 1))
    def draw_and_check(seed):
        model, batch = problem(seed, kind)
        note(model.to_json())
        check(model, batch)

    draw_and_check()


def test_outputs_of_one_call_that_are_made_of_each_other():
    # Unrolled, the last output is the state, and all outputs come of earlier states. The layer
    # before makes the tape record what happens inside the call.
    inputs = keras.Input((3, 2))
    x = layers.Dense(2, "tanh")(inputs)
    recurrent = layers.LSTM(2, return_sequences=True, return_state=True, unroll=True)
    parts = [layers.Flatten()(part) for part in recurrent(x)]
    model = keras.Model(inputs, layers.Dense(CLASSES)(layers.Concatenate()(parts)))
    model.compile("sgd", cases.SPARSE)
    random = np.random.default_rng(0)
    check(model, (random.standard_normal((4, 3, 2)), random.integers(0, CLASSES, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_random_models(kind):
    _check_drawn(kind, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_random_models(kind):
    _check_drawn(kind, 50)
