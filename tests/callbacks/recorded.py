"""Small recorded runs whose weights are known in advance."""

import keras
import numpy as np

from keras_influence import checkpoints


def drift(optimizer="sgd", eager=True, batches_at_once=1, built=True):
    """A model whose bias is minus the sum of the learning rates that plain SGD has used.

    The loss of an example is the output, so the bias has gradient 1; the inputs are 0, so the
    kernel has gradient 0.
    """
    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="ones")])
    if built:
        model.build((None, 1))
    model.compile(
        optimizer,
        lambda y, output: output,
        run_eagerly=eager,
        steps_per_execution=batches_at_once,
    )
    return model


def fit(model, *callbacks, batches=2, **arguments):
    x = np.zeros((batches, 1), np.float32)
    model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[*callbacks], **arguments)


def steps(directory):
    return [checkpoint.step for checkpoint in checkpoints.list_checkpoints(directory)]


def rates(directory):
    return [checkpoint.learning_rate for checkpoint in checkpoints.list_checkpoints(directory)]


def sums(directory):
    return [checkpoint.learning_rate_sum for checkpoint in checkpoints.list_checkpoints(directory)]


class Stop(Exception):
    """Stands for a process that dies."""


class StopAt(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.moment = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.moment:
            raise Stop


class BiasAtEpochEnd(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.values = []

    def on_epoch_end(self, epoch, logs=None):
        self.values.append(float(self.model.layers[-1].bias.numpy()[0]))
