import numpy as np
import pytest
import tensorflow as tf

from keras_influence.linalg import arnoldi, distill


def _orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def _symmetric(values, seed=0, dtype=np.float32):
    rotation = _orthogonal(len(values), seed)
    return ((rotation.T * values) @ rotation).astype(dtype)


@pytest.mark.parametrize("norm", [1.0, 1000.0])
def test_top_of_a_spectrum_over_four_decades(norm):
    values = 10 ** np.linspace(-2, 2, 100)
    matrix = _symmetric(values)
    start = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    start *= norm / np.linalg.norm(start)
    top = distill(arnoldi(lambda v: matrix @ v, start, 50), 10)
    np.testing.assert_allclose(top.values, values[::-1][:10], atol=1e-3)
    actual = np.linalg.norm(matrix @ top.vectors.T - top.vectors.T * top.values, axis=0)
    assert actual.max() < 1e-3
    # The estimate needs no further product; it is right beyond the rounding of one.
    np.testing.assert_allclose(top.residuals, actual, atol=3e-5)


def test_norm_of_the_start_does_not_matter():
    matrix = _symmetric(10 ** np.linspace(-2, 2, 100))
    start = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    small, large = (
        distill(arnoldi(lambda v: matrix @ v, start * norm, 50), 10) for norm in (2**-6, 2**10)
    )
    np.testing.assert_array_equal(small.values, large.values)
    np.testing.assert_array_equal(small.vectors, large.vectors)


def test_two_hundred_float32_steps_stay_orthogonal_and_positive():
    random = np.random.default_rng(0)
    values = np.concatenate([random.uniform(50, 100, 10), random.uniform(1e-3, 1, 1990)])
    matrix = _symmetric(values)
    result = arnoldi(lambda v: matrix @ v, random.standard_normal(2000).astype(np.float32), 200)
    gram = result.basis.astype(np.float64) @ result.basis.T
    assert np.abs(gram - np.eye(200)).max() < 1e-5
    assert distill(result, 200).values.min() > 0
    np.testing.assert_allclose(distill(result, 10).values, np.sort(values)[::-1][:10], rtol=1e-5)


def test_full_order_recovers_a_diagonal_matrix():
    matrix = np.diag([1.0, 2.0, 3.0])
    result = arnoldi(lambda v: matrix @ v, np.ones(3), 3)
    rebuilt = result.basis.T @ result.matrix @ result.basis
    np.testing.assert_allclose(rebuilt, matrix, atol=1e-12)
    top = distill(result, 3)
    np.testing.assert_allclose(top.values, [3, 2, 1], atol=1e-12)
    np.testing.assert_allclose(np.abs(top.vectors), np.eye(3)[::-1], atol=1e-12)
    assert top.residuals.max() < 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_operator_of_rank_three_ends_the_iteration_cleanly(dtype):
    factor = np.random.default_rng(0).standard_normal((50, 3))
    exact = np.sort(np.linalg.eigvalsh(factor.T @ factor))[::-1]
    start = np.random.default_rng(1).standard_normal(50).astype(dtype)
    spectra = []
    for scale in (1.0, 1e-8):
        matrix = (scale * factor @ factor.T).astype(dtype)
        result = arnoldi(lambda v: matrix @ v, start, 20)  # noqa: B023
        # Three eigenvectors, and the start's own part in the null space.
        assert result.basis.shape == (4, 50)
        assert distill(result, 20).values.shape == (4,)
        spectra.append(distill(result, 3))
        np.testing.assert_allclose(spectra[-1].values, scale * exact, rtol=1e-5)
        assert spectra[-1].residuals.max() < 1e-5 * scale * exact[0]
    np.testing.assert_allclose(np.abs(spectra[0].vectors), np.abs(spectra[1].vectors), atol=1e-4)


def test_repeated_eigenvalues_are_all_found():
    # One Krylov space holds one vector of each eigenspace: three here. The rest needs restarts.
    matrix = np.diag([3.0, 2, 2, 1, 1, 1])
    top = distill(arnoldi(lambda v: matrix @ v, np.ones(6), 6), 6)
    np.testing.assert_allclose(top.values, [3, 2, 2, 1, 1, 1], atol=1e-12)
    np.testing.assert_allclose(top.vectors @ top.vectors.T, np.eye(6), atol=1e-12)


def test_largest_magnitude_counts_and_signs_stay():
    values = np.array([5.0, -4.0, 3.0, -0.1, 0.2])
    matrix = _symmetric(values, dtype=np.float64)
    top = distill(arnoldi(lambda v: matrix @ v, np.ones(5), 5), 3)
    np.testing.assert_allclose(top.values, [5, -4, 3], atol=1e-12)


def test_zero_operator():
    result = arnoldi(lambda v: 0 * v, np.ones(5), 5)
    np.testing.assert_allclose(distill(result, 1).values, [0.0])


def test_more_steps_than_dimensions():
    matrix = np.diag([1.0, 2.0])
    result = arnoldi(lambda v: matrix @ v, np.ones(2), 10)
    assert result.matrix.shape == (2, 2)
    np.testing.assert_allclose(distill(result, 2).values, [2, 1])


def test_asymmetry_is_reported():
    symmetric = _symmetric(np.arange(1.0, 21), dtype=np.float64)
    assert arnoldi(lambda v: symmetric @ v, np.ones(20), 10).asymmetry < 1e-12
    # For H = S + A with A antisymmetric the asymmetry is |2 Q A Q'| / |Q H Q'|.
    other = np.random.default_rng(3).standard_normal((20, 20))
    result = arnoldi(lambda v: (symmetric + other - other.T) @ v, np.ones(20), 10)
    q = result.basis
    expected = np.linalg.norm(2 * q @ (other - other.T) @ q.T) / np.linalg.norm(result.matrix)
    np.testing.assert_allclose(result.asymmetry, expected, rtol=1e-10)


def test_tensors_come_and_go_as_tensors():
    matrix = tf.constant(_symmetric(np.arange(1.0, 11)))
    start = tf.ones([10])
    seen = []

    def matvec(vector):
        seen.append(tf.is_tensor(vector))
        return tf.linalg.matvec(matrix, vector)

    top = distill(arnoldi(matvec, start, 10), 2)
    assert all(seen)
    np.testing.assert_allclose(top.values, [10, 9], rtol=1e-5)


def test_the_start_is_not_changed():
    start = np.full(4, 2.0)
    arnoldi(lambda v: np.diag([1.0, 2, 3, 4]) @ v, start, 4)
    np.testing.assert_array_equal(start, 2.0)


@pytest.mark.parametrize("start", [np.zeros(3), np.array([1.0, np.nan, 0]), np.ones((1, 2, 2))])
def test_bad_start(start):
    with pytest.raises(ValueError, match=r"`start` must"):
        arnoldi(lambda v: v, start, 2)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`num_iterations` must be at least 1. Received: 0"):
        arnoldi(lambda v: v, np.ones(3), 0)
    with pytest.raises(ValueError, match=r"must return shape \(3,\)"):
        arnoldi(lambda v: v[:2], np.ones(3), 2)
    with pytest.raises(FloatingPointError, match=r"at step 0 of 2 is not finite"):
        arnoldi(lambda v: v * np.nan, np.ones(3), 2)
    result = arnoldi(lambda v: np.diag([1.0, 2, 3]) @ v, np.ones(3), 2)
    for rank in (0, 3):
        with pytest.raises(ValueError, match=r"between 1 and the number of iterations, 2"):
            distill(result, rank)
