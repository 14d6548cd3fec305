"""What becomes of eigenvalues below zero, which a minimum has none of."""

import numpy as np

NEGATIVE_EIGENVALUES = ("drop", "keep", "absolute")


def check_negative(negative_eigenvalues: str) -> None:
    if negative_eigenvalues not in NEGATIVE_EIGENVALUES:
        raise ValueError(
            f"`negative_eigenvalues` must be one of {NEGATIVE_EIGENVALUES}. "
            f"Received: {negative_eigenvalues!r}."
        )


def inverses(values: np.ndarray, damping: float, negative: str, epsilon: float) -> np.ndarray:
    """1 / (lambda + damping) of each eigenvalue, and 0 for those that are left out; float64.

    Args:
        values: the eigenvalues.
        negative: one of `NEGATIVE_EIGENVALUES`.
        epsilon: rounding of the products that the eigenvalues come from.
    """
    values = np.asarray(values, np.float64)
    # Without damping, an eigenvalue that is rounding of the largest has no inverse.
    kept = np.ones(len(values), bool)
    rounding = 10 * epsilon * np.max(np.abs(values), initial=0.0)
    near_zero = np.abs(values) <= rounding
    if negative == "drop":
        kept &= (values > 0) | near_zero
    elif negative == "absolute":
        values = np.abs(values)
    damped = values + damping
    kept &= ~near_zero | (damping > rounding)
    kept &= damped != 0
    return np.divide(1.0, damped, out=np.zeros_like(damped), where=kept)
