"""Which method predicts retraining? The linear datamodeling score of each, and what it costs.

    python examples/linear_datamodeling.py
    python examples/linear_datamodeling.py --problem=mnist-one --data_dir=DIRECTORY --bank=DIRECTORY

Trains the problem's recipe on random halves of its training set, and asks each method to predict
from one model, trained on the whole, how the halves' losses on each query are ordered. --bank names
a directory of these retrainings, which are done once, and go on where they were left. Datamodels,
which are made of retrainings, learn from the first half of the subsets and are held against the
rest. The results are in results.json of the output directory.
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


# Subsets that a datamodel's cross-validation needs, and as many to hold it against.
_DATAMODELS = 20


class Trained(NamedTuple):
    """What a method is made from.

    Attributes:
        model: trained on the whole training set.
        l2: of its objective.
        curvature: of its inverses.
        run: directory of the run's checkpoints; None where it has none.
        measurement: what is explained of each query.
    """

    model: keras.Model
    l2: float
    curvature: str
    run: pathlib.Path | None
    measurement: str = "loss"

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of every method."""
        return {"measurement": self.measurement, "verbose": 0}

    @property
    def own_damping(self) -> dict[str, Any]:
        """Of approximations that know the curvature of each layer, and damp it by itself."""
        return {**self.common, "l2": self.l2}

    @property
    def inverse(self) -> dict[str, Any]:
        """Arguments of every inverse: an optimum needs no damping, an early stop does."""
        damping = {"damping": 0.0} if self.run is None else {"run": str(self.run)}
        return {**self.own_damping, "curvature": self.curvature, **damping}


def _rank(trained: Trained, rank: int) -> int:
    return min(rank, trained.model.count_params())


def _is_small(trained: Trained) -> bool:
    return trained.model.count_params() <= 20_000


# A method is a row here: its name, and how it is made. None where the problem has no such method.
METHODS: dict[str, Callable[[Trained], Any]] = {
    "GradientDot": lambda t: ki.GradientDot(t.model, **t.common),
    "GradientDot, cosine": lambda t: ki.GradientDot(t.model, similarity="cosine", **t.common),
    "RandomProjection": lambda t: ki.RandomProjection(t.model, rank=_rank(t, 100), **t.common),
    "TracIn": lambda t: t.run and ki.TracIn(t.model, str(t.run), **t.common),
    "DiagonalFisher": lambda t: ki.DiagonalFisher(t.model, **t.own_damping),
    "KFAC": lambda t: ki.KFAC(t.model, **t.own_damping),
    "EKFAC": lambda t: ki.EKFAC(t.model, **t.own_damping),
    "Arnoldi, as published": lambda t: ki.Arnoldi(
        t.model, rank=_rank(t, 100), complement=None, **t.inverse
    ),
    "Arnoldi, rank 10": lambda t: ki.Arnoldi(t.model, rank=_rank(t, 10), **t.inverse),
    "Arnoldi, rank 100": lambda t: ki.Arnoldi(t.model, rank=_rank(t, 100), **t.inverse),
    "LiSSA": lambda t: ki.LiSSA(t.model, 400, **t.inverse) if _is_small(t) else None,
    "ConjugateGradient": lambda t: ki.ConjugateGradient(t.model, **t.inverse),
    "ExactInfluence": lambda t: ki.ExactInfluence(t.model, **t.inverse) if _is_small(t) else None,
    "ExactInfluence, leverage": lambda t: (
        ki.ExactInfluence(t.model, leverage=True, **t.inverse) if _is_small(t) else None
    ),
}


def train(problem: problems.Problem, directory: pathlib.Path, measurement: str = "loss") -> Trained:
    """Trains the model that is to be explained, and records the run where there is one."""
    run, recorders = None, []
    if problem.fit is not None:
        run, recorders = directory, [ki.callbacks.TracInCheckpoint(str(directory))]
    model = problem.trained(recorders)
    return Trained(model, problem.l2, problem.curvature, run, measurement)


def evaluate(
    method: Any, problem: problems.Problem, masks: np.ndarray, losses: np.ndarray
) -> dict[str, Any]:
    """Score, intervals and seconds of one method.

    Args:
        method: not fitted.
        problem: its data.
        masks, losses: of the bank's subsets; of a margin, as of `RetrainingBank.losses`, more is
            worse, so that they are minus what the method explains.
    """
    start = time.perf_counter()
    method.fit(problem.train)
    scores = method.scores(problem.queries, problem.train)
    if method.measurement != "loss":
        scores = -scores
    return _row(scores, masks, losses, time.perf_counter() - start)


def evaluate_datamodels(masks: np.ndarray, losses: np.ndarray) -> dict[str, Any] | None:
    """The same of datamodels: learned from the first half of the subsets, held against the rest.

    None where they learned nothing of any query.
    """
    start = time.perf_counter()
    half = len(masks) // 2
    datamodels = ki.Datamodels().fit(masks[:half], losses[:half])
    seconds = time.perf_counter() - start
    if not datamodels.weights.any():
        return None
    return _row(datamodels.scores(), masks[half:], losses[half:], seconds)


def _row(
    scores: np.ndarray, masks: np.ndarray, losses: np.ndarray, seconds: float
) -> dict[str, Any]:
    found = ki.evaluation.linear_datamodeling_score(scores, masks, losses)
    return {
        "lds": found.mean,
        "query_interval": found.query_interval,
        "subset_interval": found.subset_interval,
        "constant_outputs": found.constant_outputs,
        "seconds": seconds,
    }


def show(name: str, row: dict[str, Any]) -> None:
    """Prints a line of the table."""
    intervals = [
        "{:7.3f} to {:5.3f}".format(*row[f"{side}_interval"]) for side in ("query", "subset")
    ]
    print(f"{name:24} {row['lds']:6.3f}  {'  '.join(intervals)}  {row['seconds']:7.1f}")
    sys.stdout.flush()


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
    trained = train(problem, output / "checkpoints", _MEASUREMENT.value)
    print(f"{'method':24} {'LDS':>6}  {'over queries':>16}  {'over subsets':>16}  {'seconds':>7}")
    rows = {}
    for name, make_method in METHODS.items():
        method = make_method(trained)
        if method is None:
            continue
        logging.info("%s", name)
        rows[name] = evaluate(method, problem, bank.masks, losses)
        show(name, rows[name])
    learned = evaluate_datamodels(bank.masks, losses) if len(bank.masks) >= _DATAMODELS else None
    if learned is not None:
        name = f"Datamodels, {len(bank.masks) // 2} runs"
        rows[name] = learned
        show(name, learned)
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
