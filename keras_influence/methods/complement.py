"""What an eigenbasis leaves out, as one constant: the inverse on the complement is c (I - UU').

A truncated inverse counts the complement as zero, and predicts retraining worse than gradient
products do. The constant is an inverse Rayleigh quotient of random vectors' remainders
r = g - UU'g:

    c = sum |r|^2 / sum r'(H + damping I) r.

With gradients of training examples for g (`"rayleigh"`) it weighs the directions that gradients
use; with random signs (`"trace"`) it is the mean eigenvalue of the complement, whatever uses it.
By Jensen's inequality c |r|^2, summed over the g, is at most the exact sum r'(H + damping I)^-1 r:
the constant never overstates what it stands for.
"""

from typing import NamedTuple

import numpy as np

COMPLEMENTS = ("rayleigh", "trace", "damping", None)


class Complement(NamedTuple):
    """The constant, and how far to trust it.

    Attributes:
        constant: c: never negative, and at most 1 / damping.
        error: its standard error, by a jackknife over the probes; 0 for one that is not estimated.
        share: of the probes' squared length that lies in the complement.
        estimate: sum over the probes of g'M g, with M the inverse by eigenbasis and constant.
        lower: of the same sum for the exact inverse, a lower bound (Gauss quadrature).
        upper: an upper bound (Gauss-Radau); infinite where no eigenvalue bounds the complement's
            from below. Both as far as the kept pairs are eigenpairs.
        clipped: whether the probes met curvature that is not positive, or a constant above
            1 / damping.
    """

    constant: float
    error: float
    share: float
    estimate: float
    lower: float
    upper: float
    clipped: bool


def measured(
    coefficients: np.ndarray,
    squares: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *,
    weights: np.ndarray,
    damping: float,
    floor: float,
    constant: float | None = None,
) -> Complement:
    """The constant from m probes g = U coefficients + r, with r in the complement.

    Args:
        coefficients: float64 [m, rank].
        squares, first, second: float64 [m], r'r, r'Ar and r'AAr with A = H + damping I.
        weights: [rank], the inverse's eigenvalues on the basis.
        damping: the upper bound's inverse.
        floor: a lower bound on the damped eigenvalues of the complement; 0 where none is known.
        constant: c, where it is given and not to be estimated.
    """
    largest = 1.0 / damping if damping > 0 else np.inf
    c, error, clipped = 0.0, 0.0, False
    if constant is not None:
        c = constant
    elif squares.sum() > 0:
        c = _quotient(squares, first, largest)
        clipped = bool(first.sum() <= 0 or squares.sum() / first.sum() > largest)
        error = _jackknife(squares, first, largest)
    within = float((np.square(coefficients) @ weights).sum())
    mu = squares.sum(), first.sum(), second.sum()
    whole = float(np.square(coefficients).sum() + mu[0])
    return Complement(
        constant=c,
        error=error,
        share=float(mu[0] / whole) if whole else 0.0,
        estimate=within + c * float(mu[0]),
        lower=within + (float(mu[0] ** 2 / mu[1]) if mu[1] > 0 else 0.0),
        upper=within + _radau(*mu, floor),
        clipped=clipped,
    )


def _quotient(squares: np.ndarray, first: np.ndarray, largest: float) -> float:
    below = float(first.sum())
    if below <= 0:
        # Not positive: the most that the damping allows, or nothing.
        return largest if np.isfinite(largest) else 0.0
    return float(min(squares.sum() / below, largest))


def _jackknife(squares: np.ndarray, first: np.ndarray, largest: float) -> float:
    count = len(squares)
    if count < 2:
        return float("nan")
    without = np.array(
        [
            _quotient(np.delete(squares, each), np.delete(first, each), largest)
            for each in range(count)
        ]
    )
    return float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))


def _radau(mu0: float, mu1: float, mu2: float, floor: float) -> float:
    """Upper bound of the integral of 1/x for the measure with these moments, on x >= floor > 0.

    Two nodes, one of them at `floor` (Golub & Meurant 1994): weights that match mu0 and mu1, and
    the second node where they match mu2.
    """
    if mu0 <= 0:
        return 0.0
    if floor <= 0:
        return float("inf")
    above = mu1 - floor * mu0
    if above <= 0:
        return float(mu0 / floor)
    node = (mu2 - floor * mu1) / above
    if node <= floor:
        return float(mu0 / floor)
    weight = above / (node - floor)
    return float((mu0 - weight) / floor + weight / node)
