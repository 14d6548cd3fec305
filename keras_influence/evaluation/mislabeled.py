"""Retrieval of mislabeled examples: how early do they come when examples are checked by score?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics


class MislabelRetrieval(NamedTuple):
    """How well one score ranks mislabeled examples before the others.

    Attributes:
        auc: Area under the ROC curve: the probability that a mislabeled example scores higher
            than a correct one, a tie counting one half. 0.5 is chance.
        average_precision: Area under the precision-recall curve, summed over distinct scores. The
            share of mislabeled examples is chance.
        recall: For each checked fraction, the share of the mislabeled examples that was found.
        checked: Share of the examples checked, highest score first. Shape `[N + 1]`, 0 to 1.
        found: Share of the mislabeled examples found by then. Shape `[N + 1]`, 0 to 1.
        num_examples: N.
        num_mislabeled: How many of them are mislabeled.
    """

    auc: float
    average_precision: float
    recall: dict[float, float]
    checked: NDArray[np.float64]
    found: NDArray[np.float64]
    num_examples: int
    num_mislabeled: int


class MislabelRetrievalInterval(NamedTuple):
    """Bootstrap intervals, each `(low, high)`, around the values of a `MislabelRetrieval`."""

    auc: tuple[float, float]
    average_precision: tuple[float, float]
    level: float
    num_resamples: int


def mislabel_retrieval(
    scores: ArrayLike,
    is_mislabeled: ArrayLike,
    fractions: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
) -> MislabelRetrieval:
    """Measures how well scores find mislabeled examples.

    Use it on self-influences of a training set some of whose labels were replaced on purpose.
    A method earns its cost only where it beats the plain training loss of each example as a score.

    Equal scores are never ordered by position or label: the curve and the recall are what a
    checker expects who takes the examples of one score in random order.

    Args:
        scores: Higher means more suspicious. Shape `[N]`.
        is_mislabeled: True (or 1) where the label is wrong. Shape `[N]`.
        fractions: Shares of the examples, each in `[0, 1]`, after which to report the recall.

    Returns:
        A `MislabelRetrieval`.

    Raises:
        ValueError: If the shapes differ, a score is not finite, a label is not boolean (or 0/1), or
            there are no mislabeled examples, or no correct ones.

    Example:

    ```python
    suspicion = method.self_influence(train)
    retrieval = ki.evaluation.mislabel_retrieval(suspicion, is_mislabeled)
    retrieval.auc, retrieval.recall[0.1]
    ```
    """
    scores, is_mislabeled = _checked_inputs(scores, is_mislabeled)
    wrong = [fraction for fraction in fractions if not 0 <= fraction <= 1]
    if wrong:
        raise ValueError(f"`fractions` must lie between 0 and 1. Received: {wrong}.")
    checked, found = _expected_curve(scores, is_mislabeled)
    return MislabelRetrieval(
        auc=float(metrics.roc_auc_score(is_mislabeled, scores)),
        average_precision=float(metrics.average_precision_score(is_mislabeled, scores)),
        recall={float(f): float(np.interp(f, checked, found)) for f in fractions},
        checked=checked,
        found=found,
        num_examples=scores.size,
        num_mislabeled=int(is_mislabeled.sum()),
    )


def mislabel_retrieval_interval(
    scores: ArrayLike,
    is_mislabeled: ArrayLike,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> MislabelRetrievalInterval:
    """Measures how far AUC and average precision would move on other examples of the same kind.

    A percentile bootstrap that draws mislabeled and correct examples apart, so that every resample
    keeps their shares. It covers the choice of examples, not that of the training run.

    Args:
        scores: Higher means more suspicious. Shape `[N]`.
        is_mislabeled: True (or 1) where the label is wrong. Shape `[N]`.
        num_resamples: How many resamples to draw; the ends of the interval need some hundreds.
        seed: Seed of the resamples.
        level: Share of the resamples that the interval holds, between 0 and 1.

    Returns:
        A `MislabelRetrievalInterval`.

    Raises:
        ValueError: As `mislabel_retrieval`, or if `num_resamples` or `level` is out of range.
    """
    scores, is_mislabeled = _checked_inputs(scores, is_mislabeled)
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1. Received: {num_resamples}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, exclusive. Received: {level}.")
    # Only the order of the distinct scores matters, so a resample is two counts per distinct score.
    distinct, block = np.unique(-scores, return_inverse=True)
    positives, negatives = block[is_mislabeled], block[~is_mislabeled]
    rng = np.random.default_rng(seed)
    values = np.empty((num_resamples, 2))
    for row in values:
        row[:] = _metrics_of_counts(
            np.bincount(rng.choice(positives, positives.size), minlength=distinct.size),
            np.bincount(rng.choice(negatives, negatives.size), minlength=distinct.size),
        )
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return MislabelRetrievalInterval(
        auc=(float(low[0]), float(high[0])),
        average_precision=(float(low[1]), float(high[1])),
        level=level,
        num_resamples=num_resamples,
    )


def _checked_inputs(
    scores: ArrayLike, is_mislabeled: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(is_mislabeled)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            "`scores` and `is_mislabeled` must both have shape [N]. "
            f"Received: shapes {scores.shape} and {labels.shape}."
        )
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores))
        raise ValueError(
            f"`scores` must be finite. Received: {bad.size} that are not, at positions "
            f"{bad[:10].tolist()}{' ...' if bad.size > 10 else ''}. An example whose score "
            "overflowed has no rank: find out why, or leave it out of both arrays."
        )
    if labels.dtype != np.bool_ and not np.isin(labels, (0, 1)).all():
        raise ValueError(
            "`is_mislabeled` must be boolean, or 0 and 1. Received: values "
            f"{np.unique(labels)[:10].tolist()}."
        )
    labels = labels.astype(np.bool_)
    if not labels.any() or labels.all():
        raise ValueError(
            "Retrieval needs mislabeled and correct examples. Received: "
            f"{int(labels.sum())} mislabeled of {labels.size}."
        )
    return scores, labels


def _expected_curve(
    scores: NDArray[np.float64], is_mislabeled: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares checked and found, after 0 to N examples, expected over random orders of ties."""
    _, block, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    found = np.concatenate(
        [[0], np.cumsum(np.bincount(block[is_mislabeled], minlength=sizes.size))]
    )
    # In a random order, the number found grows linearly in expectation within a block of ties.
    steps = np.arange(scores.size + 1)
    return steps / scores.size, np.interp(steps, ends, found) / is_mislabeled.sum()


def _metrics_of_counts(
    positives: NDArray[np.int64], negatives: NDArray[np.int64]
) -> tuple[float, float]:
    """AUC and average precision from counts per distinct score, highest score first."""
    true, false = np.cumsum(positives), np.cumsum(negatives)
    lower = false[-1] - false
    auc = np.sum(positives * (lower + negatives / 2)) / (true[-1] * false[-1])
    precision = true / np.maximum(true + false, 1)
    return float(auc), float(np.sum(positives * precision) / true[-1])
