"""What becomes of the others when one example is removed: influence divided by 1 - leverage."""

import keras
import numpy as np
import pytest

import keras_influence as ki
from tests import cases

N, WIDTH, L2 = 12, 3, 0.1


def _output(labels, outputs):
    """What is linear in the parameters, so that its change is theirs times the input."""
    del labels
    return outputs[:, 0]


@pytest.fixture(scope="module")
def ridge():
    """Ridge regression at its optimum, and its exact changes without each example."""
    random = np.random.default_rng(0)
    x = random.standard_normal((N, WIDTH)) * [1, 2, 3]
    y = x @ random.standard_normal(WIDTH) + random.standard_normal(N)
    queries = random.standard_normal((4, WIDTH))

    def fitted(rows):
        """argmin (1/N) sum over rows (x'w - y)^2 + (l2/2) |w|^2."""
        a, b = x[rows], y[rows]
        return np.linalg.solve(2 * a.T @ a / N + L2 * np.eye(WIDTH), 2 * a.T @ b / N)

    weights = fitted(np.arange(N))
    model = cases.linear_regression(WIDTH)
    cases.set_weights(model, weights)
    changes = np.stack([fitted(np.delete(np.arange(N), i)) - weights for i in range(N)])
    # The hat matrix: h_i = (2/N) x_i' (2 X'X / N + l2 I)^-1 x_i.
    inverse = np.linalg.inv(2 * x.T @ x / N + L2 * np.eye(WIDTH))
    leverage = np.einsum("np,pq,nq->n", x, inverse, x) * 2 / N
    return model, (x, y), (queries, np.zeros(4)), changes, leverage


METHODS = {
    "exact": (ki.ExactInfluence, {}),
    "conjugate gradients": (ki.ConjugateGradient, {"tolerance": 1e-12}),
    "arnoldi": (ki.Arnoldi, {"rank": WIDTH, "num_iterations": WIDTH}),
}


@pytest.mark.parametrize("name", METHODS)
def test_ridge_without_one_example(ridge, name):
    model, train, queries, changes, leverage = ridge
    make, options = METHODS[name]
    options = {**options, "damping": 0.0, "l2": L2, "measurement": _output}
    assert leverage.max() > 0.3
    actual = queries[0] @ changes.T
    corrected = make(model, leverage=True, **options).fit(train)
    found = corrected.scores(queries, train)
    np.testing.assert_allclose(found, actual, rtol=1e-6)
    # Without the correction, too small by the leverage, as to first order it must be.
    plain = make(model, **options).fit(train)
    np.testing.assert_allclose(plain.scores(queries, train), actual * (1 - leverage), rtol=1e-6)
    # l''/l'^2 times self-influence is the leverage; l = e^2, so l'' = 2 and l' = 2 e.
    errors = train[0] @ np.ravel(model.get_weights()[0]) - train[1]
    own = plain.self_influence(train).astype(np.float64)
    np.testing.assert_allclose(own * 2 / (2 * errors) ** 2, leverage, rtol=1e-5)
    np.testing.assert_allclose(corrected.self_influence(train), own / (1 - leverage), rtol=1e-5)


def test_the_blocks_that_it_is_computed_in(ridge, tmp_path):
    model, train, queries, changes, _ = ridge
    options = {"damping": 0.0, "l2": L2, "measurement": _output, "leverage": True}
    # Room for the gradients of five of the twelve at a time.
    method = ki.ExactInfluence(model, direction_bytes=5 * 2 * 8 * WIDTH, **options).fit(train)
    found = method.scores(queries, train, directory=tmp_path / "scores")
    np.testing.assert_allclose(found, queries[0] @ changes.T, rtol=1e-6)
    del options["measurement"]
    whole = ki.ExactInfluence(model, **options).fit(train)
    own = whole.self_influence(train)
    np.testing.assert_allclose(method.self_influence(train), own, rtol=1e-6)
    whole.save(tmp_path / "method")
    np.testing.assert_array_equal(ki.load(tmp_path / "method", model).self_influence(train), own)
    names = [stage.name for stage in method.plan(train, queries).stages]
    assert "gradients of outputs" in names and "products with eigenvectors" in names


