import keras
import numpy as np
import pytest
from keras import layers

from keras_influence import data
from keras_influence.trainers.recipe import Recipe, make
from keras_influence.trainers.stacked import Stack, obstacle

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def images(num=20):
    random = np.random.default_rng(0)
    return random.random((num, 6, 6, 2)).astype(np.float32), random.integers(0, 3, num)


def dense_model(optimizer, **options):
    def make_model():
        model = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.Flatten(),
                layers.Dense(7, "relu", **options),
                layers.Dropout(0),
                layers.Dense(3),
            ]
        )
        model.compile(optimizer(), LOSS)
        return model

    return make_model


def branching_cnn():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="tanh")(inputs)
    x = layers.Add()([x, layers.Conv2D(4, 2, strides=2, use_bias=False)(inputs)])
    x = layers.MaxPooling2D(2, padding="same")(x)
    x = layers.Dense(5, "softplus")(x)  # On every position.
    outputs = layers.Dense(3)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    return model


@pytest.mark.parametrize(
    "make_model",
    [
        dense_model(lambda: keras.optimizers.SGD(0.1)),
        dense_model(lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=1e-2)),
        dense_model(
            lambda: keras.optimizers.SGD(
                keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), 0.9, nesterov=True
            )
        ),
        dense_model(
            lambda: keras.optimizers.Adam(0.01), kernel_regularizer=keras.regularizers.L2(0.1)
        ),
        dense_model(lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1)),
        branching_cnn,
    ],
)
def test_a_stack_ends_where_each_run_by_itself_does(make_model):
    x, y = images()
    weights = np.linspace(0.5, 2, len(y), dtype=np.float32)
    recipe = Recipe({"epochs": 2, "batch_size": 4}, None)
    # 10 examples each: two whole batches and half a one.
    subsets, seeds = [np.arange(10), np.arange(5, 15), np.arange(0, 20, 2)], [3, 4, 5]
    models = [make(make_model, seed) for seed in seeds]
    assert obstacle(models[0], recipe) is None
    stack = Stack(models[0], [model.get_weights() for model in models])
    stack.train((x, y, weights), subsets, seeds, recipe)
    for replica, (model, rows, seed) in enumerate(zip(models, subsets, seeds, strict=True)):
        before = model.get_weights()
        recipe.train(model, data.Examples((x[rows], y[rows], weights[rows]), rows), seed)
        for start, alone, stacked in zip(
            before, model.get_weights(), stack.weights(replica), strict=True
        ):
            assert np.abs(alone - start).max() > 1e-3
            np.testing.assert_allclose(stacked, alone, atol=1e-5)


def test_subsets_smaller_than_a_batch():
    x, y = images()
    model = make(dense_model(lambda: keras.optimizers.SGD(0.1)), 3)
    recipe = Recipe({"epochs": 1, "batch_size": 16}, None)
    stack = Stack(model, [model.get_weights()] * 2)
    stack.train((x, y), [np.arange(5), np.arange(5)], [1, 2], recipe)
    recipe.train(model, data.Examples((x[:5], y[:5]), np.arange(5)), 1)
    for replica in range(2):
        for alone, stacked in zip(model.get_weights(), stack.weights(replica), strict=True):
            np.testing.assert_allclose(stacked, alone, atol=1e-5)


def compiled(*more, optimizer="sgd", loss=LOSS):
    model = keras.Sequential([keras.Input((6, 6, 2)), *more, layers.Flatten(), layers.Dense(3)])
    model.compile(optimizer, loss)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: compiled(layers.Dropout(0.5)), "drops at random"),
        (lambda: compiled(layers.BatchNormalization()), "is a BatchNormalization"),
        (lambda: compiled(layers.Conv2D(2, 3, groups=2)), "has groups"),
        (lambda: compiled(layers.Dense(2, dtype="mixed_float16")), "mixed precision"),
        (lambda: compiled(layers.Dense(2, kernel_constraint="max_norm")), "constrains"),
        (
            lambda: compiled(layers.Dense(2, kernel_regularizer="orthogonal_regularizer")),
            "regulariser",
        ),
        (lambda: compiled(optimizer="adafactor"), "Adafactor"),
        (lambda: compiled(optimizer=keras.optimizers.SGD(clipnorm=1.0)), "clipnorm"),
        (
            lambda: compiled(optimizer=keras.optimizers.SGD(gradient_accumulation_steps=2)),
            "accumulates",
        ),
        (lambda: compiled(loss=lambda y, outputs: outputs[:, 0]), "no Keras loss"),
        (
            lambda: compiled(
                loss=keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight")
            ),
            "mean_with_sample_weight",
        ),
    ],
)
def test_what_cannot_be_stacked_is_told(model, reason):
    assert reason in obstacle(model(), Recipe({"epochs": 1}, None))
