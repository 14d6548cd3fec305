"""Retraining and single steps as functions, for the measures in `evaluation` that ask for them."""

import os
import pathlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence import checkpoints, data, storage
from keras_influence.gradients import PerExampleLoss
from keras_influence.trainers.bank import RetrainingBank
from keras_influence.trainers.recipe import MakeModel


class Retraining:
    """Masks in, losses of the queries out: a bank for each set of masks that is asked for.

    What was asked for once is read from the disk the next time, and goes on after a kill.

    Args:
        directory: of the banks.
        make_model, train, queries: as in `RetrainingBank`.
        measurement: what to return of each query, as `StoredBank.losses` gives it.
        **recipe: the other arguments of `RetrainingBank`.

    Example:

    ```python
    retrain = ki.trainers.Retraining(
        "banks/removals", make_model, train, queries, fit={"epochs": 5}
    )
    ki.evaluation.removal_curve(scores, [0.1, 0.2, 0.4], retrain)
    ```
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        make_model: MakeModel,
        train: Any,
        queries: Any,
        *,
        measurement: str = "loss",
        **recipe: Any,
    ):
        self.directory = pathlib.Path(directory)
        self._arguments = (make_model, train)
        self._options = {"queries": queries, **recipe}
        self.measurement = measurement

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        """Losses [subsets, queries] after training on each of `masks` [subsets, N]."""
        name = storage.arrays_fingerprint([masks])
        bank = RetrainingBank(self.directory / name, *self._arguments, masks, **self._options)
        return bank.run().losses(self.measurement)


class Patch:
    """One step of plain gradient descent on chosen examples, from the model's weights as they are.

    Args:
        model: trained; after each call its weights are as before.
        train: labelled examples to choose from.
        queries: labelled examples to measure.
        learning_rate: of the step, on the mean loss of the chosen examples.
    """

    def __init__(self, model: keras.Model, train: Any, queries: Any, learning_rate: float):
        self._model = model
        self._loss = PerExampleLoss(model)
        self._train = data.read(train)
        self._queries = data.read(queries)
        self._rate = learning_rate

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Losses [queries] after a step on the training examples `ids`."""
        with checkpoints.weights_restored(self._model):
            if len(ids):
                variables = self._model.trainable_variables
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(self._losses(self._train.take(np.asarray(ids))))
                gradients = tape.gradient(loss, [variable.value for variable in variables])
                for variable, gradient in zip(variables, gradients, strict=True):
                    if gradient is not None:
                        variable.assign_sub(self._rate * tf.convert_to_tensor(gradient))
            return self._losses(self._queries.arrays).numpy()

    def _losses(self, examples: tuple[Any, ...]) -> tf.Tensor:
        x, y, *weights = tf.nest.map_structure(tf.constant, examples)
        return self._loss(y, self._model(x, training=False), *weights)
