"""Models and training functions that other processes can import."""

import os
import pathlib

import keras
import numpy as np

from keras_influence.trainers import RetrainingBank, random_subsets

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def vectors(num, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((num, 5)).astype(np.float32), random.integers(0, 3, num)


def mlp():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(3)]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS)
    return model


def wider_mlp():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(3)]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS)
    return model


def line():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    return model


def least_squares(model, examples):
    x, y = examples.arrays
    model.set_weights([np.linalg.lstsq(x, y, rcond=None)[0][:, None]])


def second_output(y, outputs):
    return outputs[:, 1]


def counted(model, examples):
    """Trains nothing, and notes that it was called in the file that the environment names."""
    with open(os.environ["COUNTED"], "a", encoding="utf-8") as file:
        file.write(f"{examples.ids.tolist()}\n")


def counted_bank(directory):
    return RetrainingBank(
        directory,
        mlp,
        vectors(8),
        random_subsets(8, 12),
        train_fn=counted,
        measurements=["loss"],
        verbose=0,
    )


def main(directory):
    counted_bank(directory).run()
    pathlib.Path(directory, "finished").touch()
