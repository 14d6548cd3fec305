"""The banks of retrainings that the figures of `linear_datamodeling_score` are made from.

    python benchmarks/banks.py --directory=DIRECTORY --data_dir=DIRECTORY

Each bank is a directory under --directory. A bank that is there goes on where it was left, so that
this can be stopped and started again, and by several processes at once.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

from problems import PROBLEMS

_DIRECTORY = flags.DEFINE_string("directory", "banks", "Where the banks go.")
_BANKS = flags.DEFINE_list("banks", list(PROBLEMS), "Which banks to make.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes that share the work.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    for name in _BANKS.value:
        problem = PROBLEMS[name](flags.FLAGS.data_dir)
        bank = problem.bank(pathlib.Path(_DIRECTORY.value) / name)
        bank.run(processes=_PROCESSES.value)
        logging.info("%s: %d runs, %.0f s of work", name, bank.num_done, bank.seconds())


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", None, "Directory of tensorflow_datasets.")
    app.run(main)
