"""What any attribution must pass before its numbers mean anything."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keras_influence.evaluation.correlations import spearman


class RandomizedWeights(NamedTuple):
    """Attributions of the trained model against those of one whose weights were drawn anew.

    Attributes:
        per_query: Rank correlation of the two over the training examples, for each query; NaN where
            one is constant. Shape `[queries]`.
        mean: Over the queries that have one. Near 0 where the method explains what was learned;
            near 1 it explains the data and the architecture alone.
    """

    per_query: NDArray[np.float64]
    mean: float


class DuplicateQuery(NamedTuple):
    """Where copies of the queries among the training examples rank.

    Attributes:
        ranks: Rank of each query's copy by falling score, from 0; of several equal scores, the
            mean. Shape `[queries]`.
        first: Share of the queries whose copy comes first, or shares the first place.
    """

    ranks: NDArray[np.float64]
    first: float


class ClassAgreement(NamedTuple):
    """Whether the top examples of a query are of its class.

    Attributes:
        same_class: Share of each query's top k of its own class. Shape `[queries]`.
        mean: Over the queries.
        chance: What examples drawn at random would have.
    """

    same_class: NDArray[np.float64]
    mean: float
    chance: float


def randomized_weights(trained: ArrayLike, randomized: ArrayLike) -> RandomizedWeights:
    """Compares scores of a trained model with those of the same model before training.

    After Adebayo et al., "Sanity checks for saliency maps" (2018).

    Args:
        trained: Scores `[queries, N]`.
        randomized: Scores of the model with weights drawn anew. Shape `[queries, N]`.
    """
    trained, randomized = _same_shape(trained, randomized)
    per_query = spearman(trained.T, randomized.T)
    known = per_query[np.isfinite(per_query)]
    return RandomizedWeights(per_query, float(known.mean()) if known.size else float("nan"))


def duplicate_query(scores: ArrayLike, copies: ArrayLike) -> DuplicateQuery:
    """Ranks a copy of each query, put into the training set, among all training examples.

    Args:
        scores: Shape `[queries, N]`.
        copies: Id of the training example that is a copy of each query. Shape `[queries]`.
    """
    scores, copies = np.asarray(scores, np.float64), np.asarray(copies, np.int64)
    if scores.ndim != 2 or copies.shape != (len(scores),):
        raise ValueError(
            "`scores` must be [queries, N] and `copies` [queries]. Received: shapes "
            f"{scores.shape} and {copies.shape}."
        )
    own = scores[np.arange(len(scores)), copies][:, np.newaxis]
    above, equal = (scores > own).sum(axis=1), (scores == own).sum(axis=1) - 1
    return DuplicateQuery(above + equal / 2, float(np.mean(above == 0)))


def class_agreement(
    scores: ArrayLike, query_labels: ArrayLike, train_labels: ArrayLike, k: int = 10
) -> ClassAgreement:
    """The identical class test: share of a query's top k that are of the query's class.

    After Hanawa et al., "Evaluation of similarity-based explanations" (2021). Passing it says
    little, since labels alone can; failing it says much.

    Args:
        scores: Shape `[queries, N]`.
        query_labels: What the model predicts for each query. Shape `[queries]`.
        train_labels: Label of each training example. Shape `[N]`.
        k: How many of the highest scores to look at.
    """
    scores = np.asarray(scores, np.float64)
    query_labels, train_labels = np.asarray(query_labels), np.asarray(train_labels)
    if scores.shape != (len(query_labels), len(train_labels)) or not 1 <= k <= len(train_labels):
        raise ValueError(
            "`scores` must be [queries, N], as many as labels, and `k` from 1 to N. Received: "
            f"shape {scores.shape}, {len(query_labels)} and {len(train_labels)} labels, k={k}."
        )
    top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    same = (train_labels[top] == query_labels[:, np.newaxis]).mean(axis=1)
    chance = float(np.mean(train_labels == query_labels[:, np.newaxis]))
    return ClassAgreement(same, float(same.mean()), chance)


def _same_shape(
    first: ArrayLike, second: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            "Both scores must have one shape, [queries, N]. Received: shapes "
            f"{first.shape} and {second.shape}."
        )
    return first, second
