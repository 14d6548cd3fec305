"""Training that goes on after a kill, epoch by epoch, with a checkpoint of each for TracIn."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from absl import logging

import keras_influence as ki
from keras_influence.checkpoints import WEIGHTS_FILE, Checkpoint


class Trained(NamedTuple):
    """What a training run left.

    Attributes:
        checkpoints: Of every epoch, the first one first.
        resumed: Epochs that had been trained before.
        seconds: Time of the others.
    """

    checkpoints: list[Checkpoint]
    resumed: int
    seconds: float


def train(
    model: keras.Model,
    batches: Callable[[int], Any],
    directory: str | os.PathLike,
    epochs: int,
) -> Trained:
    """Trains `model` up to `epochs`, from the last one that has a checkpoint in `directory`.

    Weights and optimizer go on as they were, and dropout is seeded anew for each epoch (Keras saves
    no state of its generators), so that an interrupted run ends with the weights of one that was
    not.

    Args:
        model: Built and compiled.
        batches: Number of an epoch, from 0 -> its dataset, the same each time.
        directory: Of the checkpoints; new, empty, or of the same run.
        epochs: Epochs in all.
    """
    done = 0
    # Loading brings back the optimizer's variables only where they are.
    model.optimizer.build(model.trainable_variables)
    if ki.checkpoints.checkpoint_directories(directory):
        last = ki.checkpoints.list_checkpoints(directory)[-1]
        last.verify()
        model.load_weights(last.path / WEIGHTS_FILE)
        done = last.epoch + 1
        logging.info("Going on after %d epochs.", done)
    recorder = ki.callbacks.TracInCheckpoint(directory)
    start = time.perf_counter()
    generators = [v for v in model.variables if v.path.endswith("seed_generator_state")]
    for epoch in range(done, epochs):
        for number, generator in enumerate(generators):
            generator.assign((number, epoch))
        model.fit(
            ki.data.untuned(batches(epoch)),
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
            verbose=2,
            callbacks=[recorder],
        )
    seconds = time.perf_counter() - start
    return Trained(ki.checkpoints.list_checkpoints(directory)[:epochs], done, seconds)
