"""How many retrainings a datamodel needs to predict better than any method from one model.

    python benchmarks/datamodels.py --bank=DIRECTORY

Softmax regression on 200 of scikit-learn's digits, l2 1e-4, trained to the optimum on 1,200 random
halves. Datamodels learn from the first of these, up to 1,000; they and the methods of
examples/linear_datamodeling.py are compared on the 200 that are left. Writes
benchmarks/results/datamodels.json and docs/datamodels.png. --bank names a directory that keeps the
retrainings, which go on where they were left.
"""

import json
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import app
from matplotlib import figure

import keras_influence as ki

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import linear_datamodeling  # noqa: E402
import problems  # noqa: E402
import retraining_flags  # noqa: E402
import runs  # noqa: E402

_NUM_TRAIN, _L2, _HELD_OUT = 200, 1e-4, 200
# Of the examples' methods, those that the figure has room for.
_METHODS = (
    "GradientDot",
    "Arnoldi, rank 10",
    "Arnoldi, rank 100",
    "ConjugateGradient",
    "ExactInfluence",
)
_RUNS = (50, 100, 200, 300, 500, 700, 1000)


def draw(result: dict, path: pathlib.Path) -> None:
    """LDS against the number of retrainings, and the methods that need none as lines across."""
    drawing = figure.Figure(figsize=(6, 4), layout="constrained")
    axes = drawing.subplots()
    rows = result["datamodels"]
    numbers, values = ([row[key] for row in rows] for key in ("runs", "lds"))
    axes.plot(numbers, values, "o-", label="Datamodels")
    ends = [[row["query_interval"][side] for row in rows] for side in (0, 1)]
    axes.fill_between(numbers, *ends, alpha=0.2)
    for number, (name, row) in enumerate(result["methods"].items(), 1):
        axes.axhline(row["lds"], linestyle="--", linewidth=1, color=f"C{number}", label=name)
    axes.set_xscale("log")
    axes.set_xticks(numbers, [str(number) for number in numbers], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("retrainings on half of the training set")
    axes.set_ylabel("linear datamodeling score, held out")
    axes.legend(fontsize="small")
    drawing.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    if not retraining_flags.BANK.value:
        raise app.UsageError("Name a directory for the retrainings: --bank=DIRECTORY.")
    problem = problems.digits(_L2, max(_RUNS) + _HELD_OUT, _NUM_TRAIN)
    problem = problem._replace(train_fn=problems.NewtonSoftmaxRegression(_L2))
    bank = problem.bank(retraining_flags.BANK.value).run()
    losses = bank.losses("loss")
    held_out = bank.masks[-_HELD_OUT:], losses[-_HELD_OUT:]
    trained = linear_datamodeling.train(problem, pathlib.Path("unused"))
    rows = {}
    for name in _METHODS:
        method = linear_datamodeling.METHODS[name](trained)
        rows[name] = linear_datamodeling.evaluate(method, problem, *held_out)
        print(name, rows[name], flush=True)
    learned = []
    for number in _RUNS:
        start = time.perf_counter()
        datamodels = ki.Datamodels().fit(bank.masks[:number], losses[:number])
        seconds = time.perf_counter() - start
        found = ki.evaluation.linear_datamodeling_score(datamodels.scores(), *held_out)
        learned.append(
            {
                "runs": number,
                "lds": found.mean,
                "query_interval": found.query_interval,
                "subset_interval": found.subset_interval,
                "seconds": seconds,
            }
        )
        print(learned[-1], flush=True)
    result = {
        "methods": rows,
        "datamodels": learned,
        "retraining_seconds": bank.seconds(),
        "settings": {"num_train": _NUM_TRAIN, "l2": _L2, "held_out": _HELD_OUT},
        "versions": runs.versions(),
    }
    path = ROOT / "benchmarks" / "results" / "datamodels.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, ROOT / "docs" / "datamodels.png")


if __name__ == "__main__":
    app.run(main)
