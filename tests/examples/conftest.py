import keras
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import image_data
import models
from image_data import ImageData


@pytest.fixture(scope="session")
def two_halves():
    """40 training and 12 test images of 8 x 8, bright in the left or in the right half."""
    rng = np.random.default_rng(0)
    labels = (np.arange(52) % 2).astype(np.int32)
    images = rng.uniform(0, 0.2, (52, 8, 8, 1)).astype(np.float32)
    images[labels == 0, :, :4] += 0.8
    images[labels == 1, :, 4:] += 0.8
    return ImageData(
        images[:40], labels[:40], images[40:], labels[40:], 2, class_names=("left", "right")
    )


@pytest.fixture
def small_program(monkeypatch, two_halves):
    """The examples train a dense layer of 8 units, called mlp, on `two_halves`."""

    def build(input_shape, num_classes):
        return keras.Sequential(
            [
                keras.Input(input_shape),
                keras.layers.Flatten(),
                keras.layers.Dense(8, activation="relu"),
                keras.layers.Dense(num_classes),
            ]
        )

    def load(name, data_dir, num_train):
        assert (name, data_dir) == ("digits", None)
        number = num_train or len(two_halves.train_labels)
        return two_halves._replace(
            train_images=two_halves.train_images[:number],
            train_labels=two_halves.train_labels[:number],
        )

    monkeypatch.setitem(models.MODELS, "mlp", build)
    monkeypatch.setattr(image_data, "load", load)


@pytest.fixture
def run_program():
    """Runs the `main` of a module with some flags, and puts the flags back."""

    def run(module, **settings):
        words = [f"--{name}={value}" for name, value in settings.items()]
        with flagsaver.flagsaver():
            module.main(flags.FLAGS([module.__name__, *words]))

    return run
