"""How much sooner a bank of retrainings is done when its models train stacked.

    python benchmarks/stacking.py --data_dir=DIRECTORY

Runs of the mlp on random halves of Fashion-MNIST, one by one and stacked, in turns, in one process:
the ratio of the two in each turn. Everything counts that a run is: making the models, training,
measuring, writing. And how far apart the losses are that the two banks hold: rounding decides on
which side of a relu's kink a unit comes to lie, from where two runs part; so the same is done in
float64. Written to benchmarks/results/stacking.json.
"""

import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from absl import app, flags

import keras_influence as ki

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import problems  # noqa: E402
import runs  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SEED, BATCH_SIZE = 0, 64

_EPOCHS = flags.DEFINE_list("epochs", ["1", "10"], "Epochs of each run.")
_TURNS = flags.DEFINE_integer("turns", 3, "Banks of each kind.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of tensorflow_datasets.")


def mlp() -> keras.Model:
    """That of the bank of Fashion-MNIST, with a loss of the model's precision."""
    model = problems.fashion_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(model.optimizer, loss)
    return model


def measure(problem: problems.Problem, epochs: int, turns: int) -> dict[str, Any]:
    """A row: seconds of both kinds, and what lies between their losses."""
    x, y = problem.train

    def done(stack: int | str, dtype: str = "float32") -> tuple[float, np.ndarray]:
        with tempfile.TemporaryDirectory() as directory:
            made = bank(directory, size, stack, dtype)
            start = time.perf_counter()
            made.run()
            return time.perf_counter() - start, made.losses("loss", on="train")

    def bank(
        directory: str, num_runs: int, stack: int | str, dtype: str = "float32"
    ) -> ki.trainers.RetrainingBank:
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        return ki.trainers.RetrainingBank(
            directory,
            mlp,
            (x.astype(dtype), y),
            ki.trainers.random_subsets(len(y), num_runs),
            fit={"epochs": epochs, "batch_size": BATCH_SIZE},
            stack=stack,
            verbose=0,
        )

    with tempfile.TemporaryDirectory() as directory:
        # As many as train at once by default.
        size = bank(directory, 100, "auto").record["stack"]
    seconds = []
    for _ in range(turns):
        (alone, losses), (stacked, others) = done(1), done("auto")
        seconds.append((alone, stacked))
        print(epochs, seconds[-1], flush=True)
    apart = np.abs(losses - others)
    # Losses are kept in float32: of float64, what its rounding leaves of the difference.
    (_, losses), (_, others) = done(1, "float64"), done(size, "float64")
    return {
        "epochs": epochs,
        "runs": size,
        "num_train": int(problem.masks[0].sum()),
        "alone_seconds": float(np.median([each[0] for each in seconds])),
        "stacked_seconds": float(np.median([each[1] for each in seconds])),
        "ratio": np.quantile([a / b for a, b in seconds], [0, 0.5, 1]).tolist(),
        "equal_runs": int(np.sum(apart.max(axis=1) <= 1e-5)),
        "median_difference": float(np.median(apart)),
        "largest_difference_float64": float(np.abs(losses - others).max()),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    problem = problems.PROBLEMS["fashion"](_DATA_DIR.value)
    result = {
        "rows": [measure(problem, int(epochs), _TURNS.value) for epochs in _EPOCHS.value],
        "settings": {
            "seed": SEED,
            "batch_size": BATCH_SIZE,
            "turns": _TURNS.value,
            "matmul_gflops": runs.matmul_gflops(),
        },
        "versions": runs.versions(),
    }
    text = json.dumps(result, indent=1) + "\n"
    (RESULTS / "stacking.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
