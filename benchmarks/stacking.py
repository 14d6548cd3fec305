"""How much sooner a bank of retrainings is done when its models train stacked.

    python benchmarks/stacking.py

Runs of the mlp on random halves of random images, one by one and stacked, in turns, in one process;
the ratio of the two in each turn, and the largest difference of a loss that the two banks hold.
Everything counts that a run is: making the models, training, measuring, writing. Written to
benchmarks/results/stacking.json.
"""

import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

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
_EXAMPLES = flags.DEFINE_integer("examples", 6144, "Images, of which each run sees half.")
_TURNS = flags.DEFINE_integer("turns", 3, "Banks of each kind.", lower_bound=1)


def measure(epochs: int, num_examples: int, turns: int) -> dict[str, Any]:
    """A row: seconds of both kinds, and what lies between their losses."""
    random = np.random.default_rng(SEED)
    x = random.standard_normal((num_examples, 28, 28, 1)).astype(np.float32)
    y = random.integers(0, 10, num_examples)

    def bank(directory: str, num_runs: int, stack: int | str) -> ki.trainers.RetrainingBank:
        return ki.trainers.RetrainingBank(
            directory,
            problems.fashion_model,
            (x, y),
            ki.trainers.random_subsets(num_examples, num_runs),
            fit={"epochs": epochs, "batch_size": BATCH_SIZE},
            stack=stack,
            verbose=0,
        )

    with tempfile.TemporaryDirectory() as directory:
        # As many as train at once by default.
        size = bank(directory, 100, "auto").record["stack"]

    def done(stack: int | str) -> tuple[float, np.ndarray]:
        with tempfile.TemporaryDirectory() as directory:
            made = bank(directory, size, stack)
            start = time.perf_counter()
            made.run()
            return time.perf_counter() - start, made.losses("loss", on="train")

    seconds, apart = [], 0.0
    for _ in range(turns):
        (alone, losses), (stacked, others) = done(1), done("auto")
        seconds.append((alone, stacked))
        apart = max(apart, float(np.abs(losses - others).max()))
        print(epochs, seconds[-1], apart, flush=True)
    return {
        "epochs": epochs,
        "runs": size,
        "num_train": num_examples // 2,
        "alone_seconds": float(np.median([each[0] for each in seconds])),
        "stacked_seconds": float(np.median([each[1] for each in seconds])),
        "ratio": np.quantile([a / b for a, b in seconds], [0, 0.5, 1]).tolist(),
        "largest_difference": apart,
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    result = {
        "rows": [measure(int(epochs), _EXAMPLES.value, _TURNS.value) for epochs in _EPOCHS.value],
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
