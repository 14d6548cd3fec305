"""The training examples of greatest influence on each query."""

from typing import Any, NamedTuple

import tensorflow as tf


class TopExamples(NamedTuple):
    """The training examples of greatest influence of one sign.

    Attributes:
        ids: int64 [Q, k], positions in the training set, the greatest influence first.
        scores: float32 [Q, k].
    """

    ids: Any
    scores: Any


class Influences(NamedTuple):
    """Who speaks for each of Q predictions, and who against it.

    Attributes:
        proponents: `TopExamples` of the largest scores: without them the query's loss would rise.
        opponents: `TopExamples` of the smallest scores: without them it would fall.
    """

    proponents: TopExamples
    opponents: TopExamples


def top_influences(scores: Any, k: int) -> Influences:
    """The k largest and the k smallest scores of each query; ties go to the smaller id.

    Args:
        scores: [Q, N], as a method's `scores` returns it.
        k: examples of each kind, at most N.
    """
    scores = tf.convert_to_tensor(scores)
    if scores.shape[1] is not None and not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"`k` must be between 1 and the number of training examples, {scores.shape[1]}. "
            f"Received: k={k}."
        )
    # tf.math.top_k puts the lower index first where values are equal.
    best, best_ids = tf.math.top_k(scores, k)
    worst, worst_ids = tf.math.top_k(-scores, k)
    return Influences(
        TopExamples(tf.cast(best_ids, tf.int64), best),
        TopExamples(tf.cast(worst_ids, tf.int64), -worst),
    )
