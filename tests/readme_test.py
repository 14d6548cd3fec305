"""The README's lines of use run as they stand, on a small model."""

import pathlib
import re

import tensorflow as tf

import keras_influence as ki
from tests import cases

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_lines_of_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    # 79 parameters have no 100 eigenvectors.
    block = block.replace("rank=100", "rank=4")
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
    # The scorer lies beside the checkpoints, and the run goes on all the same.
    recorder = ki.callbacks.TracInCheckpoint("runs/mnist")
    names["model"].fit(names["train"], epochs=11, initial_epoch=10, callbacks=[recorder], verbose=0)
    assert len(ki.TracIn(names["model"], checkpoints="runs/mnist").checkpoints) == 11
