"""Gram-Schmidt against a basis that is read in blocks of columns."""

import numpy as np

from keras_influence.linalg.basis import Basis


def orthogonalize(basis: Basis, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtracts from `vectors`, in place, their parts in the span of `basis`, twice.

    The second pass's inner products are taken block by block while the first pass subtracts, so
    that the basis is read three times, not four.

    Args:
        basis: orthonormal rows.
        vectors: [p], or several, [k, p].

    Returns:
        The coefficients, [rows] or [rows, k], and the vectors.
    """
    count = basis.shape[0]
    first = np.zeros((count, *vectors.shape[:-1]), vectors.dtype)
    for columns, block in basis.blocks(count):
        first += block @ vectors[..., columns].T
    second = np.zeros_like(first)
    for columns, block in basis.blocks(count):
        vectors[..., columns] -= first.T @ block
        second += block @ vectors[..., columns].T
    for columns, block in basis.blocks(count):
        vectors[..., columns] -= second.T @ block
    return first.astype(np.float64) + second, vectors


def norm(vector: np.ndarray) -> float:
    # In float64: the square of a float32 below 1e-19 is zero, and a long sum loses digits.
    return float(np.sqrt(np.einsum("i,i->", vector, vector, dtype=np.float64)))
