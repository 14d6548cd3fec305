"""Leave-one-out: predicted changes of the loss against those that retraining gave."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keras_influence.evaluation.correlations import pearson, spearman


class LeaveOneOut(NamedTuple):
    """Agreement of predicted and actual changes of each query's loss.

    Attributes:
        pearson: Correlation for each query over the removals; NaN where either side is constant.
            Shape `[queries]`.
        spearman: The same of ranks.
        slope: Of the line through the origin that fits the actual changes to the predicted ones: 1
            where the size is right too. Shape `[queries]`.
        actual: Changes of the loss, against the mean of the controls. Shape `[removals, queries]`.
        noise: Standard deviation of a query's loss among the controls, which removed nothing; NaN
            for a single one. Shape `[queries]`.
        signal_to_noise: Standard deviation of a query's actual changes over `noise`: near 1, the
            changes are those of the training's own randomness, and no method can predict them.
            Infinite where the controls agree exactly.
    """

    pearson: NDArray[np.float64]
    spearman: NDArray[np.float64]
    slope: NDArray[np.float64]
    actual: NDArray[np.float64]
    noise: NDArray[np.float64]
    signal_to_noise: NDArray[np.float64]


def leave_one_out(predicted: ArrayLike, outputs: ArrayLike, controls: int = 1) -> LeaveOneOut:
    """Compares predicted changes with those of retraining without an example, or a group.

    Args:
        predicted: Influences of each removed example on each query, or sums over a group: rises of
            the loss. Shape `[queries, removals]`.
        outputs: Losses after each retraining: the controls, that removed nothing, and then the
            removals, as `trainers.leave_one_out` orders its subsets; the mean over repeats. Shape
            `[controls + removals, queries]`.
        controls: How many of the outputs are of controls.

    Raises:
        ValueError: If shapes do not match, there is no control, or a value is not finite.

    Example:

    ```python
    masks = ki.trainers.leave_one_out(len(y), ids, controls=3)
    ...  # A bank of these subsets.
    scores = method.scores(queries, train)[:, ids]
    ki.evaluation.leave_one_out(scores, bank.losses("loss"), controls=3).pearson
    ```
    """
    predicted = np.asarray(predicted, np.float64)
    outputs = np.asarray(outputs, np.float64)
    if (
        controls < 1
        or predicted.ndim != 2
        or outputs.shape != (controls + predicted.shape[1], predicted.shape[0])
    ):
        raise ValueError(
            "Shapes must be `predicted` [queries, removals] and `outputs` [controls + removals, "
            f"queries], with one control at least. Received: {predicted.shape}, {outputs.shape} "
            f"and controls={controls}."
        )
    if not (np.isfinite(predicted).all() and np.isfinite(outputs).all()):
        raise ValueError("Predictions and outputs must be finite. Received: some that are not.")
    actual = outputs[controls:] - outputs[:controls].mean(axis=0)
    changes = predicted.T
    noise = np.full(len(predicted), np.nan)
    if controls > 1:
        noise = outputs[:controls].std(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (changes * actual).sum(axis=0) / (changes**2).sum(axis=0)
        signal_to_noise = actual.std(axis=0) / noise
    return LeaveOneOut(
        pearson(changes, actual),
        spearman(changes, actual),
        slope,
        actual,
        noise,
        signal_to_noise,
    )
