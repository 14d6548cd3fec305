"""Datamodels: what a model trained on a subset will say, as a linear function of the subset."""

from typing import NamedTuple

import joblib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import linear_model

from keras_influence.methods.table import TableMethod

# The smallest penalty that is tried, relative to the smallest that leaves no weight.
_SMALLEST = 1e-4


class _Fold(NamedTuple):
    """Subsets to fit on, centred, and their products, which all examples share."""

    rows: NDArray[np.bool_]
    inputs: NDArray[np.float64]
    mean: NDArray[np.float64]
    gram: NDArray[np.float64]


class Datamodels(TableMethod):
    """A sparse linear regression from subsets to outputs, for each example that was measured.

    Ilyas et al., "Datamodels: predicting predictions from training data" (2022), eq. 3: weights w
    and intercept b that minimise the mean over subsets of (outputs - mask'w - b)^2 / 2 plus
    penalty * |w|_1, where a cross-validation over the subsets chooses the penalty of each example.

    Use it where thousands of retrainings are affordable, as a bound on what methods from one model
    can reach: with enough subsets no linear method predicts better. With few, most weights are 0;
    below as many subsets as a query has influential examples, gradients know more.

    Args:
        penalties: how many are tried, from the smallest that leaves no weight down to 1e-4 of it.
        penalty: of every example, in units of the outputs; None chooses.
        l1_ratio: share of the penalty on the weights' magnitude; the rest is on half of their
            square (an elastic net). 1, the paper's, is right where few examples matter; toward 0
            where all matter a little.
        folds: of the cross-validation.
        jobs: threads; -1 for one a processor.
        seed: of the folds.

    Attributes:
        weights: after `fit`, float64 [examples, N]: what holding an example adds to the output.
        intercepts: float64 [examples].
        chosen: the penalty of each example, float64 [examples].

    Example:

    ```python
    bank = ki.trainers.StoredBank("banks/digits")
    losses = bank.losses("margin")
    datamodels = ki.Datamodels().fit(bank.masks[:1000], losses[:1000])
    datamodels.scores()  # [queries, N], positive for proponents
    held_out = ki.evaluation.linear_datamodeling_score(
        datamodels.scores(), bank.masks[1000:], losses[1000:]
    )
    ```
    """

    def __init__(
        self,
        penalties: int = 20,
        *,
        penalty: float | None = None,
        l1_ratio: float = 1.0,
        folds: int = 5,
        jobs: int = -1,
        seed: int = 0,
    ):
        if penalties < 1 or folds < 2 or not 0 < l1_ratio <= 1:
            raise ValueError(
                "`penalties` must be at least 1, `folds` 2, and `l1_ratio` above 0 and at most 1. "
                f"Received: {penalties}, {folds}, {l1_ratio}."
            )
        self.penalties = penalties
        self.penalty = penalty
        self.l1_ratio = l1_ratio
        self.folds = folds
        self.jobs = jobs
        self.seed = seed
        self.weights: NDArray[np.float64] = np.zeros((0, 0))
        self.intercepts: NDArray[np.float64] = np.zeros(0)
        self.chosen: NDArray[np.float64] = np.zeros(0)

    def _fit(self, masks: NDArray[np.bool_], outputs: NDArray[np.float64]) -> None:
        count = len(masks)
        if count < 2 * self.folds:
            raise ValueError(
                f"{self.folds} folds need {2 * self.folds} subsets at least. Received: {count}."
            )
        whole = _fold(masks, np.ones(count, bool))
        number = np.random.default_rng(self.seed).permutation(count) % self.folds
        folds = []
        if self.penalty is None:
            folds = [_fold(masks, number != k) for k in range(self.folds)]
        found = joblib.Parallel(n_jobs=self.jobs, prefer="threads")(
            joblib.delayed(self._fit_one)(whole, folds, masks, column) for column in outputs.T
        )
        self.weights = np.stack([weights for weights, _, _ in found])
        self.intercepts = np.array([intercept for _, intercept, _ in found])
        self.chosen = np.array([penalty for _, _, penalty in found])

    def _fit_one(
        self,
        whole: _Fold,
        folds: list[_Fold],
        masks: NDArray[np.bool_],
        outputs: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], float, float]:
        centred = outputs - outputs.mean()
        largest = np.abs(whole.inputs.T @ centred).max() / len(outputs) / self.l1_ratio
        if largest == 0:
            return np.zeros(masks.shape[1]), float(outputs.mean()), 0.0
        penalties = largest * np.geomspace(1, _SMALLEST, self.penalties)
        if self.penalty is not None:
            best = self.penalty
            path = np.array([best])
        else:
            errors = np.zeros(len(penalties))
            for fold in folds:
                weights, intercepts = self._path(fold, outputs, penalties)
                left = ~fold.rows
                errors += ((masks[left] @ weights + intercepts - outputs[left, None]) ** 2).sum(0)
            path = penalties[: int(errors.argmin()) + 1]
            best = float(path[-1])
        weights, intercepts = self._path(whole, outputs, path)
        return weights[:, -1], float(intercepts[-1]), best

    def _path(
        self, fold: _Fold, outputs: NDArray[np.float64], penalties: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights [N, penalties] and intercepts [penalties], each begun at the one before."""
        own = outputs[fold.rows]
        _, weights, _ = linear_model.enet_path(
            fold.inputs,
            own - own.mean(),
            l1_ratio=self.l1_ratio,
            alphas=penalties,
            precompute=fold.gram,
            max_iter=5_000,
        )
        return weights, own.mean() - fold.mean @ weights

    def _table(self) -> NDArray[np.float64]:
        # Removing an example takes away what holding it adds.
        return -self.weights

    def predict(self, masks: ArrayLike) -> NDArray[np.float64]:
        """Outputs after training on subsets that were not seen.

        Args:
            masks: Shape `[subsets, N]`.

        Returns:
            float64 [subsets, examples].
        """
        self._check_fitted()
        return np.asarray(masks, np.float64) @ self.weights.T + self.intercepts


def _fold(masks: NDArray[np.bool_], rows: NDArray[np.bool_]) -> _Fold:
    inputs = masks[rows].astype(np.float64)
    mean = inputs.mean(axis=0)
    inputs = np.asfortranarray(inputs - mean)
    return _Fold(rows, inputs, mean, inputs.T @ inputs)
