"""Gauss-Newton and Fisher products against J' L J formed densely, L written down by hand."""

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence import gradients
from keras_influence.gradients import LossMaps
from tests import cases
from tests.gradients import rules_test

layers = keras.layers
losses = keras.losses
NUM = 6


@pytest.fixture(autouse=True)
def double():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def network(loss, activation=None, units=3):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(units, activation)]
    )
    model.compile("sgd", loss)
    return model


def jacobian(maps, function):
    """d function() / d parameters: [n, outputs, p]; one reverse pass an entry."""
    with tf.GradientTape(persistent=True) as tape:
        outputs = function()
        entries = tf.unstack(tf.reshape(outputs, [-1]))
    rows = [
        tape.gradient(entry, maps.parameters.values, unconnected_gradients="zero")
        for entry in entries
    ]
    flat = [np.concatenate([np.reshape(tf.convert_to_tensor(g), -1) for g in row]) for row in rows]
    return np.reshape(flat, [outputs.shape[0], -1, maps.parameters.size])


def logits_of(model, x):
    hidden, last = model.layers
    return tf.matmul(hidden(x), last.kernel) + last.bias


def columns(product, batch, weights, size):
    return np.stack([product(batch, vector, weights) for vector in np.eye(size)])


def gram(maps, batch, terms, weights):
    compiled = maps.compiled(functools.partial(gradients.gram, maps))
    return compiled(batch, tf.constant(terms), tf.constant(weights))


def softmax_curvature(p):
    return np.stack([np.diag(row) - np.outer(row, row) for row in p])


def diagonal(values):
    return np.stack([np.diag(row) for row in values])


def softmax(z):
    return tf.nn.softmax(z).numpy()


def sigmoid(z):
    return tf.sigmoid(z).numpy()


