"""Models of keras.applications and KerasHub, and the check that their gradients are right.

Every architecture family by its smallest member, at the smallest input that it takes. Nothing is
downloaded: the weights are drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_influence.gradients import LossMaps
from keras_influence.gradients.coverage import Coverage

CLASSES, VOCABULARY, LENGTH = 3, 11, 6
# Examples that are drawn, for the batch statistics.
_DRAWN = 8

Build = Callable[[], keras.Model]


class LibraryModel(NamedTuple):
    """One member of a family of architectures.

    Attributes:
        family: the family's name.
        member: the class or function that makes it.
        library: "keras.applications" or "keras_hub".
        build: makes the model, whose outputs are logits.
    """

    family: str
    member: str
    library: str
    build: Build


class Comparison(NamedTuple):
    """Projections by the layers' rules, held against a reference.

    Attributes:
        coverage: what serves which variable.
        error: largest absolute difference, relative to the reference's largest entry.
        reference: "forward mode", or "one backward pass an example" where that goes wrong.
        num_flat: variables whose gradient is zero, but for rounding, on this batch.
    """

    coverage: Coverage
    error: float
    reference: str
    num_flat: int


def _application(family: str, member: str, size: int, **options: Any) -> LibraryModel:
    def build() -> keras.Model:
        return getattr(keras.applications, member)(
            weights=None,
            input_shape=(size, size, 3),
            classes=CLASSES,
            classifier_activation=None,
            **options,
        )

    return LibraryModel(family, member, "keras.applications", build)


def _backbone(
    family: str, member: str, options: dict[str, Any], head: Callable[[Any, Any], Any]
) -> LibraryModel:
    def build() -> keras.Model:
        import keras_hub

        backbone = getattr(keras_hub.models, member)(**options)
        outputs = head(backbone, backbone(backbone.input))
        return keras.Model(backbone.input, outputs, name=backbone.name)

    return LibraryModel(family, member, "keras_hub", build)


def _classify(name: str | None) -> Callable[[Any, Any], Any]:
    def head(backbone: Any, outputs: Any) -> Any:
        del backbone
        features = outputs if name is None else outputs[name]
        if len(features.shape) == 3:
            features = features[:, 0]
        return keras.layers.Dense(CLASSES)(features)

    return head


def _next_token(name: str | None) -> Callable[[Any, Any], Any]:
    """The head of a language model: the embedding, in reverse."""

    def head(backbone: Any, outputs: Any) -> Any:
        features = outputs if name is None else outputs[name]
        return backbone.token_embedding(features, reverse=True)

    return head


_TOY = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
_LLAMA = {name: value for name, value in _TOY.items() if name != "num_heads"}
_VIT = {
    "image_shape": (16, 16, 3),
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 12,
}

MODELS = (
    _application("MobileNet", "MobileNet", 32),
    _application("MobileNetV2", "MobileNetV2", 32),
    _application("MobileNetV3", "MobileNetV3Small", 32, include_preprocessing=False),
    _application("EfficientNet", "EfficientNetB0", 32),
    _application("EfficientNetV2", "EfficientNetV2B0", 32, include_preprocessing=False),
    _application("ResNet", "ResNet50", 32),
    _application("ResNetV2", "ResNet50V2", 32),
    _application("DenseNet", "DenseNet121", 32),
    _application("VGG", "VGG16", 32),
    _application("Xception", "Xception", 71),
    _application("Inception", "InceptionV3", 75),
    _application("InceptionResNet", "InceptionResNetV2", 75),
    _application("NASNet", "NASNetMobile", 32),
    _application("ConvNeXt", "ConvNeXtTiny", 32, include_preprocessing=False),
    _backbone(
        "BERT", "BertBackbone", {**_TOY, "max_sequence_length": 8}, _classify("pooled_output")
    ),
    _backbone("GPT-2", "GPT2Backbone", {**_TOY, "max_sequence_length": 8}, _next_token(None)),
    _backbone(
        "Llama",
        "LlamaBackbone",
        {**_LLAMA, "num_query_heads": 4, "num_key_value_heads": 2},
        _next_token(None),
    ),
    _backbone("T5", "T5Backbone", _TOY, _next_token("decoder_sequence_output")),
    _backbone(
        "Whisper",
        "WhisperBackbone",
        {**_TOY, "max_encoder_sequence_length": 8, "max_decoder_sequence_length": 8},
        _next_token("decoder_sequence_output"),
    ),
    _backbone("ViT", "ViTBackbone", _VIT, _classify(None)),
)


def problem(
    chosen: LibraryModel, dtype: str = "float64", num_examples: int = 2, seed: int = 0
) -> tuple[keras.Model, Any]:
    """A model with drawn weights, and a batch.

    Noise on all weights, because scales that begin at zero make the gradients of what lies before
    them zero too; little on kernels, which are drawn. Batch statistics are made those of the batch
    and a few more, so that signals neither vanish nor explode on their way through a deep network.
    """
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        keras.utils.set_random_seed(seed)
        model = chosen.build()
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    finally:
        keras.config.set_floatx(before)
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        scale = 0.1 if len(variable.shape) == 1 else 0.01
        variable.assign(variable + scale * random.standard_normal(variable.shape))
    x = tf.nest.map_structure(lambda tensor: _one_input(tensor, random), model.input)
    _set_statistics(model, x)
    x = tf.nest.map_structure(lambda values: values[:num_examples], x)
    classes = model.output.shape[-1]
    positions = [LENGTH] * (len(model.output.shape) - 2)
    return model, (x, random.integers(0, classes, (num_examples, *positions)))


def _one_input(tensor: Any, random: np.random.Generator) -> np.ndarray:
    shape = [_DRAWN, *(LENGTH if size is None else size for size in tensor.shape[1:])]
    if tensor.dtype.startswith("float"):
        return random.standard_normal(shape).astype(tensor.dtype)
    if "mask" in tensor.name:
        mask = np.ones(shape, tensor.dtype)
        mask[0, -1] = 0
        return mask
    high = 2 if "segment" in tensor.name else VOCABULARY
    return random.integers(1, high, shape).astype(tensor.dtype)


def _set_statistics(model: keras.Model, x: Any) -> None:
    found = False
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
        elif isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
            found = True
    if found:
        model(x, training=True)


def compare(model: keras.Model, batch: Any, num_directions: int = 2, seed: int = 0) -> Comparison:
    """Projections of `batch` on random directions, by rules and by a reference.

    In the directions, all variables weigh alike: each one's part is divided by the norm of its own
    gradient, or else the layers with the largest gradients would hide the errors of the others.
    Not by one that is zero but for rounding, as that of the keys' biases in attention.
    """
    maps = LossMaps(model)
    random = np.random.default_rng(seed)
    directions = random.standard_normal((num_directions, maps.parameters.size))
    gradient = maps.gradient(batch).numpy()
    ends = np.cumsum(maps.parameters.sizes)[:-1]
    norms = np.array([np.linalg.norm(part) for part in np.split(gradient, ends)])
    smallest = 1e-8 * norms.max()
    for part, norm in zip(np.split(directions, ends, axis=1), norms, strict=True):
        part /= max(norm, smallest)
    directions = directions.astype(maps.parameters.dtype.as_numpy_dtype)
    coverage = maps.coverage(batch)
    actual = maps.project(batch, directions).numpy()
    if coverage.plain:
        expected, reference = maps.forward_project(batch, tf.constant(directions)), "forward mode"
        expected = expected.numpy()
    else:
        reference = "one backward pass an example"
        rows = [
            maps.gradient(tf.nest.map_structure(lambda leaf, i=i: leaf[i : i + 1], batch))
            for i in range(len(actual))
        ]
        expected = np.stack(rows) @ directions.T
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    return Comparison(coverage, float(error), reference, int((norms <= smallest).sum()))
