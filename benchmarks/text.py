"""Runs an example on text at the settings of the README's tables, and keeps the results.

    python benchmarks/text.py --table=qnli --data=qnli.tsv.gz --weights=DIRECTORY --run=DIRECTORY
    python benchmarks/text.py --table=wikitext2 --data=wiki.valid.tokens,wiki.test.tokens \
        --run=DIRECTORY

`qnli` is examples/text_classification.py on QNLI's pairs with a MiniLM of 6 layers, 384 wide (the
example says of what form); `wikitext2` is examples/language_model.py on text, by several methods. A
run that was killed goes on in the directory of --run. Writes
benchmarks/results/text-TABLE-SEED.json.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from result_files import RESULTS

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"

QNLI: dict[str, int | float | str] = {
    "corruption": 0.1,
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "lengths": "56,96",
    "num_last_layers": 2,
    "rank": "10",
    "checkpoints": "1",
    "num_iterations": 20,
    "num_hessian_examples": 256,
    "score_batch_size": 16,
    "methods": "arnoldi,gradient_dot,random_projection,tracin",
    "num_queries": 4,
    "k": 3,
    "folds": 5,
    "processes": 2,
}
# Otherwise at the example's defaults.
WIKITEXT2: dict[str, int | float | str] = {"num_queries": 20, "k": 5}
WIKITEXT2_METHODS = (
    {"method": "ekfac"},
    {"method": "arnoldi", "complement": "rayleigh"},
    {"method": "tracin"},
    {"method": "gradient_dot"},
    {"method": "arnoldi", "complement": "none"},
)

_TABLE = flags.DEFINE_enum("table", None, ["qnli", "wikitext2"], "What to run.", required=True)
_DATA = flags.DEFINE_string("data", None, "QNLI's pairs, or files of text.", required=True)
_WEIGHTS = flags.DEFINE_string("weights", None, "The MiniLM, for `qnli`.")
_RUN = flags.DEFINE_string("run", None, "Where the run is kept.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Of the split, the turned labels and the run.")


def run(example: str, settings: dict[str, Any], places: dict[str, str]) -> None:
    flagged = {**settings, "seed": _SEED.value, **places}
    arguments = [f"--{flag}={value}" for flag, value in flagged.items()]
    subprocess.run([sys.executable, str(EXAMPLES / example), *arguments], check=True)


def read(file: pathlib.Path, places: dict[str, str]) -> dict[str, Any]:
    result = json.loads(file.read_text(encoding="utf-8"))
    # The places of this run are no part of the result.
    result["settings"].update(dict.fromkeys(places, ""))
    return result


def qnli(places: dict[str, str]) -> dict[str, Any]:
    if _WEIGHTS.value is None:
        raise app.UsageError("--table=qnli needs --weights, the MiniLM's directory.")
    places["weights"] = _WEIGHTS.value
    run("text_classification.py", QNLI, places)
    return read(pathlib.Path(_RUN.value, "results.json"), places)


def wikitext2(places: dict[str, str]) -> dict[str, Any]:
    """The results of each method, which share a training."""
    results = []
    for chosen in WIKITEXT2_METHODS:
        run("language_model.py", {**WIKITEXT2, **chosen}, places)
        # The directory may hold the answers to other questions, too; this one's are the newest.
        files = pathlib.Path(_RUN.value).glob("*/results.json")
        results.append(read(max(files, key=lambda file: file.stat().st_mtime_ns), places))
        results[-1]["queries"] = [without_texts(query) for query in results[-1]["queries"]]
    return {"methods": results}


def without_texts(query: dict[str, Any]) -> dict[str, Any]:
    """The numbers and sources of a query and its passages, whose words are the corpus's."""
    kept = {key: query[key] for key in ("source", "log_likelihood")}
    for kind in ("proponents", "opponents"):
        kept[kind] = [{key: each[key] for key in ("id", "source", "score")} for each in query[kind]]
    return kept


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    places = {"data": _DATA.value, "output_dir": _RUN.value}
    result = {"qnli": qnli, "wikitext2": wikitext2}[_TABLE.value](places)
    file = RESULTS / f"text-{_TABLE.value}-{_SEED.value}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    app.run(main)
