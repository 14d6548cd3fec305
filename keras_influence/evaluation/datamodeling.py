"""The linear datamodeling score: do summed scores order the outcomes of retraining on subsets?"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keras_influence.evaluation.correlations import interval, is_constant, spearman


class LinearDatamodelingScore(NamedTuple):
    """How well sums of scores over subsets order what retraining on these subsets gave.

    Attributes:
        mean: Mean of `per_query` over the queries that have a correlation. 1 is perfect order.
        per_query: Spearman correlation of each query over the subsets; NaN where either side is
            constant, and so has no order. Shape `[queries]`.
        query_interval: Bootstrap interval of the mean over queries: would other queries agree?
        subset_interval: Bootstrap interval of the mean over subsets: would other subsets?
        constant_predictions: Queries whose predicted outputs are all the same.
        constant_outputs: Queries whose actual outputs are all the same, such as correctness where
            no subset changes the answer.
        level: Share of the resamples that each interval holds.
        num_subsets: How many subsets.
    """

    mean: float
    per_query: NDArray[np.float64]
    query_interval: tuple[float, float]
    subset_interval: tuple[float, float]
    constant_predictions: int
    constant_outputs: int
    level: float
    num_subsets: int


def predicted_outputs(scores: ArrayLike, masks: ArrayLike) -> NDArray[np.float64]:
    """What influences predict of the loss after training on each subset, up to a constant.

    An influence is the rise of the loss when the example is removed, so that having trained on it
    is worth minus that: the sum over the subset of -I(x, z).

    Args:
        scores: Influences, positive for proponents. Shape `[queries, N]`.
        masks: True where a subset holds an example. Shape `[subsets, N]`.

    Returns:
        Shape `[subsets, queries]`.
    """
    return -(np.asarray(masks, np.float64) @ np.asarray(scores, np.float64).T)


def linear_datamodeling_score(
    scores: ArrayLike,
    masks: ArrayLike,
    outputs: ArrayLike,
    *,
    attribution: str = "influence",
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> LinearDatamodelingScore:
    """Rank correlation, over subsets, of predicted and actual outputs, as a mean over queries.

    Spearman's, as Park et al. ("TRAK", 2023, eq. 4) define it. Tied values share their mean rank.
    What noise the retraining has bounds the score from above: average several repeats, and compare
    methods on the same bank.

    Args:
        scores: One score for each query and training example. Shape `[queries, N]`.
        masks: True where an example was trained on. Shape `[subsets, N]`.
        outputs: What retraining on each subset gave, the mean over repeats. Shape
            `[subsets, queries]`.
        attribution: What the scores are. `"influence"`: rises of the loss on removal, as every
            method here gives them, so that outputs are predicted by the sum of -score over the
            subset, and must be larger when the query does worse: a loss, or minus a margin.
            `"additive"`: outputs are predicted by the plain sum, as datamodels' weights are.
        num_resamples: Of each bootstrap.
        seed: Of the resamples.
        level: Share of the resamples that an interval holds.

    Raises:
        ValueError: If shapes do not match, a value is not finite, there are fewer than two subsets,
            or no query has both outputs and predictions that vary.

    Example:

    ```python
    scores = method.scores(queries, train)
    ki.evaluation.linear_datamodeling_score(scores, bank.masks, bank.losses("loss")).mean
    ```
    """
    scores, masks, outputs = _checked_inputs(scores, masks, outputs)
    if attribution not in ("influence", "additive"):
        raise ValueError(
            f'`attribution` must be "influence" or "additive". Received: {attribution!r}.'
        )
    predictions = predicted_outputs(scores, masks)
    if attribution == "additive":
        predictions = -predictions
    flat_predictions, flat_outputs = is_constant(predictions), is_constant(outputs)
    per_query = spearman(predictions, outputs)
    varying = np.isfinite(per_query)
    if not varying.any():
        raise ValueError(
            "No query has outputs and predictions that differ between subsets, so there is no "
            "order to compare. Measure a loss or a margin, on more subsets."
        )
    rng = np.random.default_rng(seed)
    known = per_query[varying]
    over_queries = [rng.choice(known, known.size).mean() for _ in range(num_resamples)]
    predictions, outputs = predictions[:, varying], outputs[:, varying]
    over_subsets = []
    for _ in range(num_resamples):
        chosen = rng.integers(0, len(masks), len(masks))
        drawn = spearman(predictions[chosen], outputs[chosen])
        # Of few subsets, a resample may hold one alone.
        if np.isfinite(drawn).any():
            over_subsets.append(np.nanmean(drawn))
    # A subset drawn twice is a tie, which lowers every resample's rank correlation a little.
    shifted = np.array(over_subsets) + (known.mean() - np.mean(over_subsets))
    return LinearDatamodelingScore(
        mean=float(known.mean()),
        per_query=per_query,
        query_interval=interval(over_queries, level),
        subset_interval=interval(np.clip(shifted, -1, 1), level),
        constant_predictions=int(flat_predictions.sum()),
        constant_outputs=int(flat_outputs.sum()),
        level=level,
        num_subsets=len(masks),
    )


def _checked_inputs(
    scores: ArrayLike, masks: ArrayLike, outputs: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    scores, outputs = np.asarray(scores, np.float64), np.asarray(outputs, np.float64)
    masks = np.asarray(masks)
    if masks.dtype != np.bool_ and not np.isin(masks, (0, 1)).all():
        raise ValueError(f"`masks` must be boolean, or 0 and 1. Received: dtype {masks.dtype}.")
    if scores.ndim != 2 or masks.ndim != 2 or outputs.shape != (len(masks), len(scores)):
        raise ValueError(
            "Shapes must be `scores` [queries, N], `masks` [subsets, N] and `outputs` [subsets, "
            f"queries]. Received: {scores.shape}, {masks.shape} and {outputs.shape}."
        )
    if scores.shape[1] != masks.shape[1] or len(masks) < 2:
        raise ValueError(
            "`scores` and `masks` must be of as many training examples, and the subsets two at "
            f"least. Received: {scores.shape[1]} and {masks.shape[1]} examples, {len(masks)} "
            "subsets."
        )
    for name, values in (("scores", scores), ("outputs", outputs)):
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"`{name}` must be finite. Received: {values[row, column]} at [{row}, {column}]."
            )
    return scores, masks.astype(np.bool_), outputs
