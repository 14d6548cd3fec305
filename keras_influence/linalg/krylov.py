"""The Arnoldi iteration for a symmetric operator known only through its products with vectors.

Algorithm 1 of Schioppa et al., "Scaling Up Influence Functions" (AAAI 2022), with three repairs:
every new vector is orthogonalised twice (once, in float32, leaves |Q'Q - I| of 0.2 to 0.3 after 200
steps, and negative eigenvalues of positive matrices); breakdown is measured against the operator's
own size; and an invariant subspace is left by a restart, so that repeated eigenvalues are found.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from keras_influence.linalg.basis import Basis, HostBasis


class ArnoldiResult(NamedTuple):
    """What `arnoldi` found: H restricted to the Krylov space, and a basis of that space.

    Attributes:
        matrix: float64 [steps, steps], Q H Q'. Upper Hessenberg; tridiagonal up to rounding and
            asymmetry of the operator.
        basis: [steps, p], orthonormal rows Q: the `Basis` that was given, or an array.
        remainder: norm of the part of H q_last that lies outside the basis: the residual of an
            eigenpair is this times the last entry of its eigenvector of `matrix`. Zero when the
            basis spans an invariant subspace.
        num_iterations: steps that were asked for: at least the steps taken.
    """

    matrix: np.ndarray
    basis: Any
    remainder: float
    num_iterations: int

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


class Step(NamedTuple):
    """What one step of the iteration found: all that the next ones need, beside the basis.

    Attributes:
        coefficients: float64 [step + 1], products of H q_step with the basis.
        remainder: norm of the part of H q_step outside the basis.
        image_norm: |H q_step|.
        restarted: whether that part was rounding, and a random vector came next.
        last: whether the iteration ended with this step, before its end.
    """

    coefficients: np.ndarray
    remainder: float
    image_norm: float
    restarted: bool
    last: bool = False


class Journal(Protocol):
    """Steps that are done, kept where a later process finds them."""

    def steps(self) -> list[Step]:
        """Those that were recorded, in order."""

    def record(self, step: Step) -> None:
        """Keeps a step; the basis holds its vectors already."""


def _orthogonalize(basis: Basis, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtracts from `vector`, in place, its part in the span of `basis`, by Gram-Schmidt twice.

    Returns the coefficients and the vector. The second pass's inner products are taken block by
    block while the first pass subtracts, so that the basis is read three times, not four.
    """
    count = basis.shape[0]
    first = np.zeros(count, vector.dtype)
    for columns, block in basis.blocks(count):
        first += block @ vector[columns]
    second = np.zeros_like(first)
    for columns, block in basis.blocks(count):
        vector[columns] -= first @ block
        second += block @ vector[columns]
    for columns, block in basis.blocks(count):
        vector[columns] -= second @ block
    return first.astype(np.float64) + second, vector


def _norm(vector: np.ndarray) -> float:
    # In float64: the square of a float32 below 1e-19 is zero, and a long sum loses digits.
    return float(np.sqrt(np.einsum("i,i->", vector, vector, dtype=np.float64)))


