"""Block conjugate gradients against dense solves, and against one right-hand side at a time."""

import numpy as np
import pytest
import tensorflow as tf

from keras_influence.linalg import block_conjugate_gradient, conjugate_gradient

SIZE = 60


def system(count, dtype="float64", spread=5):
    """A of eigenvalues from 10^-spread to 1, and right-hand sides, as they come of gradients."""
    random = np.random.default_rng(0)
    vectors = np.linalg.qr(random.standard_normal((SIZE, SIZE)))[0]
    matrix = (vectors * np.logspace(0, -spread, SIZE)) @ vectors.T
    right = random.standard_normal((count, SIZE)) @ matrix
    return matrix.astype(dtype), right.astype(dtype)


def solve(matrix, right, method=block_conjugate_gradient, **options):
    options = {"tolerance": 1e-10, "max_iterations": 500, **options}
    multiplied = []

    def products(rows):
        multiplied.append(len(rows))
        return tf.constant(rows.numpy() @ matrix)

    return method(products, tf.constant(right), **options), multiplied


@pytest.mark.parametrize("count", [2, 6, 64])
def test_solves_in_fewer_steps_than_each_by_itself(count):
    matrix, right = system(count)
    steps = []
    found, multiplied = solve(matrix, right, after=lambda: steps.append(1))
    expected = np.linalg.solve(matrix, right.T).T
    np.testing.assert_allclose(found.vectors, expected, atol=1e-6 * np.abs(expected).max())
    assert found.residuals.max() <= 1e-10
    rest = np.linalg.norm(right - found.vectors.numpy() @ matrix, axis=1)
    np.testing.assert_allclose(found.residuals, rest / np.linalg.norm(right, axis=1), atol=1e-14)
    alone, _ = solve(matrix, right, conjugate_gradient)
    assert found.iterations.max() * min(count, 4) < 2 * alone.iterations.max()
    assert len(steps) == found.iterations.max() and multiplied[0] == count
    assert not found.indefinite.any()
    values = np.linalg.eigvalsh(matrix)
    assert (values[0] < found.curvatures).all() and (found.curvatures < values[-1]).all()


def test_more_right_hand_sides_than_parameters_take_one_step():
    matrix, right = system(SIZE + 4, spread=2)
    found, _ = solve(matrix, right)
    assert (found.iterations == 1).all() and found.residuals.max() < 1e-10


def test_float32_is_as_near_as_its_rounding():
    matrix, right = system(6, "float32", spread=3)
    found, _ = solve(matrix, right, tolerance=1e-5)
    assert found.residuals.max() <= 1e-5
    rest = np.linalg.norm(right - found.vectors.numpy() @ matrix, axis=1)
    assert (rest <= 2e-5 * np.linalg.norm(right, axis=1)).all()
    # What no float32 can reach ends, with the residual that it has.
    found, multiplied = solve(matrix, right, tolerance=1e-12)
    assert 1e-12 < found.residuals.max() < 1e-5 and len(multiplied) < 500


def test_rows_that_depend_on_each_other_and_rows_of_zeros():
    matrix, right = system(3)
    right = np.stack(
        [right[0], np.zeros(SIZE), right[0], right[1] - 1e3 * right[0], 1e-9 * right[2]]
    )
    found, _ = solve(matrix, right)
    assert (found.residuals <= 1e-10).all()
    np.testing.assert_array_equal(found.vectors[1], 0)
    assert found.iterations[1] == 0 and found.residuals[1] == 0
    np.testing.assert_allclose(found.vectors[0], found.vectors[2], rtol=1e-9)
    none, multiplied = solve(matrix, np.zeros((2, SIZE)))
    assert not none.vectors.numpy().any() and not multiplied


def test_preconditioners():
    matrix, right = system(5)
    inverse = np.linalg.inv(matrix)
    found, _ = solve(matrix, right, precondition=lambda rows: tf.constant(rows.numpy() @ inverse))
    assert (found.iterations == 1).all() and found.residuals.max() < 1e-9
    # The twenty largest eigenvalues made one.
    values, vectors = np.linalg.eigh(matrix)
    values[:-20] = values[-21]
    nearly = (vectors / values) @ vectors.T
    helped, _ = solve(matrix, right, precondition=lambda rows: tf.constant(rows.numpy() @ nearly))
    plain, _ = solve(matrix, right)
    assert helped.residuals.max() <= 1e-10
    assert helped.iterations.max() < plain.iterations.max()


def test_a_matrix_that_is_not_positive_is_solved_row_by_row():
    matrix, right = system(4)
    values, vectors = np.linalg.eigh(matrix)
    values[-1] *= -1
    matrix = (vectors * values) @ vectors.T
    found, _ = solve(matrix, right)
    alone, _ = solve(matrix, right, conjugate_gradient)
    assert found.indefinite.all()
    for name in found._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))


def test_stops_after_the_steps_that_are_allowed():
    matrix, right = system(4)
    found, multiplied = solve(matrix, right, max_iterations=3)
    assert (found.iterations == 3).all() and found.residuals.max() > 1e-6
    # One more for the residual.
    assert multiplied == [4] * 4
    with pytest.raises(FloatingPointError, match="not finite"):
        solve(np.full((SIZE, SIZE), np.nan), right)
