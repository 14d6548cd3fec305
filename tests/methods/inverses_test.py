"""Every inverse against the dense solve, on models small enough to write the matrix down."""

import keras
import numpy as np
import pytest

import keras_influence as ki
from keras_influence.methods import curvature as curvature_module
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


@pytest.mark.parametrize("curvature", ki.gradients.CURVATURES[1:])
def test_a_convolution_takes_fewer_outer_products_than_columns(curvature, monkeypatch):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(2, 3, activation="tanh"), keras.layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((6, 6, 1)), *layers, keras.layers.Dense(3)])
    model.compile("sgd", cases.SPARSE)
    x, y = cases.images(24)
    options = {"damping": 0.1, "l2": 0.01, "curvature": curvature, "batch_size": 7}
    # Rows of 24 examples, of 29 numbers: one class at a time.
    options["direction_bytes"] = 24 * 29 * 4
    method = ki.ExactInfluence(model, **options).fit((x, y))
    assert method.num_roots == 3 and method.discrepancy < 1e-5
    lines = []
    method.summary(lines.append)
    assert any("outer products of 3 gradients an example; a product differs" in s for s in lines)
    with monkeypatch.context() as patch:
        patch.setattr(curvature_module, "num_roots", lambda *_: 0)
        columns = ki.ExactInfluence(model, **options).fit((x, y))
    assert columns.num_roots == 0 and columns.discrepancy < 1e-5
    largest = columns.eigenvalues[-1]
    np.testing.assert_allclose(method.eigenvalues, columns.eigenvalues, atol=1e-6 * largest)
    scores = columns.scores((x, y), (x, y))
    np.testing.assert_allclose(method.scores((x, y), (x, y)), scores, atol=1e-4 * scores.max())
    assert ki.ExactInfluence(model, damping=0.1).fit((x, y)).num_roots == 0
    # One product, by which the matrix is checked.
    plan = ki.ExactInfluence(model, **options).plan((x, y))
    assert plan.hessian_products == plan.calls["curvature"] == 1 and "outer products" in str(plan)

    # Weights below zero have no root: the comparison finds it, and the matrix comes by columns.
    signed = (x, y, np.where(np.arange(24) < 4, 1.0, -0.5))
    found = ki.ExactInfluence(model, **options).fit(signed)
    assert found.num_roots == 0 and found.eigenvalues[0] < -0.01


def test_a_curvature_that_is_none():
    with pytest.raises(ValueError, match=r"`curvature` must be one of .* Received: 'ggn'"):
        ki.ExactInfluence(cases.mlp(), curvature="ggn")
    with pytest.raises(ValueError, match=r"`curvature` must be one of"):
        ki.Arnoldi(cases.mlp(), curvature="ggn")