def arnoldi(
    matvec: Callable[[Any], Any],
    start: Any,
    num_iterations: int,
    *,
    seed: int = 0,
    basis: Basis | None = None,
    journal: Journal | None = None,
) -> ArnoldiResult:
    """Builds an orthonormal basis of the Krylov space of a symmetric operator H.

    Where the space turns out to be invariant before `num_iterations` steps (repeated eigenvalues, a
    rank below the number of steps), the iteration goes on from a random vector orthogonal to all
    before it; if H maps that one to nothing, H is zero on everything that is left, and the
    iteration stops.

    Args:
        matvec: v -> H v on flat vectors [p]. It is handed what `start` is: numpy arrays for a numpy
            array, tensors for a `tf.Tensor`.
        start: [p], any non-zero norm; its float dtype is the dtype of the basis.
        num_iterations: products with H, at least 1. At most p are made.
        seed: seeds the restarts.
        basis: where the vectors go, of the dtype of `start`; an array in memory by default, which
            takes `num_iterations * p` numbers.
        journal: of the steps. Those that it holds, with their vectors in `basis`, are not done
            again, and those that follow have the bits that they would have had.

    Returns:
        An `ArnoldiResult` of at most `num_iterations` steps.

    Raises:
        ValueError: a start vector that is zero, not finite or not flat; a product of another shape;
            fewer than one iteration.
        FloatingPointError: a product that is not finite.

    Example:

    >>> result = arnoldi(lambda v: matrix @ v, np.ones(100), num_iterations=50)
    >>> values, vectors, residuals = distill(result, rank=10)
    """
    as_given = _like(start)
    vector = np.array(start)  # A copy: it is scaled in place.
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"`start` must be a flat vector [p]. Received shape {vector.shape}.")
    if not np.issubdtype(vector.dtype, np.floating) or vector.dtype.itemsize < 4:
        vector = vector.astype(np.float32)
    if num_iterations < 1:
        raise ValueError(f"`num_iterations` must be at least 1. Received: {num_iterations}.")
    norm = _norm(vector)
    if not 0 < norm < np.inf:
        raise ValueError(f"`start` must have a finite norm above zero. Received norm: {norm}.")
    size = vector.size
    steps = min(num_iterations, size)
    # What is left after a product is subtracted from its own projection is rounding when it is
    # below a few units in the last place of the product, times the growth of a sum of `size` terms.
    tolerance = 10 * np.finfo(vector.dtype).eps * np.sqrt(size)

    given = basis
    if basis is None:
        basis = HostBasis(steps, size, vector.dtype)
    if basis.dtype != vector.dtype or basis.shape[1] != size:
        raise ValueError(
            f"`basis` must hold vectors [{size}] of {vector.dtype}. Received: vectors "
            f"[{basis.shape[1]}] of {basis.dtype}."
        )
    done = journal.steps()[:steps] if journal is not None else []
    if done:
        # One vector more than steps, but for the last step's.
        needed = len(done) if done[-1].last or len(done) == steps else len(done) + 1
        if basis.shape[0] < needed:
            raise ValueError(
                f"The journal has {len(done)} steps, whose vectors `basis` must hold: {needed}. "
                f"It holds {basis.shape[0]}."
            )
        basis.truncate(needed)
    else:
        basis.truncate(0)
        basis.append(vector / norm)
    operator_norm = max((step.image_norm for step in done), default=0.0)
    restarted = done[-1].restarted if done else False
    for number in range(len(done), steps):
        if done and done[-1].last:
            break
        image = np.array(matvec(as_given(basis[number : number + 1][0])), dtype=vector.dtype)
        if image.shape != (size,):
            raise ValueError(f"`matvec` must return shape ({size},). It returned {image.shape}.")
        image_norm = _norm(image)
        if not np.isfinite(image_norm):
            raise FloatingPointError(
                f"The operator's product at step {number} of {steps} is not finite. A loss or a "
                "gradient overflowed, or the model's weights hold NaN."
            )
        if restarted and image_norm <= tolerance * operator_norm:
            # A random vector outside the invariant space is mapped to nothing: so is all of it.
            done.append(Step(np.zeros(number + 1), 0.0, image_norm, False, last=True))
        else:
            operator_norm = max(operator_norm, image_norm)
            coefficients, rest = _orthogonalize(basis, image)
            remainder = _norm(rest)
            restarted = bool(remainder <= tolerance * operator_norm)
            if number + 1 < steps:
                if restarted:
                    # Of the step's own seed, so that one that begins here draws the same.
                    random = np.random.default_rng([seed, number])
                    rest = random.standard_normal(size).astype(vector.dtype)
                    _, rest = _orthogonalize(basis, rest)
                basis.append(rest / _norm(rest))
            done.append(Step(coefficients, remainder, image_norm, restarted))
        if journal is not None:
            journal.record(done[-1])
    return _result(done, basis if given is not None else basis[:], steps, num_iterations)


def _result(done: list[Step], basis: Any, steps: int, num_iterations: int) -> ArnoldiResult:
    if done[-1].last:
        done = done[:-1]
    count = len(done)
    matrix = np.zeros((count, count))
    for number, step in enumerate(done):
        matrix[: number + 1, number] = step.coefficients
        if number + 1 < count and not step.restarted:
            matrix[number + 1, number] = step.remainder
    if isinstance(basis, np.ndarray):
        basis = basis[:count]
    # Short of the steps that were asked for, the last one met an invariant space.
    remainder = 0.0 if done[-1].restarted or count < steps else done[-1].remainder
    return ArnoldiResult(matrix, basis, remainder, num_iterations)


def _like(start: Any) -> Callable[[np.ndarray], Any]:
    if isinstance(start, np.ndarray):
        return lambda vector: vector
    import tensorflow as tf

    return tf.convert_to_tensor if tf.is_tensor(start) else lambda vector: vector


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
    values, inner = np.linalg.eigh(0.5 * (result.matrix + result.matrix.T))
    order = np.argsort(-np.abs(values), kind="stable")[:rank]
    values, inner = values[order], inner[:, order]
    # H Q'S - Q'S diag(values) = Q'(T S - S diag(values)) + remainder * q_next * (last row of S).
    inside = np.linalg.norm(result.matrix @ inner - inner * values, axis=0)
    residuals = np.hypot(inside, result.remainder * np.abs(inner[-1]))
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
    for columns, block in basis.blocks(combination.shape[1]):
        out.write(columns, combination @ block)
