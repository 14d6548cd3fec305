"""What completes a fitted eigenbasis: the complement's constant, and a sketch of the complement."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from keras_influence import data
from keras_influence.methods.complement import Complement, measured
from keras_influence.methods.curvature import FrozenCurvature
from keras_influence.methods.outside import principal, remainders
from keras_influence.methods.sums import weighted_sum
from keras_influence.methods.work import Job, Work

if TYPE_CHECKING:
    from keras_influence.methods.eigenbasis import EigenbasisInverse

# Gradients of the sketch's sample that are computed together.
_SAMPLE_ROWS = 8
# Vectors in memory for each probe: itself, its remainder, and the product of that.
_VECTORS_PER_PROBE = 3


def complement_of(
    method: "EigenbasisInverse", operator: FrozenCurvature, frozen: list[data.Batch]
) -> Complement:
    """The constant, from probes that are made as many at a time as the memory budget holds.

    Args:
        method: with its eigenbasis.
        operator: the curvature.
        frozen: the examples of the curvature.
    """
    basis, damping = method._fitted_basis(), method._damping
    parts = []
    for probes in _probes(method, frozen):
        rest, coefficients = remainders(basis.vectors, probes)
        image = operator.products(tf.convert_to_tensor(rest), damping).numpy()
        if not np.isfinite(image).all():
            raise FloatingPointError("A product of the curvature is not finite.")
        moments = [
            np.einsum("mp,mp->m", a, b, dtype=np.float64)
            for a, b in ((rest, rest), (rest, image), (image, image))
        ]
        parts.append((coefficients, *moments))
    # A penalty raises what is positive without it.
    positive = not (basis.values < 0).any()
    return measured(
        *(np.concatenate(each) for each in zip(*parts, strict=True)),
        weights=method._kept_inverses(),
        damping=damping,
        floor=damping + method.l2 if positive else 0.0,
        constant=1.0 / damping if method.complement == "damping" else None,
    )


def _probes(method: "EigenbasisInverse", frozen: list[data.Batch]) -> Iterator[np.ndarray]:
    """Blocks of vectors [k, p] that the constant is estimated from."""
    parameters = method.maps.parameters
    rows = method._rows_in_budget(parameters.size * parameters.dtype.size * _VECTORS_PER_PROBE)
    dtype = parameters.dtype.as_numpy_dtype
    num = sum(batch.num_examples for batch in frozen)
    # For any quadratic form, the mean over random signs of its value at a signed sum of gradients
    # is the sum of its values at the gradients: a few sums stand for the whole set.
    length = parameters.size if method.complement == "trace" else num
    for start in range(0, method.num_probes, rows):
        block = []
        for probe in range(start, min(start + rows, method.num_probes)):
            random = np.random.default_rng([method.seed, 2, probe])
            signs = random.choice(np.array([-1, 1], np.int8), length)
            block.append(
                signs.astype(dtype)
                if method.complement == "trace"
                else weighted_sum(method.maps, method.model, frozen, signs)
            )
        yield np.stack(block)


def sketch_of(method: "EigenbasisInverse", frozen: list[data.Batch]) -> np.ndarray | None:
    """Orthonormal directions that hold most of the remainders of a sample of gradients, [s, p]."""
    num = sum(batch.num_examples for batch in frozen)
    count = sample_size(method, num)
    if count == 0:
        return None
    sample = _sample(method, frozen, count)
    outside, _ = remainders(method._fitted_basis().vectors, sample)
    del sample
    return principal(outside, min(method.sketch_size, -(-count // 2)))


def sample_size(method: "EigenbasisInverse", num: int) -> int:
    """Four times the sketch, if there are as many examples and the memory budget holds them."""
    if method.complement is None or method.sketch_size == 0:
        return 0
    parameters = method.maps.parameters
    # The sample, its remainders, and the sketch.
    held = method._rows_in_budget(3 * parameters.size * parameters.dtype.size)
    return min(num, 4 * method.sketch_size, held)


def _sample(method: "EigenbasisInverse", frozen: list[data.Batch], count: int) -> np.ndarray:
    """Gradients of training examples, [count, p]."""
    num = sum(batch.num_examples for batch in frozen)
    chosen = np.zeros(num, bool)
    chosen[np.random.default_rng([method.seed, 3]).permutation(num)[:count]] = True
    found, before = [], 0
    for batch in frozen:
        mine = chosen[before : before + batch.num_examples]
        before += batch.num_examples
        for row in np.flatnonzero(mine):
            found.append((batch.ids[row : row + 1], batch.examples, [row]))
    rows = []
    for _, alike in itertools.groupby(found, lambda each: _shapes(each[1])):
        each = list(alike)
        for start in range(0, len(each), _SAMPLE_ROWS):
            few = each[start : start + _SAMPLE_ROWS]
            # Of one size, so that one graph serves.
            padded = few + few[:1] * (_SAMPLE_ROWS - len(few))
            examples = tf.nest.map_structure(
                lambda *leaves: np.concatenate(leaves),
                *(_taken(examples, row) for _, examples, row in padded),
            )
            ids = np.concatenate([ids for ids, _, _ in few])
            batch = data.Batch(examples, np.ones(len(padded), np.float32), ids)
            rows.append(method._rows(method.maps.example_gradients, [batch], "gradient"))
    return np.concatenate(rows)


def _taken(examples: Any, rows: Any) -> Any:
    return tf.nest.map_structure(lambda leaf: np.asarray(leaf)[rows], examples)


def _shapes(examples: Any) -> list[tuple[int, ...]]:
    return [np.shape(leaf)[1:] for leaf in tf.nest.flatten(examples)]


def completion_work(method: "EigenbasisInverse", job: Job, held: float) -> Iterator[Work]:
    """Of the constant and the sketch; `held` are bytes of the eigenvectors in memory."""
    frozen, probes = job.frozen(method.num_examples), method.num_probes
    # The examples lie where they are computed with, and are read again.
    yield job.freezing(method.num_examples)
    held += frozen.bytes
    count = sample_size(method, frozen.num_examples)
    if count:
        sample = frozen.cut(_SAMPLE_ROWS).first(count)
        yield Work(
            "gradients for the sketch",
            job.rows("example_gradients", sample, method.maps),
            sample.num_batches,
            host=held + 3 * count * job.vector_bytes,
            device=frozen.bytes,
        )
        size = min(method.sketch_size, -(-count // 2))
        held += size * job.vector_bytes
        # Products of the sample with the eigenvectors, four times, and with itself, once; of the
        # sketch with the sample, and its orthogonalisation, as slow as six products with itself.
        products = 4 * count * min(method.rank, job.size) + count**2 + size * count + 6 * size**2
        yield Work(
            "products for the sketch",
            job.combination(count, count),
            products / count**2 * job.parts(count),
            # The sample, its remainders and what is subtracted; then the remainders and four times
            # the sketch, on its way through a decomposition.
            host=held + (max(3 * count, count + 4 * size) - size) * job.vector_bytes,
            device=frozen.bytes,
        )
    block = min(probes, method._rows_in_budget(_VECTORS_PER_PROBE * int(job.vector_bytes)))
    held += _VECTORS_PER_PROBE * block * job.vector_bytes
    if method.complement != "trace":
        yield Work(
            "sums of gradients",
            job.rows("gradient", frozen, method.maps),
            probes * frozen.num_batches,
            host=held,
            device=frozen.bytes,
        )
    joined = job.joined(method.num_examples)
    yield Work(
        "products for the complement",
        job.products(joined, block),
        -(-probes // block) * joined.num_batches,
        probes,
        host=held,
        device=frozen.bytes + 2 * block * job.vector_bytes,
    )


def certificate(method: "EigenbasisInverse") -> Iterator[str]:
    """Lines of `summary` about what the eigenbasis leaves out."""
    found = method.complement_estimate
    if found is None:
        yield "complement: none; what the kept eigenvectors leave out counts as zero"
        yield (
            "verdict: ranks and mislabeled examples; not the size of effects, for which pass "
            "`complement='rayleigh'`"
        )
        return
    sketch = 0 if method._sketch is None else len(method._sketch)
    yield (
        f"complement ({method.complement}): {found.constant:.4g} +- {found.error:.2g}, for "
        f"{found.share:.1%} of the probes' squared length; {sketch} directions of it in an encoding"
        + ("; clipped, for curvature that is not positive" if found.clipped else "")
    )
    if method.refine:
        yield f"refined by {method.refine} steps of conjugate gradients for each query"
    if not np.isfinite(found.upper) or found.estimate <= 0:
        yield "error of a quadratic form: not bounded; the curvature may be negative there"
        yield "verdict: an estimate without a bound; compare with ConjugateGradient"
        return
    low, high = found.lower / found.estimate - 1, found.upper / found.estimate - 1
    yield (
        f"exact quadratic form of the probes: between {low:+.1%} and {high:+.1%} of the estimate, "
        "as far as the kept pairs have converged"
    )
    if high < 0.1:
        yield "verdict: as good as the exact inverse"
    elif high < 1:
        yield "verdict: close to the exact inverse; `refine=2` or a larger rank closes the rest"
    else:
        yield (
            "verdict: the bound is loose (a small damping allows large inverses that nothing here "
            "rules out); `refine=2`, a larger rank or ConjugateGradient would tell"
        )
