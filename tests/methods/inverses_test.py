"""Every inverse against the dense solve, on models small enough to write the matrix down."""

import keras
import numpy as np
import pytest

import keras_influence as ki
from tests import cases

DAMPING, L2 = 0.02, 0.01


@pytest.fixture(scope="module")
def problem():
    """A float64 network near a minimum, its data, queries, and the dense answer."""
    keras.utils.set_random_seed(0)
    model = cases.mlp((3, 4, 2))
    train, queries = cases.vectors(30, dtype="float64"), cases.vectors(4, seed=5, dtype="float64")
    hessian = cases.dense_hessian(model, cases.cross_entropy, *train)
    # Positive definite: the l2 penalty makes up for the most negative eigenvalue.
    l2 = L2 - min(np.linalg.eigvalsh(hessian)[0], 0.0)
    matrix = hessian + (l2 + DAMPING) * np.eye(len(hessian))
    gradients = [
        cases.dense_gradients(model, cases.cross_entropy, *examples)
        for examples in (queries, train)
    ]
    return model, train, queries, l2, matrix, gradients


METHODS = {
    "exact": (lambda model, l2: ki.ExactInfluence(model, damping=DAMPING, l2=l2), 1e-10),
    "conjugate gradients": (
        lambda model, l2: ki.ConjugateGradient(model, 1e-11, damping=DAMPING, l2=l2),
        1e-8,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_the_dense_solve(problem, name):
    model, train, queries, l2, matrix, (of_queries, of_train) = problem
    make, tolerance = METHODS[name]
    method = make(model, l2).fit(train)
    expected = of_queries @ np.linalg.solve(matrix, of_train.T) / 30
    # Scores are float32; the products are of the model's own precision.
    np.testing.assert_allclose(method.scores(queries, train), expected, rtol=max(tolerance, 1e-5))
    products = method.inverse_products(of_queries)
    forms = np.einsum("qp,qp->q", products, of_queries)
    exact = np.einsum("qp,qp->q", np.linalg.solve(matrix, of_queries.T).T, of_queries)
    np.testing.assert_allclose(forms, exact, rtol=tolerance)
    own = np.einsum("np,np->n", np.linalg.solve(matrix, of_train.T).T, of_train) / 30
    np.testing.assert_allclose(method.self_influence(train), own, rtol=max(tolerance, 1e-5))
