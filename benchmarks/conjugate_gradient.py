"""What it brings to solve for many queries together, and what preconditioners spare.

    python benchmarks/conjugate_gradient.py

100 queries solved as one block, against 5 of them one at a time (seconds for one, times 100; in
turns, the median), and the steps to a residual of 1e-3 of both, with and without a preconditioner,
on scikit-learn's digits. The curvature is the Gauss-Newton matrix, damped by a tenth of its mean
eigenvalue; of mlp, where that is within float32's rounding of the largest eigenvalues, by what its
training leaves undetermined, 1 / (updates x rate / (1 - momentum)). Written to
benchmarks/results/conjugate-gradient.json.
"""

import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import app, flags

import keras_influence as ki
import projection

# `projection` has put the examples where they are found.
import image_data  # isort: skip
import models  # isort: skip
import runs  # isort: skip

RESULTS = pathlib.Path(__file__).parent / "results"
SEED = 0
NUM_TRAIN, NUM_QUERIES, SINGLE, TURNS = 500, 100, 5, 3
TOLERANCE = 1e-3
EPOCHS, BATCH, RATE, MOMENTUM = 10, 50, 0.05, 0.9
DAMPINGS = {"mlp": (1 - MOMENTUM) / (EPOCHS * NUM_TRAIN // BATCH * RATE)}


def softmax(shape: tuple[int, int, int]) -> keras.Model:
    return keras.Sequential([keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(10)])


MODELS = {
    "softmax regression": softmax,
    "small_cnn": lambda shape: models.small_cnn(shape, 10),
    "mlp": lambda shape: models.mlp(shape, 10),
}


def problem(name: str) -> tuple[keras.Model, Any, Any]:
    """A model that has been trained on some of scikit-learn's digits, the digits, and queries."""
    keras.utils.set_random_seed(SEED)
    data = image_data.load("digits", None, NUM_TRAIN)
    model = MODELS[name](data.train_images.shape[1:])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE, MOMENTUM), loss)
    train = data.train_images, data.train_labels
    model.fit(*train, epochs=EPOCHS, batch_size=BATCH, verbose=0)
    return model, train, (data.test_images[:NUM_QUERIES], data.test_labels[:NUM_QUERIES])


def measure(name: str) -> dict[str, Any]:
    model, train, queries = problem(name)
    common: dict[str, Any] = {"curvature": "gauss_newton", "seed": SEED, "verbose": 0}
    solver: dict[str, Any] = {"batch_size": NUM_TRAIN, "direction_bytes": 2**30, **common}
    damping = DAMPINGS.get(name, "auto")
    method = ki.ConjugateGradient(model, TOLERANCE, 1000, damping=damping, **solver).fit(train)
    maps = method.maps
    gradients = maps.example_gradients((queries[0], queries[1])).numpy()
    method.inverse_products(gradients)  # Traces the graphs.
    method.inverse_products(gradients[:1])
    together, alone = [], []
    for _ in range(TURNS):
        start = time.perf_counter()
        method.inverse_products(gradients)
        middle = time.perf_counter()
        for row in range(SINGLE):
            method.inverse_products(gradients[row : row + 1])
        together.append(middle - start)
        alone.append((time.perf_counter() - middle) / SINGLE * NUM_QUERIES)
    row: dict[str, Any] = {
        "model": name,
        "parameters": model.count_params(),
        "damping": method.used_damping,
        "together_seconds": statistics.median(together),
        "alone_seconds": statistics.median(alone),
        "steps": {"none": steps(method, gradients)},
    }
    damping = method.used_damping
    for label, helper in (
        ("Arnoldi, 50 pairs", ki.Arnoldi(model, 50, damping=damping, **common)),
        ("EKFAC", ki.EKFAC(model, damping=damping, seed=SEED, verbose=0)),
    ):
        helped = ki.ConjugateGradient(
            model,
            TOLERANCE,
            1000,
            damping=damping,
            preconditioner=helper.fit(train),
            **solver,
        ).fit(train)
        row["steps"][label] = steps(helped, gradients)
    return row


def steps(method: ki.ConjugateGradient, gradients: np.ndarray) -> dict[str, float]:
    """The median over the queries, of all together, and of some one at a time."""
    blocks = {
        "together": [gradients],
        "alone": [gradients[row : row + 1] for row in range(SINGLE)],
    }
    found = {}
    for name, parts in blocks.items():
        counts = []
        for part in parts:
            method.inverse_products(part)
            assert method.solutions is not None
            counts += method.solutions.iterations.tolist()
        found[name] = float(np.median(counts))
    return found


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"No argument is taken. Received: {argv[1:]}.")
    rows = []
    for name in flags.FLAGS.models:
        rows.append(measure(name))
        print(rows[-1], flush=True)
        result = {
            "num_train": NUM_TRAIN,
            "num_queries": NUM_QUERIES,
            "tolerance": TOLERANCE,
            "turns": TURNS,
            "seed": SEED,
            "rows": rows,
            "machine": projection.machine(),
        }
        runs.write_json(RESULTS / "conjugate-gradient.json", result)


if __name__ == "__main__":
    flags.DEFINE_list("models", list(MODELS), "What to measure.")
    app.run(main)
