"""Training on all examples at once, to a minimum: from where what one example does can be told."""

import dataclasses
from typing import Any

import keras
import numpy as np
import scipy.optimize
import tensorflow as tf

import keras_influence as ki

# Largest entry of a gradient at a minimum. One example of hundreds weighs a thousandth.
_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class FullBatch:
    """Trains a model by L-BFGS to a minimum of its mean loss + (l2/2) |parameters|^2.

    Raises:
        FloatingPointError: none is found. A model in float64 comes to one that float32 may miss by
            rounding.
        ValueError: a model with weights that are not trained.
    """

    l2: float

    def __call__(self, model: keras.Model, examples: ki.data.Examples) -> None:
        variables = [variable.value for variable in model.trainable_variables]
        if len(variables) < len(model.weights):
            raise ValueError(
                "All weights must be trainable. Received some that are not: "
                f"{[variable.path for variable in model.non_trainable_variables]}."
            )
        # Which does not round to float32, as Keras's losses do.
        losses = ki.gradients.PerExampleLoss(model)
        x, y = tf.nest.map_structure(tf.constant, examples.arrays)
        initial = model.get_weights()
        ends = np.cumsum([array.size for array in initial])

        @tf.function(autograph=False)
        def value_and_gradient() -> tuple[tf.Tensor, list[Any]]:
            with tf.GradientTape() as tape:
                value = tf.reduce_mean(losses(y, model(x, training=False)))
            return value, tape.gradient(value, variables)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            for variable, part in zip(variables, np.split(flat, ends[:-1]), strict=True):
                variable.assign(part.reshape(variable.shape))
            value, gradients = value_and_gradient()
            gradient = np.concatenate([np.ravel(part) for part in gradients]).astype(np.float64)
            return float(value) + self.l2 / 2 * flat @ flat, gradient + self.l2 * flat

        start = np.concatenate([array.ravel() for array in initial]).astype(np.float64)
        options = {"maxiter": 20_000, "maxfun": 40_000, "gtol": _TOLERANCE, "ftol": 0, "maxcor": 50}
        found = scipy.optimize.minimize(
            objective, start, jac=True, method="L-BFGS-B", options=options
        )
        largest = np.abs(objective(found.x)[1]).max()
        if not largest <= _TOLERANCE:
            raise FloatingPointError(
                f"L-BFGS stopped at a gradient of {largest:.1e} after {found.nit} steps, above "
                f"{_TOLERANCE:g}: {found.message}"
            )
