"""The contract of a method that learns from retrainings what no gradient of one model tells."""

import abc
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


class TableMethod(abc.ABC):
    """A method that turns retrainings on subsets into one table of scores.

    It knows the training set it was fitted on and the examples that were measured, and no others:
    there is no model to ask about a new query. Scores have the sign and the unit of every other
    method: the rise of an example's loss when the training example is removed.
    """

    num_subsets: int | None = None

    def fit(self, masks: ArrayLike, outputs: ArrayLike) -> Self:
        """Learns the table.

        Args:
            masks: True where an example was trained on. Shape `[subsets, N]`.
            outputs: What was measured after training on each subset, more being worse, as
                `trainers.StoredBank.losses` gives it. Shape `[subsets, examples]`.

        Returns:
            The method itself.

        Raises:
            ValueError: shapes that do not match, a value that is not finite, too few subsets.
        """
        masks, outputs = checked_retrainings(masks, outputs)
        self._fit(masks, outputs)
        self.num_subsets = len(masks)
        return self

    @abc.abstractmethod
    def _fit(self, masks: NDArray[np.bool_], outputs: NDArray[np.float64]) -> None: ...

    @abc.abstractmethod
    def _table(self) -> NDArray[np.float64]:
        """Scores [examples, N]."""

    def scores(self) -> NDArray[np.float32]:
        """Influence of every training example on every example that was measured.

        Returns:
            float32 [examples, N]; positive for proponents.
        """
        self._check_fitted()
        return self._table().astype(np.float32)

    def _check_fitted(self) -> None:
        if self.num_subsets is None:
            raise ValueError(
                f"{type(self).__name__} is not fitted: call `fit(masks, outputs)` with what "
                "retraining on subsets gave."
            )


def checked_retrainings(
    masks: ArrayLike, outputs: ArrayLike
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    masks, outputs = np.asarray(masks), np.asarray(outputs, np.float64)
    if masks.dtype != np.bool_ or masks.ndim != 2 or outputs.ndim != 2:
        raise ValueError(
            "`masks` must be boolean [subsets, N] and `outputs` [subsets, examples]. Received: "
            f"{masks.dtype} {masks.shape} and {outputs.shape}."
        )
    if len(masks) != len(outputs) or len(masks) < 2:
        raise ValueError(
            "There must be as many `outputs` as `masks`, two at least. Received: "
            f"{len(outputs)} and {len(masks)}."
        )
    if not np.isfinite(outputs).all():
        row, column = np.argwhere(~np.isfinite(outputs))[0]
        raise ValueError(
            f"`outputs` must be finite. Received: {outputs[row, column]} of subset {row}, example "
            f"{column}."
        )
    return masks, outputs
