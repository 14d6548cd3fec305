import keras
import numpy as np
import pytest

import keras_influence as ki
import models


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # 1 x 9 x 8 + 8 = 80, four of 8 x 9 x 8 + 8 = 584, 8 x 10 + 10 = 90 and 10 x 10 + 10 = 110.
        ("small_cnn", 80 + 4 * 584 + 90 + 110),
        # 9 x 32 + 32, 32 x 9 x 64 + 64; 28 x 28 shrinks to 12 x 12: 9216 x 84 + 84, 84 x 10 + 10.
        ("large_cnn", 793_894),
        # 784 x 512 + 512, 512 x 256 + 256, 256 x 128 + 128, 128 x 10 + 10.
        ("mlp", 401_920 + 131_328 + 32_896 + 1_290),
    ],
)
def test_parameters_on_mnist(name, parameters):
    assert models.MODELS[name]((28, 28, 1), 10).count_params() == parameters


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3)])
def test_logits_of_any_image(name, shape):
    model = models.MODELS[name](shape, 7)
    logits = np.asarray(model(np.random.default_rng(0).random((2, *shape), np.float32)))
    assert logits.shape == (2, 7)
    # Logits, not probabilities: they do not sum to one.
    assert np.all(np.abs(logits.sum(axis=1) - 1) > 1e-4)


def test_parameters_of_the_transformer():
    # Width d = 256, 32 positions, 8,000 tokens. An attention has four projections d x d + d; a
    # normalisation follows each attention and each feed-forward part.
    embeddings = 8_000 * 256 + 32 * 256
    attention = 4 * (256 * 256 + 256) + 2 * 256
    feed_forward = 256 * 1_024 + 1_024 + 1_024 * 256 + 256 + 2 * 256
    encoder = embeddings + 2 * (attention + feed_forward)
    decoder = embeddings + 2 * (2 * attention + feed_forward)
    logits = 256 * 8_000 + 8_000
    assert encoder + decoder + logits == 9_854_784
    assert models.transformer().count_params() == 9_854_784


def tiny_transformer():
    return models.transformer(
        num_tokens=4, vocabulary=7, width=6, num_layers=1, num_heads=2, feed_forward=5
    )


def test_the_decoder_of_the_transformer_sees_no_later_token():
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 7, (2, 3, 4))
    model = tiny_transformer()
    before = np.asarray(model((source, target)))
    target[:, 2] = (target[:, 2] + 1) % 7
    after = np.asarray(model((source, target)))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.all(np.any(before[:, 2:] != after[:, 2:], axis=-1))


@pytest.mark.slow
def test_projections_of_the_transformer_are_those_of_forward_mode():
    rng = np.random.default_rng(0)
    source, target, next_target = rng.integers(0, 7, (3, 3, 4))
    model = tiny_transformer()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    maps = ki.gradients.LossMaps(model, loss)
    batch = ((source, target), next_target)
    directions = rng.standard_normal((2, maps.parameters.size), np.float32)
    projected = maps.project(batch, directions)
    expected = maps.forward_project(batch, directions)
    np.testing.assert_allclose(projected, expected, rtol=1e-4, atol=1e-5)
    # Every weight has a rule: nothing of what a transformer holds is left to forward mode.
    rules = maps.coverage(batch).shares()
    assert not [rule for rule in rules if rule.startswith("forward mode")]