def _draw(seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((NUM, 4))
    return random, x, random.integers(0, 3, NUM)


CATEGORICAL = losses.CategoricalCrossentropy
BINARY = losses.BinaryCrossentropy
# Name: (loss, activation, labels, (z, outputs, labels) -> L [n, 3, 3], whether at the logits,
# the same for Fisher, or None where it is one).
CASES = {
    "sparse": (
        losses.SparseCategoricalCrossentropy(from_logits=True),
        None,
        lambda random, classes: classes,
        lambda z, f, y: softmax_curvature(softmax(z)),
        True,
        None,
    ),
    "sparse_softmax": (
        "sparse_categorical_crossentropy",
        "softmax",
        lambda random, classes: classes,
        lambda z, f, y: softmax_curvature(softmax(z)),
        True,
        None,
    ),
    "categorical_smoothed": (
        CATEGORICAL(from_logits=True, label_smoothing=0.1),
        None,
        lambda random, classes: np.eye(3)[classes],
        lambda z, f, y: softmax_curvature(softmax(z)),
        True,
        None,
    ),
    "categorical_softmax": (
        "categorical_crossentropy",
        "softmax",
        lambda random, classes: random.dirichlet([1, 1, 1], NUM),
        lambda z, f, y: softmax_curvature(softmax(z)),
        True,
        None,
    ),
    # The mean over three outputs.
    "binary": (
        BINARY(from_logits=True, label_smoothing=0.1),
        None,
        lambda random, classes: np.eye(3)[classes],
        lambda z, f, y: diagonal(sigmoid(z) * (1 - sigmoid(z)) / 3),
        True,
        None,
    ),
    "binary_sigmoid": (
        "binary_crossentropy",
        "sigmoid",
        lambda random, classes: np.eye(3)[classes],
        lambda z, f, y: diagonal(sigmoid(z) * (1 - sigmoid(z)) / 3),
        True,
        None,
    ),
    # mean (f - y)^2, whatever made f.
    "mse": (
        "mse",
        "softmax",
        lambda random, classes: random.standard_normal((NUM, 3)),
        lambda z, f, y: diagonal(np.full((NUM, 3), 2 / 3)),
        False,
        None,
    ),
    # mean (f - y log(f + 1e-7)); labels have the mean f.
    "poisson": (
        "poisson",
        "softplus",
        lambda random, classes: random.integers(0, 4, (NUM, 3)),
        lambda z, f, y: diagonal(y / (f + 1e-7) ** 2 / 3),
        False,
        lambda z, f, y: diagonal(f / (f + 1e-7) ** 2 / 3),
    ),
    # sum y log(y / f), both clipped at 1e-7.
    "kl": (
        "kl_divergence",
        "softmax",
        lambda random, classes: random.dirichlet([1, 1, 1], NUM),
        lambda z, f, y: diagonal(y / f**2),
        False,
        lambda z, f, y: diagonal(1 / f),
    ),
    # Quadratic within 0.5, linear beyond.
    "huber": (
        losses.Huber(delta=0.5),
        None,
        lambda random, classes: random.standard_normal((NUM, 3)),
        lambda z, f, y: diagonal((np.abs(f - y) < 0.5) / 3),
        False,
        "is not known as the likelihood",
    ),
    "log_cosh": (
        "log_cosh",
        None,
        lambda random, classes: random.standard_normal((NUM, 3)),
        lambda z, f, y: diagonal((1 - np.tanh(f - y) ** 2) / 3),
        False,
        "is not known as the likelihood",
    ),
    # mean max(1 - y f, 0)^2 with y in {-1, 1}.
    "squared_hinge": (
        "squared_hinge",
        None,
        lambda random, classes: 2 * np.eye(3)[classes] - 1,
        lambda z, f, y: diagonal(2 * (y * f < 1) / 3),
        False,
        "is not known as the likelihood",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_product(name):
    loss, activation, labels, curvature, at_logits, fisher = CASES[name]
    random, x, classes = _draw()
    y = labels(random, classes)
    model = network(loss, activation)
    maps = LossMaps(model)
    sample_weight, weights = random.uniform(size=(2, NUM))
    z, f = logits_of(model, x).numpy(), model(x).numpy()
    function = (lambda: logits_of(model, x)) if at_logits else (lambda: model(x))
    jacobians = jacobian(maps, function)
    batch = (x, y, sample_weight)

    def check(product, second):
        scaled = second * (sample_weight * weights)[:, np.newaxis, np.newaxis]
        expected = np.einsum("nap,nab,nbq->pq", jacobians, scaled, jacobians)
        assert np.abs(expected).max() > 1e-2
        found = columns(product, batch, weights, maps.parameters.size)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)

    second = curvature(z, f, y)
    check(maps.gauss_newton, second)
    if isinstance(fisher, str):
        with pytest.raises(ValueError, match=fisher):
            maps.fisher(batch, np.ones(maps.parameters.size))
    else:
        check(maps.fisher, second if fisher is None else fisher(z, f, y))


def test_the_fisher_matrix_is_that_of_gradients_by_labels_of_the_model():
    # sum_c p_c grad l(c) grad l(c)', with no second derivative.
    _, x, classes = _draw()
    model = network(losses.SparseCategoricalCrossentropy(from_logits=True))
    maps = LossMaps(model)
    p = softmax(model(x))
    expected = 0.0
    for label in range(3):
        rows = maps.example_gradients((x, np.full(NUM, label))).numpy()
        expected += np.einsum("n,np,nq->pq", p[:, label], rows, rows)
    found = columns(maps.fisher, (x, classes), None, maps.parameters.size)
    np.testing.assert_allclose(found, expected, atol=1e-12)

    model = network("poisson", "exponential", units=1)
    maps = LossMaps(model)
    f = model(x).numpy()[:, 0]
    expected = 0.0
    for label in range(60):
        probability = np.exp(label * np.log(f) - f - math.lgamma(label + 1))
        rows = maps.example_gradients((x, np.full((NUM, 1), label))).numpy()
        expected += np.einsum("n,np,nq->pq", probability, rows, rows)
    found = columns(maps.fisher, (x, np.zeros((NUM, 1))), None, maps.parameters.size)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # Keras's log(f + 1e-7).


@pytest.mark.parametrize("name", CASES)
def test_outer_products_of_roots_add_up_to_it(name):
    loss, activation, labels, _, _, fisher = CASES[name]
    random, x, classes = _draw()
    maps = LossMaps(network(loss, activation))
    batch = (x, labels(random, classes), random.uniform(size=NUM))
    terms = maps.label_terms(batch)
    assert terms.exact and terms.size == 3
    likelihood = not isinstance(fisher, str)
    assert terms.free_of_labels == (likelihood and name not in ("poisson", "kl"))
    if not likelihood:
        return
    weights = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    found = sum(gram(maps, batch, part, weights) for part in ([0, 2], [1]))
    for product in [maps.fisher] + [maps.gauss_newton] * terms.free_of_labels:
        expected = columns(product, batch, weights, maps.parameters.size)
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "conv2d_strides",
        "multi_head_attention",
        "tied_embedding",
        "positions_without_batch",
        pytest.param("bidirectional", marks=pytest.mark.slow),
        "custom",
        "convolution_used_twice",
    ],
)
def test_layers(name):
    model, batch = rules_test.problem(rules_test.CASES[name][0], "float64")
    maps = LossMaps(model)
    vector = np.random.default_rng(3).standard_normal(maps.parameters.size)
    p = softmax(model(batch[0]))
    jacobians = jacobian(maps, lambda: model(batch[0], training=False))
    expected = np.einsum(
        "nap,nab,nbq,q->p", jacobians, softmax_curvature(p), jacobians, vector, optimize=True
    )
    found = maps.gauss_newton(batch, vector)
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())


def test_tokens_with_a_mask_count_by_themselves():
    # Two tokens of three: the loss of the example is their mean.
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), layers.Embedding(5, 2, mask_zero=True), layers.Dense(3)]
    )
    model.compile("sgd", cases.SPARSE)
    maps = LossMaps(model)
    x, y = np.array([[1, 4, 0]]), np.array([[2, 0, 1]])
    p = softmax(model(x))[0]
    jacobians = jacobian(maps, lambda: model(x)[0])
    weights = np.array([0.5, 0.5, 0])
    expected = np.einsum("t,tap,tab,tbq->pq", weights, jacobians, softmax_curvature(p), jacobians)
    found = columns(maps.gauss_newton, (x, y), None, maps.parameters.size)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not maps.label_terms((x, y)).exact
    assert gradients.num_roots(maps, (x, y), "gauss_newton") == 0


