"""Eigenpairs of an operator that is known on a space of vectors."""

from typing import Any, NamedTuple

import numpy as np

from keras_influence.linalg.basis import Basis, HostBasis, rounding_of


class ArnoldiResult(NamedTuple):
    """What `arnoldi` found: H restricted to the Krylov space, and a basis of that space.

    Attributes:
        matrix: float64 [rows, rows], Q H Q'. Of a single start and without restarts, upper
            Hessenberg: tridiagonal up to rounding and asymmetry of the operator.
        basis: [rows, p], orthonormal rows Q: the `Basis` that was given, which may hold further
            rows, or an array.
        outside: float64 [directions, rows], the part of H Q' outside the basis, in orthonormal
            directions. None, or zeros, when the basis spans an invariant subspace.
        num_iterations: products that were asked for: at least those that were made.
        num_products: products that were made.
        num_restarts: times that the basis was cut down to its best part.
    """

    matrix: np.ndarray
    basis: Any
    outside: np.ndarray
    num_iterations: int
    num_products: int
    num_restarts: int

    @property
    def remainder(self) -> float:
        """Norm of the part of H Q' outside the basis (Frobenius)."""
        return float(np.linalg.norm(self.outside))

    @property
    def asymmetry(self) -> float:
        """|T - T'| / |T| (Frobenius): rounding for a symmetric operator, more for another one."""
        norm = np.linalg.norm(self.matrix)
        return float(np.linalg.norm(self.matrix - self.matrix.T) / norm) if norm else 0.0


class Eigenbasis(NamedTuple):
    """Eigenpairs of largest magnitude.

    Attributes:
        values: float64 [rank], eigenvalues sorted by falling magnitude.
        vectors: [rank, p], unit eigenvectors as rows: an array, or a `Basis`.
        residuals: float64 [rank], |H u - lambda u| of each pair. Some eigenvalue of H lies within
            this distance of `values[i]`.
    """

    values: np.ndarray
    vectors: Any
    residuals: np.ndarray


class RitzPairs(NamedTuple):
    """Eigenpairs of largest magnitude of an operator restricted to a space.

    Attributes:
        values: float64 [rank], by falling magnitude.
        inner: float64 [rows, rank], eigenvectors as combinations of the rows of the basis.
        residuals: float64 [rank], |H u - lambda u|.
    """

    values: np.ndarray
    inner: np.ndarray
    residuals: np.ndarray

    def converged(self, rank: int, tolerance: float) -> bool:
        """Whether there are `rank` pairs, with residuals of so much of the largest eigenvalue."""
        within = self.residuals[:rank] <= tolerance * np.abs(self.values[:1])
        return len(self.values) >= rank and bool(np.all(within))


def ritz_pairs(
    matrix: np.ndarray, outside: np.ndarray, rank: int, rounding: float = 0.0
) -> RitzPairs:
    """The `rank` pairs of largest magnitude, or all of fewer.

    Args:
        matrix: [rows, rows], Q H Q'.
        outside: [directions, rows], the part of H Q' outside the basis.
        rank: pairs.
        rounding: share of a row of the basis that was lost where it was stored.
    """
    values, inner = np.linalg.eigh(0.5 * (matrix + matrix.T))
    order = np.argsort(-np.abs(values), kind="stable")[:rank]
    values, inner = values[order], inner[:, order]
    # H Q'S - Q'S diag(values) = Q'(T S - S diag(values)) + outside S, in orthogonal directions.
    within = np.linalg.norm(matrix @ inner - inner * values, axis=0)
    beyond = np.linalg.norm(outside @ inner, axis=0)
    # Of what a product adds to the basis, the rounding is outside of it too.
    lost = rounding * np.linalg.norm(np.tril(matrix, -1) @ inner, axis=0)
    return RitzPairs(values, inner, np.hypot(np.hypot(within, beyond), lost))


def distill(result: ArnoldiResult, rank: int, vectors: Basis | None = None) -> Eigenbasis:
    """The `rank` eigenpairs of largest magnitude that a Krylov space holds.

    Args:
        result: from `arnoldi`.
        rank: pairs to keep. Where the iteration ended early, because the operator has fewer
            non-zero eigenvalues, fewer pairs come back.
        vectors: where to put the eigenvectors, with room for as many rows as there are pairs; an
            array by default.

    Raises:
        ValueError: `rank` below 1, or above the iterations that `arnoldi` was asked for.
    """
    if not 1 <= rank <= result.num_iterations:
        raise ValueError(
            f"`rank` must be between 1 and the number of iterations, {result.num_iterations}. "
            f"Received: rank={rank}."
        )
    rounding = rounding_of(result.basis)
    values, inner, residuals = ritz_pairs(result.matrix, result.outside, rank, rounding)
    combination = inner.T.astype(result.basis.dtype)
    kept = vectors
    if kept is None:
        kept = HostBasis(len(values), result.basis.shape[1], result.basis.dtype)
    _combine(combination, result.basis, kept)
    return Eigenbasis(values, kept[:] if vectors is None else kept, residuals)


def _combine(combination: np.ndarray, basis: Any, out: Basis) -> None:
    """Rows of `basis`, combined, into `out`."""
    if isinstance(basis, np.ndarray):
        out.write(slice(None), combination @ basis)
        return
    if hasattr(basis, "combinations"):  # Arithmetic of its own, where its rows are.
        out.write(slice(None), basis.combinations(combination))
        return
    for columns, block in basis.blocks(combination.shape[1]):
        out.write(columns, combination @ block)
