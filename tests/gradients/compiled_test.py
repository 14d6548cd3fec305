"""The maps as one program each that XLA compiles whole, as on a TPU, here for a CPU."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence.gradients import Contraction, LossMaps, blocks, maps
from tests import cases

layers = keras.layers


def _images():
    model = keras.Sequential(
        [
            keras.Input((10, 10, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(5, activation="tanh"),
            layers.Dense(3),
        ]
    )
    return model, cases.images(7, 10)


def _tokens():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True))
    outputs = layers.Dense(11)(layers.Dense(16, activation="relu")(x))
    random = np.random.default_rng(0)
    return keras.Model(tokens, outputs), tuple(random.integers(0, 11, (2, 7, 6)).astype(np.int32))


# A budget that holds all 7 examples, and one for which none of the factors' blocks divide them.
@pytest.mark.parametrize("budget", [32 * 2**20, 5_000.0])
@pytest.mark.parametrize("problem", cases.but_slow([_images, _tokens], _tokens))
def test_compiled_whole_the_maps_give_the_same_numbers(problem, budget):
    model, batch = problem()
    batch = tf.nest.map_structure(tf.constant, batch)
    plain = LossMaps(model, cases.SPARSE, contraction=Contraction(budget=budget))
    random = np.random.default_rng(0)
    directions = random.standard_normal((3, plain.parameters.size)).astype(np.float32)
    weights = tf.constant([1.0] * 5 + [0.0] * 2)
    for function, arguments in (
        (plain.curvature, (tf.constant(directions[0]), weights)),
        (plain.project, (tf.constant(directions),)),
        (plain.squared_norms, ()),
    ):
        compiled = tf.function(function, autograph=False, jit_compile=True)
        found, expected = compiled(batch, *arguments), function(batch, *arguments)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


def test_xla_compiles_what_lives_on_a_tpu_and_nothing_else():
    places = ("CPU:0", "GPU:1", "TPU:3")
    values = [types.SimpleNamespace(device=f"/job:w/replica:0/task:0/device:{p}") for p in places]
    assert [maps.on_tpu([value]) for value in values] == [False, False, True]
    assert maps.on_tpu(values)
    model, _ = _images()
    assert not maps.on_tpu([variable.value for variable in model.variables])


@pytest.mark.parametrize(
    ("options", "traced"),
    [
        # 4 examples at once: two blocks of 4 in a loop, and one of the 2 that are left.
        ({}, [4, 2]),
        ({"jit_compile": True}, [4, 2]),
        # The last block's size is known when it runs.
        ({"input_signature": [tf.TensorSpec([None, 2]), tf.TensorSpec([None, 3])]}, [None]),
    ],
)
def test_blocks_are_of_one_size_but_for_what_is_left(options, traced):
    seen = []

    def function(x, y):
        seen.append(x.shape[0])
        return tf.reduce_sum(x, axis=1, keepdims=True) * y

    @tf.function(autograph=False, **options)
    def over(x, y):
        return blocks.over_examples(function, [x, y], bytes_each=8.0, budget=35.0)

    x, y = np.float32(range(20)).reshape(10, 2), np.float32(range(30)).reshape(10, 3)
    np.testing.assert_array_equal(over(x, y), x.sum(1, keepdims=True) * y)
    assert seen == traced
