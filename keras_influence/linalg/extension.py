"""What a block of vectors adds to a basis."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from keras_influence.linalg.space import Space

# A vector that loses this much of its length to its block is cleaned of the basis once more.
_CANCELLED = 0.1


class Extension(NamedTuple):
    """New directions, orthonormal to a basis and to each other.

    Attributes:
        vectors: the new ones, of the space.
        rest: float64 [new, k], products of the given vectors with them.
        random: of each, whether it was drawn.
    """

    vectors: list[Any]
    rest: np.ndarray
    random: tuple[bool, ...]


def extend(
    space: Space,
    vectors: Any,
    floor: float,
    draw: Callable[[int], np.ndarray] | None,
) -> Extension:
    """Orthonormal directions that a block of vectors adds to the rows of a space.

    Args:
        space: of orthonormal rows.
        vectors: of the space, orthogonal to the rows; they may depend on each other.
        floor: length up to which what is left of a vector is rounding.
        draw: a random vector [p] in place of the k-th one, where that is so; without it, fewer
            directions come back.
    """
    rows, size = space.shape
    room = min(len(vectors), size - rows)
    directions: list[Any] = []
    rest = np.zeros((room, len(vectors)))
    random: list[bool] = []
    for number, vector in enumerate(vectors):
        length = space.norm(vector)
        left = length
        if directions:
            inside, vector = space.apart(directions, vector)
            rest[: len(directions), number] = inside
            left = space.norm(vector)
        if len(directions) == room:
            continue  # The basis has all of space: the rest is rounding, whatever its length.
        if left > floor:
            rest[len(directions), number] = left
            vector = space.divided(vector, left)
            if left < _CANCELLED * length:
                # What rounding left of the basis in it was small beside its length then.
                vector = _clean(space, directions, vector)
        elif draw is not None:
            vector = _clean(space, directions, space.adopt(draw(number)))
        else:
            continue
        directions.append(vector)
        random.append(not left > floor)
    return Extension(directions, rest[: len(directions)], tuple(random))


def _clean(space: Space, directions: list[Any], vector: Any) -> Any:
    """The direction of what of a vector is orthogonal to both."""
    _, (vector,) = space.orthogonalize([vector])
    if directions:
        _, vector = space.apart(directions, vector)
        _, (vector,) = space.orthogonalize([vector])
    return space.divided(vector, space.norm(vector))
