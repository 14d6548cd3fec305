"""Reads an optimizer's step and learning rate while it trains."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf


def inner_optimizer(model: keras.Model) -> Any:
    """The optimizer that makes the model's steps, taken out of any `LossScaleOptimizer`.

    Raises:
        ValueError: when the model is not compiled with one optimizer.
    """
    optimizer: Any = getattr(model, "optimizer", None)
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    if optimizer is None or hasattr(optimizer, "optimizers"):
        raise ValueError(
            "TracInCheckpoint needs a model that is compiled with one optimizer, whose learning "
            f"rate is the weight of a checkpoint. Received: optimizer={optimizer!r}."
        )
    return optimizer


class RateMeter:
    """Step, rate and sum of rates of a model's optimizer, cheap enough to read at every batch.

    Attributes:
        batches_per_step: batches that one step of the optimizer takes (gradient accumulation).
        first_step: the optimizer's step when the meter was made.
        step: the optimizer's step at the last `advance`.
        rate: the current learning rate.
        total: sum over the steps since `first_step` of the rate that each used.
    """

    def __init__(self, model: keras.Model):
        self._optimizer = inner_optimizer(model)
        self._eager = bool(model.run_eagerly)
        self._schedule: Any = None
        self._schedule_sum: Any = None
        self.batches_per_step = int(self._optimizer.gradient_accumulation_steps or 1)
        self.first_step = self.step = self._summed = self._read_step()
        self.rate = self._read_rate()
        self.total = 0.0

    def advance(self) -> None:
        """Takes note of the batches trained on since the last call."""
        self.step = self._read_step()
        # A schedule is evaluated in `settle` only: eagerly it can cost as much as a small step.
        if self._current_schedule() is None:
            self.rate = self._read_rate()
            self.total += max(0, self.step - self._summed) * self.rate
            self._summed = self.step

    def settle(self) -> None:
        """Makes `rate` and `total` current where the rate follows a schedule."""
        schedule = self._current_schedule()
        if schedule is None:
            return
        self.rate = self._read_rate()
        # The optimizer evaluates its schedule at the batch that completes a step, counted from 0.
        batches = (np.arange(self._summed, self.step) + 1) * self.batches_per_step - 1
        self._summed = self.step
        if self._eager:
            self.total += sum(float(schedule(tf.constant(batch))) for batch in batches)
        elif batches.size:
            if schedule is not self._schedule:
                self._schedule, self._schedule_sum = schedule, _sum_over_batches(schedule)
            self.total += float(self._schedule_sum(tf.constant(batches)))

    def _read_step(self) -> int:
        return int(self._optimizer.iterations.numpy())

    def _read_rate(self) -> float:
        rate = self._optimizer.learning_rate
        return float(rate.numpy() if hasattr(rate, "numpy") else rate)

    def _current_schedule(self) -> Any:
        rate = getattr(self._optimizer, "_learning_rate", None)
        is_schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
        return rate if is_schedule else None


def _sum_over_batches(schedule: Any) -> Any:
    def one(batch: tf.Tensor) -> tf.Tensor:
        return tf.cast(schedule(batch), tf.float64)

    def total(batches: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.map_fn(one, batches, fn_output_signature=tf.float64))

    signature = [tf.TensorSpec([None], tf.int64)]
    return tf.function(total, input_signature=signature, autograph=False)
