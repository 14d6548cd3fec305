"""What an iteration knows of its operator: the operator as seen from the basis, step by step."""

from typing import NamedTuple, Protocol

import numpy as np


class Step(NamedTuple):
    """What one step found: the products of H with a block of vectors of the basis.

    Attributes:
        coefficients: float64 [rows, block], products of each H q with the rows of the basis, of
            which the last `block` are the q themselves. No columns where the products were zero and
            tell nothing.
        rest: float64 [new, block], of the part of each H q outside the basis: its products with
            the directions that are new.
        image_norm: largest |H q|.
        random: of those new directions that the basis was given, whether each was drawn at random,
            because a product left no part that is more than rounding.
        exhausted: whether H is zero on all that is orthogonal to the basis.
        last: whether the iteration ended here, before its end.
    """

    coefficients: np.ndarray
    rest: np.ndarray
    image_norm: float
    random: tuple[bool, ...]
    exhausted: bool = False
    last: bool = False

    @property
    def num_products(self) -> int:
        """Products that the result rests on."""
        return self.coefficients.shape[1]


class Restart(NamedTuple):
    """A basis that was exchanged for its best part and the vectors that were to come next.

    Attributes:
        matrix: float64 [kept + block, kept], products of the new rows with H times the kept ones.
    """

    matrix: np.ndarray

    @property
    def num_products(self) -> int:
        return 0


class Journal(Protocol):
    """Steps that are done, kept where a later process finds them."""

    def steps(self) -> list[Step | Restart]:
        """Those that were recorded, in order."""

    def record(self, step: Step | Restart) -> None:
        """Keeps a step; the basis holds its vectors already."""


class Projection(NamedTuple):
    """An operator H, as seen from an orthonormal basis of which some rows were multiplied by it.

    Attributes:
        matrix: float64 [rows + outside, multiplied]: products of the basis, and of the directions
            outside it that have a part in its products, with H times its first rows.
        num_rows: vectors in the basis: the multiplied ones, and those that come next.
        random: of each of the latter, whether it was drawn at random.
        operator_norm: the largest |H q| so far.
        exhausted, last: see `Step`.
        num_products, num_restarts: so far.
    """

    matrix: np.ndarray
    num_rows: int
    random: tuple[bool, ...]
    operator_norm: float = 0.0
    exhausted: bool = False
    last: bool = False
    num_products: int = 0
    num_restarts: int = 0

    @classmethod
    def begin(cls, random: tuple[bool, ...]) -> "Projection":
        """Before the first product, with a block of vectors to start from."""
        return cls(np.zeros((len(random), 0)), len(random), random)

    @property
    def multiplied(self) -> int:
        return self.matrix.shape[1]

    @property
    def waiting(self) -> int:
        """Vectors whose products come next."""
        return self.num_rows - self.multiplied

    def after(self, step: Step | Restart) -> "Projection":
        if isinstance(step, Restart):
            return self._replace(
                matrix=step.matrix,
                num_rows=len(step.matrix),
                num_restarts=self.num_restarts + 1,
            )
        rows, done, products = self.num_rows, self.multiplied, step.num_products
        matrix = np.zeros((rows + len(step.rest), done + products))
        matrix[:rows, :done] = self.matrix
        matrix[:rows, done:] = step.coefficients
        matrix[rows:, done:] = step.rest
        return self._replace(
            matrix=matrix,
            num_rows=rows + len(step.random),
            random=step.random,
            operator_norm=max(self.operator_norm, step.image_norm),
            exhausted=step.exhausted,
            last=step.last,
            num_products=self.num_products + products,
        )
