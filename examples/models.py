"""Reference image classifiers of the examples and benchmarks. All of them return logits."""

from collections.abc import Callable

import keras
from keras import layers


def small_cnn(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """The all-convolutional network of Koh and Liang (2017): 2,616 parameters on one channel.

    Tanh convolutions of 8 channels with strides 1, 2, 1, 2, 1, a 1 x 1 convolution of 10 channels,
    the mean over positions and a linear layer. Padded, so that it takes images of 8 x 8 too.
    """
    return keras.Sequential(
        [keras.Input(input_shape)]
        + [
            layers.Conv2D(8, 3, strides=strides, padding="same", activation="tanh")
            for strides in (1, 2, 1, 2, 1)
        ]
        + [
            layers.Conv2D(10, 1, activation="tanh"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(num_classes),
        ],
        name="small_cnn",
    )


def large_cnn(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Two convolutions and two dense layers: 793,894 parameters on 28 x 28 x 1 and 10 classes."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(84, activation="relu"),
            layers.Dense(num_classes),
        ],
        name="large_cnn",
    )


def mlp(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Dense layers of 512, 256 and 128 units: 567,434 parameters on 28 x 28 x 1 and 10 classes."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(),
            layers.Dense(512, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(num_classes),
        ],
        name="mlp",
    )


MODELS: dict[str, Callable[[tuple[int, int, int], int], keras.Model]] = {
    "small_cnn": small_cnn,
    "large_cnn": large_cnn,
    "mlp": mlp,
}
