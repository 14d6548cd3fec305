"""KerasHub's BERT, new or with the weights of a Hugging Face directory, as a classifier."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import keras_hub
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILE = "vocab.txt"
CONFIG_FILE = "config.json"

# Where KerasHub's BERT leaves no choice, what a directory's must be, and may leave unsaid.
_FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
}
# Of PyTorch's modules that are stored beside the weights, and follow from the configuration.
_POSITIONS = "embeddings.position_ids"


def load_backbone(directory: str | os.PathLike) -> keras_hub.models.BertBackbone:
    """The BERT of a directory with `config.json` and `model.safetensors`, as `BertModel` saves it.

    Every tensor of the file goes into one variable, and every variable gets one.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: a configuration that KerasHub's BERT does not have; a tensor too many, one too
            few, or one of another shape.
    """
    directory = pathlib.Path(directory)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"There is no {name} in {directory}. Pass the directory of a BERT with "
                f"{CONFIG_FILE}, {VOCABULARY_FILE} and {WEIGHTS_FILE}."
            )
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    for key, needed in _FIXED.items():
        if config.get(key, needed) != needed:
            raise ValueError(
                f"{directory / CONFIG_FILE} must have {key}={needed!r}, as KerasHub's BERT has. "
                f"Received: {config[key]!r}."
            )
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        dropout=config["hidden_dropout_prob"],
        max_sequence_length=config["max_position_embeddings"],
        num_segments=config["type_vocab_size"],
    )
    for layer in backbone.transformer_layers:
        # KerasHub approximates by tanh what "gelu" computes by the error function.
        layer._feedforward_intermediate_dense.activation = keras.activations.gelu
    _assign(backbone, safetensors.numpy.load_file(directory / WEIGHTS_FILE))
    return backbone


def _assign(backbone: keras_hub.models.BertBackbone, tensors: dict[str, NDArray[Any]]) -> None:
    positions = tensors.pop(_POSITIONS, None)
    expected = np.arange(backbone.max_sequence_length)
    if positions is not None and not np.array_equal(np.ravel(positions), expected):
        raise ValueError(f"{_POSITIONS} must count from 0 to {expected[-1]}, and does not.")
    variables = {variable.path: variable for variable in backbone.trainable_variables}
    names = dict(_names(backbone.num_layers))
    unknown = sorted(set(tensors) - set(names.values()))
    absent = sorted(set(names.values()) - set(tensors))
    if unknown or absent or set(names) != set(variables):
        raise ValueError(
            f"The tensors must be those of a BERT with {backbone.num_layers} layers and a pooler. "
            f"Of no use: {unknown}. Missing: {absent}. Variables without a tensor: "
            f"{sorted(set(variables) - set(names))}."
        )
    for path, name in names.items():
        variable, tensor = variables[path], tensors[name]
        # A Dense layer of PyTorch keeps [outputs, inputs].
        matrix = tensor.T if path.endswith("/kernel") else tensor
        if matrix.shape != _merged(path, tuple(variable.shape)):
            raise ValueError(
                f"The tensor {name} must give {path}, of shape {tuple(variable.shape)}. Received "
                f"the shape {tensor.shape}."
            )
        variable.assign(matrix.reshape(variable.shape))


def _merged(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A variable's shape where the heads and the numbers of each are one axis."""
    if path.endswith("/attention_output/kernel"):
        return (shape[0] * shape[1], shape[2])
    if path.endswith("/kernel"):
        return (shape[0], math.prod(shape[1:]))
    return (math.prod(shape),) if path.endswith("/bias") else shape


