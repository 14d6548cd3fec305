"""Runs examples/find_mislabeled.py at the settings of the README's table, and keeps the results.

    python benchmarks/mislabeled.py --data_dir=DIRECTORY

Each data set and model with each seed is a run of its own, written to
benchmarks/results/mislabeled-DATASET-MODEL-SEED.json with the settings, versions, accuracy and
matrix-product rate of the machine. Those that are there already are not run again, so that the
benchmark can be stopped and continued. `python benchmarks/tables.py` writes the README's tables.
"""

import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from absl import app, flags, logging

RESULTS = pathlib.Path(__file__).parent / "results"
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "find_mislabeled.py"

# One setting for all but the digits: nothing is tuned on the figures that the table reports.
# Arnoldi's Hessian is that of some of the examples: a product costs 8 network passes of each.
# LiSSA solves a system for each example, and scores a random sample.
COMMON = {
    "num_train": 10_000,
    "corruption": 0.1,
    "epochs": 10,
    "batch_size": 64,
    "rank": "10,100",
    "checkpoints": "1,10",
    "score_batch_size": 500,
}
LARGE = {
    **COMMON,
    "model": "large_cnn",
    "learning_rate": 0.01,
    "methods": "arnoldi,random_projection,tracin,gradient_dot,lissa",
    "num_hessian_examples": 1_000,
    "lissa_examples": 200,
    "lissa_depth": 50,
}
SMALL = {
    **COMMON,
    "model": "small_cnn",
    "learning_rate": 0.05,
    "methods": "arnoldi,random_projection,tracin,gradient_dot",
    "num_hessian_examples": 2_000,
}
SETTINGS: dict[str, dict[str, int | float | str]] = {
    "mnist-large_cnn": {**LARGE, "dataset": "mnist"},
    "fashion_mnist-large_cnn": {**LARGE, "dataset": "fashion_mnist"},
    "mnist-small_cnn": {**SMALL, "dataset": "mnist"},
    "fashion_mnist-small_cnn": {**SMALL, "dataset": "fashion_mnist"},
    # The example's own defaults.
    "digits-large_cnn": {},
}

_RUNS = flags.DEFINE_list("runs", list(SETTINGS), f"What to run, out of {', '.join(SETTINGS)}.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds to run.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of tensorflow_datasets.")


def run(name: str, seed: int, data_dir: str | None, result: pathlib.Path) -> None:
    """Runs the example once at the settings called `name`, and moves its results to `result`."""
    settings = {**SETTINGS[name], "seed": seed}
    if data_dir:
        settings["data_dir"] = data_dir
    with tempfile.TemporaryDirectory() as directory:
        output = pathlib.Path(directory) / "run"
        arguments = [f"--{flag}={value}" for flag, value in settings.items()]
        subprocess.run(
            [sys.executable, str(EXAMPLE), *arguments, f"--output_dir={output}"], check=True
        )
        text = (output / "results.json").read_text(encoding="utf-8")
    # The places of this run are no part of the result.
    for place in filter(None, (data_dir, str(output))):
        text = text.replace(place, "")
    result.parent.mkdir(exist_ok=True)
    result.write_text(text, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    for seed in _SEEDS.value:
        for name in _RUNS.value:
            result = RESULTS / f"mislabeled-{name}-{seed}.json"
            if result.exists():
                logging.info("%s is there already", result)
                continue
            run(name, int(seed), _DATA_DIR.value, result)
            logging.info("Wrote %s", result)


if __name__ == "__main__":
    app.run(main)
