import numpy as np
import pytest

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