def _names(num_layers: int) -> Iterator[tuple[str, str]]:
    """Path of each variable of KerasHub's backbone, and the name of its tensor."""
    for part in ("token", "position", "segment"):
        name = {"token": "word", "segment": "token_type"}.get(part, part)
        yield f"{part}_embedding/embeddings", f"embeddings.{name}_embeddings.weight"
    yield from _pairs("embeddings_layer_norm", "embeddings.LayerNorm", "gamma", "beta")
    for number in range(num_layers):
        here, there = f"transformer_layer_{number}", f"encoder.layer.{number}"
        for part in ("query", "key", "value"):
            yield from _pairs(
                f"{here}/self_attention_layer/{part}", f"{there}.attention.self.{part}"
            )
        for path, name in (
            ("self_attention_layer/attention_output", "attention.output.dense"),
            ("feedforward_intermediate_dense", "intermediate.dense"),
            ("feedforward_output_dense", "output.dense"),
        ):
            yield from _pairs(f"{here}/{path}", f"{there}.{name}")
        for path, name in (
            ("self_attention_layer_norm", "attention.output.LayerNorm"),
            ("feedforward_layer_norm", "output.LayerNorm"),
        ):
            yield from _pairs(f"{here}/{path}", f"{there}.{name}", "gamma", "beta")
    yield from _pairs("pooled_dense", "pooler.dense")


def _pairs(
    path: str, name: str, weight: str = "kernel", bias: str = "bias"
) -> Iterator[tuple[str, str]]:
    yield f"{path}/{weight}", f"{name}.weight"
    yield f"{path}/{bias}", f"{name}.bias"


def small_backbone(vocabulary_size: int, max_length: int) -> keras_hub.models.BertBackbone:
    """A new BERT of 2 layers, 128 wide, such as trains without a pretrained one."""
    return keras_hub.models.BertBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=2,
        num_heads=2,
        hidden_dim=128,
        intermediate_dim=512,
        max_sequence_length=max_length,
    )


def make_backbone(
    weights: str | os.PathLike | None, vocabulary_size: int, max_length: int
) -> keras_hub.models.BertBackbone:
    """The BERT of the directory `weights`; without one, a small new one of this size."""
    if weights is not None:
        return load_backbone(weights)
    return small_backbone(vocabulary_size, max_length)


def classifier(
    backbone: keras_hub.models.BertBackbone,
    num_classes: int,
    learning_rate: float,
    num_steps: int,
) -> keras.Model:
    """A linear layer on what the two sentences' means tell of each other, compiled.

    u and v are means of the backbone's outputs over each sentence's tokens; the layer reads u, v,
    |u - v| and u * v (Conneau et al. 2017, figure 1, there of sentences read apart). A sentence
    encoder was trained to be compared by such means, not by its pooler's outputs. The model gives
    logits, and is compiled with crossentropy and AdamW, whose rate rises over a tenth of
    `num_steps` to `learning_rate` and then falls to 0 as a cosine.
    """
    outputs = backbone.output["sequence_output"]
    real = keras.ops.not_equal(backbone.input["padding_mask"], 0)
    u, v = (
        keras.layers.GlobalAveragePooling1D(name=f"mean_{segment}")(
            outputs,
            mask=keras.ops.logical_and(
                real, keras.ops.equal(backbone.input["segment_ids"], segment)
            ),
        )
        for segment in (0, 1)
    )
    compared = keras.layers.Concatenate()([u, v, keras.ops.absolute(u - v), u * v])
    kept = keras.layers.Dropout(backbone.dropout)(compared)
    model = keras.Model(backbone.input, keras.layers.Dense(num_classes, name="label")(kept))
    warmup = num_steps // 10
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, num_steps - warmup, warmup_target=learning_rate, warmup_steps=warmup
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def last_layers(
    backbone: keras_hub.models.BertBackbone, count: int
) -> Callable[[keras.Variable], bool] | None:
    """Chooses the variables of the last `count` layers and of all above them; None for all.

    Raises:
        ValueError: the backbone has not as many layers.
    """
    if count == 0:
        return None
    if count > backbone.num_layers:
        raise ValueError(
            f"The BERT has {backbone.num_layers} layers, of which the last {count} were asked for."
        )
    first = backbone.num_layers - count
    chosen = {f"transformer_layer_{number}" for number in range(first, backbone.num_layers)}
    chosen.add("label")
    return lambda variable: variable.path.split("/")[0] in chosen


def is_lowercase(directory: str | os.PathLike) -> bool:
    """Whether the tokenizer of a directory writes all in lower case, as it does unless it says."""
    file = pathlib.Path(directory, "tokenizer_config.json")
    if not file.exists():
        return True
    return bool(json.loads(file.read_text(encoding="utf-8")).get("do_lower_case", True))
