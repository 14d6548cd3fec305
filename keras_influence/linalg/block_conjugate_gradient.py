"""Block conjugate gradients: every right-hand side is solved in the Krylov space of all of them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_influence.linalg.conjugate_gradient import Solutions, conjugate_gradient, row_norms

Rows = Callable[[tf.Tensor], tf.Tensor]

# Columns of vectors that are multiplied in float64 at a time: few enough for a processor's cache.
_COLUMNS = 2**13
# Of the squares of a block's orthogonal parts, relative to the largest: what float64 can tell of 0.
_ROUNDING = 1e-12


class _Factors(NamedTuple):
    """R = C'Q of rows [k, p], with Q M Q' = I for the preconditioner M.

    Attributes:
        basis: Q, [m, p], m at most k.
        preconditioned: Q M, [m, p].
        coefficients: C, float64 [m, k].
    """

    basis: tf.Tensor
    preconditioned: tf.Tensor
    coefficients: np.ndarray


def block_conjugate_gradient(
    products: Rows,
    right: tf.Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    precondition: Rows | None = None,
    after: Callable[[], None] | None = None,
) -> Solutions:
    """Solves A x_j = b_j for all rows together by preconditioned block conjugate gradients.

    A step minimises each row's error over the space that all rows' residuals have spanned (O'Leary
    1980), so that one row's outliers are gone for all: there are as many fewer steps as rows have
    eigenvectors in common, and k rows of p numbers take, but for rounding, p / k of them at most.
    Directions are orthogonalised and combined as in Dubrulle (2001, "BCGrQ"), and those that depend
    on others are left out. What rounding has cost is seen in the residuals themselves, and solved
    for again.

    A that has a direction d with d'Ad <= 0 is not positive definite: all rows are then solved each
    by itself, as `conjugate_gradient` says.

    Args:
        products: rows [m, p] -> A v_j of each, m at most k.
        right: [k, p].
        tolerance: of |b - A x| / |b|, at which a row counts as solved.
        max_iterations: steps at most.
        precondition: rows [m, p] -> M v_j with a symmetric positive M near the inverse of A.
        after: called after each step.

    Raises:
        FloatingPointError: a product that is not finite.
    """

    def alone() -> Solutions:
        return conjugate_gradient(
            products,
            right,
            tolerance=tolerance,
            max_iterations=max_iterations,
            precondition=precondition,
            after=after,
        )

    norms = row_norms(right)
    rows = np.flatnonzero(norms > 0)
    if len(rows) < 2:
        return alone()
    multiply = _of_few_sizes(products, len(rows))
    prepare = None if precondition is None else _of_few_sizes(precondition, len(rows))
    scaled = _combined(np.diag(1 / norms[rows]), tf.gather(right, rows))
    solution, residual, left = tf.zeros_like(scaled), scaled, np.ones(len(rows))
    iterations, smallest = np.zeros(len(rows), int), np.inf
    while iterations.max() < max_iterations and (left > tolerance).any():
        factors = _factors(residual, prepare)
        directions = factors.preconditioned
        before = left
        while iterations.max() < max_iterations and (left > tolerance).any() and len(directions):
            images = multiply(directions)
            inner = _gram(directions, images)
            if not np.isfinite(inner).all():
                raise FloatingPointError("A product of the curvature is not finite.")
            values, vectors = np.linalg.eigh((inner + inner.T) / 2)
            rounding = len(values) * np.finfo(right.dtype.as_numpy_dtype).eps * values[-1]
            if values[0] < -rounding or values[-1] <= 0:
                return alone()
            smallest = min(smallest, np.min(np.diag(inner) / np.square(row_norms(directions))))
            # Of directions whose curvature is within its rounding nothing is known: no step.
            steep = values > rounding
            inverse = (vectors[:, steep] / values[steep]) @ vectors[:, steep].T
            iterations[left > tolerance] += 1
            solution += _combined(factors.coefficients.T @ inverse, directions)
            rest = _factors(factors.basis - _combined(inverse, images), prepare)
            directions = rest.preconditioned + _combined(rest.coefficients, directions)
            factors = rest._replace(coefficients=rest.coefficients @ factors.coefficients)
            overlaps = factors.coefficients
            # The basis is orthonormal in the preconditioner's product: without one, in the plain.
            if prepare is not None:
                overlaps = _gram(factors.basis, factors.basis) @ overlaps
            left = np.sqrt(np.maximum(np.sum(factors.coefficients * overlaps, axis=0), 0))
            if after is not None:
                after()
        residual = scaled - multiply(solution)
        left = row_norms(residual)
        if left.max() > before.max() / 2:
            break
    vectors = np.zeros(right.shape, right.dtype.as_numpy_dtype)
    vectors[rows] = _combined(np.diag(norms[rows]), solution)
    return Solutions(
        tf.convert_to_tensor(vectors),
        _spread(left, rows, len(norms), 0.0),
        _spread(iterations, rows, len(norms), 0),
        _spread(np.full(len(rows), smallest), rows, len(norms), np.inf),
        np.zeros(len(norms), bool),
    )


def _spread(values: np.ndarray, rows: np.ndarray, count: int, elsewhere: float) -> np.ndarray:
    spread = np.full(count, elsewhere, values.dtype)
    spread[rows] = values
    return spread


def _factors(rows: tf.Tensor, precondition: Rows | None) -> _Factors:
    preconditioned = rows if precondition is None else precondition(rows)
    squares = _gram(rows, preconditioned)
    values, vectors = np.linalg.eigh((squares + squares.T) / 2)
    # What is less depends on the other rows; if not, it is in the residual that is computed anew.
    epsilon = max(np.finfo(rows.dtype.as_numpy_dtype).eps, _ROUNDING)
    kept = values > epsilon * max(values[-1], 0)
    roots = np.sqrt(values[kept])[:, np.newaxis]
    inverse, coefficients = vectors[:, kept].T / roots, vectors[:, kept].T * roots
    basis = _combined(inverse, rows)
    if precondition is None:
        return _Factors(basis, basis, coefficients)
    return _Factors(basis, _combined(inverse, preconditioned), coefficients)


def _of_few_sizes(function: Rows, most: int) -> Rows:
    """`function` of at most `most` rows, with zeros for the rest of them or of their halves.

    It makes a graph for each number of rows.
    """
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))

    def padded(rows: tf.Tensor) -> tf.Tensor:
        count = len(rows)
        size = min(size for size in sizes if size >= count)
        if size == count:
            return function(rows)
        return function(tf.pad(rows, [[0, size - count], [0, 0]]))[:count]

    return padded


def _combined(coefficients: np.ndarray, rows: tf.Tensor) -> tf.Tensor:
    return tf.matmul(tf.constant(coefficients, rows.dtype), rows)


def _gram(a: tf.Tensor, b: tf.Tensor) -> np.ndarray:
    """<a_i, b_j>, float64."""
    same = a is b
    left = np.asarray(a)
    right = left if same else np.asarray(b)
    total = np.zeros((len(left), len(right)))
    for start in range(0, left.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        columns = left[:, part].astype(np.float64)
        # One array twice is what BLAS takes half the products for.
        total += columns @ (columns if same else right[:, part].astype(np.float64)).T
    return total
