"""Gram-Schmidt against a basis that is read in blocks of columns."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_influence.linalg.basis import Basis, HostBasis

# A vector that loses this much of its length to its block is cleaned of the basis once more.
_CANCELLED = 0.1


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


class Extension(NamedTuple):
    """New directions, orthonormal to a basis and to each other.

    Attributes:
        vectors: [new, p].
        rest: float64 [new, k], products of the given vectors with them.
        random: of each, whether it was drawn.
    """

    vectors: np.ndarray
    rest: np.ndarray
    random: tuple[bool, ...]


def extend(
    basis: Basis,
    vectors: np.ndarray,
    floor: float,
    draw: Callable[[int], np.ndarray] | None,
) -> Extension:
    """Orthonormal directions that a block of vectors adds to a basis.

    Args:
        basis: orthonormal rows.
        vectors: [k, p], orthogonal to them; they may depend on each other.
        floor: length up to which what is left of a vector is rounding.
        draw: a random vector [p] in place of the k-th one, where that is so; without it, fewer
            directions come back.
    """
    size = basis.shape[1]
    room = min(len(vectors), size - basis.shape[0])
    block = HostBasis(room, size, vectors.dtype)
    rest = np.zeros((room, len(vectors)))
    random: list[bool] = []
    for number, vector in enumerate(vectors):
        length = norm(vector)
        left = length
        if random:
            inside, vector = orthogonalize(block, vector)
            rest[: len(random), number] = inside
            left = norm(vector)
        if len(random) == room:
            continue  # The basis has all of space: the rest is rounding, whatever its length.
        if left > floor:
            rest[len(random), number] = left
            vector = vector / left
            if left < _CANCELLED * length:
                # What rounding left of the basis in it was small beside its length then.
                vector = _clean(basis, block, vector)
        elif draw is not None:
            vector = _clean(basis, block, draw(number))
        else:
            continue
        block.append(vector)
        random.append(not left > floor)
    return Extension(block[:], rest[: len(random)], tuple(random))


def _clean(basis: Basis, block: HostBasis, vector: np.ndarray) -> np.ndarray:
    """The direction of what of a vector is orthogonal to both."""
    _, vector = orthogonalize(basis, vector)
    if block.shape[0]:
        _, vector = orthogonalize(block, vector)
        _, vector = orthogonalize(basis, vector)
    return vector / norm(vector)
