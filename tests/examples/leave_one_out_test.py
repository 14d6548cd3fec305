import functools
import json

import keras
import numpy as np
import pytest

import full_batch
import keras_influence as ki
import leave_one_out
import problems


def test_removals_of_a_convex_model_come_true(tmp_path, run_program):
    run_program(leave_one_out, num_removed=6, l2=0.1, output_dir=tmp_path / "run")
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["num_removed"] == 6
    # The optimum of a strictly convex objective: first order is right but for the example's share.
    assert result["pearson"] > 0.99
    assert 0.9 < result["slope"] < 1.15
    assert abs(result["control"]) < 1e-6
    assert (tmp_path / "run" / "scatter.png").stat().st_size > 0


def tiny_network(dtype="float32"):
    """Six tanh units on four pixels."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), dtype=dtype),
            keras.layers.AveragePooling2D(4, dtype=dtype),
            keras.layers.Flatten(dtype=dtype),
            keras.layers.Dense(6, "tanh", dtype=dtype),
            keras.layers.Dense(10, dtype=dtype),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_a_network_goes_on_from_its_minimum(tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "cnn_model", tiny_network)
    small = functools.partial(problems.digits_cnn, num_train=60)
    monkeypatch.setattr(problems, "digits_cnn", small)
    found = leave_one_out.compare("small_cnn", 0.01, 5, tmp_path / "bank")
    # 200 steps of .05 / (1 - .9): 1 / 100.
    assert found.summary["damping"] == pytest.approx(0.01)
    # Nothing removed, nothing changed but for rounding: the start is a minimum.
    assert abs(found.summary["control"]) < 1e-4 < found.summary["largest_change"] / 100
    assert found.summary["pearson"] > 0.97
    assert (np.sign(found.predicted) == np.sign(found.actual)).all()
    # The same bank again goes on from the same weights, and so has nothing to train.
    monkeypatch.setattr(full_batch.FullBatch, "__call__", None)
    again = leave_one_out.compare("small_cnn", 0.01, 5, tmp_path / "bank")
    np.testing.assert_array_equal(again.actual, found.actual)


def test_a_minimum_is_one(monkeypatch):
    x, y = problems.digits(0.01, 2, 20).train
    examples = ki.data.read((x.reshape(-1, 8, 8, 1).astype(np.float64), y))
    model = tiny_network("float64")
    full_batch.FullBatch(0.01)(model, examples)
    maps = ki.gradients.LossMaps(model)
    mean = maps.gradient(examples.arrays).numpy() / 20
    weights = maps.parameters.flatten(maps.parameters.values)
    np.testing.assert_allclose(mean, -0.01 * weights, atol=1e-6)
    assert np.abs(weights).max() > 0.1
    monkeypatch.setattr(full_batch, "_TOLERANCE", 0.0)
    with pytest.raises(FloatingPointError, match=r"L-BFGS stopped at a gradient of .*above 0"):
        full_batch.FullBatch(0.01)(model, examples)
    model.layers[-1].trainable = False
    with pytest.raises(ValueError, match=r"All weights must be trainable.*dense"):
        full_batch.FullBatch(0.01)(model, examples)
