"""What happens when the examples that a method names are removed, and the model retrained.

Each takes `retrain(masks) -> outputs [subsets, queries]`, which trains on the examples where a mask
is True, and measures every query. `trainers.Retraining` is one, and keeps its runs on the disk.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keras_influence.evaluation.correlations import pearson, spearman

# From masks [subsets, N].
Retrain = Callable[[NDArray[np.bool_]], ArrayLike]


class Counterfactual(NamedTuple):
    """Each query's change when its own top k examples are removed.

    Attributes:
        predicted: Sum of the removed scores. Shape `[queries]`.
        actual: Loss after the retraining minus the loss before. Shape `[queries]`.
        removed: Ids that were removed for each query, by falling score. Shape `[queries, k]`.
        pearson: Correlation of predicted and actual over the queries; NaN for fewer than two.
        spearman: The same of ranks.
    """

    predicted: NDArray[np.float64]
    actual: NDArray[np.float64]
    removed: NDArray[np.int64]
    pearson: float
    spearman: float


class Brittleness(NamedTuple):
    """How few examples carry a prediction.

    Attributes:
        smallest: For each query, the smallest of the tried counts of top examples whose removal
            makes the prediction wrong; -1 where none does. Shape `[queries]`.
        flipped: For each tried count, the share of the queries that flipped at it or before. Shape
            `[counts]`.
        counts: The counts that were tried, rising.
    """

    smallest: NDArray[np.int64]
    flipped: NDArray[np.float64]
    counts: tuple[int, ...]


class RemovalCurve(NamedTuple):
    """The mean loss of the queries as more and more of the training set is removed.

    Attributes:
        fractions: Shares removed, rising from 0. Shape `[points]`.
        by_score: Mean loss when the highest scores go first. Shape `[points]`.
        at_random: Mean loss when as many go at random, the mean over the draws. Shape `[points]`.
        area: Mean height of `by_score` above `at_random` over the fractions: positive where the
            scores name what the queries need.
    """

    fractions: NDArray[np.float64]
    by_score: NDArray[np.float64]
    at_random: NDArray[np.float64]
    area: float


def _checked(scores: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(
            "`scores` must be finite, [queries, training examples]. Received: shape "
            f"{scores.shape}{'' if np.isfinite(scores).all() else ' with values that are not'}."
        )
    return scores


def _ranked(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ids by falling score, equal ones by id."""
    return np.argsort(-scores, axis=-1, kind="stable")


def _outputs(
    retrain: Retrain, num_train: int, removed: Sequence[NDArray[np.int64]], queries: int | None
) -> NDArray[np.float64]:
    """What retraining without each of `removed` gave, [subsets, queries]."""
    masks = np.ones((len(removed), num_train), bool)
    for mask, ids in zip(masks, removed, strict=True):
        mask[ids] = False
    outputs = np.asarray(retrain(masks), np.float64)
    if outputs.ndim != 2 or outputs.shape != (len(removed), queries or outputs.shape[1]):
        raise ValueError(
            f"`retrain` must give [subsets, queries], {len(removed)} x {queries or 'queries'}. "
            f"Received: shape {outputs.shape}."
        )
    if not np.isfinite(outputs).all():
        raise ValueError("`retrain` must give finite outputs. Received: some that are not.")
    return outputs


_NOTHING = np.zeros(0, np.int64)


def _check_counts(counts: Sequence[int], num_train: int) -> tuple[int, ...]:
    chosen = tuple(sorted(set(counts)))
    if not chosen or chosen[0] < 1 or chosen[-1] >= num_train:
        raise ValueError(
            f"The numbers of examples to remove must lie from 1 to {num_train - 1}. Received: "
            f"{list(counts)}."
        )
    return chosen


