"""Tiny text models of KerasHub's layers, and sentences for them, that the tests share.

Token 0 is padding, 1 begins and 2 ends a sentence.
"""

import contextlib

import keras
import keras_hub
import numpy as np

from tests import cases

VOCABULARY, WIDTH, LONGEST = 11, 8, 12
CLASSES = 3
_BEGIN, _END = 1, 2
_hub = keras_hub.layers


@contextlib.contextmanager
def _floatx(dtype):
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(policy)


def _noisy(model, loss=None, seed=0):
    """With noise on all weights: what begins at zero would have gradients of zero behind it."""
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * random.standard_normal(variable.shape))
    model.compile("sgd", loss or cases.SPARSE)
    return model


def _tokens(name):
    return keras.Input((None,), dtype="int32", name=name)


def encoder_decoder(dtype="float64", loss=None):
    """One table for source, target and, in reverse, logits; sines; cross attention.

    Which tokens count for the loss is told by sample weights.
    """
    with _floatx(dtype):
        source, target = _tokens("source"), _tokens("target")
        table = _hub.ReversibleEmbedding(VOCABULARY, WIDTH, name="table")
        sines = _hub.SinePositionEncoding()
        x, y = table(source), table(target)
        mask = keras.ops.not_equal(source, 0)
        encoder = _hub.TransformerEncoder(12, 2, activation="gelu", name="encoder")
        decoder = _hub.TransformerDecoder(12, 2, normalize_first=True, name="decoder")
        x = encoder(x + sines(x), padding_mask=mask)
        y = decoder(y + sines(y), x, encoder_padding_mask=mask)
        logits = table(keras.layers.LayerNormalization(name="last")(y), reverse=True)
        return _noisy(keras.Model([source, target], logits, name="translator"), loss)


def causal(dtype="float64", loss=None, tied=True):
    """Learned positions, a decoder without cross attention.

    Padding is a class that the loss ignores; where the head is not tied, a Keras mask reaches it.
    """
    loss = loss or keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=0 if tied else None
    )
    with _floatx(dtype):
        tokens = _tokens("tokens")
        table = _hub.TokenAndPositionEmbedding(
            VOCABULARY, LONGEST, WIDTH, mask_zero=True, name="table"
        )
        x = _hub.TransformerDecoder(12, 2, name="decoder")(table(tokens))
        x = keras.layers.LayerNormalization(name="last")(x)
        head = keras.layers.Dense(VOCABULARY, name="head")
        logits = table.token_embedding(x, reverse=True) if tied else head(x)
        return _noisy(keras.Model(tokens, logits, name="writer"), loss)


def classifier(dtype="float64", loss=None):
    """A BERT with its padding mask as an input, and a class from the first token."""
    with _floatx(dtype):
        backbone = keras_hub.models.BertBackbone(
            vocabulary_size=VOCABULARY,
            num_layers=1,
            num_heads=2,
            hidden_dim=WIDTH,
            intermediate_dim=12,
            max_sequence_length=LONGEST,
        )
        pooled = backbone(backbone.input)["pooled_output"]
        logits = keras.layers.Dense(CLASSES, name="classes")(pooled)
        return _noisy(keras.Model(backbone.input, logits, name="reader"), loss)


def sentences(lengths, seed=0):
    """A sentence of each length: arrays of words."""
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCABULARY, length) for length in lengths]


def rows(sequences, length):
    """Sequences as one array [N, length] with zeros behind them."""
    return np.stack([np.pad(s, (0, length - len(s))) for s in sequences]).astype("int32")


def translations(sources, targets, length):
    """(source, target), the next tokens, and which of them count, all [N, length]."""
    inputs, after = writing(targets, length)
    return (rows(sources, length), inputs), after, (after != 0).astype("float32")


def writing(texts, length):
    """Tokens and the next tokens, [N, length]."""
    return rows([[_BEGIN, *t] for t in texts], length), rows([[*t, _END] for t in texts], length)


def reading(texts, length):
    """Inputs of a classifier, and classes."""
    tokens, _ = writing(texts, length)
    inputs = {
        "token_ids": tokens,
        "padding_mask": (tokens != 0).astype("int32"),
        "segment_ids": np.zeros_like(tokens),
    }
    return inputs, np.array([t.sum() % CLASSES for t in texts])
