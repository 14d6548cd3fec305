"""The README's lines of use run as they stand, on a small model."""

import pathlib
import re

import keras
import numpy as np
import tensorflow as tf

import keras_influence as ki
from tests import cases

README = pathlib.Path(__file__).parents[1] / "README.md"


def _reader():
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(5, 2, mask_zero=True),
            keras.layers.Dense(5, name="decoder_0"),
        ]
    )
    model.compile("sgd", cases.SPARSE)
    return model


def _sentences():
    tokens = [np.arange(length) % 4 + 1 for length in (2, 5, 3, 6, 1, 4)]
    signature = (tf.TensorSpec([None], tf.int32),) * 2
    return tf.data.Dataset.from_generator(
        lambda: ((t, t) for t in tokens), output_signature=signature
    )


def test_the_lines_of_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block, texts, mirrored, asked, retrained, recorded, converged, durable = re.findall(
        r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    # 83 parameters have no 100 eigenvectors.
    block, mirrored, converged = (
        each.replace("rank=100", "rank=4") for each in (block, mirrored, converged)
    )
    images, labels = cases.images(24, size=4)
    names = {
        "model": cases.image_model(size=4),
        "train": tf.data.Dataset.from_tensor_slices((images, labels)).batch(8),
        "test": (images[:3], labels[:3]),
        "images": images[:5],
        "labels": labels[:5],
    }
    exec(block, names)
    assert names["top"].proponents.ids.shape == (5, 10)
    assert names["suspects"].shape == (24,)
    assert names["scores"].shape == (3, 24)
    assert len(names["tracin"].checkpoints) == 10
    loaded = ki.load("runs/mnist/scorer", names["model"])
    assert (
        (loaded((images[:5], labels[:5])).opponents.ids == names["top"].opponents.ids).numpy().all()
    )
    exec(
        texts.replace("[17, 33, 65], [64, 32, 16, 1]", "[4, 7], [3, 2, 1]").replace("=20", "=2"),
        {"ki": ki, "tf": tf, "model": _reader(), "sentences": _sentences()},
    )
    grouped = {"some": (images[:4], labels[:4]), "test_labels": labels[:3], "train_labels": labels}
    names |= grouped
    exec(asked, names)
    assert names["scores"].shape == names["errors"].shape == (3, 24)
    assert names["by_class"].shape == (labels[:3].max() + 1, labels.max() + 1)
    assert names["change"].shape == (names["model"].count_params(),)
    exec(
        retrained.replace("num_subsets=100", "num_subsets=4").replace("20}", "1}"),
        names | {"x": images, "y": labels, "make_model": lambda: cases.image_model(size=4)},
    )
    exec(converged, names)
    assert names["arnoldi"].eigenbasis.values.shape == (4,)
    names["more"] = cases.images(7, size=4, seed=1)
    durable = durable.replace("rank=100", "rank=4").replace("[17, 4711]", "[17, 11]")
    exec(durable, names)
    np.testing.assert_array_equal(names["scorer"].ids, np.delete(np.arange(31), [11, 17]))
    # Of a model of its own, since it trains it.
    exec(
        recorded,
        names
        | {"model": cases.image_model(size=4), "keras": keras, "loss": cases.SPARSE, "y": labels},
    )
    # The scorer lies beside the checkpoints, and the run goes on all the same.
    recorder = ki.callbacks.TracInCheckpoint("runs/mnist")
    names["model"].fit(names["train"], epochs=11, initial_epoch=10, callbacks=[recorder], verbose=0)
    assert len(ki.TracIn(names["model"], checkpoints="runs/mnist").checkpoints) == 11

    names |= {"tf": tf, "build_model": lambda: cases.image_model(size=4)}
    exec(mirrored, names)
    assert names["model"].distribute_strategy is names["strategy"]
    # Four eigenvectors, half as many directions of the complement as examples, and the norm.
    assert names["scorer"].encodings.shape == (24, 17)