def test_positions_whose_number_is_not_known_are_not_taken_for_one():
    inputs = keras.Input((4,))
    tokens = layers.Dense(6)(inputs)
    outputs = layers.Lambda(lambda z: tf.reshape(z, [tf.shape(z)[0], tf.size(z[0]) // 3, 3]))(
        tokens
    )
    model = keras.Model(inputs, outputs)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    terms = LossMaps(model).label_terms((np.ones((NUM, 4)), np.zeros((NUM, 2))))
    assert terms == (3, False, True)


def test_outputs_with_losses_and_weights_of_their_own():
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, "tanh")(inputs)
    classes = layers.Dense(3, "softmax", name="classes")(hidden)
    value = layers.Dense(1, name="value")(hidden)
    model = keras.Model(inputs, {"classes": classes, "value": value})
    model.compile(
        "sgd",
        {"classes": "sparse_categorical_crossentropy", "value": "mse"},
        loss_weights={"classes": 0.5, "value": 3.0},
    )
    maps = LossMaps(model)
    _, x, y = _draw()
    batch = (x, {"classes": y, "value": np.zeros((NUM, 1))})

    def logits():
        hidden = model.layers[1](x)
        layer = model.get_layer("classes")
        return tf.matmul(hidden, layer.kernel) + layer.bias

    first = jacobian(maps, logits)
    second = jacobian(maps, lambda: model(x)["value"])
    expected = np.einsum(
        "nap,nab,nbq->pq", first, 0.5 * softmax_curvature(softmax(logits())), first
    ) + 6 * np.einsum("nap,naq->pq", second, second)
    found = columns(maps.gauss_newton, batch, None, maps.parameters.size)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    # Three rows of the classes and one of the value.
    assert maps.label_terms(batch) == (4, True, True)
    found = gram(maps, batch, np.arange(4), np.ones(NUM))
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "activation", "message"),
    [
        ("mae", None, "'mae' is piecewise linear: its second derivatives are zero"),
        ("hinge", None, "is piecewise linear"),
        (losses.CosineSimilarity(), None, "'cosine_similarity' is not known to be convex"),
        (lambda y, f: tf.reduce_mean(tf.square(y - f), -1), None, "declare it"),
        ("categorical_crossentropy", "relu", "its last operation is no softmax"),
        ("binary_crossentropy", "softmax", None),  # Keras takes any logits; so do we.
    ],
)
def test_losses_without_a_gauss_newton_matrix(loss, activation, message):
    _, x, classes = _draw()
    model = network(loss, activation)
    maps = LossMaps(model)
    batch, vector = (x, np.eye(3)[classes]), np.ones(maps.parameters.size)
    if message is None:
        assert np.isfinite(maps.gauss_newton(batch, vector)).all()
        return
    for product in (maps.gauss_newton, maps.fisher):
        with pytest.raises(ValueError, match=message):
            product(batch, vector)


def test_a_loss_of_the_users_own_may_be_declared(monkeypatch):
    monkeypatch.setattr(
        "keras_influence.gradients.convexity._convex", dict(gradients.convexity._convex)
    )

    class Cubic(losses.Loss):
        def call(self, y_true, y_pred):
            return tf.reduce_sum(tf.abs(y_pred - y_true) ** 3, axis=-1)

    _, x, classes = _draw()
    y = np.eye(3)[classes]
    model = network(Cubic())
    gradients.declare_convex(Cubic)
    maps = LossMaps(model)
    jacobians = jacobian(maps, lambda: model(x))
    second = diagonal(6 * np.abs(model(x).numpy() - y))
    expected = np.einsum("nap,nab,nbq->pq", jacobians, second, jacobians)
    found = columns(maps.gauss_newton, (x, y), None, maps.parameters.size)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    with pytest.raises(ValueError, match="is not known as the likelihood"):
        maps.fisher((x, y), np.ones(maps.parameters.size))
    gradients.declare_convex(Cubic, likelihood=True, expected_labels=lambda f: f + 1)
    model.compile("sgd", Cubic())
    maps = LossMaps(model)
    found = columns(maps.fisher, (x, y), None, maps.parameters.size)
    np.testing.assert_allclose(found, 6 * np.einsum("nap,naq->pq", jacobians, jacobians))


def test_where_the_network_is_linear_the_hessian_is_the_same():
    _, x, classes = _draw()
    model = network(cases.SPARSE)
    last = LossMaps(model, variables=model.layers[-1].trainable_variables)
    vector = np.random.default_rng(0).standard_normal(last.parameters.size)
    np.testing.assert_allclose(
        last.gauss_newton((x, classes), vector), last.curvature((x, classes), vector), atol=1e-12
    )
