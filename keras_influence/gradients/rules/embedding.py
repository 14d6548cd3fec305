"""Tables of which an example reads some rows."""

from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_influence.gradients.blocks import of_shape
from keras_influence.gradients.calls import LayerCall
from keras_influence.gradients.factors import Factor, Outer, Rows
from keras_influence.gradients.rules.registry import register_rule

Explanation = Iterator[tuple[keras.Variable, Factor]]


@register_rule(keras.layers.Embedding)
def embedding(call: LayerCall) -> Explanation:
    """z = (E + s A B)[ids]."""
    layer = call.layer
    if layer.quantization_mode is not None:
        return
    yield from _looked_up(call)


def _looked_up(call: LayerCall) -> Explanation:
    layer, table = call.layer, call.layer._embeddings
    ids = tf.cast(call.inputs, tf.int32)
    gradient = call.output_gradient
    width = gradient.shape[-1]
    ids = tf.reshape(ids, [tf.shape(ids)[0], _count(ids)])
    values = tf.reshape(gradient, [tf.shape(gradient)[0], _count(ids), width])
    # A negative id counts from the end, as it does for Keras's `take`.
    ids = tf.where(ids < 0, ids + table.shape[0], ids)
    if call.uses(table):
        yield table, Rows(table.shape, ids, values)
    if getattr(layer, "lora_enabled", False):
        scale = layer.lora_alpha / layer.lora_rank
        a, b = (
            call.cast(each.value) for each in (layer.lora_embeddings_a, layer.lora_embeddings_b)
        )
        if call.uses(layer.lora_embeddings_a):
            through = scale * tf.tensordot(values, b, axes=[[-1], [1]])
            yield layer.lora_embeddings_a, Rows(layer.lora_embeddings_a.shape, ids, through)
        if call.uses(layer.lora_embeddings_b):
            yield layer.lora_embeddings_b, Outer.dense(scale * tf.gather(a, ids), values)


@register_rule(keras.layers.ReversibleEmbedding, "keras_hub>ReversibleEmbedding")
def reversible_embedding(call: LayerCall) -> Explanation:
    """Forwards a lookup; with `reverse=True` logits = c tanh((x E') / c), or x E'."""
    layer = call.layer
    if layer.quantization_mode is not None:
        return
    reverse = call.kwargs.get("reverse", call.args[1] if len(call.args) > 1 else False)
    if not reverse:
        yield from _looked_up(call)
        return
    delta = call.output_gradient
    if layer.logit_soft_cap is not None:
        delta *= 1 - tf.square(call.cast(call.outputs) / layer.logit_soft_cap)
    if not layer.tie_weights:
        if call.uses(layer.reverse_embeddings):
            yield layer.reverse_embeddings, Outer.dense(call.inputs, delta)
    elif not getattr(layer, "lora_enabled", False) and call.uses(layer._embeddings):
        yield layer._embeddings, Outer.dense(delta, call.inputs)


@register_rule("keras_hub>PositionEmbedding")
def position_embedding(call: LayerCall) -> Explanation:
    """The first T rows of a table, for every example, from `start_index` on."""
    table = call.layer.position_embeddings
    start = call.kwargs.get("start_index", call.args[1] if len(call.args) > 1 else 0)
    if call.kwargs.get("positions") is not None or len(call.args) > 2:
        return
    gradient = call.output_gradient
    if gradient.shape.rank != 3 or not call.uses(table):
        return
    ids = tf.range(tf.shape(gradient)[1]) + tf.cast(start, tf.int32)
    ids = tf.broadcast_to(ids, tf.shape(gradient)[:2])
    yield table, Rows(table.shape, of_shape(ids, gradient.shape[:2]), gradient)


def _count(ids: tf.Tensor) -> int | tf.Tensor:
    return -1 if None in ids.shape[1:] else ids.shape[1:].num_elements()
