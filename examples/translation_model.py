"""The translation model of the examples: a Transformer of KerasHub's layers, and its decoding."""

from collections.abc import Callable
from typing import NamedTuple

import keras
import keras_hub
import tensorflow as tf

PAD, UNKNOWN, BEGIN, END = range(4)


class Size(NamedTuple):
    """Of an encoder-decoder.

    Attributes:
        num_layers: Of the encoder, and of the decoder.
        width: Of the embeddings and of what the layers pass on.
        num_heads: Of every attention.
        hidden_width: Of the feed-forward layers.
        dropout: Rate.
    """

    num_layers: int
    width: int
    num_heads: int
    hidden_width: int
    dropout: float


# Base and big are those of Vaswani et al., "Attention Is All You Need" (2017), table 3. The smaller
# ones are for a few epochs, through which dropout only takes a third of the time.
SIZES = {
    "tiny": Size(1, 8, 2, 16, 0.0),
    "mini": Size(2, 128, 4, 512, 0.0),
    "small": Size(2, 256, 4, 1024, 0.0),
    "base": Size(6, 512, 8, 2048, 0.1),
    "big": Size(6, 1024, 16, 4096, 0.3),
}


def build(size: Size, vocabulary_size: int, max_tokens: int) -> keras.Model:
    """A Transformer that reads {"source", "target"} and predicts the token after each of target's.

    Both languages and the outputs share one embedding. Normalisation comes before each block, which
    trains without tricks.

    Args:
        size: Of the model.
        vocabulary_size: Tokens, the four special ones included.
        max_tokens: Longest sequence.

    Returns:
        A model of token ids [B, S] and [B, T] with logits [B, T, vocabulary_size].
    """
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in ("source", "target")}
    masks = {name: keras.ops.not_equal(tokens, PAD) for name, tokens in inputs.items()}
    scale = keras.initializers.RandomNormal(stddev=size.width**-0.5)
    embedding = keras_hub.layers.ReversibleEmbedding(
        vocabulary_size, size.width, embeddings_initializer=scale, name="embedding"
    )
    embedded = {}
    for name, tokens in inputs.items():
        tokens = embedding(tokens)
        positions = keras_hub.layers.PositionEmbedding(
            max_tokens, initializer=scale, name=f"{name}_positions"
        )(tokens)
        embedded[name] = keras.layers.Dropout(size.dropout)(tokens + positions)
    options = {
        "intermediate_dim": size.hidden_width,
        "num_heads": size.num_heads,
        "dropout": size.dropout,
        "normalize_first": True,
    }
    encoded, decoded = embedded["source"], embedded["target"]
    for number in range(size.num_layers):
        encoder = keras_hub.layers.TransformerEncoder(**options, name=f"encoder_{number}")
        encoded = encoder(encoded, padding_mask=masks["source"])
    encoded = keras.layers.LayerNormalization(name="encoded")(encoded)
    for number in range(size.num_layers):
        decoder = keras_hub.layers.TransformerDecoder(**options, name=f"decoder_{number}")
        decoded = decoder(
            decoded,
            encoded,
            decoder_padding_mask=masks["target"],
            encoder_padding_mask=masks["source"],
        )
    decoded = keras.layers.LayerNormalization(name="decoded")(decoded)
    return keras.Model(inputs, embedding(decoded, reverse=True), name="translator")


def decoder_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The decoder's layers, from the first."""
    return [
        layer for layer in model.layers if isinstance(layer, keras_hub.layers.TransformerDecoder)
    ]


def last_decoder_variables(model: keras.Model, count: int) -> list[keras.Variable]:
    """The variables of the last `count` decoder layers."""
    layers = decoder_layers(model)
    if not 1 <= count <= len(layers):
        raise ValueError(
            f"The model has {len(layers)} decoder layers. Received: the last {count} of them."
        )
    return [variable for layer in layers[-count:] for variable in layer.trainable_variables]


def greedy_decoder(model: keras.Model, max_tokens: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function [B, S] -> [B, max_tokens] that takes the likeliest token at each step.

    One program for all batches of a shape: a loop that keeps each layer's keys and values, and ends
    when every translation has. What follows a translation's end is padding.
    """
    encode = keras.Model(model.input["source"], model.get_layer("encoded").output)
    embedding, positions = model.get_layer("embedding"), model.get_layer("target_positions")
    layers, normalize = decoder_layers(model), model.get_layer("decoded")

    @tf.function(reduce_retracing=False)
    def decode(source: tf.Tensor) -> tf.Tensor:
        count, length = source.shape
        mask = tf.not_equal(source, PAD)
        encoded = encode(source, training=False)

        def step(index, token, own, of_source, first=None):
            x = embedding(token[:, tf.newaxis])
            x = x + positions(x, start_index=index)
            new_own, new_source = [], []
            for layer, keys, source_keys in zip(layers, own, of_source, strict=True):
                x, keys, source_keys = layer(
                    x,
                    encoded,
                    encoder_padding_mask=mask,
                    self_attention_cache=keys,
                    self_attention_cache_update_index=index,
                    cross_attention_cache=source_keys,
                    cross_attention_cache_update_index=first,
                    training=False,
                )
                new_own.append(keys)
                new_source.append(source_keys)
            logits = embedding(normalize(x), reverse=True)
            found = tf.argmax(logits[:, 0], axis=-1, output_type=tf.int32)
            ended = (token == END) | (token == PAD)
            return tf.where(ended, PAD, found), new_own, new_source

        def empty(size):
            heads = layers[0].num_heads
            return [
                tf.zeros([count, 2, size, heads, encoded.shape[-1] // heads], encoded.dtype)
                for _ in layers
            ]

        # The first step also computes the keys and values of the source.
        begin = tf.fill([count], BEGIN)
        token, own, of_source = step(0, begin, empty(max_tokens), empty(length), first=0)
        tokens = tf.TensorArray(tf.int32, max_tokens, element_shape=[count]).write(0, token)

        def goes_on(index, token, own, tokens):
            return (index < max_tokens) & tf.reduce_any((token != END) & (token != PAD))

        def body(index, token, own, tokens):
            token, own, _ = step(index, token, own, of_source)
            return index + 1, token, own, tokens.write(index, token)

        _, _, _, tokens = tf.while_loop(goes_on, body, (tf.constant(1), token, own, tokens))
        return tf.transpose(tokens.stack())

    return decode
