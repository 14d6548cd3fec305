import keras
import numpy as np
import pytest
import tensorflow as tf

import translation_model
from translation_model import BEGIN, END, PAD


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    built = translation_model.build(translation_model.SIZES["tiny"], 8, max_tokens=6)
    random = np.random.default_rng(0)
    for variable in built.trainable_variables:
        variable.assign(variable + random.standard_normal(variable.shape))
    return built


def test_greedy_decoding_takes_the_likeliest_token_after_each_prefix(model):
    random = np.random.default_rng(1)
    sources = random.integers(4, 8, (20, 5))
    sources[::2, 3:] = PAD
    decode = translation_model.greedy_decoder(model, max_tokens=6)
    found = decode(tf.constant(sources, tf.int32)).numpy()
    for source, tokens in zip(sources, found, strict=True):
        target = [BEGIN]
        for token in tokens:
            if target[-1] in (END, PAD) and len(target) > 1:
                assert token == PAD
                continue
            logits = model({"source": source[None], "target": np.array([target])})
            assert token == np.argmax(logits[0, -1])
            target.append(token)
    # Some translations end early and some do not.
    ended = (found == END).any(axis=1)
    assert ended.any() and not ended.all()
    decode(tf.constant(sources[::-1].copy(), tf.int32))
    assert decode.experimental_get_tracing_count() == 1


def test_padding_changes_nothing(model):
    short = {"source": np.array([[5, 6, 7]]), "target": np.array([[2, 7]])}
    long = {name: np.pad(tokens, ((0, 0), (0, 3))) for name, tokens in short.items()}
    np.testing.assert_allclose(model(long)[:, :2], model(short), atol=1e-5)


def test_the_last_decoder_layers():
    size = translation_model.SIZES["tiny"]._replace(num_layers=2)
    model = translation_model.build(size, 12, max_tokens=6)
    last, both = (translation_model.last_decoder_variables(model, count) for count in (1, 2))
    # Two attentions of four kernels and four biases, two dense layers and three normalisations:
    # 2 x 4 x (64 + 8) + (8 x 16 + 16) + (16 x 8 + 8) + 3 x 16 = 904.
    assert sum(int(np.prod(v.shape)) for v in last) == 904
    assert {v.path.split("/")[0] for v in last} == {"decoder_1"} and len(both) == 2 * len(last)
    with pytest.raises(ValueError, match="Received: the last 3"):
        translation_model.last_decoder_variables(model, 3)
