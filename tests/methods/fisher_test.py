"""Inverses of the Fisher matrix in blocks, against matrices written down."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from keras_influence.methods import means
from tests import cases
from tests.gradients import rules_test

layers = keras.layers
DAMPING = 0.1


@pytest.fixture(autouse=True)
def double():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def softmax(z):
    return tf.nn.softmax(z).numpy()


def expected_squares(method, model, x, y, transform=lambda rows: rows):
    """The mean over examples and the model's labels of the squares of transformed gradients."""
    p = softmax(model(x))
    total = 0.0
    for label in range(p.shape[1]):
        rows = transform(method.maps.example_gradients((x, np.full(y.shape, label))).numpy())
        total += np.einsum("n,np->p", p[:, label], rows**2) / len(y)
    return total


@pytest.mark.parametrize(
    "name",
    [
        "dense_positions",
        "embedding",
        "custom",
        pytest.param("conv2d_strides", marks=pytest.mark.slow),
        pytest.param("tied_embedding", marks=pytest.mark.slow),
        pytest.param("convolution_used_twice", marks=pytest.mark.slow),
    ],
)
def test_the_diagonal(name):
    model, (x, y) = rules_test.problem(rules_test.CASES[name][0], "float64")
    method = ki.DiagonalFisher(model, labels="empirical", damping=DAMPING).fit((x, y))
    gradients = method.maps.example_gradients((x, y)).numpy()
    expected = gradients / (np.mean(gradients**2, axis=0) + DAMPING)
    np.testing.assert_allclose(method.inverse_products(gradients), expected, rtol=0, atol=1e-10)
    own = np.einsum("np,np->n", gradients, expected) / len(y)
    np.testing.assert_allclose(method.self_influence((x, y)), own, rtol=1e-6)
    true = ki.DiagonalFisher(model, labels="expected", damping=DAMPING).fit((x, y))
    expected = gradients / (expected_squares(true, model, x, y) + DAMPING)
    np.testing.assert_allclose(true.inverse_products(gradients), expected, rtol=0, atol=1e-10)


def test_sampled_labels_come_near_the_expected_ones():
    model, (x, y) = rules_test.problem(rules_test.CASES["dense_positions"][0], "float64")
    method = ki.DiagonalFisher(model, num_samples=400, damping=0.0).fit((x, y))
    squares = 1 / method.inverse_products(np.ones([1, method.maps.parameters.size]))[0]
    expected = expected_squares(method, model, x, y)
    # 400 draws for each of a few examples: a mean's error is a few percent.
    np.testing.assert_allclose(squares, expected, atol=0.1 * expected.max())
    assert abs(squares.sum() / expected.sum() - 1) < 0.05


def dense_pair(activation="tanh"):
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, activation), layers.Dense(3, use_bias=False)]
    )
    model.compile("sgd", cases.SPARSE)
    random = np.random.default_rng(0)
    return model, random.standard_normal((12, 4)), random.integers(0, 3, 12)


def kronecker_factors(model, x, y):
    """A and G of both layers by hand, and the examples' gradients: empirical labels."""
    first, last = model.layers
    hidden = np.tanh(x @ first.kernel.numpy() + first.bias.numpy())
    back = softmax(model(x)) - np.eye(3)[y]
    inner = (back @ last.kernel.numpy().T) * (1 - hidden**2)
    inputs = np.concatenate([x, np.ones([len(x), 1])], axis=1)
    pairs = [(inputs, inner), (hidden, back)]
    return [(a.T @ a / len(x), d.T @ d / len(x)) for a, d in pairs]


def blocks_of_identity(model, matrices):
    """Dense matrix [p, p] with the blocks of both layers: kernel and bias rows lie together."""
    size = sum(len(matrix) for matrix in matrices)
    dense, start = np.zeros([size, size]), 0
    for matrix in matrices:
        stop = start + len(matrix)
        dense[start:stop, start:stop] = matrix
        start = stop
    return dense


def test_kfac_inverts_the_kronecker_products():
    model, x, y = dense_pair()
    method = ki.KFAC(model, labels="empirical", damping=DAMPING).fit((x, y))
    matrices = [np.kron(a, g) for a, g in kronecker_factors(model, x, y)]
    dense = blocks_of_identity(model, matrices) + DAMPING * np.eye(5 * 5 + 5 * 3)
    found = method.inverse_products(np.eye(len(dense)))
    np.testing.assert_allclose(found, np.linalg.inv(dense), atol=1e-10)


def test_ekfac_has_mean_squares_in_the_eigenbases():
    model, x, y = dense_pair()
    method = ki.EKFAC(model, labels="empirical", damping=DAMPING).fit((x, y))
    gradients = method.maps.example_gradients((x, y)).numpy()
    matrices, start = [], 0
    for a, g in kronecker_factors(model, x, y):
        basis = np.kron(np.linalg.eigh(a)[1], np.linalg.eigh(g)[1])
        part = gradients[:, start : start + len(basis)] @ basis
        start += len(basis)
        matrices.append(basis @ np.diag(np.mean(part**2, axis=0)) @ basis.T)
    dense = blocks_of_identity(model, matrices) + DAMPING * np.eye(start)
    found = method.inverse_products(np.eye(start))
    np.testing.assert_allclose(found, np.linalg.inv(dense), atol=1e-10)
    np.testing.assert_allclose(
        method.scores((x[:2], y[:2]), (x, y)),
        gradients[:2] @ np.linalg.solve(dense, gradients.T) / 12,
        rtol=1e-5,
    )


