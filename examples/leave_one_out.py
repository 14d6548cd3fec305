"""Do predicted changes of the loss come true? One example removed at a time, and retrained.

    python examples/leave_one_out.py

Figure 2 of Koh and Liang ("Understanding black-box predictions via influence functions", 2017) for
softmax regression on scikit-learn's digits, trained to the optimum by L-BFGS: the query is the test
digit of the largest loss; of the training digits with the largest predicted effect, each is removed
by itself, and the predicted change of the query's loss is held against the actual one. Draws
scatter.png, and writes results.json.
"""

import pathlib
from collections.abc import Sequence

import keras
import numpy as np
from absl import app, flags
from matplotlib import figure

import common_flags
import keras_influence as ki
import problems
import retraining_flags
import runs

_L2 = flags.DEFINE_float("l2", 1e-2, "Penalty (l2/2) |parameters|^2 of the objective.")
_NUM_REMOVED = flags.DEFINE_integer("num_removed", 100, "Examples to remove.", lower_bound=2)


def hardest_query(problem: problems.Problem, model: keras.Model) -> problems.Problem:
    """The problem with one query, that of the largest loss."""
    x, y = problem.queries
    losses = np.asarray(ki.gradients.LossMaps(model).losses((x, y)))
    worst = [int(losses.argmax())]
    return problem._replace(queries=(x[worst], y[worst]))


def draw(predicted: np.ndarray, actual: np.ndarray, r: float, path: pathlib.Path) -> None:
    """Predicted against actual changes, with the line where they are equal."""
    drawing = figure.Figure(figsize=(4, 4), layout="constrained")
    axes = drawing.subplots()
    ends = [min(predicted.min(), actual.min()), max(predicted.max(), actual.max())]
    axes.plot(ends, ends, color="gray", linewidth=1)
    axes.plot(actual, predicted, ".")
    axes.set_xlabel("actual change of the loss")
    axes.set_ylabel("predicted change of the loss")
    axes.set_title(f"r = {r:.3f}")
    drawing.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    output = runs.new_directory(
        common_flags.OUTPUT_DIR.value, "leave_one_out", f"digits-{_L2.value}"
    )
    problem = problems.digits(_L2.value)
    model = problem.trained()
    problem = hardest_query(problem, model)
    exact = ki.ExactInfluence(model, l2=_L2.value, damping=0.0, verbose=0).fit(problem.train)
    scores = exact.scores(problem.queries, problem.train)
    chosen = np.argsort(-np.abs(scores[0]))[: _NUM_REMOVED.value]
    problem = problem._replace(masks=ki.trainers.leave_one_out(scores.shape[1], chosen))
    bank = problem.bank(retraining_flags.BANK.value or output / "bank").run(
        processes=retraining_flags.PROCESSES.value
    )
    found = ki.evaluation.leave_one_out(scores[:, chosen], bank.losses("loss"))
    r, slope = float(found.pearson[0]), float(found.slope[0])
    draw(scores[0, chosen], found.actual[:, 0], r, output / "scatter.png")
    runs.write_json(
        output / "results.json",
        {
            "l2": _L2.value,
            "num_removed": len(chosen),
            "pearson": r,
            "spearman": float(found.spearman[0]),
            "slope": slope,
            "retraining_seconds": bank.seconds(),
            "versions": runs.versions(),
        },
    )
    print(f"r = {r:.4f} over {len(chosen)} removals; actual = {slope:.3f} predicted. See {output}")


if __name__ == "__main__":
    app.run(main)
