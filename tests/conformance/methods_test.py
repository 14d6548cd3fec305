"""Every method's golden, crossed with what every method must do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from keras_influence.methods import EncodingMethod, curvature
from tests import cases


def _tracin(model, directory, **kwargs):
    recorder = ki.callbacks.TracInCheckpoint(directory / "run")
    model.optimizer.learning_rate = 0.05
    train = cases.images(classes=model.output_shape[-1])
    model.fit(*train, epochs=2, verbose=0, callbacks=[recorder])
    return ki.TracIn(model, checkpoints=directory / "run", **kwargs)


GOLDENS = {
    "arnoldi": lambda model, _, **k: ki.Arnoldi(model, 4, 12, negative_eigenvalues="absolute", **k),
    "random_projection": lambda model, _, **k: ki.RandomProjection(model, 4, **k),
    "tracin": _tracin,
    "gradient_dot": lambda model, _, **k: ki.GradientDot(model, **k),
    "ekfac": lambda model, _, **k: ki.EKFAC(model, **k),
    "lissa": lambda model, _, **k: ki.LiSSA(model, 5, 0.1, 20.0, **k),
}


@pytest.fixture(params=GOLDENS)
def golden(request, tmp_path):
    return lambda model, **kwargs: GOLDENS[request.param](model, tmp_path, **kwargs)


def test_shapes_types_and_self_influence(golden):
    train, queries = cases.images(), cases.images(3, seed=5)
    method = golden(cases.image_model()).fit(train)
    scores = method.scores(queries, train)
    assert scores.shape == (3, 24) and scores.dtype == np.float32
    own = method.self_influence(train)
    assert own.shape == (24,) and own.dtype == np.float32
    # Self-influence is the diagonal of the training set's scores against itself.
    diagonal = np.diag(method.scores(train, train))
    np.testing.assert_allclose(own, diagonal, rtol=1e-4, atol=1e-6 * np.abs(diagonal).max())


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_change_nothing(golden, batch_size, monkeypatch):
    # Small batches, each by itself.
    monkeypatch.setattr(curvature, "_JOINED_BYTES", 0)
    model = cases.image_model()
    train, queries = cases.images(), cases.images(3, seed=5)
    whole = golden(model, batch_size=24).fit(train)
    dataset = tf.data.Dataset.from_tensor_slices(train).batch(batch_size)
    parts = type(whole).from_config({**whole.get_config(), "batch_size": None}, model).fit(dataset)
    for a, b in (
        (parts.scores(queries, dataset), whole.scores(queries, train)),
        (parts.self_influence(dataset), whole.self_influence(train)),
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_save_and_load_give_the_same_bits(golden, tmp_path):
    model = cases.image_model()
    train, queries = cases.images(), cases.images(3, seed=5)
    method = golden(
        model,
        scale="raw",
        variables=model.layers[-1].trainable_variables,
        contraction=ki.gradients.Contraction(order="gradient"),
    ).fit(train)
    method.save(tmp_path / "method")
    loaded = ki.load(tmp_path / "method", model)
    assert loaded.get_config() == method.get_config()
    assert loaded.num_train == 24
    if isinstance(method, ki.LiSSA):
        with pytest.raises(ValueError, match=r"call `fit\(train\)` after loading"):
            loaded.scores(queries, train)
        loaded.fit(train)
    np.testing.assert_array_equal(loaded.scores(queries, train), method.scores(queries, train))
    if isinstance(method, EncodingMethod):
        np.testing.assert_array_equal(loaded.encode(train), method.encode(train))
    with pytest.raises(ValueError, match=r"another architecture"):
        ki.load(tmp_path / "method", cases.mlp())


def test_the_same_seed_gives_the_same_bits(golden):
    model = cases.image_model()
    train = cases.images()
    first = golden(model).fit(train)
    again = type(first).from_config(first.get_config(), model).fit(train)
    np.testing.assert_array_equal(again.self_influence(train), first.self_influence(train))


def test_a_duplicate_argues_for_and_a_wrong_label_against(golden):
    # Row 5 is the query, row 11 the query with the other of two labels: with two classes its
    # gradient points the opposite way.
    x, y = cases.images(24, classes=2)
    x[11], y[11] = x[5], 1 - y[5]
    model = cases.image_model(classes=2)
    model.optimizer.learning_rate = 0.05
    model.fit(x, y, epochs=3, verbose=0)
    method = golden(model).fit((x, y))
    scores = method.scores((x[5:6], y[5:6]), (x, y))[0]
    rank = np.argsort(np.argsort(-scores))
    # A random projection of rank 4 only roughly keeps products; the others keep them exactly.
    near = 8 if isinstance(method, ki.RandomProjection) else 3
    assert scores[5] > 0 and rank[5] < near
    assert scores[11] < 0 and rank[11] >= 24 - near


def test_one_example_and_none(golden):
    model = cases.image_model()
    x, y = cases.images()
    method = golden(model).fit((x, y))
    np.testing.assert_allclose(
        method.scores((x[:1], y[:1]), (x[:1], y[:1])), [method.self_influence((x[:1], y[:1]))], 1e-5
    )
    with pytest.raises(ValueError, match=r"is empty"):
        method.self_influence((x[:0], y[:0]))
    with pytest.raises(ValueError, match=r"is empty"):
        golden(model).fit((x[:0], y[:0]))


def test_a_bad_example_is_named(golden):
    model = cases.image_model()
    x, y = cases.images()
    method = golden(model).fit((x, y))
    nan = x.copy()
    nan[17] = np.nan
    with pytest.raises(FloatingPointError, match=r"example 17 is not finite: its loss is nan"):
        method.self_influence((nan, y))
    label = np.where(np.arange(24) == 6, 3, y)
    with pytest.raises(FloatingPointError, match=r"example 6 is not finite.* its label 3"):
        method.self_influence((x, label))


def test_an_order_that_changes_is_refused(golden):
    train = cases.images()
    method = golden(cases.image_model()).fit(train)
    shuffled = tf.data.Dataset.from_tensor_slices(train).shuffle(24, seed=1).batch(8)
    with pytest.raises(ValueError, match=r"gives other examples each time"):
        method.self_influence(shuffled)
    with pytest.raises(ValueError, match=r"gives other examples each time"):
        method.scores(train, shuffled)


def test_models_that_are_not_ready(golden, tmp_path):
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    unbuilt.compile("sgd", "mse")
    uncompiled = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    cls = type(golden(cases.image_model()))
    extra = {"checkpoints": []} if cls is ki.TracIn else {}
    with pytest.raises(ValueError, match=r"is not built: it has no weights yet"):
        cls(unbuilt, **extra)
    with pytest.raises(ValueError, match=r"has no loss: compile it with one, or pass `loss=`"):
        cls(uncompiled, **extra)


def test_summary_names_the_method_and_its_parameters(golden, capsys):
    method = golden(cases.image_model())
    method.summary()
    assert "not fitted" in capsys.readouterr().out
    lines = []
    method.fit(cases.images()).summary(lines.append)
    assert lines[0] == f"{type(method).__name__} of model 'sequential'"
    # Dense(36 -> 4): 144 + 4; Dense(4 -> 3): 12 + 3.
    assert lines[1] == "  parameters: 163 of 163 trainable (100.0%), in 4 variables"
    assert lines[2].startswith("  fitted on 24 training examples, in ")
