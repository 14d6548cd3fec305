import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from tests import cases


def _least_squares(num=100, width=10):
    """X, y, the trained model and 5 queries: H = 2 X'X / n, gradient of one loss 2 (x'w - y) x."""
    random = np.random.default_rng(0)
    x = random.standard_normal((num, width)) * np.linspace(1, 3, width)
    y = x @ random.standard_normal(width) + random.standard_normal(num)
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    model = cases.linear_regression(width)
    cases.set_weights(model, weights)
    queries = (random.standard_normal((5, width)), random.standard_normal(5))
    return model, (x, y), queries, weights


def _gradients(examples, weights):
    x, y = examples
    return 2 * (x @ weights - y)[:, np.newaxis] * x


def test_full_rank_least_squares_is_exact():
    model, train, queries, weights = _least_squares()
    arnoldi = ki.Arnoldi(model, rank=10, num_iterations=10, damping=0.0).fit(train)
    hessian = 2 * train[0].T @ train[0] / 100
    basis = arnoldi.eigenbasis
    np.testing.assert_allclose(
        basis.vectors.T @ np.diag(basis.values) @ basis.vectors, hessian, atol=1e-7
    )
    exact = _gradients(queries, weights) @ np.linalg.solve(hessian, _gradients(train, weights).T)
    np.testing.assert_allclose(arnoldi.scores(queries, train), exact / 100, rtol=1e-6, atol=0)
    own = np.einsum(
        "ni,ni->n",
        _gradients(train, weights),
        np.linalg.solve(hessian, _gradients(train, weights).T).T,
    )
    np.testing.assert_allclose(arnoldi.self_influence(train), own / 100, rtol=1e-6)


def test_damping_and_l2_enter_the_curvature():
    model, train, queries, weights = _least_squares()
    hessian = 2 * train[0].T @ train[0] / 100 + (0.3 + 0.2) * np.eye(10)
    exact = _gradients(queries, weights) @ np.linalg.solve(hessian, _gradients(train, weights).T)
    arnoldi = ki.Arnoldi(model, 10, 10, damping=0.3, l2=0.2, scale="raw").fit(train)
    np.testing.assert_allclose(arnoldi.scores(queries, train), exact, rtol=1e-6, atol=0)


def test_low_rank_keeps_the_largest_eigenvalues():
    model, train, queries, weights = _least_squares()
    values, vectors = np.linalg.eigh(2 * train[0].T @ train[0] / 100)
    top, values = vectors[:, -3:], values[-3:]
    arnoldi = ki.Arnoldi(model, rank=3, num_iterations=10, damping=0.0, complement=None).fit(train)
    np.testing.assert_allclose(arnoldi.eigenbasis.values, values[::-1], rtol=1e-10)
    expected = (_gradients(queries, weights) @ top / values) @ (_gradients(train, weights) @ top).T
    np.testing.assert_allclose(arnoldi.scores(queries, train), expected / 100, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("batch_size", [5, 32])
def test_full_order_rebuilds_the_hessian_of_an_mlp(batch_size):
    model = cases.mlp((3, 7, 2))
    x, y = cases.vectors(32, 3, 2, dtype="float64")
    hessian = cases.dense_hessian(model, cases.cross_entropy, x, y)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)
    arnoldi = ki.Arnoldi(model, rank=44, num_iterations=44, damping=0.0).fit(dataset)
    values, vectors, _ = arnoldi.eigenbasis
    np.testing.assert_allclose(vectors.T @ np.diag(values) @ vectors, hessian, atol=1e-7)