@pytest.mark.parametrize("labels", ["sampled", "expected"])
def test_a_linear_layer_with_squared_error_is_exact(labels):
    # l = (w'a + b - y)^2: F = 2 mean a a', whatever the labels.
    random = np.random.default_rng(0)
    x, y = random.standard_normal((20, 6)), random.standard_normal((20, 1))
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    inputs = np.concatenate([x, np.ones([20, 1])], axis=1)
    fisher = 2 * inputs.T @ inputs / 20
    for damping in (0.3, "auto"):
        method = ki.EKFAC(model, labels=labels, damping=damping).fit((x, y))
        used = 0.3 if damping == 0.3 else 0.1 * np.trace(fisher) / 7
        assert method.used_damping == pytest.approx(used, rel=1e-10)
        expected = np.linalg.inv(fisher + used * np.eye(7))
        np.testing.assert_allclose(method.inverse_products(np.eye(7)), expected, rtol=1e-8)


def test_several_outputs_with_squared_error_are_exact_in_expectation():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((20, 4)), random.standard_normal((20, 3))
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.compile("sgd", "mse")
    inputs = np.concatenate([x, np.ones([20, 1])], axis=1)
    # The mean over three outputs, of which each has 2 (f - y) for a derivative.
    fisher = np.kron(2 / 3 * inputs.T @ inputs / 20, np.eye(3))
    method = ki.EKFAC(model, labels="expected", damping=0.1, l2=0.2).fit((x, y))
    expected = np.linalg.inv(fisher + 0.3 * np.eye(15))
    np.testing.assert_allclose(method.inverse_products(np.eye(15)), expected, atol=1e-8)


@pytest.mark.slow
def test_softmax_regression_of_the_size_of_mnist():
    # At weights of zero every class has one tenth, whatever the image: F is a Kronecker product.
    random = np.random.default_rng(0)
    num = 300
    x = random.standard_normal((num, 784)) / np.arange(1, 785) ** 0.5
    y = random.integers(0, 10, num)
    model = keras.Sequential([keras.Input((784,)), layers.Dense(10, kernel_initializer="zeros")])
    model.compile("sgd", cases.SPARSE)
    inputs = np.concatenate([x, np.ones([num, 1])], axis=1)
    a, u = np.linalg.eigh(inputs.T @ inputs / num)
    g, v = np.linalg.eigh(np.eye(10) / 10 - 0.01)
    back = 0.1 - np.eye(10)[y]

    def exact(damping):
        values = np.outer(a, g) + damping
        return np.einsum("ni,nj,ij->n", (inputs @ u) ** 2, (back @ v) ** 2, 1 / values)

    true = ki.EKFAC(model, labels="expected").fit((x, y))
    np.testing.assert_allclose(true.self_influence((x, y)) * num, exact(true.used_damping), 1e-5)
    sampled = ki.EKFAC(model, num_samples=8).fit((x, y))
    ratios = sampled.self_influence((x, y)) * num / exact(sampled.used_damping)
    assert np.mean(np.abs(ratios - 1)) < 0.05 and abs(np.mean(ratios) - 1) < 0.01


def test_tokens_are_summed_before_they_are_squared():
    # One kernel entry, two positions: gradient a_1 d_1 + a_2 d_2 for each example.
    inputs = keras.Input((2, 1))
    hidden = layers.Dense(1, use_bias=False)(inputs)
    model = keras.Model(inputs, layers.Flatten()(hidden))
    model.compile("sgd", "mse")
    random = np.random.default_rng(0)
    x, y = random.standard_normal((7, 2, 1)), random.standard_normal((7, 2))
    method = ki.EKFAC(model, labels="empirical", damping=0.0).fit((x, y))
    gradients = np.sum((model(x).numpy() - y) * x[..., 0], axis=1)
    found = method.inverse_products(np.ones([1, 1]))
    np.testing.assert_allclose(found, [[1 / np.mean(gradients**2)]], rtol=1e-10)


@pytest.mark.parametrize("name", ["conv2d_groups", "multi_head_attention", "tied_embedding"])
@pytest.mark.parametrize("max_rank", [pytest.param(2048, marks=pytest.mark.slow), 3])
def test_whole_bases_and_cut_ones(name, max_rank):
    model, batch = rules_test.problem(rules_test.CASES[name][0], "float64")
    method = ki.EKFAC(model, labels="empirical", damping=DAMPING, max_rank=max_rank).fit(batch)
    size = method.maps.parameters.size
    fisher = np.linalg.inv(method.inverse_products(np.eye(size))) - DAMPING * np.eye(size)
    gradients = method.maps.example_gradients(batch).numpy()
    trace = np.mean(np.sum(gradients**2, axis=1))
    if max_rank == 2048:
        assert np.trace(fisher) == pytest.approx(trace, rel=1e-8)
    sizes = [np.prod(block.sizes) for block in method.blocks]
    means = [method._mean(number) for number in range(len(sizes))]
    assert np.dot(sizes, means) == pytest.approx(trace, rel=1e-8)
    assert np.linalg.eigvalsh(fisher)[0] > -1e-10
    own = np.einsum("np,np->n", gradients, method.inverse_products(gradients)) / len(gradients)
    np.testing.assert_allclose(method.self_influence(batch), own, rtol=1e-5)


