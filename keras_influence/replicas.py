"""The replicas of a model's strategy as places for the parts of long vectors."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence import distribution


def replicas(model: keras.Model) -> "StrategyReplicas | None":
    """Those of the model's strategy; None where it has none.

    Raises:
        NotImplementedError: they belong to several processes.
    """
    strategy = distribution.strategy_of(model)
    if strategy is None:
        return None
    if distribution.several_workers(strategy):
        raise NotImplementedError(
            "A basis on the devices is split over the replicas of one process, and this strategy "
            'has several processes. Keep the whole of it in each one\'s memory: `basis="host"`.'
        )
    return StrategyReplicas(strategy)


class StrategyReplicas:
    """See `linalg.device.Replicas`.

    Args:
        strategy: of one process.
    """

    def __init__(self, strategy: Any):
        self._strategy = strategy
        self.count = strategy.num_replicas_in_sync
        (kind,) = {
            tf.DeviceSpec.from_string(device).device_type
            for device in strategy.extended.worker_devices
        }
        self.fused = kind != "CPU"

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def on_replicas(*arguments: Any) -> Any:
            return self._strategy.run(function, args=arguments)

        return tf.function(functools.partial(on_replicas), autograph=False)

    def number(self) -> Any:
        return distribution.replica_number()

    def summed(self, value: tf.Tensor) -> tf.Tensor:
        return distribution.all_reduced(value)

    def whole(self, part: tf.Tensor) -> tf.Tensor:
        return distribution.all_gathered(part)

    def zeros(self, shape: tuple[int, ...], dtype: tf.DType) -> Any:
        with self._strategy.scope():
            return tf.Variable(
                tf.zeros(shape, dtype),
                trainable=False,
                # One of its own for each replica, which no other one ever asks for.
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.NONE,
            )

    def everywhere(self, value: Any) -> Any:
        return distribution.copies(self._strategy, tf.convert_to_tensor(value))

    def parts(self, value: Any) -> list[np.ndarray]:
        return [np.asarray(each) for each in self._strategy.experimental_local_results(value)]
