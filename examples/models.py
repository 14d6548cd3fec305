"""Reference models of the examples and benchmarks. All of them return logits."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops


def small_cnn(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """The all-convolutional network of Koh and Liang (2017): 2,616 parameters on one channel.

    Tanh convolutions of 8 channels with strides 1, 2, 1, 2, 1, a 1 x 1 convolution of 10 channels,
    the mean over positions and a linear layer. Padded, so that it takes images of 8 x 8 too.
    """
    return keras.Sequential(
        [keras.Input(input_shape)]
        + [
            layers.Conv2D(8, 3, strides=strides, padding="same", activation="tanh")
            for strides in (1, 2, 1, 2, 1)
        ]
        + [
            layers.Conv2D(10, 1, activation="tanh"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(num_classes),
        ],
        name="small_cnn",
    )


def large_cnn(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Two convolutions and two dense layers: 793,894 parameters on 28 x 28 x 1 and 10 classes."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(84, activation="relu"),
            layers.Dense(num_classes),
        ],
        name="large_cnn",
    )


def mlp(input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Dense layers of 512, 256 and 128 units: 567,434 parameters on 28 x 28 x 1 and 10 classes."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(),
            layers.Dense(512, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(num_classes),
        ],
        name="mlp",
    )


MODELS: dict[str, Callable[[tuple[int, int, int], int], keras.Model]] = {
    "small_cnn": small_cnn,
    "large_cnn": large_cnn,
    "mlp": mlp,
}


class TokenAndPosition(layers.Layer):
    """Embeds tokens, and adds a learned embedding of their positions: [B, T] -> [B, T, width]."""

    def __init__(self, num_tokens: int, vocabulary: int, width: int):
        super().__init__()
        self.tokens = layers.Embedding(vocabulary, width)
        self.positions = layers.Embedding(num_tokens, width)

    def call(self, inputs: Any) -> Any:
        return self.tokens(inputs) + self.positions(ops.arange(ops.shape(inputs)[1]))


def _attend(queries: Any, values: Any, num_heads: int, causal: bool = False) -> Any:
    attention = layers.MultiHeadAttention(num_heads, queries.shape[-1] // num_heads)
    attended = attention(queries, values, use_causal_mask=causal)
    return layers.LayerNormalization()(queries + attended)


def _feed_forward(x: Any, units: int) -> Any:
    hidden = layers.Dense(units, activation="relu")(x)
    return layers.LayerNormalization()(x + layers.Dense(x.shape[-1])(hidden))


def transformer(
    num_tokens: int = 32,
    vocabulary: int = 8_000,
    width: int = 256,
    num_layers: int = 2,
    num_heads: int = 8,
    feed_forward: int = 1_024,
) -> keras.Model:
    """The encoder-decoder of Vaswani et al. (2017), small: 9,854,784 parameters.

    ([B, num_tokens] source tokens, [B, num_tokens] target tokens) -> logits of the next target
    token, [B, num_tokens, vocabulary].

    Args:
        num_tokens: of a source, and of a target.
        vocabulary: of both.
        num_layers: of the encoder, and of the decoder.
        feed_forward: units of the layers between two attentions.
    """
    source = keras.Input([num_tokens], dtype="int32", name="source")
    target = keras.Input([num_tokens], dtype="int32", name="target")
    encoded = TokenAndPosition(num_tokens, vocabulary, width)(source)
    for _ in range(num_layers):
        encoded = _feed_forward(_attend(encoded, encoded, num_heads), feed_forward)
    decoded = TokenAndPosition(num_tokens, vocabulary, width)(target)
    for _ in range(num_layers):
        decoded = _attend(decoded, decoded, num_heads, causal=True)
        decoded = _feed_forward(_attend(decoded, encoded, num_heads), feed_forward)
    logits = layers.Dense(vocabulary)(decoded)
    return keras.Model((source, target), logits, name="transformer")