def test_the_summary_says_what_is_seen_together(capsys):
    model, (x, y) = rules_test.problem(rules_test.CASES["tied_embedding"][0], "float64")
    ki.EKFAC(model, max_rank=4).fit((x, y)).summary()
    printed = capsys.readouterr().out
    # Embedding 7 x 4, used in two ways; Dense 4 -> 4 and its bias; Dense (with bias) 36 -> 3.
    assert "28.0% diagonal" not in printed
    assert "diagonal" in printed and "kronecker" in printed and "sampled labels, 1 an" in printed
    assert "36: eigenvalues" not in printed and "input directions alike" in printed
    assert "have no Kronecker form, but a diagonal" in printed


def test_dead_units_count_for_nothing():
    model, x, y = dense_pair("relu")
    model.layers[0].bias.assign([-100.0] * 5)
    method = ki.EKFAC(model).fit((x, y))
    assert method.dampings[0] == 0
    own = method.self_influence((x, y))
    assert np.isfinite(own).all()
    assert np.all(own == 0)  # The last layer has no bias, and sees zeros.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "true"}, r"`labels` must be one of .* Received: 'true'"),
        ({"num_samples": 0}, r"`num_samples` must be at least 1"),
        ({"num_samples": 2, "labels": "expected"}, r"above it only where labels are sampled"),
        ({"max_rank": 0}, r"`max_rank` must be at least 1"),
        ({"damping": -1.0}, r"must not be negative"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ki.EKFAC(cases.mlp(), **options)


def test_a_loss_without_labels_of_its_own():
    model, x, y = dense_pair()
    model.compile("sgd", keras.losses.Huber())
    y = np.eye(3)[y]
    with pytest.raises(ValueError, match=r'is not known as the likelihood.*labels="empirical"'):
        ki.EKFAC(model).fit((x, y))
    assert np.isfinite(ki.EKFAC(model, labels="empirical").fit((x, y)).self_influence((x, y))).all()


def test_not_finite_examples_are_named():
    model, x, y = dense_pair()
    x[7] = np.nan
    with pytest.raises(FloatingPointError, match=r"example 7 is not finite"):
        ki.EKFAC(model).fit((x, y))


def test_a_fit_that_was_interrupted_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(means, "_BATCHES", 1)
    monkeypatch.setattr(means, "_SECONDS", 0.0)
    model, x, y = dense_pair()
    make = lambda: ki.EKFAC(model, batch_size=3)  # noqa: E731
    whole = make().fit((x, y))
    original, written, last = means.Sums._write, [], []

    def write(self, name, total, done):
        original(self, name, total, done)
        written.append((name, done))
        if [len(written)] == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(means.Sums, "_write", write)
    # Four batches of two passes: killed within each, and goes on after the last part written.
    for stop in (2, 3, 1):
        written.clear()
        last[:] = [stop]
        with pytest.raises(KeyboardInterrupt):
            make().fit((x, y), tmp_path / "fit")
    written.clear()
    last.clear()
    found = make().fit((x, y), tmp_path / "fit")
    assert written == [("squares", 3), ("squares", 4)]
    for one, other in zip(
        found._spectra + found._bases, whole._spectra + whole._bases, strict=True
    ):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    again = make().fit((x, y), tmp_path / "fit")  # A store by now.
    np.testing.assert_array_equal(again.self_influence((x, y)), whole.self_influence((x, y)))
    assert not (tmp_path / "fit" / "sums").exists()
    with pytest.raises(ValueError, match=r"holds a fit of something else \(labels"):
        ki.EKFAC(model, batch_size=3, labels="empirical").fit((x, y), tmp_path / "fit")


@pytest.mark.slow
def test_sigterm_writes_the_sums_and_ends_the_process(tmp_path):
    program = f"""
        import os, signal
        import numpy as np
        import keras_influence as ki
        from keras_influence.methods import means
        from tests import cases

        means._BATCHES = 1
        model, train = cases.mlp(), cases.vectors(dtype="float64")
        original = means.Sums._read

        def read(self, name, like):
            if name == "squares":
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, name, like)

        means.Sums._read = read
        ki.EKFAC(model, batch_size=8).fit(train, {str(tmp_path / "fit")!r})
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=dict(os.environ), timeout=120
    )
    assert result.returncode == 128 + signal.SIGTERM
    stored = sorted(path.name for path in (tmp_path / "fit" / "sums").iterdir())
    assert stored == ["factors-00000004", "squares-00000001"]
    record = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert record["identity"]["kind"] == "EKFAC"
