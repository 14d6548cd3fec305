"""TracIn, GradientDot, RandomProjection and LiSSA against sums written out."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from tests import cases

WIDTH = 3


def _problem():
    random = np.random.default_rng(0)
    train = (random.standard_normal((6, WIDTH)), random.standard_normal(6))
    queries = (random.standard_normal((2, WIDTH)), random.standard_normal(2))
    return train, queries


def _gradients(examples, weights):
    # l = (x'w - y)^2 has the gradient 2 (x'w - y) x.
    x, y = examples
    return 2 * (x @ weights - y)[:, np.newaxis] * x


def _recorded(directory, weight_sets, rates):
    """A run of one batch an epoch, whose weights and learning rate are put there by hand."""
    model = cases.linear_regression(WIDTH)

    class Puppeteer(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = rates[epoch]

        def on_train_batch_end(self, batch, logs=None):
            cases.set_weights(self.model, weight_sets[self.epochs_done])
            self.epochs_done += 1

        epochs_done = 0

    train, _ = _problem()
    recorder = ki.callbacks.TracInCheckpoint(directory)
    model.fit(
        *train,
        batch_size=6,
        epochs=len(rates),
        verbose=0,
        callbacks=[Puppeteer(), recorder],
    )
    return model


@pytest.mark.parametrize("same_weights", [True, False])
def test_tracin_is_a_sum_over_checkpoints_of_products(tmp_path, same_weights):
    first, second = np.array([0.5, -1, 2.0]), np.array([1.0, 0, -0.5])
    weight_sets = [first, first if same_weights else second]
    rates = [0.125, 0.5]
    model = _recorded(tmp_path / "run", weight_sets, rates)
    cases.set_weights(model, np.full(3, 7.0))
    train, queries = _problem()
    tracin = ki.TracIn(model, checkpoints=tmp_path / "run")
    expected = sum(
        rate * _gradients(queries, w) @ _gradients(train, w).T
        for rate, w in zip(rates, weight_sets, strict=True)
    )
    np.testing.assert_allclose(tracin.scores(queries, train), expected, rtol=1e-6)
    own = sum(
        rate * (_gradients(train, w) ** 2).sum(axis=1)
        for rate, w in zip(rates, weight_sets, strict=True)
    )
    np.testing.assert_allclose(tracin.self_influence(train), own, rtol=1e-6)
    # The model's own weights are back.
    np.testing.assert_array_equal(model.get_weights()[0].ravel(), 7.0)


def test_tracin_over_chosen_checkpoints(tmp_path):
    weight_sets = [np.array([0.5, -1, 2.0]), np.array([1.0, 0, -0.5]), np.ones(3)]
    model = _recorded(tmp_path / "run", weight_sets, [0.125, 0.25, 0.5])
    train, queries = _problem()
    last = ki.checkpoints.list_checkpoints(tmp_path / "run")[-1:]
    expected = 0.5 * _gradients(queries, np.ones(3)) @ _gradients(train, np.ones(3)).T
    np.testing.assert_allclose(
        ki.TracIn(model, checkpoints=last).scores(queries, train), expected, rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"`checkpoints` is empty"):
        ki.TracIn(model, checkpoints=[])
    with pytest.raises(FileNotFoundError):
        ki.TracIn(model, checkpoints=tmp_path / "nothing")


def test_tracin_leaves_out_checkpoints_without_a_rate(tmp_path):
    weight_sets = [np.array([0.5, -1, 2.0]), np.ones(3)]
    model = _recorded(tmp_path / "run", weight_sets, [0.125, 0.0])
    train, queries = _problem()
    first, last = ki.checkpoints.list_checkpoints(tmp_path / "run")
    tracin = ki.TracIn(model, checkpoints=tmp_path / "run")
    assert [each.step for each in tracin.checkpoints] == [first.step]
    expected = 0.125 * _gradients(queries, weight_sets[0]) @ _gradients(train, weight_sets[0]).T
    np.testing.assert_allclose(tracin.scores(queries, train), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=rf"0 at all of `checkpoints`, of steps \[{last.step}\]"):
        ki.TracIn(model, checkpoints=[last])


def test_tracin_puts_the_weights_back_after_an_error(tmp_path):
    model = _recorded(tmp_path / "run", [np.zeros(3)], [0.5])
    cases.set_weights(model, np.full(3, 7.0))
    train, _ = _problem()
    bad = (train[0], np.where(np.arange(6) == 4, np.nan, train[1]))
    with pytest.raises(FloatingPointError, match=r"example 4 is not finite"):
        ki.TracIn(model, checkpoints=tmp_path / "run").self_influence(bad)
    np.testing.assert_array_equal(model.get_weights()[0].ravel(), 7.0)


def test_gradient_dot_and_cosine():
    model = cases.linear_regression(WIDTH)
    weights = np.array([0.5, -1, 2.0])
    cases.set_weights(model, weights)
    train, queries = _problem()
    g, q = _gradients(train, weights), _gradients(queries, weights)
    dot = ki.GradientDot(model).fit(train)
    np.testing.assert_allclose(dot.scores(queries, train), q @ g.T / 6, rtol=1e-6)
    np.testing.assert_allclose(dot.self_influence(train), (g**2).sum(1) / 6, rtol=1e-6)
    raw = ki.GradientDot(model, scale="raw")
    np.testing.assert_allclose(raw.scores(queries, train), q @ g.T, rtol=1e-6)
    cosine = ki.GradientDot(model, similarity="cosine")
    norms = np.linalg.norm(q, axis=1)[:, np.newaxis] * np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(cosine.scores(queries, train), q @ g.T / norms, rtol=1e-5)


def test_an_example_without_gradient_has_cosine_zero():
    model = cases.linear_regression(WIDTH)
    cases.set_weights(model, np.ones(3))
    train, queries = _problem()
    train = (train[0], np.where(np.arange(6) == 2, train[0].sum(axis=1), train[1]))
    cosine = ki.GradientDot(model, similarity="cosine")
    assert (cosine.scores(queries, train)[:, 2] == 0).all()
    np.testing.assert_array_equal(cosine.self_influence(train), [1, 1, 0, 1, 1, 1])


def test_without_fit_the_unit_is_unknown():
    model = cases.linear_regression(WIDTH)
    train, queries = _problem()
    for method in (ki.GradientDot(model), ki.RandomProjection(model, 2)):
        for call in (lambda m: m.scores(queries, train), lambda m: m.self_influence(train)):
            with pytest.raises(ValueError, match=r'`fit.train.`, or pass `scale="raw"`'):
                call(method)


def test_random_projection_is_the_gram_of_encodings_and_unbiased():
    model = cases.linear_regression(WIDTH)
    weights = np.array([0.5, -1, 2.0])
    cases.set_weights(model, weights)
    train, queries = _problem()
    g, q = _gradients(train, weights), _gradients(queries, weights)
    one = ki.RandomProjection(model, 4, seed=3).fit(train)
    np.testing.assert_allclose(
        one.encode(train), g @ one._direction_rows(0, 4).numpy().T, rtol=1e-5
    )
    np.testing.assert_allclose(
        one.scores(queries, train), one.encode(queries) @ one.encode(train).T / 6, rtol=1e-4
    )
    np.testing.assert_array_equal(
        one._direction_rows(1, 3), ki.RandomProjection(model, 4, seed=3)._direction_rows(0, 4)[1:3]
    )
    # Var(<Rq, Rg>) = (|q|^2 |g|^2 + <q, g>^2) / rank <= 2 |q|^2 |g|^2 / rank: at rank 10,000, four
    # standard deviations are 0.057 |q| |g|.
    many = ki.RandomProjection(model, 10_000, scale="raw")
    bound = 0.057 * np.linalg.norm(q, axis=1)[:, np.newaxis] * np.linalg.norm(g, axis=1)
    assert (np.abs(many.scores(queries, train) - q @ g.T) < bound).all()


def test_lissa_solves_the_system_that_it_states():
    # The whole set in each step makes the recursion deterministic: after depth d an eigenvalue a of
    # H + damping I is inverted up to the factor 1 - (1 - a / scale)^(d + 1).
    model = cases.linear_regression(WIDTH)
    weights = np.array([0.5, -1, 2.0])
    cases.set_weights(model, weights)
    train, queries = _problem()
    g, q = _gradients(train, weights), _gradients(queries, weights)
    values, vectors = np.linalg.eigh(2 * train[0].T @ train[0] / 6 + 0.1 * np.eye(3))
    for depth, rtol in ((3, 1e-5), (400, 1e-5)):
        share = (1 - (1 - values / 8) ** (depth + 1)) / values
        lissa = ki.LiSSA(model, depth, 0.1, 8.0, hessian_batch_size=6, scale="raw").fit(train)
        inverse = vectors @ np.diag(share) @ vectors.T
        np.testing.assert_allclose(lissa.scores(queries, train), q @ inverse @ g.T, rtol=rtol)
        np.testing.assert_allclose(
            lissa.self_influence(train), np.einsum("ni,ij,nj->n", g, inverse, g), rtol=rtol
        )
    lines = []
    lissa.summary(lines.append)
    assert any("damping 0.1, l2 0: 400 steps at scale 8" in line for line in lines)


def test_lissa_refuses_a_scale_below_the_spectrum():
    model = cases.linear_regression(WIDTH)
    cases.set_weights(model, np.ones(3))
    train, queries = _problem()
    top = np.linalg.eigvalsh(2 * train[0].T @ train[0] / 6)[-1]
    lissa = ki.LiSSA(model, 100, 0.0, top / 4, hessian_batch_size=6)
    with pytest.raises(ValueError, match=rf"damped curvature, which is {top:.4g}") as error:
        lissa.fit(train)
    advised = float(str(error.value).split("use ")[1].split(",")[0])
    ki.LiSSA(model, 100, 0.0, advised, hessian_batch_size=6).fit(train).scores(queries, train)
    # By itself it takes 1.2 times the largest.
    auto = ki.LiSSA(model, 100, 0.0, hessian_batch_size=6).fit(train)
    np.testing.assert_allclose(auto.used_scale, 1.2 * top, rtol=1e-6)
    np.testing.assert_allclose(auto.spectrum[1], top, rtol=1e-6)


def test_lissa_stops_with_a_diagnosis():
    # Batches of one: the curvature of example i is 2 |x_i|^2, far above that of the mean.
    model = cases.linear_regression(WIDTH)
    cases.set_weights(model, np.ones(3))
    train, queries = _problem()
    top = np.linalg.eigvalsh(2 * train[0].T @ train[0] / 6)[-1]
    train[0][0] *= 1e-3
    lissa = ki.LiSSA(model, 200, 0.0, 1.01 * top, hessian_batch_size=1).fit(train)
    largest = 2 * np.square(train[0]).sum(axis=1).max()
    assert largest > 2.02 * top
    with pytest.raises(FloatingPointError, match=r"diverges.*`scale_factor` above"):
        lissa.scores(queries, train)


def test_lissa_tells_its_uncertainty():
    model = cases.linear_regression(WIDTH)
    cases.set_weights(model, np.ones(3))
    train, queries = _problem()
    lissa = ki.LiSSA(model, 60, 0.5, hessian_batch_size=2, num_repeats=8).fit(train)
    scores, errors = lissa.scores(queries, train, return_uncertainty=True)
    np.testing.assert_allclose(scores, lissa.scores(queries, train), rtol=1e-5, atol=1e-7)
    exact = ki.ExactInfluence(model, damping=0.5).fit(train).scores(queries, train)
    # Standard errors of a mean of eight: the exact scores lie within a few of them.
    assert (errors > 0).all()
    assert np.mean(np.abs(scores - exact) < 3 * errors) > 0.9
    with pytest.raises(ValueError, match=r"`num_repeats` of at least 2. Received: 1"):
        ki.LiSSA(model, 5).fit(train).scores(queries, train, return_uncertainty=True)
    with pytest.raises(ValueError, match=r"GradientDot cannot say how far"):
        ki.GradientDot(model).fit(train).scores(queries, train, return_uncertainty=True)


def test_lissa_names_negative_curvature():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    cases.set_weights(model, np.ones(2))

    def loss(y_true, y_pred):
        w = model.trainable_variables[0]
        return -tf.reduce_sum(w**2) / 2 + 0.0 * y_pred[:, 0]

    train = (np.ones((4, 2), "float32"), np.zeros(4, "float32"))
    lissa = ki.LiSSA(model, 50, 0.0, 2.0, loss=loss).fit(train)
    assert lissa.spectrum[0] == pytest.approx(-1)
    with pytest.raises(FloatingPointError, match=r"negative: .*`damping` of at least 1"):
        lissa.self_influence(train)


def test_bad_arguments():
    model = cases.linear_regression(WIDTH)
    with pytest.raises(ValueError, match=r"`similarity` must be one of"):
        ki.GradientDot(model, "euclid")
    with pytest.raises(ValueError, match=r"`scale` must be one of"):
        ki.GradientDot(model, scale="mean")
    with pytest.raises(ValueError, match=r"`rank` must be at least 1. Received: 0"):
        ki.RandomProjection(model, 0)
    with pytest.raises(ValueError, match=r"`depth` must be at least 1. Received: 0"):
        ki.LiSSA(model, depth=0)
    with pytest.raises(ValueError, match=r"`scale_factor` must be above zero"):
        ki.LiSSA(model, scale_factor=0.0)
    with pytest.raises(ValueError, match=r"not fitted"):
        ki.LiSSA(model).scores(*_problem())


def test_random_directions_are_drawn_within_the_budget():
    model = cases.image_model()
    x, y = cases.images(5)
    size = model.count_params()
    whole = ki.RandomProjection(model, 7, seed=1).fit((x, y))
    # Three rows of float32 at a time: blocks of 3, 3 and 1.
    parts = ki.RandomProjection(model, 7, seed=1, direction_bytes=3 * 4 * size + 1).fit((x, y))
    drawn = []
    rows = parts._direction_rows
    parts._direction_rows = lambda start, stop: drawn.append((start, stop)) or rows(start, stop)
    np.testing.assert_allclose(parts.encode((x, y)), whole.encode((x, y)), rtol=1e-5, atol=1e-6)
    assert drawn == [(0, 3), (3, 6), (6, 7)]
    found = [ki.InfluenceScorer(method, k=2).index((x, y)) for method in (whole, parts)]
    drawn.clear()
    tops = [scorer((x[:2], y[:2])) for scorer in found]
    np.testing.assert_array_equal(tops[0].proponents.ids, tops[1].proponents.ids)
    np.testing.assert_allclose(tops[0].proponents.scores, tops[1].proponents.scores, rtol=1e-4)
    assert drawn == [(0, 3), (3, 6), (6, 7)]
    with pytest.raises(ValueError, match="`direction_bytes` must be above zero"):
        ki.RandomProjection(model, 7, direction_bytes=0)


def test_queries_that_exceed_the_budget_pass_in_blocks():
    model = cases.image_model()
    x, y = cases.images(7)
    size = model.count_params()
    whole = ki.GradientDot(model).fit((x, y))
    parts = ki.GradientDot(model, direction_bytes=2 * 4 * size).fit((x, y))
    np.testing.assert_allclose(
        parts.scores((x, y), (x, y)), whole.scores((x, y), (x, y)), rtol=1e-4, atol=1e-7
    )


def test_the_summary_says_which_rule_serves_which_layer():
    model = cases.image_model()  # Flatten, Dense(36 x 4), Dense(4 x 3).
    lines = []
    method = ki.GradientDot(model)
    method.summary(lines.append)
    assert lines[-1] == "  layers: known after `fit`"
    lines.clear()
    method.fit(cases.images(4)).summary(lines.append)
    text = "\n".join(lines)
    assert "100.0%  dense" in text
    first, last = (layer.name for layer in model.layers if layer.weights)
    assert lines[-2].split() == [first, "148", "dense"]
    assert lines[-1].split() == [last, "15", "dense"]
