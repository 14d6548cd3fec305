"""Runs examples/translation.py at its defaults, keeps the results, and prints their tables.

    python benchmarks/translation.py --data=de-en.tsv.gz --work_dir=DIRECTORY --at_once=2
    python benchmarks/translation.py --data=de-en.tsv.gz --work_dir=DIRECTORY --runs=all

`permuted` is retrieval of wrong references over three seeds, `mixed` selection of training pairs
over two: on two cores at 250 GFLOP/s in matrix products each takes up to three hours. Two runs at a
time, each on a core of its own, take less than one after the other. `all` scores every pair of the
file at rank 20, and a sample of them by forward mode. Results go to
benchmarks/results/translation-RUN-SEED.json. A run that was stopped goes on from what is in the
work directory; one whose result is there is not run again. `python benchmarks/tables.py` writes
the README's tables.
"""

import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Sequence

from absl import app, flags, logging

import translation_tables
from result_files import RESULTS

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
_AT_ONCE = flags.DEFINE_integer(
    "at_once", 1, "Runs that go on at a time, each on its share of the processors.", lower_bound=1
)
flags.register_validator(
    _RUNS,
    lambda names: bool(names) and set(names) <= set(RUNS),
    f"must be out of {', '.join(RUNS)}",
)


def run(name: str, seed: int, data: str, work: pathlib.Path) -> None:
    """Runs the example once, or what is left of it, and copies its results to `RESULTS`."""
    result = RESULTS / f"translation-{name}-{seed}.json"
    if result.exists():
        logging.info("%s is there already", result)
        return
    settings = {**RUNS[name][1], "seed": seed, "data": data, "output_dir": work / f"{name}-{seed}"}
    arguments = [f"--{flag}={value}" for flag, value in settings.items()]
    subprocess.run([sys.executable, str(EXAMPLE), *arguments], check=True)
    found = json.loads((settings["output_dir"] / "results.json").read_text(encoding="utf-8"))
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    logging.info("Wrote %s", result)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    processors = sorted(os.sched_getaffinity(0))
    if _AT_ONCE.value > len(processors):
        raise app.UsageError(f"There are {len(processors)} processors for {_AT_ONCE.value} runs.")
    shares: queue.Queue[set[int]] = queue.Queue()
    for number in range(_AT_ONCE.value):
        shares.put(set(processors[number :: _AT_ONCE.value]))

    def keep_to_a_share() -> None:
        # Of this thread, and so of the processes that it starts.
        os.sched_setaffinity(0, shares.get())

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE.value, "run", keep_to_a_share) as pool:
        work = pathlib.Path(_WORK_DIR.value)
        jobs = [
            pool.submit(run, name, seed, _DATA.value, work)
            for name in _RUNS.value
            for seed in RUNS[name][0]
        ]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
    for name in _RUNS.value:
        print(translation_tables.TABLES[name]())


if __name__ == "__main__":
    app.run(main)
