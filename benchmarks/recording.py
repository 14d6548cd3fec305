"""What training costs more when an InfluenceTrainer takes note of its steps.

    python benchmarks/recording.py

Epochs of plain training and of recorded training in turns, in one process, of models whose steps
are short (softmax regression: the worst case) and longer; the ratio of the two in each turn.
Recorded are ids and learning rates alone, and with them each example's loss, its squared gradient,
or its gradient's products with those of 5 queries. Written to benchmarks/results/recording.json.
"""

import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_influence as ki

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import models  # noqa: E402
import runs  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SEED, BATCH_SIZE, NUM_QUERIES = 0, 64, 5
SHAPE, CLASSES = (28, 28, 1), 10
RECORDS: dict[str, dict[str, Any]] = {
    "ids and rates": {},
    "and losses": {"losses": True},
    "and self-influence": {"self_influence": True},
    "and 5 queries": {"queries": True},
}

_MODELS = flags.DEFINE_list("models", ["softmax", "small_cnn", "mlp"], "What is trained.")
_STEPS = flags.DEFINE_integer("steps", 100, "Steps of an epoch.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 11, "Epochs of each kind.", lower_bound=1)


def softmax(shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    return keras.Sequential(
        [keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(num_classes)]
    )


def compiled(model: keras.Model) -> keras.Model:
    """On a CPU Keras compiles nothing by XLA unless it is told to: both are trained alike."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, jit_compile=False)
    return model


def measure(name: str, steps: int, turns: int) -> list[dict[str, Any]]:
    """A row for each kind of record."""
    random = np.random.default_rng(SEED)
    count = steps * BATCH_SIZE
    x = random.standard_normal((count, *SHAPE)).astype(np.float32)
    y = random.integers(0, CLASSES, count)
    plain = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE)
    identified = ki.data.with_ids(plain)
    make = {**models.MODELS, "softmax": softmax}[name]
    rows = []
    for kind, options in RECORDS.items():
        keras.utils.set_random_seed(SEED)
        if "queries" in options:
            options = {"queries": (x[:NUM_QUERIES], y[:NUM_QUERIES])}
        model = compiled(make(SHAPE, CLASSES))
        trainer = compiled(ki.trainers.InfluenceTrainer(make(SHAPE, CLASSES), **options))
        seconds = [[_epoch(model, plain), _epoch(trainer, identified)] for _ in range(turns + 1)][
            1:
        ]  # The first one traces.
        ratios = [recorded / alone for alone, recorded in seconds]
        milliseconds = [1000 * each[0] / steps for each in seconds]
        rows.append(
            {
                "model": name,
                "num_parameters": model.count_params(),
                "record": kind,
                "step_milliseconds": np.quantile(milliseconds, [0.25, 0.5, 0.75]).tolist(),
                "ratio": np.quantile(ratios, [0.25, 0.5, 0.75]).tolist(),
            }
        )
        print(rows[-1], flush=True)
    return rows


def _epoch(model: keras.Model, dataset: tf.data.Dataset) -> float:
    start = time.perf_counter()
    model.fit(dataset, verbose=0)
    return time.perf_counter() - start


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    rows = [row for name in _MODELS.value for row in measure(name, _STEPS.value, _TURNS.value)]
    result = {
        "rows": rows,
        "settings": {
            "seed": SEED,
            "batch_size": BATCH_SIZE,
            "steps": _STEPS.value,
            "turns": _TURNS.value,
            "matmul_gflops": runs.matmul_gflops(),
        },
        "versions": runs.versions(),
    }
    text = json.dumps(result, indent=1) + "\n"
    (RESULTS / "recording.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
