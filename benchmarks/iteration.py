"""Hessian products that the top eigenpairs take to converge, by the way in which they are found.

    python benchmarks/iteration.py

The 20 eigenpairs of largest magnitude of small_cnn and mlp, trained on digits, over 500 training
images, until |Hu - lambda u| is at most a thousandth of the largest eigenvalue: from one vector,
with a basis of at most 40, and from blocks of four. What was claimed is measured: each pair is
multiplied once more, and the eigenvalues are compared with those that a block of eight found to a
hundredth of that: a pair may have converged while a larger eigenvalue is still missing. Writes
benchmarks/results/iteration.json.
"""

import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_influence as ki
from keras_influence.methods.curvature import FrozenCurvature

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import image_data  # noqa: E402
import runs  # noqa: E402
import training  # noqa: E402

RANK = 20
WAYS: dict[str, tuple[int, int | None]] = {  # Starting vectors, and vectors at most.
    "one vector": (1, None),
    "one vector, at most 40 held": (1, 40),
    "block of 4": (4, None),
    "block of 4, at most 40 held": (4, 40),
}
_LEARNING_RATES = {"small_cnn": 0.05, "mlp": 0.01}

_EXAMPLES = flags.DEFINE_integer("num_examples", 500, "Examples of the Hessian.")
_EPOCHS = flags.DEFINE_integer("epochs", 10, "Of the training before.")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-3, "Of the residuals, of the largest eigenvalue.")
_DRAWS = flags.DEFINE_integer("num_draws", 1, "Draws of the starting vectors.")
_OUTPUT = flags.DEFINE_string(
    "output", str(ROOT / "benchmarks" / "results" / "iteration.json"), "File to write."
)


def measure(
    model_name: str,
    num_examples: int,
    epochs: int,
    tolerance: float,
    num_draws: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each of `WAYS`."""
    images = image_data.load("digits")
    with tempfile.TemporaryDirectory() as directory:
        rate = _LEARNING_RATES[model_name]
        trained = training.train(images, model_name, directory, epochs, 64, rate, seed)
    model = trained.model
    examples = (images.train_images[:num_examples], images.train_labels[:num_examples])
    maps = ki.gradients.LossMaps(model)
    operator = FrozenCurvature(maps, model, ki.data.freeze(examples, num_examples)[0])

    def found(
        block_size: int, max_vectors: int | None, tolerance: float, draw: int
    ) -> tuple[ki.linalg.ArnoldiResult, ki.linalg.Eigenbasis]:
        start = tf.random.stateless_normal([block_size, operator.size], [draw, block_size])
        result = ki.linalg.arnoldi(
            operator.products,
            start,
            20 * RANK,
            rank=RANK,
            tolerance=tolerance,
            max_vectors=max_vectors,
            seed=draw,
        )
        return result, ki.linalg.distill(result, RANK)

    _, exact = found(8, None, tolerance / 100, 0)
    rows = []
    for way, (block_size, max_vectors) in WAYS.items():
        row: dict[str, Any] = {
            "model": model_name,
            "num_parameters": model.count_params(),
            "way": way,
            "products": [],
            "restarts": [],
            "held": [],
            "missed": [],
            "largest_residual": [],
        }
        for draw in range(num_draws):
            result, pairs = found(block_size, max_vectors, tolerance, draw)
            images_of = operator.products(tf.convert_to_tensor(pairs.vectors)).numpy()
            rest = images_of - pairs.values[:, np.newaxis] * pairs.vectors
            lengths = np.linalg.norm(rest, axis=1) / abs(pairs.values[0])
            row["products"].append(result.num_products)
            row["restarts"].append(result.num_restarts)
            row["held"].append(min(max_vectors or result.num_products, result.num_products))
            row["missed"].append(missed(exact.values, pairs.values, tolerance))
            row["largest_residual"].append(float(lengths.max()))
        rows.append(row)
    return rows


def missed(exact: np.ndarray, values: np.ndarray, tolerance: float) -> int:
    """Eigenvalues of which none of `values` is nearer than the tolerance, each of them once."""
    left = list(values)
    count = 0
    for value in exact:
        near = [each for each in left if abs(each - value) <= tolerance * abs(exact[0])]
        if near:
            left.remove(min(near, key=lambda each: abs(each - value)))
        else:
            count += 1
    return count


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    settings = {
        "num_examples": _EXAMPLES.value,
        "epochs": _EPOCHS.value,
        "tolerance": _TOLERANCE.value,
        "rank": RANK,
        "seed": 0,
        "versions": runs.versions(),
    }
    rows = [
        row
        for name in _LEARNING_RATES
        for row in measure(name, _EXAMPLES.value, _EPOCHS.value, _TOLERANCE.value, _DRAWS.value)
    ]
    text = json.dumps({"settings": settings, "rows": rows}, indent=1)
    print(text)
    pathlib.Path(_OUTPUT.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
