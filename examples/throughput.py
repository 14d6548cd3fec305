"""How fast examples are scored, in what room, and with how many operations each."""

import resource
import sys
from typing import Any, NamedTuple

import tensorflow as tf

from keras_influence import data
from keras_influence.gradients import projection_flops
from keras_influence.methods import InfluenceMethod

# Schioppa et al., "Scaling Up Influence Functions": examples an hour on 32 TPU v2 cores.
PUBLISHED_PER_HOUR = 2.2e6


class Throughput(NamedTuple):
    """What scoring took.

    Attributes:
        examples_per_hour: Examples scored, tracing included.
        tokens_per_second: Their tokens, padding not counted.
        flops_per_example: Products by weights and by directions; see
            `keras_influence.gradients.projection_flops`.
        peak_megabytes: The most that the process has held so far.
    """

    examples_per_hour: float
    tokens_per_second: float
    flops_per_example: float
    peak_megabytes: float

    def __str__(self) -> str:
        return (
            f"{self.examples_per_hour:,.0f} examples an hour (published, on 32 TPU v2 cores: "
            f"{PUBLISHED_PER_HOUR:,.0f}), {self.tokens_per_second:,.0f} tokens a second, "
            f"{self.flops_per_example / 1e9:.2f} GFLOP an example, at most "
            f"{self.peak_megabytes:,.0f} MB"
        )


def measure(seconds: float, num_examples: int, num_tokens: int, flops: float) -> Throughput:
    """The throughput of `num_examples` that were scored in `seconds`."""
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Throughput(3600 * num_examples / seconds, num_tokens / seconds, flops, peak / 1e6)


def flops_per_example(method: InfluenceMethod, dataset: Any, num_directions: int) -> float:
    """Mean over the dataset's examples of the flops of their products with some directions.

    Args:
        method: Whose variables and rules are counted.
        dataset: The examples; batches of one shape count alike.
        num_directions: 1 for a gradient's own norm.
    """
    counted: dict[str, float] = {}
    total, count = 0.0, 0
    for batch in data.batches(dataset, method.batch_size):
        shapes = str([leaf.shape[1:] for leaf in tf.nest.flatten(batch.examples)])
        if shapes not in counted:
            flops = projection_flops(method.maps, batch.examples, num_directions)
            counted[shapes] = sum(flops.values())
        total += counted[shapes] * batch.num_examples
        count += batch.num_examples
    return total / count
