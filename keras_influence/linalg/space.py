"""What an iteration does with its vectors, wherever they are."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keras_influence.linalg.basis import Basis, HostBasis
from keras_influence.linalg.orthogonal import norm, orthogonalize


@runtime_checkable
class Space(Protocol):
    """Arithmetic on vectors [p], and rows of them: where they are is the space's own affair."""

    @property
    def basis(self) -> Any:
        """What the rows are in, for `ArnoldiResult`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows so far, p)."""

    @property
    def dtype(self) -> np.dtype:
        """Of the arithmetic."""

    def truncate(self, count: int) -> None:
        """Forgets the rows from `count` on."""

    def combine(self, combination: np.ndarray) -> None:
        """See `Basis.combine`."""

    def adopt(self, vector: np.ndarray) -> Any:
        """A vector of the host, as one of the space."""

    def operand(self, rows: slice, flat: bool) -> Any:
        """Rows as the operator takes them: the only one as [p], or [k, p]."""

    def images(self, found: Any, count: int, flat: bool) -> Any:
        """What the operator made of `count` rows, as vectors.

        Raises:
            ValueError: it is of another shape than they.
        """

    def norm(self, vector: Any) -> float: ...

    def divided(self, vector: Any, divisor: float) -> Any: ...

    def orthogonalize(self, vectors: Any) -> tuple[np.ndarray, Any]:
        """Products of vectors with the rows, float64 [rows so far, k], and what is left of them.

        By classical Gram-Schmidt, twice. The vectors given may be changed.
        """

    def apart(self, directions: Sequence[Any], vector: Any) -> tuple[np.ndarray, Any]:
        """The same of one vector and orthonormal directions, which are no rows: [directions]."""

    def append(self, vector: Any) -> None:
        """Adds a vector of norm one as a row."""


class HostSpace:
    """Arithmetic of numpy on the blocks of a `Basis`.

    Args:
        basis: of the rows.
        as_operand: makes of an array what the operator takes.
    """

    def __init__(self, basis: Basis, as_operand: Callable[[np.ndarray], Any] = np.asarray):
        self.basis = basis
        self._as_operand = as_operand

    @property
    def shape(self) -> tuple[int, int]:
        return self.basis.shape

    @property
    def dtype(self) -> np.dtype:
        return self.basis.dtype

    def truncate(self, count: int) -> None:
        self.basis.truncate(count)

    def combine(self, combination: np.ndarray) -> None:
        self.basis.combine(combination)

    def adopt(self, vector: np.ndarray) -> np.ndarray:
        return vector

    def operand(self, rows: slice, flat: bool) -> Any:
        block = self.basis[rows]
        return self._as_operand(block[0] if flat else block)

    def images(self, found: Any, count: int, flat: bool) -> np.ndarray:
        images = np.array(found, dtype=self.dtype)  # A copy: it is changed in place.
        shape = self.shape[1:] if flat else (count, *self.shape[1:])
        if images.shape != shape:
            raise ValueError(f"`matvec` must return shape {shape}. It returned {images.shape}.")
        return images.reshape(count, -1)

    def norm(self, vector: np.ndarray) -> float:
        return norm(vector)

    def divided(self, vector: np.ndarray, divisor: float) -> np.ndarray:
        return vector / divisor

    def orthogonalize(self, vectors: Any) -> tuple[np.ndarray, np.ndarray]:
        block = np.asarray(vectors)
        # One vector as such: its products are those of a matrix and a vector, with their own bits.
        coefficients, rest = orthogonalize(self.basis, block[0] if len(block) == 1 else block)
        return coefficients.reshape(-1, len(block)), rest.reshape(block.shape)

    def apart(
        self, directions: Sequence[np.ndarray], vector: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = HostBasis(len(directions), self.shape[1], self.dtype)
        for direction in directions:
            rows.append(direction)
        return orthogonalize(rows, vector)

    def append(self, vector: np.ndarray) -> None:
        self.basis.append(vector)


def orthogonality(basis: Any) -> float:
    """The largest entry of |Q Q' - I| of rows Q, which are read once."""
    if isinstance(basis, np.ndarray):
        gram = basis.astype(np.float64) @ basis.T
    elif hasattr(basis, "gram"):  # Arithmetic of its own, where its rows are.
        gram = basis.gram()
    else:
        count = basis.shape[0]
        products = basis.map_blocks(count, lambda _, block: block @ block.T)
        gram = sum(products, start=np.zeros((count, count)))
    return float(np.abs(gram - np.eye(len(gram))).max(initial=0))
