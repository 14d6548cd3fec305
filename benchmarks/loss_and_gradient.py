"""Why the training loss finds replaced labels that gradients miss.

    python benchmarks/loss_and_gradient.py --data_dir=DIRECTORY

Trains as the Fashion-MNIST rows of benchmarks/mislabeled.py do, and takes the score apart. With p
the predicted probabilities, y the given label and a the last layer's inputs, the squared gradient
of the last kernel is |p - y|^2 |a|^2. The loss, -log p_y, grows without bound where a label is
wrong; |p - y|^2 ends at 2. Writes benchmarks/results/loss-and-gradient.json.
"""

import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import keras
import numpy as np
from absl import app, flags

import keras_influence as ki

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import image_data  # noqa: E402
import mislabeled  # noqa: E402 (it defines --data_dir)
import runs  # noqa: E402
import training  # noqa: E402

_SEED = flags.DEFINE_integer("seed", 0, "Seed of the replaced labels and of the training.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    settings = mislabeled.SETTINGS["fashion_mnist-large_cnn"]
    data = image_data.load("fashion_mnist", flags.FLAGS.data_dir, settings["num_train"])
    labels, is_mislabeled = image_data.corrupt_labels(
        data.train_labels, settings["corruption"], data.num_classes, _SEED.value
    )
    data = data._replace(train_labels=labels)
    with tempfile.TemporaryDirectory() as directory:
        trained = training.train(
            data,
            settings["model"],
            directory,
            epochs=settings["epochs"],
            batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            seed=_SEED.value,
        )
    model = trained.model
    inputs = keras.Model(model.inputs, model.layers[-1].input).predict(
        data.train_images, batch_size=500, verbose=0
    )
    probabilities = keras.ops.softmax(
        model.predict(data.train_images, batch_size=500, verbose=0).astype("float64")
    ).numpy()
    wrong = probabilities - np.eye(data.num_classes)[labels]
    outputs = (wrong**2).sum(axis=1)
    activations = (inputs.astype("float64") ** 2).sum(axis=1)
    scores = {
        "loss": training.example_losses(model, data.train_images, labels),
        "outputs": outputs,
        "last_kernel": outputs * activations,
        "activations": activations,
    }
    rows = {}
    for name, score in scores.items():
        retrieval = ki.evaluation.mislabel_retrieval(score, is_mislabeled)
        rows[name] = {"auc": retrieval.auc, "average_precision": retrieval.average_precision}
        print(name, rows[name])
    result = {
        "rows": rows,
        "median_outputs_mislabeled": float(np.median(outputs[is_mislabeled])),
        "share_of_correct_above_1": float(np.mean(outputs[~is_mislabeled] > 1)),
        "median_loss_mislabeled": float(np.median(scores["loss"][is_mislabeled])),
        "train_accuracy": trained.train_accuracy,
        "settings": {**settings, "seed": _SEED.value},
        "matmul_gflops": runs.matmul_gflops(),
        "versions": runs.versions(),
    }
    path = mislabeled.RESULTS / "loss-and-gradient.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
