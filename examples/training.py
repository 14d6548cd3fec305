"""Trains an image classifier of the examples and records its checkpoints."""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

import keras_influence as ki
import models
from image_data import ImageData
from keras_influence.callbacks.tracin_checkpoint import CheckpointReport
from keras_influence.checkpoints import Checkpoint

_EVALUATION_BATCH_SIZE = 500


class TrainedModel(NamedTuple):
    """A trained model, and what its training was like."""

    model: keras.Model
    checkpoints: list[Checkpoint]
    checkpoint_report: CheckpointReport
    train_accuracy: float
    test_accuracy: float
    train_seconds: float


def train(
    data: ImageData,
    model_name: str,
    directory: str | os.PathLike,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    strategy: tf.distribute.Strategy | None = None,
) -> TrainedModel:
    """Trains by momentum SGD, with a checkpoint in `directory` at the end of every epoch.

    Args:
        data: What to train on; the training accuracy is that on its labels, right or wrong.
        model_name: A key of `models.MODELS`.
        directory: Where the checkpoints go.
        epochs: Passes over the training set.
        batch_size: Examples of a step.
        learning_rate: Rate of SGD with a momentum of 0.9.
        seed: Seed of the initial weights and of the order of the examples.
        strategy: Of the model, and so of all that is done with it; by default that in scope.
    """
    keras.utils.set_random_seed(seed)
    with (strategy or tf.distribute.get_strategy()).scope():
        model = models.MODELS[model_name](data.train_images.shape[1:], data.num_classes)
        model.compile(
            optimizer=keras.optimizers.SGD(learning_rate, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    recorder = ki.callbacks.TracInCheckpoint(directory)
    start = time.perf_counter()
    model.fit(
        data.train_images,
        data.train_labels,
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
        callbacks=[recorder],
    )
    seconds = time.perf_counter() - start
    return TrainedModel(
        model=model,
        checkpoints=ki.checkpoints.list_checkpoints(directory),
        checkpoint_report=recorder.report(),
        train_accuracy=_accuracy(model, data.train_images, data.train_labels),
        test_accuracy=_accuracy(model, data.test_images, data.test_labels),
        train_seconds=seconds,
    )


def example_losses(
    model: keras.Model, images: NDArray[np.float32], labels: NDArray[np.int32]
) -> NDArray[np.float32]:
    """The loss of each example: the score that a method must beat to be worth its time."""
    logits = model.predict(images, batch_size=_EVALUATION_BATCH_SIZE, verbose=0)
    losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return keras.ops.convert_to_numpy(losses)


def predict_labels(model: keras.Model, images: NDArray[np.float32]) -> NDArray[np.int32]:
    """The most likely class of each image."""
    logits = model.predict(images, batch_size=_EVALUATION_BATCH_SIZE, verbose=0)
    return logits.argmax(axis=1).astype(np.int32)


def choose_queries(
    predicted: NDArray[np.int32], labels: NDArray[np.int32], number: int
) -> NDArray[np.int64]:
    """Chooses the first misclassified images, at most half of `number`, then the first others."""
    wrong = np.flatnonzero(predicted != labels)[: (number + 1) // 2]
    right = np.flatnonzero(predicted == labels)[: number - wrong.size]
    return np.concatenate([wrong, right])


def evenly_spaced(checkpoints: Sequence[Checkpoint], count: int) -> list[Checkpoint]:
    """Chooses `count` checkpoints at even distances, of which the last is the run's last."""
    if not 1 <= count <= len(checkpoints):
        raise ValueError(
            f"The number of checkpoints must be between 1 and {len(checkpoints)}, those that the "
            f"run has. Received: {count}."
        )
    ends = np.linspace(0, len(checkpoints), count + 1)[1:]
    return [checkpoints[round(end) - 1] for end in ends]


def _accuracy(model: keras.Model, images: NDArray[np.float32], labels: NDArray[np.int32]) -> float:
    return model.evaluate(
        images, labels, batch_size=_EVALUATION_BATCH_SIZE, verbose=0, return_dict=True
    )["accuracy"]
