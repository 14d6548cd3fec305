import json

import keras
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from absl.testing import flagsaver

import image_data
import models
from image_data import ImageData


@pytest.fixture(scope="session")
def two_halves():
    """40 training and 12 test images of 8 x 8, bright in the left or in the right half."""
    rng = np.random.default_rng(0)
    labels = (np.arange(52) % 2).astype(np.int32)
    images = rng.uniform(0, 0.2, (52, 8, 8, 1)).astype(np.float32)
    images[labels == 0, :, :4] += 0.8
    images[labels == 1, :, 4:] += 0.8
    return ImageData(
        images[:40], labels[:40], images[40:], labels[40:], 2, class_names=("left", "right")
    )


@pytest.fixture
def small_program(monkeypatch, two_halves):
    """The examples train a dense layer of 8 units, called mlp, on `two_halves`."""

    def build(input_shape, num_classes):
        return keras.Sequential(
            [
                keras.Input(input_shape),
                keras.layers.Flatten(),
                keras.layers.Dense(8, activation="relu"),
                keras.layers.Dense(num_classes),
            ]
        )

    def load(name, data_dir, num_train):
        assert (name, data_dir) == ("digits", None)
        number = num_train or len(two_halves.train_labels)
        return two_halves._replace(
            train_images=two_halves.train_images[:number],
            train_labels=two_halves.train_labels[:number],
        )

    monkeypatch.setitem(models.MODELS, "mlp", build)
    monkeypatch.setattr(image_data, "load", load)


@pytest.fixture
def run_program():
    """Runs the `main` of a module with some flags, and puts the flags back."""

    def run(module, **settings):
        words = [f"--{name}={value}" for name, value in settings.items()]
        with flagsaver.flagsaver():
            module.main(flags.FLAGS([module.__name__, *words]))

    return run


@pytest.fixture(scope="session")
def bert_directory(tmp_path_factory):
    """A BERT of one layer, 8 wide, as `BertModel` saves it."""
    directory = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["red", "green", "is", "it", "?", "a", "thing", "."],
    ]
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    config = {
        "model_type": "bert",
        "vocab_size": len(words),
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    layer, shapes = "encoder.layer.0.", {}
    for part, rows in (("word", len(words)), ("position", 16), ("token_type", 2)):
        shapes[f"embeddings.{part}_embeddings.weight"] = (rows, 8)
    for name in ("attention.self.query", "attention.self.key", "attention.self.value"):
        shapes[f"{layer}{name}.weight"] = (8, 8)
    shapes[f"{layer}attention.output.dense.weight"] = (8, 8)
    shapes[f"{layer}intermediate.dense.weight"] = (16, 8)
    shapes[f"{layer}output.dense.weight"] = (8, 16)
    shapes["pooler.dense.weight"] = (8, 8)
    for name in [name for name in shapes if "embeddings" not in name]:
        shapes[name.replace("weight", "bias")] = shapes[name][:1]
    for name in ("embeddings", f"{layer}attention.output", f"{layer}output"):
        for part in ("weight", "bias"):
            shapes[f"{name}.LayerNorm.{part}"] = (8,)
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    tensors["embeddings.position_ids"] = np.arange(16)[np.newaxis]
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory
