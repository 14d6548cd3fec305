"""Gradients inside and outside of the span of an eigenbasis, wherever its vectors lie."""

from typing import Any

import numpy as np


def inside(vectors: Any, rows: Any) -> np.ndarray:
    """<row_i, u_j>, float64 [k, rank].

    Args:
        vectors: [rank, p], an array or a `linalg.Basis`.
        rows: [k, p].
    """
    rows = np.asarray(rows)
    if isinstance(vectors, np.ndarray):
        return (rows @ vectors.T).astype(np.float64)
    total = np.zeros((len(rows), vectors.shape[0]))
    for columns, block in vectors.blocks(vectors.shape[0]):
        total += rows[:, columns] @ block.T
    return total


def combined(vectors: Any, coefficients: np.ndarray, dtype: Any) -> np.ndarray:
    """sum_j coefficients_ij u_j, [k, p]."""
    coefficients = coefficients.astype(dtype)
    if isinstance(vectors, np.ndarray):
        return coefficients @ vectors
    result = np.empty((len(coefficients), vectors.shape[1]), dtype)
    for columns, block in vectors.blocks(vectors.shape[0]):
        result[:, columns] = coefficients @ block
    return result


def remainders(vectors: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows without their part in the span, [k, p], and the coefficients of that [k, rank].

    Subtracted twice, so that rounding leaves nothing of the span; what is left is zero where it is
    rounding itself.
    """
    rows = np.array(rows)
    noise = 10 * np.finfo(rows.dtype).eps * np.sqrt(rows.shape[1])
    lengths = np.linalg.norm(rows, axis=1)
    first = inside(vectors, rows)
    rows -= combined(vectors, first, rows.dtype)
    second = inside(vectors, rows)
    rows -= combined(vectors, second, rows.dtype)
    rows[np.linalg.norm(rows, axis=1) <= noise * lengths] = 0
    return rows, first + second


def principal(rows: np.ndarray, count: int) -> np.ndarray:
    """Orthonormal directions [<= count, p] that hold most of the rows' squares."""
    gram = (rows @ rows.T).astype(np.float64)
    values, vectors = np.linalg.eigh(gram)
    order = np.argsort(-values)[:count]
    epsilon = np.finfo(rows.dtype).eps
    order = order[values[order] > epsilon * len(rows) * max(values.max(initial=0.0), 0.0)]
    weights = (vectors[:, order] / np.sqrt(values[order])).T.astype(rows.dtype)
    directions = weights @ rows
    # Small values leave directions that are not quite orthogonal.
    q, _ = np.linalg.qr(directions.T)
    return np.ascontiguousarray(q.T)
