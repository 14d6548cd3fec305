"""Which method predicts retraining? The linear datamodeling score of each, and what it costs.

    python examples/linear_datamodeling.py
    python examples/linear_datamodeling.py --problem=mnist-one --data_dir=DIRECTORY --bank=DIRECTORY

Trains the problem's recipe on random halves of its training set, and asks each method to predict
from one model, trained on the whole, how the halves' losses on each query are ordered. --bank names
a directory of these retrainings, which are done once, and go on where they were left. The results
are in results.json of the output directory.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from absl import app, flags, logging

import common_flags
import keras_influence as ki
import problems
import retraining_flags
import runs

_PROBLEM = flags.DEFINE_enum("problem", "digits-1e-2", list(problems.PROBLEMS), "What to train.")
_MEASUREMENT = flags.DEFINE_enum(
    "measurement", "loss", ["loss", "margin"], "What is predicted of each query."
)
_SUBSETS = flags.DEFINE_integer("subsets", 0, "Subsets to compare on; 0 for all.", lower_bound=0)


class Trained(NamedTuple):
    """What a method is made from.

    Attributes:
        model: trained on the whole training set.
        l2: of its objective.
        run: directory of the run's checkpoints; None where it has none.
    """

    model: keras.Model
    l2: float
    run: pathlib.Path | None

    @property
    def inverse(self) -> dict[str, Any]:
        """Arguments of every inverse: an optimum needs no damping, an early stop does."""
        options = {"l2": self.l2, "verbose": 0}
        return options | ({"damping": 0.0} if self.run is None else {"run": str(self.run)})


def _rank(trained: Trained, rank: int) -> int:
    return min(rank, trained.model.count_params())


# A method is a row here: its name, and how it is made. None where the problem has no such method.
METHODS: dict[str, Callable[[Trained], Any]] = {
    "GradientDot": lambda t: ki.GradientDot(t.model, verbose=0),
    "TracIn": lambda t: t.run and ki.TracIn(t.model, str(t.run), verbose=0),
    "Arnoldi, rank 10": lambda t: ki.Arnoldi(t.model, rank=_rank(t, 10), **t.inverse),
    "Arnoldi, rank 100": lambda t: ki.Arnoldi(t.model, rank=_rank(t, 100), **t.inverse),
    "ConjugateGradient": lambda t: ki.ConjugateGradient(t.model, **t.inverse),
    "ExactInfluence": lambda t: (
        ki.ExactInfluence(t.model, **t.inverse) if t.model.count_params() <= 20_000 else None
    ),
}


def train(problem: problems.Problem, directory: pathlib.Path) -> Trained:
    """Trains the model that is to be explained, and records the run where there is one."""
    if problem.fit is None:
        return Trained(problem.trained(), problem.l2, None)
    recorder = ki.callbacks.TracInCheckpoint(str(directory))
    return Trained(problem.trained([recorder]), problem.l2, directory)


def evaluate(
    method: Any, problem: problems.Problem, masks: np.ndarray, losses: np.ndarray
) -> dict[str, Any]:
    """Score, intervals and seconds of one method."""
    start = time.perf_counter()
    method.fit(problem.train)
    scores = method.scores(problem.queries, problem.train)
    seconds = time.perf_counter() - start
    found = ki.evaluation.linear_datamodeling_score(scores, masks, losses)
    return {
        "lds": found.mean,
        "query_interval": found.query_interval,
        "subset_interval": found.subset_interval,
        "constant_outputs": found.constant_outputs,
        "seconds": seconds,
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    problem = problems.PROBLEMS[_PROBLEM.value](common_flags.DATA_DIR.value)
    if _SUBSETS.value:
        problem = problem._replace(masks=problem.masks[: _SUBSETS.value])
    output = runs.new_directory(
        common_flags.OUTPUT_DIR.value,
        "linear_datamodeling",
        f"{_PROBLEM.value}-{_MEASUREMENT.value}",
    )
    bank = problem.bank(retraining_flags.BANK.value or output / "bank").run(
        processes=retraining_flags.PROCESSES.value
    )
    losses = bank.losses(_MEASUREMENT.value)
    trained = train(problem, output / "checkpoints")
    print(f"{'method':20} {'LDS':>6}  {'over queries':>16}  {'over subsets':>16}  {'seconds':>7}")
    rows = {}
    for name, make_method in METHODS.items():
        method = make_method(trained)
        if method is None:
            continue
        logging.info("%s", name)
        rows[name] = row = evaluate(method, problem, bank.masks, losses)
        intervals = [
            "{:7.3f} to {:5.3f}".format(*row[f"{side}_interval"]) for side in ("query", "subset")
        ]
        print(f"{name:20} {row['lds']:6.3f}  {'  '.join(intervals)}  {row['seconds']:7.1f}")
        sys.stdout.flush()
    runs.write_json(
        output / "results.json",
        {
            "problem": _PROBLEM.value,
            "measurement": _MEASUREMENT.value,
            "num_subsets": len(bank.masks),
            "repeats": bank.repeats,
            "retraining_seconds": bank.seconds(),
            "num_queries": len(problem.queries[1]),
            "num_train": len(problem.train[1]),
            "num_parameters": trained.model.count_params(),
            "methods": rows,
            "versions": runs.versions(),
        },
    )


if __name__ == "__main__":
    app.run(main)
