"""Orthogonalisation where the operator computes, against that of NumPy on the host."""

import numpy as np
import pytest
import tensorflow as tf

from keras_influence.linalg import (
    DeviceBasis,
    HostBasis,
    arnoldi,
    distill,
    orthogonal,
    orthogonality,
)
from keras_influence.linalg.basis import BFLOAT16
from keras_influence.linalg.device import orthogonalize


def _basis(count, rows, size, dtype):
    """`count` orthonormal rows, and zeros up to `rows`."""
    random = np.random.default_rng(0)
    basis = np.zeros((rows, size), dtype)
    basis[:count] = np.linalg.qr(random.standard_normal((size, count)))[0].T
    return basis, random.standard_normal(size).astype(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-14), (np.float32, 2e-6)])
def test_the_same_as_that_of_the_iteration(dtype, tolerance):
    basis, vector = _basis(5, 8, 300, dtype)
    coefficients, rest = orthogonalize(basis, vector)
    rows = HostBasis(5, 300, dtype)
    for row in basis[:5]:
        rows.append(row)
    expected, expected_rest = orthogonal.orthogonalize(rows, vector.copy())
    # Entries of both are of order one.
    np.testing.assert_allclose(coefficients[:5], expected, atol=tolerance)
    np.testing.assert_allclose(rest, expected_rest, atol=tolerance)
    np.testing.assert_array_equal(coefficients[5:], np.zeros(3))
    np.testing.assert_allclose(basis @ rest.numpy(), np.zeros(8), atol=tolerance)


def test_coefficients_and_rest_by_hand():
    # v = 3 e1 + 4 e2 + 5 e3 against e1 and (e2 + e3) / sqrt 2: the second coefficient is
    # 9 / sqrt 2, and the rest is 4 - 4.5 and 5 - 4.5.
    basis = np.array([[1, 0, 0], [0, 0.5**0.5, 0.5**0.5], [0, 0, 0]])
    coefficients, rest = orthogonalize(basis, np.array([3.0, 4, 5]))
    np.testing.assert_allclose(coefficients, [3, 9 / 2**0.5, 0], rtol=1e-14)
    np.testing.assert_allclose(rest, [0, -0.5, 0.5], atol=1e-14)


def test_two_hundred_float32_steps_of_an_iteration_stay_orthogonal():
    """Once would leave an overlap of 0.2 here; the products are those of `krylov_test`."""
    random = np.random.default_rng(0)
    values = np.concatenate([random.uniform(50, 100, 10), random.uniform(1e-3, 1, 1990)])
    rotation = np.linalg.qr(random.standard_normal((2000, 2000)))[0]
    matrix = ((rotation.T * values) @ rotation).astype(np.float32)
    basis = tf.Variable(tf.zeros([200, 2000]))
    vector = random.standard_normal(2000).astype(np.float32)
    for step in range(200):
        basis[step].assign(vector / np.linalg.norm(vector))
        vector = orthogonalize(basis, matrix @ basis[step].numpy()).vector.numpy()
    gram = basis.numpy().astype(np.float64) @ basis.numpy().T
    assert np.abs(gram - np.eye(200)).max() < 1e-6


def test_it_is_traced_once_for_all_steps():
    basis, vector = _basis(5, 8, 301, np.float32)
    before = orthogonalize.experimental_get_tracing_count()
    orthogonalize(tf.constant(basis), tf.constant(vector))
    basis[5:] = 0.1
    orthogonalize(tf.constant(basis), tf.constant(vector))
    assert orthogonalize.experimental_get_tracing_count() == before + 1


@pytest.mark.parametrize(("basis", "vector"), [((3, 4), (5,)), ((3, 4), (4, 1)), ((4,), (4,))])
def test_shapes_are_checked(basis, vector):
    with pytest.raises(ValueError, match=r"`basis` must have the shape \[m, p\]"):
        orthogonalize(tf.zeros(basis), tf.zeros(vector))


def _decay(size=300, dtype=np.float32):
    """A symmetric matrix of eigenvalues from 100 down over four decades, and them."""
    values = 10 ** np.linspace(2, -2, size)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0]
    return ((rotation.T * values) @ rotation).astype(dtype), values


