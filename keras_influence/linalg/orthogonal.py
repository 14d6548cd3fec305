"""Gram-Schmidt against a basis that is read in blocks of columns."""

import functools

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
    zero = np.zeros((count, *vectors.shape[:-1]), vectors.dtype)

    def products(columns: slice, block: np.ndarray) -> np.ndarray:
        return block @ vectors[..., columns].T

    def subtract(coefficients: np.ndarray, columns: slice, block: np.ndarray) -> None:
        vectors[..., columns] -= coefficients.T @ block

    def subtract_and_multiply(columns: slice, block: np.ndarray) -> np.ndarray:
        subtract(first, columns, block)
        return products(columns, block)

    first = sum(basis.map_blocks(count, products), start=zero)
    second = sum(basis.map_blocks(count, subtract_and_multiply), start=zero)
    basis.map_blocks(count, functools.partial(subtract, second))
    return first.astype(np.float64) + second, vectors


def norm(vector: np.ndarray) -> float:
    # In float64: the square of a float32 below 1e-19 is zero, and a long sum loses digits.
    return float(np.sqrt(np.einsum("i,i->", vector, vector, dtype=np.float64)))
