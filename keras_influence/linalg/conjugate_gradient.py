"""Conjugate gradients for many right-hand sides, which share each pass of the operator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class Solutions(NamedTuple):
    """What `conjugate_gradient` found, for each of k right-hand sides.

    Attributes:
        vectors: [k, p], the solutions.
        residuals: float64 [k], |b - A x| / |b|, computed from the solution, not carried along.
        iterations: int [k], steps that changed the solution.
        curvatures: float64 [k], the smallest quotient d'Ad / d'd of a direction d that was met.
        indefinite: bool [k], whether a direction without positive curvature was met.
    """

    vectors: tf.Tensor
    residuals: np.ndarray
    iterations: np.ndarray
    curvatures: np.ndarray
    indefinite: np.ndarray


def conjugate_gradient(
    products: Callable[[tf.Tensor], tf.Tensor],
    right: tf.Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    precondition: Callable[[tf.Tensor], tf.Tensor] | None = None,
    after: Callable[[], None] | None = None,
) -> Solutions:
    """Solves A x_j = b_j for each row by preconditioned conjugate gradients.

    (Hestenes & Stiefel 1952.) Each row has a recurrence of its own; a step asks the operator once
    for all rows that are not yet solved. A row that meets a direction d with d'Ad <= 0 stops there,
    as Steihaug (1983) stops: A is not positive definite, and a further step would make the
    quadratic model of the loss worse without limit. Where that is the first direction, the step is
    taken with the curvature's magnitude, so that the answer points along the (preconditioned)
    right-hand side.

    Args:
        products: rows [k, p] -> A v_j of each.
        right: [k, p].
        tolerance: of |b - A x| / |b|, at which a row counts as solved.
        max_iterations: steps at most.
        precondition: rows [k, p] -> M v_j with a symmetric positive M near the inverse of A.
        after: called after each step.

    Raises:
        FloatingPointError: a product that is not finite.
    """
    count = len(right)
    solution = np.zeros(right.shape, right.dtype.as_numpy_dtype)
    iterations = np.zeros(count, int)
    curvatures = np.full(count, np.inf)
    indefinite = np.zeros(count, bool)
    norms = row_norms(right)
    rows = np.flatnonzero(norms > 0)
    # Of the rows in hand, those that are no padding come first.
    real = len(rows)
    active = np.ones(real, bool)

    def preconditioned(residual: tf.Tensor) -> tf.Tensor:
        return residual if precondition is None else precondition(residual)

    x = tf.zeros([len(rows), right.shape[1]], right.dtype)
    r = tf.gather(right, rows)
    z = preconditioned(r)
    d = z
    rz = _dots(r, z)
    for step in range(max_iterations):
        if not active.any():
            break
        # Where half are done, on with the others alone; not at each that is done, for the operator
        # makes a graph for every number of rows.
        if active.sum() * 2 <= len(rows):
            solution[rows[:real]] = x[:real]
            real = int(active.sum())
            kept = _padded(np.flatnonzero(active))
            rows, rz = rows[kept], rz[kept]
            active = np.arange(len(kept)) < real
            x, r, d = (tf.gather(tensor, kept) for tensor in (x, r, d))
        image = products(d)
        along = _dots(d, image)
        if not np.isfinite(along[active]).all():
            raise FloatingPointError("A product of the curvature is not finite.")
        lengths = _dots(d, d)
        quotients = np.divide(along, lengths, out=np.zeros_like(along), where=lengths > 0)
        which = rows[active]
        curvatures[which] = np.minimum(curvatures[which], quotients[active])
        bad = active & (along <= 0)
        indefinite[rows[bad]] = True
        steps = np.divide(rz, along, out=np.zeros_like(rz), where=active & ~bad)
        if step == 0:
            steps = np.where(bad & (along < 0), -rz / np.where(along < 0, along, 1.0), steps)
        iterations[rows[steps != 0]] += 1
        x += _column(steps, x) * d
        r -= _column(steps, r) * image
        active &= ~bad & (row_norms(r) > tolerance * norms[rows])
        z = preconditioned(r)
        before, rz = rz, _dots(r, z)
        ratio = np.divide(rz, before, out=np.zeros_like(rz), where=active & (before != 0))
        d = z + _column(ratio, z) * d
        if after is not None:
            after()
    solution[rows[:real]] = x[:real]
    vectors = tf.convert_to_tensor(solution)
    residuals = np.zeros(count)
    if (norms > 0).any():
        rest = row_norms(right - products(vectors))
        residuals = np.divide(rest, norms, out=residuals, where=norms > 0)
    return Solutions(vectors, residuals, iterations, curvatures, indefinite)


def _padded(kept: np.ndarray) -> np.ndarray:
    """As many as the next power of two, the first one again and again."""
    size = 1 << (len(kept) - 1).bit_length()
    return np.concatenate([kept, np.full(size - len(kept), kept[0])])


def _dots(a: Any, b: Any) -> np.ndarray:
    return np.einsum("kp,kp->k", a, b, dtype=np.float64)


def row_norms(rows: Any) -> np.ndarray:
    """|v_j| of each row, float64 [k]."""
    return np.sqrt(_dots(rows, rows))


def _column(values: np.ndarray, like: tf.Tensor) -> tf.Tensor:
    return tf.constant(values[:, np.newaxis], like.dtype)
