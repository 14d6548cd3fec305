import keras
import numpy as np
import pytest

import keras_influence as ki
import throughput
from keras_influence.gradients import projection_flops


def test_rates():
    # 100 examples of 3 tokens each in 2 s: 180,000 examples an hour, 150 tokens a second.
    found = throughput.measure(2.0, 100, 300, 5e9)
    assert found[:3] == (180_000, 150, 5e9)
    assert 50 < found.peak_megabytes < 100_000
    assert "180,000 examples an hour" in str(found) and "2,200,000" in str(found)
    assert "150 tokens a second, 5.00 GFLOP an example" in str(found)


def test_flops_are_the_mean_over_shapes():
    inputs = keras.Input((None, 3))
    outputs = keras.layers.Dense(5, use_bias=False)(inputs)
    model = keras.Model(inputs, outputs)
    model.compile(loss="mse")
    method = ki.GradientDot(model, batch_size=2)
    batches = [(np.ones((n, t, 3)), np.ones((n, t, 5))) for n, t in ((2, 4), (1, 8))]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return batches[index]

    each = [projection_flops(method.maps, batch, 1) for batch in batches]
    # A product of [T, 3] and [3, 5] is 30 T flops, and none goes back below the first layer.
    assert [flops["forward_pass"] for flops in each] == [120, 240]
    short, long = (sum(flops.values()) for flops in each)
    found = throughput.flops_per_example(method, Batches(), 1)
    assert found == pytest.approx((2 * short + long) / 3)