def _start(size=300, dtype=np.float32):
    return np.random.default_rng(1).standard_normal(size).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_iteration_on_a_device_is_that_on_the_host(dtype):
    matrix, _ = _decay(dtype=dtype)
    expected = distill(arnoldi(lambda v: matrix @ v, _start(dtype=dtype), 60), 10)
    seen = []

    def product(vector):
        seen.append(tf.is_tensor(vector))
        return tf.linalg.matvec(matrix, vector)

    basis = DeviceBasis(60, 300, dtype)
    result = arnoldi(product, _start(dtype=dtype), 60, basis=basis)
    found = distill(result, 10)
    assert all(seen) and result.basis is basis
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)
    np.testing.assert_allclose(np.abs(found.vectors @ expected.vectors.T), np.eye(10), atol=1e-4)
    np.testing.assert_allclose(found.residuals, expected.residuals, atol=3e-5)
    rows = basis[:].astype(np.float64)
    assert orthogonality(basis) < 1e-6
    assert orthogonality(basis) == pytest.approx(np.abs(rows @ rows.T - np.eye(60)).max(), abs=3e-7)


def test_an_invariant_space_is_left_on_a_device_too():
    matrix = np.diag([3.0, 2, 2, 1, 1, 1])
    basis = DeviceBasis(6, 6, np.float64)
    top = distill(arnoldi(lambda v: tf.linalg.matvec(matrix, v), np.ones(6), 6, basis=basis), 6)
    np.testing.assert_allclose(top.values, [3, 2, 2, 1, 1, 1], atol=1e-12)


def test_blocks_and_restarts_on_a_device_are_those_on_the_host():
    matrix, values = _decay(dtype=np.float64)
    start = np.random.default_rng(1).standard_normal((3, 300))
    kwargs = {"rank": 5, "max_vectors": 24, "tolerance": 1e-8}
    expected = arnoldi(lambda block: block @ matrix, start, 120, **kwargs)
    basis = DeviceBasis(24, 300, np.float64)
    found = arnoldi(lambda block: tf.matmul(block, matrix), start, 120, basis=basis, **kwargs)
    assert found.num_restarts == expected.num_restarts > 0
    assert found.num_products == expected.num_products
    top = distill(found, 5)
    np.testing.assert_allclose(top.values, values[:5], rtol=1e-9)
    np.testing.assert_allclose(matrix @ top.vectors.T, top.vectors.T * top.values, atol=1e-5)
    assert orthogonality(basis) < 1e-12


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_beyond_the_squares_of_float32(scale):
    basis = DeviceBasis(2, 3, np.float32)
    vector = basis.adopt(np.array([3, 0, 4], np.float32) * np.float32(scale))
    assert basis.norm(vector) == pytest.approx(5 * scale, rel=1e-6)
    assert basis.norm(basis.adopt(np.zeros(3, np.float32))) == 0
    assert not np.isfinite(basis.norm(basis.adopt(np.array([1, np.nan, 2], np.float32))))


def test_rows_that_are_forgotten_count_for_nothing():
    basis = DeviceBasis(3, 4, np.float32)
    for row in np.eye(4, dtype=np.float32)[:3]:
        basis.append_row(row)
    basis.truncate(1)
    assert basis.shape == (1, 4)
    coefficients, (rest,) = basis.orthogonalize([basis.adopt(np.array([1, 2, 3, 4], np.float32))])
    np.testing.assert_array_equal(coefficients, [[1]])
    np.testing.assert_array_equal(rest, [0, 2, 3, 4])
    with pytest.raises(ValueError, match=r"`matvec` must return shape \(4,\)"):
        basis.images(tf.zeros(5), 1, True)
    with pytest.raises(ValueError, match=r"`matvec` must return shape \(2, 4\)"):
        basis.images(tf.zeros([3, 4]), 2, False)


@pytest.mark.parametrize("make", [HostBasis, DeviceBasis])
def test_rows_in_bfloat16_are_orthogonalised_as_they_are_stored(make):
    matrix, values = _decay()
    basis = make(60, 300, np.float32, BFLOAT16)
    result = arnoldi(lambda v: matrix @ np.asarray(v), _start(), 60, basis=basis)
    rows = basis[:]
    np.testing.assert_array_equal(rows, rows.astype(BFLOAT16).astype(np.float32))
    # A row is rounded, by 2^-8 at the most, after it was made orthogonal to what is stored: of two
    # rows, sum_k q_ik q_jk r_k with |r_k| <= 2^-8, which is 2^-8 / sqrt(p) in size: 2.3e-4.
    assert 1e-5 < orthogonality(basis) < 5 * 2**-8 / 300**0.5
    # Eigenvalues feel it squared, vectors do as they are, and the residuals tell.
    found = distill(result, 5)
    np.testing.assert_allclose(found.values, values[:5], rtol=1e-4)
    actual = np.linalg.norm(matrix @ found.vectors.T - found.vectors.T * found.values, axis=0)
    assert (actual < found.residuals).all()
    assert (found.residuals < 2**-8 * 100).all()
