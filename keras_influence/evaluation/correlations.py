"""Correlations of columns, where a constant column has none."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# Relative to the largest value: sums of the same numbers in another order differ by so much.
_ROUNDING = 1e-12


def is_constant(columns: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which columns [n, columns] vary by no more than rounding."""
    return np.ptp(columns, axis=0) <= _ROUNDING * np.abs(columns).max(axis=0)


def pearson(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Correlation of each column of two arrays [n, columns]; NaN where either is constant."""
    first, second = (np.asarray(values, np.float64) for values in (first, second))
    known = ~(is_constant(first) | is_constant(second))
    a, b = (values[:, known] - values[:, known].mean(axis=0) for values in (first, second))
    # Scaled first: the square of a small loss may be zero.
    a, b = a / np.abs(a).max(axis=0), b / np.abs(b).max(axis=0)
    correlations = np.full(first.shape[1], np.nan)
    correlations[known] = (a * b).sum(axis=0) / np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    return correlations


def spearman(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Rank correlation of each column; ties share their mean rank; NaN as in `pearson`."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    correlations = pearson(stats.rankdata(first, axis=0), stats.rankdata(second, axis=0))
    correlations[is_constant(first) | is_constant(second)] = np.nan
    return correlations


def interval(values: ArrayLike, level: float) -> tuple[float, float]:
    """The ends of the share `level` of `values` in the middle."""
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, exclusive. Received: {level}.")
    tail = (1 - level) / 2
    low, high = np.quantile(np.asarray(values, np.float64), [tail, 1 - tail])
    return float(low), float(high)