def test_negative_eigenvalues(capsys):
    # l = -w_0^2 / 2 + w_1^2 for every example, through a loss that ignores the labels: H is
    # diag(-1, 2), and at w = (1, 1) every gradient is (-1, 2).
    import keras

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    cases.set_weights(model, np.ones(2))

    def loss(y_true, y_pred):
        w = model.trainable_variables[0]
        return -(w[0, 0] ** 2) / 2 + w[1, 0] ** 2 + 0.0 * y_pred[:, 0]

    train = (np.ones((4, 2), "float32"), np.zeros(4, "float32"))
    # <g, u>^2 / lambda is 1 / -1 for the negative pair, and 4 / 2 for the other.
    for mode, expected in (("drop", 2.0), ("keep", 1.0), ("absolute", 3.0)):
        arnoldi = ki.Arnoldi(
            model,
            2,
            2,
            loss=loss,
            negative_eigenvalues=mode,
            scale="raw",
            num_examples=2,
            damping=0.0,
        ).fit(train)
        np.testing.assert_allclose(arnoldi.self_influence(train), expected, rtol=1e-5)
    np.testing.assert_allclose(arnoldi.eigenbasis.values, [2, -1], rtol=1e-5)
    np.testing.assert_allclose(arnoldi.negative_mass, 1 / 3, rtol=1e-5)
    arnoldi.summary()
    assert "negative eigenvalues: 1, 33.3% of the magnitude (absolute)" in capsys.readouterr().out


def test_a_subset_is_the_same_at_every_product_and_seed():
    model = cases.image_model()
    train = cases.images(24)
    values = [
        ki.Arnoldi(model, 2, 6, num_examples=7, seed=seed, batch_size=4).fit(train).eigenbasis[0]
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(values[0], values[1])
    assert not np.allclose(values[0], values[2])
    chosen = np.random.default_rng(1).permutation(24)[:7]
    whole = ki.Arnoldi(model, 2, 6, seed=1).fit((train[0][chosen], train[1][chosen]))
    np.testing.assert_allclose(values[0], whole.eigenbasis.values, rtol=1e-4)


def test_scale_of_the_loss_only_scales():
    model = cases.mlp()
    train = cases.vectors(16, dtype="float64")
    plain = ki.Arnoldi(model, 5, 20).fit(train)

    def tiny(y_true, y_pred):
        return 1e-8 * cases.cross_entropy(tf.cast(y_true, tf.int32), y_pred)

    scaled = ki.Arnoldi(model, 5, 20, loss=tiny).fit(train)
    np.testing.assert_allclose(scaled.eigenbasis.values, 1e-8 * plain.eigenbasis.values, rtol=1e-7)
    # Gradients shrink by 1e-8 each, the curvature between them by 1e-8 once.
    np.testing.assert_allclose(
        scaled.self_influence(train), 1e-8 * plain.self_influence(train), rtol=1e-4
    )


def test_bad_arguments():
    model = cases.image_model()
    with pytest.raises(ValueError, match=r"between 1 and `num_iterations`=4.*Received: rank=5"):
        ki.Arnoldi(model, rank=5, num_iterations=4)
    with pytest.raises(ValueError, match=r"`negative_eigenvalues` must be one of.*'ignore'"):
        ki.Arnoldi(model, negative_eigenvalues="ignore")
    with pytest.raises(ValueError, match=r"must not be negative. Received: damping=-1"):
        ki.Arnoldi(model, damping=-1)
    with pytest.raises(ValueError, match=r"not fitted: call `fit"):
        ki.Arnoldi(model).self_influence(cases.images())
    with pytest.raises(ValueError, match=r"dataset's 24 examples. Received: 25"):
        ki.Arnoldi(model, num_examples=25).fit(cases.images(24))


def test_changed_weights_are_noticed():
    model = cases.image_model()
    train = cases.images()
    arnoldi = ki.Arnoldi(model, 2, 4).fit(train)
    before = arnoldi.scores(train, train)
    kept = model.get_weights()
    model.fit(*train, verbose=0)
    with pytest.raises(ValueError, match=r"are not those that Arnoldi was fitted on"):
        arnoldi.scores(train, train)
    model.set_weights(kept)
    np.testing.assert_array_equal(arnoldi.scores(train, train), before)
