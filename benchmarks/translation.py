"""Runs examples/translation.py at its defaults, keeps the results, and prints their tables.

    python benchmarks/translation.py --data=de-en.tsv.gz --work_dir=DIRECTORY
    python benchmarks/translation.py --data=de-en.tsv.gz --work_dir=DIRECTORY --runs=all

`permuted` is retrieval of wrong references over three seeds, `mixed` selection of training pairs
over two: on two cores at 250 GFLOP/s in matrix products each takes up to three hours. `all` scores
every pair of the file at rank 20, and a sample of them by forward mode. Results go to
benchmarks/results/translation-RUN-SEED.json. A run that was stopped goes on from what is in the
work directory; one whose result is there is not run again. `python benchmarks/tables.py` writes
the README's tables.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from absl import app, flags, logging

import translation_tables

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "translation.py"

# Seeds, and what differs from the example's defaults.
RUNS: dict[str, tuple[Sequence[int], dict[str, str | int]]] = {
    "permuted": ((0, 1, 2), {}),
    "mixed": ((0, 1), {"noise": "mixed"}),
    "all": ((0,), {"noise": "none", "ranks": 20, "scored": "all", "forward_mode_pairs": 128}),
}

_RUNS = flags.DEFINE_list("runs", ["permuted", "mixed"], f"What to run, out of {', '.join(RUNS)}.")
_DATA = flags.DEFINE_string("data", None, "TSV of German-English pairs.", required=True)
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Where runs keep their stages.", required=True)
flags.register_validator(
    _RUNS,
    lambda names: bool(names) and set(names) <= set(RUNS),
    f"must be out of {', '.join(RUNS)}",
)


def run(name: str, seed: int, data: str, work: pathlib.Path, result: pathlib.Path) -> None:
    """Runs the example once, or what is left of it, and copies its results to `result`."""
    settings = {**RUNS[name][1], "seed": seed, "data": data, "output_dir": work}
    arguments = [f"--{flag}={value}" for flag, value in settings.items()]
    subprocess.run([sys.executable, str(EXAMPLE), *arguments], check=True)
    found = json.loads((work / "results.json").read_text(encoding="utf-8"))
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    for name in _RUNS.value:
        for seed in RUNS[name][0]:
            result = translation_tables.RESULTS / f"translation-{name}-{seed}.json"
            if result.exists():
                logging.info("%s is there already", result)
                continue
            work = pathlib.Path(_WORK_DIR.value, f"{name}-{seed}")
            run(name, seed, _DATA.value, work, result)
            logging.info("Wrote %s", result)
        print(translation_tables.TABLES[name]())


if __name__ == "__main__":
    app.run(main)
