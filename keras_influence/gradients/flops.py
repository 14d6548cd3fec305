"""Floating-point operations of a batch: two for a multiplication and an addition."""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_influence.gradients.factors import Outer, Rows
from keras_influence.gradients.maps import LossMaps


def projection_flops(
    maps: LossMaps, batch: Any, num_directions: int, of_gradients: bool = False
) -> dict[str, float]:
    """Flops that `project` must do for one example: its products by weights and by directions.

    Counted from the layers' shapes, for a model that rules serve throughout. A weight [m, n] at T
    positions takes 2 m n T on the way forward, and as much on the way back, but for the first
    layer, below which nothing asks for a gradient. Left out is what multiplies no weight:
    attention's own products, activations, normalisations; and what forward mode serves.

    Args:
        of_gradients: whether the directions are gradients, as `gradient_directions` gives them.
    """
    coverage = maps.coverage(batch)
    first = next(iter(coverage.units.values())).explained if coverage.units else ()
    flops = {"forward_pass": 0.0, "backward_pass": 0.0, "contractions": 0.0}
    for variable, factors in coverage.templates.items():
        for factor in factors:
            if isinstance(factor, Outer):
                products = 2.0 * math.prod(factor.layout.sizes) * (factor.positions or 1)
                flops["forward_pass"] += products
                flops["backward_pass"] += 0.0 if variable in first else products
                count = factor.flops_with_gradients if of_gradients else factor.flops
                flops["contractions"] += count(num_directions, maps.contraction)
            else:
                entries = factor.tensors[1].shape[1:] if isinstance(factor, Rows) else factor.shape
                flops["contractions"] += (
                    2.0 * num_directions * math.prod(size or 1 for size in entries)
                )
    return flops


def graph_flops(function: Any, *arguments: Any) -> float:
    """Flops of a `tf.function` on such arguments, as TensorFlow's profiler counts its graph.

    It counts a loop's body once, and an operation that it has no count for as nothing.
    """
    graph = function.get_concrete_function(*arguments).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    with _quiet():
        counted = tf.compat.v1.profiler.profile(graph, options={**options, "output": "none"})
    return float(counted.total_float_ops)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its remarks: that it is TensorFlow 1's, and which operations it has no count for."""
    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