def counterfactual(scores: ArrayLike, k: int, retrain: Retrain) -> Counterfactual:
    """Removes each query's k highest scores, retrains, and compares with their sum.

    One retraining on all examples, and one for each query.

    Args:
        scores: Influences, rises of the loss on removal. Shape `[queries, N]`.
        k: Examples to remove.
        retrain: As above; its outputs are losses.

    Example:

    ```python
    retrain = ki.trainers.Retraining(
        "banks/removals", make_model, train, queries, fit={"epochs": 10}
    )
    ki.evaluation.counterfactual(method.scores(queries, train), 20, retrain).pearson
    ```
    """
    scores = _checked(scores)
    queries, num_train = scores.shape
    _check_counts([k], num_train)
    removed = _ranked(scores)[:, :k]
    outputs = _outputs(retrain, num_train, [_NOTHING, *removed], queries)
    predicted = np.take_along_axis(scores, removed, axis=1).sum(axis=1)
    actual = np.diagonal(outputs[1:]) - outputs[0]
    correlations = [np.nan, np.nan]
    if queries > 1:
        columns = predicted[:, np.newaxis], actual[:, np.newaxis]
        correlations = [float(pearson(*columns)[0]), float(spearman(*columns)[0])]
    return Counterfactual(predicted, actual, removed, *correlations)


def brittleness(scores: ArrayLike, counts: Sequence[int], retrain: Retrain) -> Brittleness:
    """Removes more and more of each query's highest scores until its prediction is wrong.

    The fewer it takes, the better the scores: what a method misses holds the prediction up. One
    retraining for each query and count, and none once the query has flipped. Ask for queries that
    are right to begin with.

    Args:
        scores: Influences. Shape `[queries, N]`.
        counts: Numbers of examples to remove.
        retrain: As above; its outputs are margins, or correctness minus one half: positive where
            the prediction is right.

    Raises:
        ValueError: If a query is wrong with nothing removed.
    """
    scores = _checked(scores)
    queries, num_train = scores.shape
    tried = _check_counts(counts, num_train)
    wrong = np.flatnonzero(_outputs(retrain, num_train, [_NOTHING], queries)[0] <= 0)
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} queries are wrong with nothing removed, such as {wrong[0]}: leave them "
            "out."
        )
    order = _ranked(scores)
    smallest = np.full(queries, -1)
    for count in tried:
        left = np.flatnonzero(smallest < 0)
        if len(left):
            outputs = _outputs(retrain, num_train, list(order[left, :count]), queries)
            smallest[left[outputs[np.arange(len(left)), left] <= 0]] = count
    flipped = [np.mean((smallest > 0) & (smallest <= count)) for count in tried]
    return Brittleness(smallest, np.array(flipped), tried)


def removal_curve(
    scores: ArrayLike,
    fractions: Sequence[float],
    retrain: Retrain,
    num_random: int = 3,
    seed: int = 0,
) -> RemovalCurve:
    """Removes the training examples by falling score, and as many at random beside it.

    Args:
        scores: One score for each training example, or for each query and each example, of which
            the mean over queries counts. Shape `[N]` or `[queries, N]`.
        fractions: Shares of the training set to remove, above 0 and below 1.
        retrain: As above; its outputs are losses.
        num_random: Draws of examples at random, for each fraction.
        seed: Of these draws.
    """
    worth = _checked(np.atleast_2d(np.asarray(scores, np.float64))).mean(axis=0)
    num_train = len(worth)
    counts = _check_counts([round(fraction * num_train) for fraction in fractions], num_train)
    random = np.random.default_rng(seed)
    orders = [_ranked(worth), *(random.permutation(num_train) for _ in range(num_random))]
    removals = [order[:count] for order in orders for count in counts]
    means = _outputs(retrain, num_train, [_NOTHING, *removals], None).mean(axis=1)
    curves = np.insert(means[1:].reshape(len(orders), -1), 0, means[0], axis=1)
    removed = np.array([0, *counts]) / num_train
    at_random = curves[1:].mean(axis=0) if num_random else np.full(len(removed), np.nan)
    area = np.trapezoid(curves[0] - at_random, removed) / removed[-1]
    return RemovalCurve(removed, curves[0], at_random, float(area))
