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
    # All 27 directions: what is left of a gradient is rounding.
    "arnoldi": (lambda model, l2: ki.Arnoldi(model, 26, 26, damping=DAMPING, l2=l2), 1e-8),
    "arnoldi, refined": (
        lambda model, l2: ki.Arnoldi(model, 5, 20, damping=DAMPING, l2=l2, refine=30),
        1e-8,
    ),
    # The whole set in each batch, and depth enough for the flattest direction.
    "lissa": (
        lambda model, l2: ki.LiSSA(model, 800, DAMPING, l2=l2, hessian_batch_size=30),
        1e-3,
    ),
    "conjugate gradients": (
        lambda model, l2: ki.ConjugateGradient(model, 1e-11, damping=DAMPING, l2=l2),
        1e-8,
    ),
}


@pytest.mark.parametrize("name", cases.but_slow(METHODS, "lissa"))
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


@pytest.mark.parametrize("curvature", ki.gradients.CURVATURES[1:])
def test_the_gauss_newton_matrix_in_place_of_the_hessian(problem, curvature):
    model, train, queries, _, _, (of_queries, of_train) = problem
    # Of two classes: p_0 p_1 (d z_0 - d z_1)(d z_0 - d z_1)', the latter from the gradients by
    # the labels 0 and 1, of which it is the difference.
    x, _ = train
    first, second = (
        cases.dense_gradients(model, cases.cross_entropy, x, np.full(30, label)) for label in (0, 1)
    )
    p = keras.ops.softmax(model(x)).numpy()
    matrix = np.einsum("n,np,nq->pq", p.prod(axis=1) / 30, first - second, first - second)
    matrix += (DAMPING + L2) * np.eye(len(matrix))
    options = {"damping": DAMPING, "l2": L2, "curvature": curvature}
    method = ki.ExactInfluence(model, **options).fit(train)
    expected = of_queries @ np.linalg.solve(matrix, of_train.T) / 30
    np.testing.assert_allclose(method.scores(queries, train), expected, rtol=1e-5)
    assert method.eigenvalues[0] > -1e-12
    lines = []
    method.summary(lines.append)
    assert any(f"curvature {curvature}, damping 0.02, l2 0.01" in line for line in lines)
    assert method.get_config()["curvature"] == curvature
    arnoldi = ki.Arnoldi(model, len(matrix), len(matrix), **options).fit(train)
    largest = arnoldi.eigenbasis.values[:5]
    np.testing.assert_allclose(largest, method.eigenvalues[:-6:-1], rtol=1e-8)


def test_a_curvature_that_is_none():
    with pytest.raises(ValueError, match=r"`curvature` must be one of .* Received: 'ggn'"):
        ki.ExactInfluence(cases.mlp(), curvature="ggn")
    with pytest.raises(ValueError, match=r"`curvature` must be one of"):
        ki.Arnoldi(cases.mlp(), curvature="ggn")
