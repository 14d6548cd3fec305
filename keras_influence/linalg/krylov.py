"""The Arnoldi iteration for a symmetric operator known only through its products with vectors.

Algorithm 1 of Schioppa et al., "Scaling Up Influence Functions" (AAAI 2022), with three repairs:
every new vector is orthogonalised twice (once, in float32, leaves |Q'Q - I| of 0.2 to 0.3 after 200
steps, and negative eigenvalues of positive matrices); breakdown is measured against the operator's
own size; and an invariant subspace is left by a random vector, so that repeated eigenvalues are
found. It takes several starting vectors at once (block Arnoldi), ends when the wanted pairs have
converged, and makes do with a basis of few vectors by thick restarts (Wu and Simon, "Thick-Restart
Lanczos Method for Large Symmetric Eigenvalue Problems", SIAM J. Matrix Anal. Appl. 22, 2000).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_influence.linalg.basis import Basis, HostBasis, rounding_of
from keras_influence.linalg.extension import extend
from keras_influence.linalg.orthogonal import norm
from keras_influence.linalg.projection import Journal, Projection, Restart, Step
from keras_influence.linalg.ritz import ArnoldiResult, ritz_pairs
from keras_influence.linalg.space import HostSpace, Space


def arnoldi(
    matvec: Callable[[Any], Any],
    start: Any,
    num_iterations: int,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    max_vectors: int | None = None,
    seed: int = 0,
    basis: Basis | Space | None = None,
    journal: Journal | None = None,
) -> ArnoldiResult:
    """Builds an orthonormal basis of the Krylov space of a symmetric operator H.

    Where the space turns out to be invariant before `num_iterations` steps (repeated eigenvalues, a
    rank below the number of steps), the iteration goes on from a random vector orthogonal to all
    before it; if H maps that one to nothing, H is zero on everything that is left, and the
    iteration stops.

    A space from one vector holds one vector of each eigenspace, so that of an eigenvalue that is
    repeated k times, or nearly so, k are found soonest by a block of k starting vectors.

    Args:
        matvec: v -> H v on flat vectors [p]; for a block of starting vectors, on several at once,
            [k, p] -> [k, p], with k at most the block's. It is handed what `start` is: numpy arrays
            for a numpy array, tensors for a `tf.Tensor`.
        start: [p], any non-zero norm, or a block of them [block, p]; its float dtype is the dtype
            of the basis. Vectors of a block that depend on those before them are replaced by random
            ones.
        num_iterations: products with H, at least 1; whole blocks of them are made. At most p
            are, unless the iteration restarts.
        rank: eigenpairs of largest magnitude that are wanted, where one of the next two is given.
        tolerance: ends the iteration when |H u - lambda u| is at most this share of the largest
            |lambda| for each of the `rank` pairs of largest magnitude. They are known without
            further products. Below the rounding of a product, about 1e-6 in float32, the
            iteration's own residuals say nothing.
        max_vectors: rows that the basis may have, at least `rank` and twice the block. When it is
            full, it is exchanged for the eigenvectors of largest magnitude that it holds, more
            than `rank`, and the block that was to come next.
        seed: seeds the random vectors.
        basis: where the vectors go, of the dtype of `start`, with room for `basis_rows`; an array
            in memory by default. A `Basis` is read by numpy; with a `Space`, such as `DeviceBasis`,
            `matvec` takes and returns what that one holds.
        journal: of the steps. Those that it holds, with their vectors in `basis`, are not done
            again, and those that follow have the bits that they would have had.

    Returns:
        An `ArnoldiResult` of at most `num_iterations` rows.

    Raises:
        ValueError: a start vector that is zero, not finite or not flat; a product of another shape;
            fewer iterations than starting vectors; too few `max_vectors`; no `rank`.
        FloatingPointError: a product that is not finite.

    Example:

    >>> result = arnoldi(lambda v: matrix @ v, np.ones(100), num_iterations=50)
    >>> values, vectors, residuals = distill(result, rank=10)
    """
    as_given = _like(start)
    vectors = _checked_start(start)
    size, block_size = vectors.shape[-1], 1 if vectors.ndim == 1 else len(vectors)
    check_limits(num_iterations, block_size, rank, tolerance, max_vectors)
    wanted = rank or 0  # Where it is left out, nothing depends on it.
    # What is left after a product is subtracted from its own projection is rounding when it is
    # below a few units in the last place of the product, times the growth of a sum of `size` terms.
    rounding = 10 * np.finfo(vectors.dtype).eps * np.sqrt(size)

    given = basis
    if basis is None:
        rows = basis_rows(size, num_iterations, max_vectors)
        basis = HostBasis(rows, size, vectors.dtype)
    space = basis if isinstance(basis, Space) else HostSpace(basis, as_given)
    if space.dtype != vectors.dtype or space.shape[1] != size:
        raise ValueError(
            f"`basis` must hold vectors [{size}] of {vectors.dtype}. Received: vectors "
            f"[{space.shape[1]}] of {space.dtype}."
        )

    def draw(number: int) -> np.ndarray:
        # Of the product's own seed, so that an iteration that begins here draws the same.
        random = np.random.default_rng([seed, number])
        return random.standard_normal((size,)).astype(vectors.dtype)

    first, random = _first_block(vectors, rounding, lambda row: draw(num_iterations + row))
    seen = Projection.begin(random)
    done = journal.steps() if journal is not None else []
    for step in done:
        seen = seen.after(step)
    if not done:
        space.truncate(0)
        for row in first:
            space.append(space.adopt(row))
    elif space.shape[0] < seen.num_rows:
        raise ValueError(
            f"The journal has {len(done)} steps, whose vectors `basis` must hold: "
            f"{seen.num_rows}. It holds {space.shape[0]}."
        )
    space.truncate(seen.num_rows)

    flat = vectors.ndim == 1
    rounded = rounding_of(space.basis)
    while not seen.last and 0 < seen.waiting <= num_iterations - seen.num_products:
        room = min(seen.waiting, size - seen.num_rows)
        more = seen.num_products + seen.waiting + room <= num_iterations
        if more and max_vectors is not None and seen.num_rows + room > max_vectors:
            restart = _restart(seen, space, wanted, max_vectors)
            if journal is not None:
                journal.record(restart)
            seen = seen.after(restart)
        found = matvec(space.operand(slice(seen.multiplied, seen.num_rows), flat))
        images = space.images(found, seen.waiting, flat)
        lengths = [space.norm(image) for image in images]
        if not np.all(np.isfinite(lengths)):
            raise FloatingPointError(
                f"The operator's product at step {seen.num_products} of {num_iterations} is not "
                "finite. A loss or a gradient overflowed, or the model's weights hold NaN."
            )
        step = _step(seen, space, images, lengths, rounding, draw if more else None)
        if tolerance is not None and _due(seen, step):
            step = step._replace(last=_converged(seen.after(step), wanted, tolerance, rounded))
        seen = seen.after(step)
        if journal is not None:
            journal.record(step)
    count = seen.multiplied
    return ArnoldiResult(
        seen.matrix[:count],
        space.basis if given is not None else space.basis[:count],
        seen.matrix[count:],
        num_iterations,
        seen.num_products,
        seen.num_restarts,
    )


def basis_rows(size: int, num_iterations: int, max_vectors: int | None = None) -> int:
    """Rows that an iteration of `arnoldi` on vectors [size] needs room for."""
    return min(size, num_iterations, size if max_vectors is None else max_vectors)


def _checked_start(start: Any) -> np.ndarray:
    vectors = np.array(start)  # A copy: it is scaled in place.
    if vectors.ndim not in (1, 2) or vectors.size == 0:
        raise ValueError(
            "`start` must be a flat vector [p], or a block of them [block, p]. Received shape "
            f"{vectors.shape}."
        )
    if not np.issubdtype(vectors.dtype, np.floating) or vectors.dtype.itemsize < 4:
        vectors = vectors.astype(np.float32)
    length = norm(vectors.reshape(-1))
    if not 0 < length < np.inf:
        raise ValueError(f"`start` must have a finite norm above zero. Received norm: {length}.")
    return vectors


def check_limits(
    num_iterations: int,
    block_size: int,
    rank: int | None = None,
    tolerance: float | None = None,
    max_vectors: int | None = None,
) -> None:
    """Refuses arguments of `arnoldi` that do not go together.

    Raises:
        ValueError: naming them.
    """
    if num_iterations < 1:
        raise ValueError(f"`num_iterations` must be at least 1. Received: {num_iterations}.")
    if num_iterations < block_size:
        raise ValueError(
            f"`num_iterations` must be at least the number of starting vectors, {block_size}. "
            f"Received: {num_iterations}."
        )
    if tolerance is None and max_vectors is None:
        return
    if rank is None or rank < 1:
        raise ValueError(
            "`tolerance` and `max_vectors` are about the `rank` pairs that are wanted, at least 1. "
            f"Received: rank={rank}."
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"`tolerance` must be above zero. Received: {tolerance}.")
    if max_vectors is not None and max_vectors < rank + 2 * block_size:
        raise ValueError(
            "`max_vectors` must leave room for the `rank` pairs and two blocks: at least "
            f"{rank + 2 * block_size}. Received: {max_vectors}."
        )


def _first_block(
    vectors: np.ndarray, rounding: float, draw: Callable[[int], np.ndarray]
) -> tuple[Any, tuple[bool, ...]]:
    """The starting vectors as orthonormal rows, and which of them are random ones."""
    if vectors.ndim == 1:
        return (vectors / norm(vectors))[np.newaxis], (False,)
    lengths = np.array([norm(row) for row in vectors])
    # What is rounding is so beside the row's own length.
    scaled = vectors / np.where(lengths > 0, lengths, 1).astype(vectors.dtype)[:, np.newaxis]
    nothing = HostSpace(HostBasis(0, vectors.shape[1], vectors.dtype))
    rows, _, random = extend(nothing, scaled, rounding, draw)
    return rows, random


def _step(
    seen: Projection,
    space: Space,
    images: Any,
    lengths: list[float],
    rounding: float,
    draw: Callable[[int], np.ndarray] | None,
) -> Step:
    """Takes products apart, and puts what is new into the basis, if there will be more of them.

    Args:
        images: of the vectors that come next.
        lengths: theirs.
        rounding: share of the operator's size that tells nothing.
        draw: the n-th random vector; None where no further step comes.
    """
    # A random vector outside the space is mapped to nothing: so is all that is outside.
    nothing = [
        drawn and length <= rounding * seen.operator_norm
        for drawn, length in zip(seen.random, lengths, strict=True)
    ]
    exhausted = seen.exhausted or any(nothing)
    if all(nothing):
        none = np.zeros((seen.num_rows, 0))
        return Step(none, np.zeros((0, 0)), max(lengths), (), exhausted, last=True)
    coefficients, rest = space.orthogonalize(images)
    number = seen.num_products
    new, weights, random = extend(
        space,
        rest,
        rounding * max(seen.operator_norm, *lengths),
        None if draw is None or exhausted else lambda row: draw(number + row),
    )
    if draw is None:
        random = ()
    else:
        for vector in new:
            space.append(vector)
    return Step(coefficients, weights, max(lengths), random, exhausted)


def _due(seen: Projection, step: Step) -> bool:
    """Whether to look for convergence after a step.

    That takes an eigendecomposition, so it is done when the space has grown by a twentieth. Of
    nothing but the size, so that an iteration that goes on looks where it would have looked.
    """
    count = seen.multiplied + step.num_products
    return count % max(1, count // 20) < step.num_products


def _converged(seen: Projection, rank: int, tolerance: float, rounded: float) -> bool:
    count = seen.multiplied
    if count < rank:
        return False
    pairs = ritz_pairs(seen.matrix[:count], seen.matrix[count:], rank, rounded)
    return pairs.converged(rank, tolerance)


def _restart(seen: Projection, space: Space, rank: int, max_vectors: int) -> Restart:
    """Makes room in the basis."""
    count, waiting = seen.multiplied, seen.waiting
    # Half of what is beyond the wanted pairs is kept: with less, what was known of the next
    # eigenvectors must be found again; with more, the next restart comes sooner.
    kept = min((rank + count) // 2, max_vectors - 2 * waiting)
    inner = ritz_pairs(seen.matrix[:count], seen.matrix[count:], kept).inner
    combination = np.zeros((kept + waiting, seen.num_rows))
    combination[:kept, :count] = inner.T
    combination[kept:, count:] = np.eye(waiting)
    space.combine(combination.astype(space.dtype))
    return Restart(combination @ seen.matrix @ inner)


def _like(start: Any) -> Callable[[np.ndarray], Any]:
    if isinstance(start, np.ndarray):
        return lambda vector: vector
    import tensorflow as tf

    return tf.convert_to_tensor if tf.is_tensor(start) else lambda vector: vector
