"""Eigenpairs of a symmetric matrix: all of them, or the largest of one that is wide."""

from typing import NamedTuple

import numpy as np
import scipy.linalg

# Columns beyond those wanted, and products with the matrix: Halko, Martinsson & Tropp (2011),
# algorithm 4.4.
_SPARE = 64
_PRODUCTS = 2


class Leading(NamedTuple):
    """Leading eigenpairs of a positive semi-definite matrix [m, m].

    Attributes:
        values: float64 [r], falling.
        vectors: [m, r], orthonormal, in the matrix's dtype.
        rest: sum of the other m - r eigenvalues.
        spread: of how many alike they are the sum: their sum's square by the sum of their squares.
    """

    values: np.ndarray
    vectors: np.ndarray
    rest: float
    spread: float


def leading_eigenpairs(matrix: np.ndarray, rank: int, seed: int = 0) -> Leading:
    """The `rank` largest eigenpairs, in float64 where these are all.

    Of a wider matrix they are found in the span of two products with a random block: the largest
    are then right to many digits, and the smallest of them, among whose likes the cut falls, span
    nearly as much.

    Args:
        matrix: symmetric and positive semi-definite, [m, m].
        rank: at least 1.
        seed: of the random block.
    """
    width = len(matrix)
    if rank + _SPARE >= width:
        values, vectors = scipy.linalg.eigh(matrix.astype(np.float64))
        kept = slice(None, -rank - 1 if rank < width else None, -1)
        found = np.maximum(values[kept], 0), vectors[:, kept].astype(matrix.dtype)
        return Leading(*found, *_rest(matrix, found[0]))
    block = np.random.default_rng(seed).standard_normal((width, rank + _SPARE)).astype(matrix.dtype)
    for _ in range(_PRODUCTS):
        block = scipy.linalg.qr(matrix @ block, mode="economic", overwrite_a=True)[0]
    small = block.T @ (matrix @ block)
    values, inside = scipy.linalg.eigh(small.astype(np.float64))
    values = np.maximum(values[: -rank - 1 : -1], 0)
    vectors = block @ np.ascontiguousarray(inside[:, : -rank - 1 : -1]).astype(matrix.dtype)
    return Leading(values, vectors, *_rest(matrix, values))


def _rest(matrix: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Sum and spread of the eigenvalues beyond those given, from the trace and the norm."""
    left_out = len(matrix) - len(values)
    rest = float(np.trace(matrix, dtype=np.float64) - values.sum())
    if left_out == 0 or rest <= 0:
        return 0.0, float(left_out)
    squares = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64) - np.sum(values**2))
    # Within what is possible, should rounding have taken the squares.
    return rest, float(np.clip(rest**2 / max(squares, 1e-300), 1.0, left_out))
