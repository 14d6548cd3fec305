"""Memorization: how much worse an example fares in models that were not trained on it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keras_influence.methods.table import TableMethod, checked_retrainings


class MemorizedExamples(NamedTuple):
    """What holding an example does to the example itself.

    Attributes:
        values: Mean output of the models without the example minus that of those with it: near 0,
            others teach it as well; for errors, near 1, it is memorised. Shape
            `[N]`.
        standard_errors: Of the values. Shape `[N]`.
        without: Mean output of the models without the example. Shape `[N]`.
    """

    values: NDArray[np.float64]
    standard_errors: NDArray[np.float64]
    without: NDArray[np.float64]


class Memorization(TableMethod):
    """The difference in means between models without an example and models with it.

    Feldman and Zhang, "What neural networks memorize and why" (2020), eq. 1 and 2, from one bank of
    subsets for all examples. Their measure is the error, `bank.losses("correct")`, for which a
    value lies between -1 and 1; any other will do.

    An estimate is unbiased whatever the model, and noisy: its standard error falls with the square
    root of the number of subsets, whose other examples vary as well. `Datamodels` takes these into
    account, and so needs fewer subsets for a table.

    Attributes:
        standard_errors: after `fit`, float64 [examples, N], of `scores()`.

    Example:

    ```python
    bank = ki.trainers.StoredBank("banks/fashion")
    memorized = ki.Memorization.of_training(bank.masks, bank.losses("correct", on="train"))
    (-memorized.values).argsort()[:10]  # the ten that are memorised most
    table = ki.Memorization().fit(bank.masks, bank.losses("correct"))
    sure = np.abs(table.scores()) > 3 * table.standard_errors
    ```
    """

    def __init__(self) -> None:
        self._differences: NDArray[np.float64] = np.zeros((0, 0))
        self.standard_errors: NDArray[np.float64] = np.zeros((0, 0))

    def _fit(self, masks: NDArray[np.bool_], outputs: NDArray[np.float64]) -> None:
        _check_balance(masks.sum(axis=0), len(masks))
        # Around their mean, so that squares lose no digits.
        outputs = outputs - outputs.mean(axis=0)
        held = masks.astype(np.float64)
        means, variances = [], []
        for weights in (1 - held, held):
            number = weights.sum(axis=0)
            mean = outputs.T @ weights / number
            squares = (outputs**2).T @ weights / number
            means.append(mean)
            # The variance of a mean, from n - 1 degrees of freedom.
            variances.append(np.maximum(squares - mean**2, 0) / (number - 1))
        self._differences = means[0] - means[1]
        self.standard_errors = np.sqrt(variances[0] + variances[1])

    def _table(self) -> NDArray[np.float64]:
        return self._differences

    @staticmethod
    def of_training(masks: ArrayLike, outputs: ArrayLike) -> MemorizedExamples:
        """Each training example's own value: the diagonal, without the table.

        Args:
            masks: True where an example was trained on. Shape `[subsets, N]`.
            outputs: Measured on the training examples, more being worse. Shape `[subsets, N]`.
        """
        masks, outputs = checked_retrainings(masks, outputs)
        if masks.shape != outputs.shape:
            raise ValueError(
                'Outputs must be those of the training examples (`on="train"`). Received: '
                f"{outputs.shape[1]} outputs of {masks.shape[1]} examples."
            )
        _check_balance(masks.sum(axis=0), len(masks))
        sides = [np.ma.masked_array(outputs, mask) for mask in (masks, ~masks)]
        without, within = (np.asarray(side.mean(axis=0)) for side in sides)
        errors = [side.var(axis=0, ddof=1) / side.count(axis=0) for side in sides]
        return MemorizedExamples(
            without - within, np.sqrt(np.asarray(errors[0] + errors[1])), without
        )


def _check_balance(number: NDArray[np.int64], count: int) -> None:
    bad = np.flatnonzero((number < 2) | (number > count - 2))
    if len(bad):
        raise ValueError(
            f"Each example must be in two subsets at least, and absent from two. Received: "
            f"{len(bad)} that are not, such as {bad[0]}, in {number[bad[0]]} of {count}. Draw more "
            "subsets."
        )
