"""Leading eigenpairs of matrices whose eigenvalues are known."""

import numpy as np
import pytest

from keras_influence.linalg import leading_eigenpairs


@pytest.mark.parametrize("rank", [300, 280, 60, 1])
def test_values_vectors_and_what_is_left(rank):
    values = 1 / np.arange(1, 301) ** 1.5
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((300, 300)))[0]
    matrix = (basis * values) @ basis.T
    found = leading_eigenpairs(matrix, rank, seed=3)
    np.testing.assert_allclose(found.values, values[:rank], rtol=0.05)
    np.testing.assert_allclose(found.values[:5], values[: min(rank, 5)], rtol=1e-5)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(rank), atol=1e-10)
    rest = values[rank:]
    assert found.rest == pytest.approx(rest.sum(), rel=0.05, abs=1e-12)
    spread = rest.sum() ** 2 / np.sum(rest**2) if rank < 300 else 0
    assert found.spread == pytest.approx(spread, rel=0.1)
    again = leading_eigenpairs(matrix, rank, seed=3)
    np.testing.assert_array_equal(again.vectors, found.vectors)


def test_alike_eigenvalues_and_none():
    found = leading_eigenpairs(np.diag([5.0, 2, 2, 2]), 1)
    assert found.rest == pytest.approx(6) and found.spread == pytest.approx(3)
    nothing = leading_eigenpairs(np.zeros((4, 4)), 2)
    assert nothing.rest == 0 and nothing.spread == 2 and not nothing.values.any()
