"""Orthogonalisation as one program, against the one of NumPy that the iteration uses."""

import numpy as np
import pytest
import tensorflow as tf

from keras_influence.linalg import HostBasis, orthogonal
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
