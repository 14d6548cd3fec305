"""Runs examples/text_classification.py at the settings of the README's table, and keeps the result.

    python benchmarks/text.py --data=qnli.tsv.gz --weights=DIRECTORY --run=DIRECTORY

QNLI's pairs and a MiniLM of 6 layers, 384 wide (the example says of what form). A run that was
killed goes on in the directory of --run. Writes benchmarks/results/text-qnli-SEED.json.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from absl import app, flags

RESULTS = pathlib.Path(__file__).parent / "results"
EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "text_classification.py"

SETTINGS: dict[str, int | float | str] = {
    "corruption": 0.1,
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "lengths": "56,96",
    "num_last_layers": 2,
    "rank": "10",
    "checkpoints": "1,3",
    "num_iterations": 20,
    "num_hessian_examples": 256,
    "score_batch_size": 16,
    "methods": "arnoldi,gradient_dot,random_projection,tracin",
    "num_queries": 4,
    "k": 3,
}

_DATA = flags.DEFINE_string("data", None, "QNLI's pairs.", required=True)
_WEIGHTS = flags.DEFINE_string("weights", None, "The MiniLM.", required=True)
_RUN = flags.DEFINE_string("run", None, "Where the run is kept.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Of the split, the turned labels and the run.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    places = {"data": _DATA.value, "weights": _WEIGHTS.value, "output_dir": _RUN.value}
    settings = {**SETTINGS, "seed": _SEED.value, **places}
    arguments = [f"--{flag}={value}" for flag, value in settings.items()]
    subprocess.run([sys.executable, str(EXAMPLE), *arguments], check=True)
    result = json.loads(pathlib.Path(_RUN.value, "results.json").read_text(encoding="utf-8"))
    # The places of this run are no part of the result.
    result["settings"].update(dict.fromkeys(places, ""))
    file = RESULTS / f"text-qnli-{_SEED.value}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    app.run(main)
