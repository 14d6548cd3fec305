"""Small models and data, with their dense Hessians, that the tests share."""

import keras
import numpy as np
import pytest
import tensorflow as tf

SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def but_slow(names, *slow):
    """Parameters of a test, of which some take longer than a few seconds."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def images(num=24, size=6, classes=3, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((num, size, size, 1)).astype(np.float32)
    return x, random.integers(0, classes, num)


def vectors(num=32, width=3, classes=2, seed=0, dtype="float32"):
    random = np.random.default_rng(seed)
    return random.standard_normal((num, width)).astype(dtype), random.integers(0, classes, num)


def image_model(size=6, classes=3):
    model = keras.Sequential(
        [
            keras.Input((size, size, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(4, "tanh"),
            keras.layers.Dense(classes),
        ]
    )
    model.compile("sgd", SPARSE)
    return model


def mlp(widths=(3, 7, 2), dtype="float64"):
    model = keras.Sequential(
        [keras.Input((widths[0],), dtype=dtype)]
        + [keras.layers.Dense(w, "tanh", dtype=dtype) for w in widths[1:-1]]
        + [keras.layers.Dense(widths[-1], dtype=dtype)]
    )
    model.compile("sgd", SPARSE)
    return model


def linear_regression(width, dtype="float64"):
    model = keras.Sequential(
        [
            keras.Input((width,), dtype=dtype),
            keras.layers.Dense(1, use_bias=False, dtype=dtype),
        ]
    )
    model.compile("sgd", "mse")
    return model


def set_weights(model, *arrays):
    for variable, array in zip(model.trainable_variables, arrays, strict=True):
        variable.assign(np.reshape(array, variable.shape))


def dense_hessian(model, loss, x, y):
    """Hessian of the mean loss by reverse over reverse, entry by entry: float64 [p, p].

    `loss` (y, outputs) -> [batch] is written out in the test, not taken from the library.
    """
    values = [v.value for v in model.trainable_variables]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            total = tf.reduce_mean(loss(y, model(x, training=False)))
        gradients = inner.gradient(total, values)
        flat = tf.concat([tf.reshape(g, [-1]) for g in gradients], axis=0)
        entries = tf.unstack(flat)
    rows = []
    for entry in entries:
        row = outer.gradient(entry, values, unconnected_gradients="zero")
        rows.append(np.concatenate([np.reshape(r, -1) for r in row]))
    return np.stack(rows).astype(np.float64)


def dense_gradients(model, loss, x, y):
    """Gradient of each example's loss by one tape an example: float64 [batch, p]."""
    values = [v.value for v in model.trainable_variables]
    rows = []
    for i in range(len(y)):
        with tf.GradientTape() as tape:
            value = loss(y[i : i + 1], model(x[i : i + 1], training=False))[0]
        gradient = tape.gradient(value, values, unconnected_gradients="zero")
        rows.append(np.concatenate([np.reshape(tf.convert_to_tensor(g), -1) for g in gradient]))
    return np.stack(rows).astype(np.float64)


def cross_entropy(y, logits):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)


def squared_error(y, outputs):
    return tf.reduce_mean(tf.square(outputs - tf.reshape(y, tf.shape(outputs))), axis=-1)
