import keras
import numpy as np
import tensorflow as tf

import epochs

X = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)


def _model():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(2),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.1), loss)
    return model


def _batches(epoch):
    order = np.random.default_rng((5, epoch)).permutation(24)
    return tf.data.Dataset.from_tensor_slices((X[order], Y[order])).batch(8)


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path):
    whole, first, second = _model(), _model(), _model()
    trained = epochs.train(whole, _batches, tmp_path / "whole", 3)
    # 24 examples in batches of 8 make 3 steps an epoch.
    assert [checkpoint.step for checkpoint in trained.checkpoints] == [3, 6, 9]
    assert trained.resumed == 0 and trained.seconds > 0
    epochs.train(first, _batches, tmp_path / "parts", 1)
    resumed = epochs.train(second, _batches, tmp_path / "parts", 3)
    assert resumed.resumed == 1
    assert [each.fingerprint for each in resumed.checkpoints] == [
        each.fingerprint for each in trained.checkpoints
    ]
    for value, expected in zip(second.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_a_finished_run_is_read(tmp_path):
    first, second = _model(), _model()
    trained = epochs.train(first, _batches, tmp_path, 2)
    again = epochs.train(second, _batches, tmp_path, 2)
    assert again.resumed == 2 and again.checkpoints == trained.checkpoints
    np.testing.assert_array_equal(second.get_weights()[0], first.get_weights()[0])
