"""What the inverses share: damping, measurements, groups, and what they say of themselves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from keras_influence.methods.complement import measured
from tests import cases

WIDTH = 4


@pytest.fixture(scope="module")
def regression():
    """Least squares: H = 2 X'X / n, the gradient of one loss is 2 (x'w - y) x."""
    random = np.random.default_rng(0)
    x = random.standard_normal((20, WIDTH)) * [1, 2, 3, 4]
    y = x @ random.standard_normal(WIDTH) + random.standard_normal(20)
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    model = cases.linear_regression(WIDTH)
    cases.set_weights(model, weights)
    hessian = 2 * x.T @ x / 20
    gradients = 2 * (x @ weights - y)[:, np.newaxis] * x
    return model, (x, y), hessian, gradients


def _sines(theta):
    """A model whose every loss is sum_j sin(theta_j), and one example."""
    model = keras.Sequential(
        [
            keras.Input((len(theta),), dtype="float64"),
            keras.layers.Dense(1, use_bias=False, dtype="float64"),
        ]
    )
    cases.set_weights(model, theta)

    def loss(y_true, y_pred):
        w = model.trainable_variables[0]
        return tf.reduce_sum(tf.sin(w.value)) + 0.0 * y_pred[:, 0]

    examples = (np.ones((2, len(theta))), np.zeros(2))
    return model, loss, examples


@pytest.mark.parametrize(
    "make",
    [
        lambda model, loss: ki.ExactInfluence(
            model, loss=loss, damping=0.0, negative_eigenvalues="keep"
        ),
        lambda model, loss: ki.Arnoldi(
            model, 5, 5, loss=loss, damping=0.0, negative_eigenvalues="keep"
        ),
    ],
)
def test_a_sum_of_sines(make):
    # The Hessian of sum sin(theta_j) is diag(-sin(theta)): H^-1 v = -v / sin(theta).
    theta = np.array([0.5, 1.0, 2.0, 4.0, 5.5])
    model, loss, examples = _sines(theta)
    vectors = np.random.default_rng(0).standard_normal((3, 5))
    found = make(model, loss).fit(examples).inverse_products(vectors)
    np.testing.assert_allclose(found, -vectors / np.sin(theta), rtol=1e-9)


def test_conjugate_gradients_stop_at_negative_curvature(caplog):
    theta = np.array([0.5, 1.0, 2.0, 4.0, 5.5])
    model, loss, examples = _sines(theta)
    method = ki.ConjugateGradient(model, 1e-10, loss=loss, damping=0.0).fit(examples)
    method.inverse_products(np.ones((2, 5)))
    assert method.solutions.indefinite.all()
    assert method.solutions.curvatures.min() < 0
    assert "negative curvature" in caplog.text and "would be enough" in caplog.text
    lines = []
    method.summary(lines.append)
    assert any("2 of 2 stopped at negative curvature" in line for line in lines)
    # With sines that are all negative H is positive, and the solution exact.
    model, loss, examples = _sines(theta + np.pi * np.array([1, 1, 1, 0, 0]))
    method = ki.ConjugateGradient(model, 1e-12, loss=loss, damping=0.0).fit(examples)
    found = method.inverse_products(np.ones((1, 5)))
    theta = np.array(model.get_weights()[0]).ravel()
    np.testing.assert_allclose(found[0], -1 / np.sin(theta), rtol=1e-9)


def test_right_hand_sides_are_solved_alone_and_together(regression):
    model, train, hessian, gradients = regression
    method = ki.ConjugateGradient(model, 1e-12, damping=0.1).fit(train)
    matrix = hessian + 0.1 * np.eye(WIDTH)
    # By itself an eigenvector takes one step, zero none, a general vector as many as there are
    # parameters.
    eigenvector = np.linalg.eigh(matrix)[1][:, 1]
    vectors = np.stack([eigenvector, np.zeros(WIDTH), *gradients[:3]])
    expected = np.linalg.solve(matrix, vectors.T).T
    for row, steps in enumerate([1, 0, WIDTH, WIDTH, WIDTH]):
        found = method.inverse_products(vectors[row : row + 1])
        np.testing.assert_allclose(found[0], expected[row], rtol=1e-9, atol=1e-12)
        assert method.solutions.iterations.tolist() == [steps]
    # Four vectors together span all that there is.
    found = method.inverse_products(vectors)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert method.solutions.iterations.tolist() == [1, 0, 1, 1, 1]
    assert method.solutions.residuals.max() < 1e-11
    # With the exact inverse for preconditioner one step is enough for all.
    exact = ki.ExactInfluence(model, damping=0.1).fit(train)
    helped = ki.ConjugateGradient(model, 1e-10, damping=0.1, preconditioner=exact).fit(train)
    np.testing.assert_allclose(helped.inverse_products(vectors), found, rtol=1e-9, atol=1e-12)
    assert helped.solutions.iterations.max() == 1
    lines = []
    helped.summary(lines.append)
    assert any("verdict: exact to the tolerance" in line for line in lines)
    with pytest.raises(TypeError, match=r"must be an inverse.*Received: GradientDot"):
        ki.ConjugateGradient(model, preconditioner=ki.GradientDot(model))


def test_bounds_hold(regression):
    model, train, hessian, gradients = regression
    matrix = hessian + 0.1 * np.eye(WIDTH)
    exact = gradients @ np.linalg.solve(matrix, gradients.T) / 20
    # One step for one query at a time, so that something is left.
    method = ki.ConjugateGradient(model, 1e-12, 1, damping=0.1, direction_bytes=1).fit(train)
    scores, bounds = method.scores(train, train, return_uncertainty=True)
    error = np.abs(scores - exact)
    assert (error <= bounds * (1 + 1e-5)).all() and error.max() > 1e-3
    # The complement's constant lies between the eigenvalues that it stands for, and its quadratic
    # form between the bounds.
    arnoldi = ki.Arnoldi(model, 2, 4, damping=0.1, num_probes=32).fit(train)
    values = np.linalg.eigvalsh(matrix)
    found = arnoldi.complement_estimate
    assert 1 / values[1] <= found.constant <= 1 / values[0]
    assert found.lower <= found.estimate * (1 + 1e-12) and found.estimate <= found.upper
    assert found.error > 0 and not found.clipped
    scores, errors = arnoldi.scores(train, train, return_uncertainty=True)
    assert np.mean(np.abs(scores - exact)) < np.mean(np.abs(exact)) / 2
    assert errors.shape == scores.shape and (errors >= 0).all()


def test_the_complement_of_one_eigenvalue_is_exact():
    # On the complement A = 3 I: every quotient is 1/3, and so are both bounds.
    rest = np.array([[1.0, 2.0], [0.5, -1.0]])
    image = 3 * rest
    moments = [
        np.einsum("mp,mp->m", a, b) for a, b in ((rest, rest), (rest, image), (image, image))
    ]
    coefficients = np.array([[2.0], [1.0]])
    found = measured(coefficients, *moments, weights=np.array([0.25]), damping=0.5, floor=0.5)
    np.testing.assert_allclose(found.constant, 1 / 3)
    np.testing.assert_allclose(found.error, 0, atol=1e-12)
    # (4 + 1) / 4 within, (5 + 1.25) / 3 outside.
    np.testing.assert_allclose(
        [found.lower, found.estimate, found.upper], 5 / 4 + 6.25 / 3, rtol=1e-12
    )
    np.testing.assert_allclose(found.share, 6.25 / 11.25)


def test_a_complement_without_positive_curvature_is_clipped():
    ones = np.ones(2)
    arguments = {"weights": np.zeros(1), "floor": 0.0}
    none = measured(np.zeros((2, 1)), ones, -ones, ones, damping=0.0, **arguments)
    assert none.constant == 0 and none.clipped and none.upper == np.inf
    most = measured(np.zeros((2, 1)), ones, 0.1 * ones, ones, damping=0.5, **arguments)
    assert most.constant == 2 and most.clipped
    given = measured(np.zeros((2, 1)), ones, ones, ones, damping=0.5, constant=2.0, **arguments)
    assert given.constant == 2 and not given.clipped and given.error == 0


@pytest.mark.parametrize("complement", ["rayleigh", "trace", "damping"])
def test_complements_in_scores_self_influence_and_encodings(regression, complement):
    model, train, _, gradients = regression
    arnoldi = ki.Arnoldi(model, 2, 4, damping=0.1, complement=complement).fit(train)
    basis, c = arnoldi.eigenbasis, arnoldi.complement_estimate.constant
    if complement == "damping":
        assert c == pytest.approx(10)
    inverse = basis.vectors.T @ np.diag(1 / (basis.values + 0.1)) @ basis.vectors
    inverse += c * (np.eye(WIDTH) - basis.vectors.T @ basis.vectors)
    expected = gradients @ inverse @ gradients.T / 20
    np.testing.assert_allclose(arnoldi.scores(train, train), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arnoldi.self_influence(train), np.diag(expected), rtol=1e-5)
    # A sketch as wide as the complement loses nothing; the last number is the squared norm.
    encoded = arnoldi.encode(train)
    assert encoded.shape == (20, 2 + 2 + 1)
    np.testing.assert_allclose((encoded * arnoldi.metric) @ encoded.T / 20, expected, rtol=1e-6)
    np.testing.assert_allclose(encoded[:, -1], np.square(gradients).sum(1), rtol=1e-6)
    scorer = ki.InfluenceScorer(arnoldi, k=3).index(train)
    top = scorer(train)
    np.testing.assert_allclose(
        top.proponents.scores, -np.sort(-expected, axis=1)[:, :3], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(scorer.self_influence(), np.diag(expected), rtol=1e-5)


def test_a_fit_with_a_complement_is_resumed_and_saved(regression, tmp_path):
    model, train, _, _ = regression
    fitted = ki.Arnoldi(model, 2, 4, damping=0.1).fit(train, directory=tmp_path / "fit")
    fitted.save(tmp_path / "copy")
    for other in (
        ki.Arnoldi(model, 2, 4, damping=0.1).fit(train, directory=tmp_path / "fit"),
        ki.load(tmp_path / "fit", model),
        ki.load(tmp_path / "copy", model),
    ):
        assert other.complement_estimate == fitted.complement_estimate
        np.testing.assert_array_equal(other.scores(train, train), fitted.scores(train, train))
        np.testing.assert_array_equal(other.encode(train), fitted.encode(train))


def test_groups_are_sums_and_means(regression):
    model, train, hessian, gradients = regression
    exact = ki.ExactInfluence(model, damping=0.1).fit(train)
    scores = exact.scores(train, train).astype(np.float64)
    query_groups, train_groups = np.arange(20) % 3, np.arange(20) // 5
    expected = np.stack(
        [
            [scores[query_groups == q][:, train_groups == t].mean(0).sum() for t in range(4)]
            for q in range(3)
        ]
    )
    found = exact.group_scores(train, train, query_groups, train_groups)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(exact.group_scores(train, train), scores, rtol=1e-5, atol=1e-7)
    x, y = train
    change = exact.parameter_change((x[:5], y[:5]))
    matrix = hessian + 0.1 * np.eye(WIDTH)
    np.testing.assert_allclose(change, np.linalg.solve(matrix, gradients[:5].sum(0)) / 20)
    # The change times a query's gradient is the group's influence.
    np.testing.assert_allclose(gradients @ change, scores[:, :5].sum(1), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"`train_groups` must be 20 integers"):
        exact.group_scores(train, train, train_groups=np.zeros(3, int))


@pytest.mark.parametrize("measurement", ["logit", "margin", "probability", "function"])
def test_measurements_of_a_classifier(measurement):
    keras.utils.set_random_seed(1)
    model = cases.mlp((3, 4, 3))
    x, y = cases.vectors(12, 3, 3, dtype="float64")

    def log_probability(labels, logits):
        return -cases.cross_entropy(tf.cast(labels, tf.int32), logits)

    named = log_probability if measurement == "function" else measurement
    method = ki.ExactInfluence(model, damping=0.5, measurement=named, scale="raw").fit((x, y))

    def value(labels, logits):
        p = tf.nn.softmax(logits)
        chosen = tf.gather(p, labels, batch_dims=1)
        return {
            "logit": tf.gather(logits, labels, batch_dims=1),
            "margin": tf.math.log(chosen / (1 - chosen)),
            "probability": chosen,
            "function": tf.math.log(chosen),
        }[measurement]

    of_queries = cases.dense_gradients(model, value, x, y)
    of_train = cases.dense_gradients(model, cases.cross_entropy, x, y)
    hessian = cases.dense_hessian(model, cases.cross_entropy, x, y)
    values, vectors = np.linalg.eigh(hessian)
    weights = np.where(values > -1e-15, 1 / (values + 0.5), 0)  # "drop"
    expected = of_queries @ (vectors * weights) @ vectors.T @ of_train.T
    np.testing.assert_allclose(method.scores((x, y), (x, y)), expected, rtol=1e-4, atol=1e-7)
    # Products of gradients take the same measurements.
    dot = ki.GradientDot(model, measurement=named, scale="raw").fit((x, y))
    np.testing.assert_allclose(
        dot.scores((x, y), (x, y)), of_queries @ of_train.T, rtol=1e-4, atol=1e-7
    )


def test_queries_of_another_structure_than_the_training_set():
    # Sample weights here and none there: another structure, for which directions are laid out anew.
    model = cases.mlp((3, 4, 2))
    x, y = cases.vectors(8, dtype="float64")
    weighted = (x, y, np.full(8, 2.0))
    dot = ki.GradientDot(model, scale="raw").fit(weighted)
    gradients = cases.dense_gradients(model, cases.cross_entropy, x, y)
    np.testing.assert_allclose(
        dot.scores((x, y), weighted), 2 * gradients @ gradients.T, rtol=1e-5, atol=1e-9
    )


def test_a_measurement_that_the_loss_does_not_have(regression):
    with pytest.raises(ValueError, match=r"'margin' is that of a classifier"):
        ki.GradientDot(regression[0], measurement="margin")
    with pytest.raises(ValueError, match=r"`measurement` must be one of .*Received: 'entropy'"):
        ki.GradientDot(regression[0], measurement="entropy")


def test_damping_by_the_trace_and_by_the_run(regression, tmp_path):
    model, train, hessian, _ = regression
    exact = ki.ExactInfluence(model).fit(train)
    # The mean of eight forms z'Hz, whose expectation is the trace.
    np.testing.assert_allclose(exact.used_damping, 0.1 * np.trace(hessian) / WIDTH, rtol=0.5)
    trace, error = exact.trace
    assert abs(trace - np.trace(hessian)) < 4 * error
    lines = []
    ki.Arnoldi(model, 2, 4).fit(train).summary(lines.append)
    assert any(f"trace: {trace:.4g} +- {error:.2g}" in line for line in lines)
    other = cases.linear_regression(WIDTH)
    other.compile(keras.optimizers.SGD(1e-3, momentum=0.5), "mse")
    recorder = ki.callbacks.TracInCheckpoint(tmp_path / "run")
    other.fit(*train, batch_size=5, epochs=3, verbose=0, callbacks=[recorder])
    # Twelve steps of 1e-3 / (1 - 0.5).
    found = ki.ConjugateGradient(other, run=tmp_path / "run").fit(train)
    assert found.used_damping == pytest.approx(1 / (12 * 2e-3))
    other.set_weights([np.ones((WIDTH, 1))])
    with pytest.raises(ValueError, match=r"recorded no such weights"):
        ki.ConjugateGradient(other, run=tmp_path / "run").fit(train)
    with pytest.raises(ValueError, match=r"`damping` must be a number or 'auto'"):
        ki.ExactInfluence(model, damping="best")


def test_too_many_parameters_for_a_matrix(regression):
    with pytest.raises(ValueError, match=r"matrix of 4\^2 numbers.*above 3"):
        ki.ExactInfluence(regression[0], max_parameters=3).fit(regression[1])


def test_refining_needs_the_training_set(regression, tmp_path):
    model, train, hessian, gradients = regression
    fitted = ki.Arnoldi(model, 1, 4, damping=0.1, refine=WIDTH).fit(train)
    matrix = hessian + 0.1 * np.eye(WIDTH)
    expected = gradients @ np.linalg.solve(matrix, gradients.T) / 20
    np.testing.assert_allclose(fitted.scores(train, train), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(fitted.self_influence(train), np.diag(expected), rtol=1e-5)
    fitted.save(tmp_path / "method")
    with pytest.raises(ValueError, match=r"call `fit\(train\)` after loading"):
        ki.load(tmp_path / "method", model).scores(train, train)