def test_several_outputs_take_the_matrix():
    # Softmax regression: one Newton step on the objective without example i, from dense matrices.
    keras.utils.set_random_seed(0)
    model = cases.mlp((3, 3))
    x, y = cases.vectors(10, classes=3, dtype="float64")
    weights = np.linspace(0.5, 2, 10)
    l2, (p, q) = 0.05, (12, 4)
    gradients = weights[:, np.newaxis] * cases.dense_gradients(model, cases.cross_entropy, x, y)
    hessians = np.stack(
        [
            w * cases.dense_hessian(model, cases.cross_entropy, x[i : i + 1], y[i : i + 1])
            for i, w in enumerate(weights)
        ]
    )
    total = hessians.mean(axis=0) + l2 * np.eye(p)
    steps = np.stack(
        [np.linalg.solve(total - h / 10, g / 10) for h, g in zip(hessians, gradients, strict=True)]
    )
    train, queries = (x, y, weights), (x[:q], y[:q], weights[:q])
    for curvature in ki.gradients.CURVATURES:
        options = {"damping": 0.0, "l2": l2, "curvature": curvature, "leverage": True}
        exact = ki.ExactInfluence(model, **options).fit(train)
        found = exact.scores(queries, train)
        np.testing.assert_allclose(found, gradients[:q] @ steps.T, rtol=1e-5, atol=1e-9)
        own = np.einsum("np,np->n", gradients, steps)
        np.testing.assert_allclose(exact.self_influence(train), own, rtol=1e-5)
    # The Fisher matrix in one whole block would be the same; in blocks its own leverages are less.
    blocks = ki.EKFAC(model, damping=0.0, l2=l2, labels="expected", leverage=True).fit(train)
    plain = ki.EKFAC(model, damping=0.0, l2=l2, labels="expected").fit(train)
    assert (blocks.self_influence(train) > plain.self_influence(train)).all()


def test_it_comes_nearer_to_retraining_where_the_model_is_not_linear():
    # Two classes that overlap, 20 examples for 3 parameters, retrained by Newton's method.
    random = np.random.default_rng(2)
    x = random.standard_normal((20, 2))
    y = (x @ [1.0, -1.0] + random.standard_normal(20) > 0).astype(np.float64)
    inputs, l2 = np.concatenate([x, np.ones((20, 1))], axis=1), 0.02

    def optimum(rows):
        """Of (1/20) sum over rows of the loss + (l2/2) |w|^2."""
        w = np.zeros(3)
        for _ in range(30):
            p = 1 / (1 + np.exp(-inputs[rows] @ w))
            gradient = inputs[rows].T @ (p - y[rows]) / 20 + l2 * w
            hessian = (inputs[rows].T * (p * (1 - p))) @ inputs[rows] / 20 + l2 * np.eye(3)
            w = w - np.linalg.solve(hessian, gradient)
        assert np.abs(gradient).max() < 1e-12
        return w

    def losses(w):
        return np.logaddexp(0, inputs @ w) - y * (inputs @ w)

    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), keras.layers.Dense(1, dtype="float64")]
    )
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    weights = optimum(np.arange(20))
    cases.set_weights(model, weights[:2], weights[2:])
    actual = np.stack(
        [losses(optimum(np.delete(np.arange(20), i))) - losses(weights) for i in range(20)], axis=1
    )
    train = (x, y[:, np.newaxis])
    errors = [
        np.abs(
            ki.ExactInfluence(model, damping=0.0, l2=l2, leverage=leverage)
            .fit(train)
            .scores(train, train)
            - actual
        ).mean()
        for leverage in (False, True)
    ]
    # Measured: 0.0079 and 0.0038, of changes of 0.041 in the mean.
    assert errors[1] < errors[0] / 2


def test_what_has_no_correction(ridge):
    model, train, queries, _, _ = ridge
    options = {"damping": 0.0, "leverage": True}
    # As many parameters as examples: what is left has no optimum.
    few = tuple(array[:WIDTH] for array in train)
    with pytest.raises(ValueError, match=r"The leverage of example \d is 1: .* Raise `damping`"):
        ki.ExactInfluence(model, **options).fit(few).self_influence(few)
    arnoldi = ki.Arnoldi(model, WIDTH, WIDTH, **options).fit(train)
    for ask in (arnoldi.encode, ki.InfluenceScorer(arnoldi, k=1).index):
        with pytest.raises(ValueError, match=r"An encoding with `leverage=True` is not known"):
            ask(train)
    method = ki.ConjugateGradient(model, l2=L2, **options).fit(train)
    with pytest.raises(ValueError, match=r"The uncertainty of scores with `leverage=True`"):
        method.scores(queries, train, return_uncertainty=True)
    mean = ki.ExactInfluence(model, loss="mean_absolute_error", damping=0.1, leverage=True)
    with pytest.raises(ValueError, match=r"`leverage=True` must know in what the loss is convex"):
        mean.fit(train).self_influence(train)
    wide = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1001, use_bias=False)])
    wide.compile("sgd", "mse")
    ones = np.ones((3, 1)), np.ones((3, 1001))
    with pytest.raises(ValueError, match=r"Received: 1,001 outputs an example, above 1,000"):
        ki.DiagonalFisher(wide, leverage=True).fit(ones).self_influence(ones)
