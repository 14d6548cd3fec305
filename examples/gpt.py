"""A small GPT of KerasHub's layers."""

from typing import NamedTuple

import keras
import keras_hub


class Size(NamedTuple):
    """How large a GPT is: the feed-forward layers are four times as wide as the others."""

    layers: int
    width: int
    heads: int


def build(size: Size, num_pieces: int, length: int, learning_rate: float) -> keras.Model:
    """Token ids [batch, length] -> logits of each next token, compiled: crossentropy, Adam.

    Pre-normalised decoder layers as in GPT-2, and one matrix for tokens on both ends.
    """
    tokens = keras.Input((length,), dtype="int32", name="tokens")
    embedding = keras_hub.layers.TokenAndPositionEmbedding(
        num_pieces, length, size.width, embeddings_initializer=_initializer(), name="embedding"
    )
    x = embedding(tokens)
    for number in range(size.layers):
        x = keras_hub.layers.TransformerDecoder(
            4 * size.width,
            size.heads,
            dropout=0.1,
            activation="gelu",
            kernel_initializer=_initializer(),
            normalize_first=True,
            name=f"decoder_{number}",
        )(x)
    x = keras.layers.LayerNormalization(name="last_norm")(x)
    model = keras.Model(tokens, embedding.token_embedding(x, reverse=True))
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def _initializer() -> keras.initializers.Initializer:
    return keras.initializers.RandomNormal(stddev=0.02)
