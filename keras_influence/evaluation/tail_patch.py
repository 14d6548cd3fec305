"""Tail patch: does one more step on a query's top examples help the query?"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class TailPatch(NamedTuple):
    """Fall of each query's loss by one step on its top examples.

    Attributes:
        by_score: Loss before the step minus loss after it. Shape `[queries]`.
        at_random: The same for as many examples drawn at random. Shape `[queries]`.
        gain: Mean of `by_score` minus mean of `at_random`: above 0 where the scores know more than
            chance.
    """

    by_score: NDArray[np.float64]
    at_random: NDArray[np.float64]
    gain: float


def tail_patch(
    scores: ArrayLike,
    k: int,
    patch: Callable[[NDArray[np.int64]], ArrayLike],
    seed: int = 0,
) -> TailPatch:
    """Makes one training step on each query's k highest scores, from the same weights every time.

    After Chang et al., "Scalable influence and fact tracing" (2024). It needs no retraining, and
    says whether examples help once more, not whether the query depended on them.

    Args:
        scores: Shape `[queries, N]`.
        k: Examples of the step.
        patch: `patch(ids) -> losses [queries]` after one step on the training examples `ids`; the
            losses as they are for no ids. `trainers.Patch` makes one from a model.
        seed: Of the examples that are drawn at random.

    Example:

    ```python
    patch = ki.trainers.Patch(model, train, queries, learning_rate=1e-3)
    ki.evaluation.tail_patch(method.scores(queries, train), 10, patch).gain
    ```
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(
            "`scores` must be [queries, N], and `k` from 1 to N. Received: shape "
            f"{scores.shape}, k={k}."
        )
    random = np.random.default_rng(seed)
    before = np.asarray(patch(np.zeros(0, np.int64)), np.float64)
    falls = np.empty((2, len(scores)))
    for query, row in enumerate(scores):
        chosen = np.argsort(-row, kind="stable")[:k]
        drawn = random.choice(scores.shape[1], k, replace=False)
        for column, ids in enumerate((chosen, drawn)):
            falls[column, query] = before[query] - np.asarray(patch(ids), np.float64)[query]
    return TailPatch(falls[0], falls[1], float(falls[0].mean() - falls[1].mean()))
