"""Counted operations."""

import keras
import numpy as np
import tensorflow as tf

from keras_influence.gradients import LossMaps, graph_flops, projection_flops


def test_flops_of_a_projection():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4), keras.layers.Dense(5)])
    maps = LossMaps(model, keras.losses.MeanSquaredError())
    batch = (np.ones([2, 3], np.float32), np.ones([2, 5], np.float32))
    # Forward 2 (3 x 4 + 4 x 5); back through the second layer alone. One direction: a product with
    # each entry of the kernels, through the one side first, and with each entry of the biases.
    assert projection_flops(maps, batch, 1) == {
        "forward_pass": 2 * (12 + 20),
        "backward_pass": 2 * 20,
        "contractions": 2 * (12 + 20) + 2 * (4 + 5),
    }


def test_rows_of_a_table_are_counted_where_they_are_read():
    model = keras.Sequential(
        [keras.Input([6], dtype="int32"), keras.layers.Embedding(100, 4), keras.layers.Dense(5)]
    )
    maps = LossMaps(model, keras.losses.MeanSquaredError())
    batch = (np.ones([2, 6], np.int32), np.ones([2, 6, 5], np.float32))
    flops = projection_flops(maps, batch, 1)
    # The table is first, and multiplies nothing: the way back ends below the dense layer.
    assert flops["forward_pass"] == flops["backward_pass"] == 2 * 6 * 4 * 5
    # 6 rows of 4; the bias; the kernel, formed and multiplied, or through one side of 6 positions.
    dense = min(2 * 4 * 5 * (6 + 1), 2 * 6 * 4 * 5)
    assert flops["contractions"] == 2 * (6 * 4 + 5) + dense


def test_flops_of_a_graph():
    @tf.function
    def product(a, b):
        return tf.matmul(a, b)

    # 2 x 3 entries, 4 multiplications and 4 additions each.
    assert graph_flops(product, tf.ones([2, 4]), tf.ones([4, 3])) == 2 * 4 * 2 * 3
