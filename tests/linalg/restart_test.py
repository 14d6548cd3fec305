"""Blocks of starting vectors, bases of few vectors, and iterations that end when they may."""

import numpy as np
import pytest
import tensorflow as tf

from keras_influence.linalg import HostBasis, Restart, Step, arnoldi, distill
from keras_influence.storage import ArrayFile, StoredRows, generation


def _symmetric(values, seed=0):
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values),) * 2))[0]
    return (rotation.T * values) @ rotation


def _start(size, block=None, seed=1):
    shape = size if block is None else (block, size)
    return np.random.default_rng(seed).standard_normal(shape)


class _Operator:
    """Products [k, p] with the rows of a block, or with one vector, counted."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.products = 0
        self.widest = 0

    def __call__(self, vectors):
        rows = 1 if vectors.ndim == 1 else len(vectors)
        self.products += rows
        self.widest = max(self.widest, rows)
        return vectors @ self.matrix


def _true_residuals(matrix, pairs):
    vectors = pairs.vectors[:]
    return np.linalg.norm(vectors @ matrix - pairs.values[:, np.newaxis] * vectors, axis=1)


# Eigenvalues of both signs, the wanted ones apart from the rest by a few per cent.
INDEFINITE = np.concatenate([np.linspace(-6, 6, 280), [7, -7.5, 8, -9, 10, 11, -12, 14, 16, 20.0]])


@pytest.mark.parametrize("block", [None, 1, 3, 4])
@pytest.mark.parametrize("max_vectors", [None, 20, 33])
def test_converged_pairs_are_those_of_the_dense_matrix(block, max_vectors):
    matrix = _symmetric(INDEFINITE)
    operator = _Operator(matrix)
    result = arnoldi(
        operator,
        _start(290, block),
        1000,
        rank=10,
        tolerance=1e-11,
        max_vectors=max_vectors,
    )
    top = distill(result, 10)
    exact = INDEFINITE[np.argsort(-np.abs(INDEFINITE))][:10]
    np.testing.assert_allclose(top.values, exact, atol=1e-10)
    # As truly measured, and as told without a product.
    true = _true_residuals(matrix, top)
    assert true.max() < 20 * 1e-11 * 1.5
    np.testing.assert_allclose(top.residuals, true, atol=1e-12)
    np.testing.assert_allclose(top.vectors @ top.vectors.T, np.eye(10), atol=1e-12)
    np.testing.assert_allclose(
        result.basis @ matrix @ result.basis.T, result.matrix, atol=1e-11 * 20
    )
    assert result.num_products == operator.products < 1000
    assert operator.widest == (block or 1)
    assert (result.num_restarts > 0) == (max_vectors is not None)
    assert len(result.basis) <= (max_vectors or 1000)


def test_a_tolerance_ends_the_iteration_when_it_is_met_and_not_before():
    matrix = _symmetric(INDEFINITE)

    def pairs(num_iterations, tolerance=None):
        result = arnoldi(
            _Operator(matrix), _start(290), num_iterations, rank=10, tolerance=tolerance
        )
        return result.num_products, distill(result, 10)

    count, top = pairs(290, 1e-6)
    assert _true_residuals(matrix, top).max() <= 20 * 1e-6
    # A look is taken when the size has grown by a twentieth: of 40 to 59 products, every other.
    assert 40 <= count < 60
    assert _true_residuals(matrix, pairs(count - 2)[1]).max() > 20 * 1e-6
    # Where the products end first, no claim is made.
    count, top = pairs(20, 1e-6)
    assert count == 20
    assert top.residuals.max() > 20 * 1e-6


def test_blocks_find_repeated_eigenvalues_without_an_invariant_space():
    # Three of 5, two of -4, and a dense rest: in 20 steps one vector finds one of each.
    values = np.concatenate([[5, 5, 5, -4, -4], np.linspace(0.1, 3, 300)])
    matrix = _symmetric(values)
    expected = [5, 5, 5, -4, -4]
    single = distill(arnoldi(_Operator(matrix), _start(305), 20), 5).values
    assert np.sum(np.isclose(single, 5)) == 1
    for options in ({}, {"max_vectors": 24, "rank": 5}):
        result = arnoldi(_Operator(matrix), _start(305, 3), 60, **options)
        top = distill(result, 5)
        np.testing.assert_allclose(top.values, expected, atol=1e-6)
        assert (result.num_restarts > 0) == bool(options)


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_all_of_a_small_space(block):
    matrix = np.diag([3.0, 2, 2, 1, 1, 1])
    top = distill(arnoldi(_Operator(matrix), _start(6, block), 12), 6)
    np.testing.assert_allclose(top.values, [3, 2, 2, 1, 1, 1], atol=1e-12)
    np.testing.assert_allclose(top.vectors @ top.vectors.T, np.eye(6), atol=1e-12)
    assert top.residuals.max() < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-8])
@pytest.mark.parametrize("max_vectors", [None, 12])
def test_an_operator_of_low_rank_ends_the_iteration(dtype, scale, max_vectors):
    factor = np.random.default_rng(0).standard_normal((50, 4))
    exact = np.sort(np.linalg.eigvalsh(factor.T @ factor))[::-1]
    matrix = (scale * factor @ factor.T).astype(dtype)
    operator = _Operator(matrix)
    result = arnoldi(operator, _start(50, 3).astype(dtype), 300, rank=4, max_vectors=max_vectors)
    # Four eigenvectors, three starts' parts in the null space, and a random vector or two that
    # show that there is nothing more.
    assert operator.products <= 10
    top = distill(result, 4)
    np.testing.assert_allclose(top.values, scale * exact, rtol=1e-5)
    assert top.residuals.max() < 1e-5 * scale * exact[0]


def test_a_zero_operator():
    result = arnoldi(lambda v: 0 * v, _start(9, 2), 9, rank=1, tolerance=1e-3)
    np.testing.assert_array_equal(distill(result, 1).values, [0.0])
    result = arnoldi(lambda v: 0 * v, _start(9, 2), 9)
    assert result.num_products == 2
    assert result.remainder == 0


def test_starting_vectors_that_depend_on_each_other_or_are_zero():
    matrix = _symmetric(np.linspace(1, 10, 40))
    one = _start(40)
    block = np.stack([one, 0 * one, 1e-9 * one, 3 * one + 1e-3 * _start(40, seed=5)])
    result = arnoldi(_Operator(matrix), block, 40)
    np.testing.assert_allclose(result.basis @ result.basis.T, np.eye(40), atol=1e-12)
    np.testing.assert_allclose(distill(result, 3).values, [10, 10 - 3 / 13, 10 - 6 / 13], rtol=1e-9)
    np.testing.assert_allclose(np.abs(result.basis[0] @ one), np.linalg.norm(one))
    np.testing.assert_array_equal(block[1], 0 * one)  # What was given is as it was.


def test_float32_stays_orthogonal_through_restarts():
    random = np.random.default_rng(0)
    values = np.concatenate([random.uniform(50, 100, 10), random.uniform(1e-3, 40, 390)])
    matrix = _symmetric(values).astype(np.float32)
    result = arnoldi(
        _Operator(matrix), _start(400, 2).astype(np.float32), 300, rank=10, max_vectors=24
    )
    assert result.num_restarts > 20
    gram = result.basis.astype(np.float64) @ result.basis.T
    assert np.abs(gram - np.eye(len(gram))).max() < 3e-6
    np.testing.assert_allclose(distill(result, 10).values, np.sort(values)[::-1][:10], rtol=1e-5)


def test_asymmetry_is_still_reported_after_restarts():
    matrix = _symmetric(INDEFINITE)
    other = _start(290, 290, seed=3)
    options = {"rank": 10, "max_vectors": 25}
    symmetric = arnoldi(_Operator(matrix), _start(290), 100, **options)
    assert symmetric.asymmetry < 1e-12
    skew = arnoldi(_Operator(matrix + 1e-4 * (other - other.T)), _start(290), 100, **options)
    assert 1e-5 < skew.asymmetry < 1e-2


def test_tensors_in_blocks():
    matrix = tf.constant(_symmetric(np.arange(1.0, 21)))
    shapes = []

    def matvec(vectors):
        assert tf.is_tensor(vectors)
        shapes.append(tuple(vectors.shape))
        return vectors @ matrix

    top = distill(arnoldi(matvec, tf.constant(_start(20, 3)), 20), 2)
    assert set(shapes) == {(3, 20), (2, 20)}  # 20 vectors are six blocks of three and two more.
    np.testing.assert_allclose(top.values, [20, 19], rtol=1e-9)


class _Journal:
    """Records in memory, that may interrupt: before or after a record is kept."""

    def __init__(self, die=lambda step, number: False):
        self.kept = []
        self.die = die

    def steps(self):
        return list(self.kept)

    def record(self, step):
        if self.die(step, len(self.kept)):
            raise InterruptedError
        self.kept.append(step)


OPTIONS = {"rank": 8, "max_vectors": 20, "tolerance": 1e-6}


def _opened(path, journal):
    number = sum(isinstance(step, Restart) for step in journal.kept)
    description = {"shape": (20, 290), "dtype": "float64", "chunk": (1, 100)}
    return StoredRows.open(ArrayFile(path, generation("basis", number), **description))


@pytest.mark.parametrize("block", [None, 3])
def test_a_killed_iteration_goes_on_through_restarts_to_the_same_bits(tmp_path, block):
    matrix = _symmetric(INDEFINITE)

    def run(journal, basis):
        return arnoldi(
            operator, _start(290, block), 400, basis=basis, journal=journal, seed=4, **OPTIONS
        )

    operator = _Operator(matrix)
    whole_journal = _Journal()
    basis = StoredRows.create(tmp_path / "whole", "basis", (20, 290), "float64", 100)
    whole = run(whole_journal, basis)
    made = operator.products
    assert made == whole.num_products == sum(step.num_products for step in whole_journal.kept)
    assert whole.num_restarts > 2

    # Killed at every fifth record and at every restart, the first time that it is reached: what
    # the basis holds by then, it does not know of.
    died = set()

    def die(step, number):
        if number in died or not (number % 5 == 2 or isinstance(step, Restart)):
            return False
        died.add(number)
        return True

    journal = _Journal(die)
    basis = StoredRows.create(tmp_path / "killed", "basis", (20, 290), "float64", 100)
    operator.products = 0
    result = None
    while result is None:
        try:
            result = run(journal, basis)
        except InterruptedError:
            basis = _opened(tmp_path / "killed", journal)
    assert len(died) > 6
    # A step that was not recorded is made again; a restart costs no product.
    lost = sum(
        step.num_products for number, step in enumerate(whole_journal.kept) if number in died
    )
    assert operator.products == made + lost
    np.testing.assert_array_equal(result.matrix, whole.matrix)
    np.testing.assert_array_equal(result.outside, whole.outside)
    count = len(whole.matrix)
    np.testing.assert_array_equal(result.basis[:count], whole.basis[:count])
    for mine, other in zip(journal.kept, whole_journal.kept, strict=True):
        assert type(mine) is type(other)
        for one, two in zip(mine, other, strict=True):
            np.testing.assert_array_equal(one, two)
    # Never more than two arrays on the disk.
    assert len(list((tmp_path / "killed").iterdir())) <= 2
    # When all is done, nothing is done again.
    again = run(journal, _opened(tmp_path / "killed", journal))
    assert operator.products == made + lost
    np.testing.assert_array_equal(again.matrix, whole.matrix)


def test_a_kill_in_the_middle_of_a_combination_loses_nothing(tmp_path, monkeypatch):
    matrix = _symmetric(INDEFINITE)
    journal = _Journal()
    basis = StoredRows.create(tmp_path, "basis", (20, 290), "float64", 100)
    write = StoredRows.write

    def torn(self, columns, values):
        if columns.start == 100:
            raise InterruptedError
        write(self, columns, values)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(StoredRows, "write", torn)
        arnoldi(_Operator(matrix), _start(290), 400, basis=basis, journal=journal, **OPTIONS)
    assert len(journal.kept) == 19
    operator = _Operator(matrix)
    basis = _opened(tmp_path, journal)
    result = arnoldi(operator, _start(290), 400, basis=basis, journal=journal, **OPTIONS)
    assert operator.products == result.num_products - 19
    assert _true_residuals(matrix, distill(result, 8)).max() <= 20 * 1e-6


def test_a_basis_combines_its_rows():
    rows = HostBasis(4, 3, np.float64)
    for row in ([1.0, 0, 2], [0, 1, 1], [5, 5, 5]):
        rows.append(np.array(row))
    rows.combine(np.array([[1.0, 2, 0], [0, 0, 1]]))
    np.testing.assert_array_equal(rows[:], [[1, 2, 4], [5, 5, 5]])
    rows.append(np.array([7.0, 8, 9]))
    np.testing.assert_array_equal(rows[1:], [[5, 5, 5], [7, 8, 9]])


def test_bad_limits():
    identity = np.ones(9)
    for options, message in (
        ({"tolerance": 1e-3}, r"about the `rank` pairs that are wanted.*Received: rank=None"),
        ({"max_vectors": 5, "rank": 0}, r"at least 1. Received: rank=0"),
        ({"tolerance": 0.0, "rank": 1}, r"`tolerance` must be above zero. Received: 0.0"),
        ({"max_vectors": 4, "rank": 3}, r"at least 5. Received: 4"),
    ):
        with pytest.raises(ValueError, match=message):
            arnoldi(lambda v: v, identity, 5, **options)
    with pytest.raises(ValueError, match=r"the number of starting vectors, 4. Received: 3"):
        arnoldi(lambda v: v, _start(9, 4), 3)
    with pytest.raises(ValueError, match=r"must return shape \(2, 9\). It returned \(9,\)"):
        arnoldi(lambda v: v[0], _start(9, 2), 3)
    with pytest.raises(FloatingPointError, match=r"at step 2 of 5 is not finite"):
        arnoldi(_after_one(), _start(9, 2), 5)
    with pytest.raises(ValueError, match=r"finite norm above zero"):
        arnoldi(lambda v: v, np.array([[1.0, 2], [np.inf, 0]]), 2)


def _after_one():
    products = []

    def matvec(vectors):
        products.append(1)
        return vectors * np.arange(9.0) if len(products) == 1 else vectors * np.nan

    return matvec


def test_the_steps_of_a_block_add_up():
    journal = _Journal()
    arnoldi(_Operator(np.diag([4.0, 3, 2, 1])), np.eye(4)[:2], 4, journal=journal)
    first = journal.kept[0]
    assert isinstance(first, Step)
    # e1 and e2 are eigenvectors: no part is left outside, and random ones come next.
    np.testing.assert_allclose(first.coefficients, [[4, 0], [0, 3]])
    np.testing.assert_array_equal(first.rest, np.zeros((2, 2)))
    assert first.random == (True, True)
