"""Do predicted changes of the loss come true? One example removed at a time, and retrained.

    python examples/leave_one_out.py
    python examples/leave_one_out.py --architecture=small_cnn

Figure 2 of Koh and Liang ("Understanding black-box predictions via influence functions", 2017) on
scikit-learn's digits. The query is the test digit of the largest loss; of the training digits with
the largest predicted effect, each is removed by itself, and the predicted change of the query's
loss is held against the actual one. Softmax regression is trained to its optimum by L-BFGS, with
every example and without each. The small CNN of tanh units has many minima, so that it is trained
to one, and goes on from there, as theirs does: by 200 steps of the whole set without each example,
whose effect influences with a damping of 1 / (sum of the steps' rates) predict. The same steps with
nothing removed say what going on does by itself. Draws scatter.png, and writes results.json. --bank
names a directory of the retrainings, which go on where they were left.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from absl import app, flags
from matplotlib import axes as matplotlib_axes
from matplotlib import figure

import common_flags
import keras_influence as ki
import problems
import retraining_flags
import runs
from keras_influence.methods import InverseMethod

# By default, l2 of the objective.
L2 = {"softmax": 1e-2, "small_cnn": 1e-2}

_ARCHITECTURE = flags.DEFINE_enum("architecture", "softmax", list(L2), "What is trained.")
_L2 = flags.DEFINE_float(
    "l2", None, "Penalty (l2/2) |parameters|^2 of the objective; by default that of the model."
)
_NUM_REMOVED = flags.DEFINE_integer("num_removed", 100, "Examples to remove.", lower_bound=2)


class Removals(NamedTuple):
    """Predicted and actual changes of the query's loss, and what they are worth.

    Attributes:
        predicted, actual: of each removal, by falling |predicted|.
        summary: numbers, for results.json.
    """

    predicted: np.ndarray
    actual: np.ndarray
    summary: dict[str, Any]


def hardest_query(problem: problems.Problem, losses: np.ndarray) -> problems.Problem:
    """The problem with one query, that of the largest loss."""
    x, y = problem.queries
    worst = [int(losses.argmax())]
    return problem._replace(queries=(x[worst], y[worst]))


def explained(
    name: str, l2: float, bank: pathlib.Path
) -> tuple[problems.Problem, keras.Model, InverseMethod]:
    """What is trained, the model that is to be explained, and an inverse, not fitted."""
    options: dict[str, Any] = {"l2": l2, "verbose": 0}
    if name == "softmax":
        problem = problems.digits(l2)
        model = problem.trained()
        return problem, model, ki.ExactInfluence(model, damping=0.0, **options)
    problem = problems.digits_cnn(l2, bank.with_name(f"{bank.name}-start.npz"))
    continued = problem.make_model
    assert isinstance(continued, problems.Continued)
    model = continued()
    # Thousands of parameters and one query: its system is sooner solved than all are inverted.
    method = ki.ConjugateGradient(model, 1e-4, 1000, damping=continued.damping, **options)
    return problem, model, method


def compare(
    name: str, l2: float, num_removed: int, bank: pathlib.Path, processes: int = 1
) -> Removals:
    """Removes those of the largest predicted effect, one at a time.

    Args:
        name: a key of `L2`.
        l2: of the objective.
        num_removed: examples, at most all.
        bank: directory of the retrainings; what they start from is kept beside it.
        processes: that retrain.
    """
    problem, model, method = explained(name, l2, bank)
    before = np.asarray(ki.gradients.LossMaps(model).losses(problem.queries))
    problem = hardest_query(problem, before)
    scores = method.fit(problem.train).scores(problem.queries, problem.train)
    chosen = np.argsort(-np.abs(scores[0]), kind="stable")[:num_removed]
    problem = problem._replace(masks=ki.trainers.leave_one_out(scores.shape[1], chosen))
    done = problem.bank(bank).run(processes=processes)
    losses = done.losses("loss")
    found = ki.evaluation.leave_one_out(scores[:, chosen], losses)
    return Removals(
        scores[0, chosen],
        found.actual[:, 0],
        {
            "model": name,
            "num_parameters": model.count_params(),
            "num_train": scores.shape[1],
            "l2": l2,
            "damping": method.used_damping,
            "num_removed": len(chosen),
            "query_loss": float(before.max()),
            "control": float(losses[0, 0] - before.max()),
            "largest_change": float(np.abs(found.actual).max()),
            "pearson": float(found.pearson[0]),
            "spearman": float(found.spearman[0]),
            "slope": float(found.slope[0]),
            "retraining_seconds": done.seconds(),
        },
    )


def scatter(axes: matplotlib_axes.Axes, found: Removals) -> None:
    """Predicted against actual changes, with the line where they are equal."""
    both = np.concatenate([found.predicted, found.actual])
    ends = [both.min(), both.max()]
    axes.plot(ends, ends, color="gray", linewidth=1)
    axes.plot(found.actual, found.predicted, ".")
    axes.set_xlabel("actual change of the loss")
    axes.set_ylabel("predicted change of the loss")
    axes.set_title(f"{found.summary['model']}: r = {found.summary['pearson']:.3f}")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    output = runs.new_directory(common_flags.OUTPUT_DIR.value, "leave_one_out", _ARCHITECTURE.value)
    bank = pathlib.Path(retraining_flags.BANK.value or output / "bank")
    name = _ARCHITECTURE.value
    l2 = L2[name] if _L2.value is None else _L2.value
    found = compare(name, l2, _NUM_REMOVED.value, bank, retraining_flags.PROCESSES.value)
    drawing = figure.Figure(figsize=(4, 4), layout="constrained")
    scatter(drawing.subplots(), found)
    drawing.savefig(output / "scatter.png", dpi=120)
    runs.write_json(output / "results.json", {**found.summary, "versions": runs.versions()})
    print(
        f"r = {found.summary['pearson']:.4f} over {len(found.actual)} removals; actual = "
        f"{found.summary['slope']:.3f} predicted; changes up to "
        f"{found.summary['largest_change']:.2g}, {found.summary['control']:.1g} with nothing "
        f"removed. See {output}"
    )


if __name__ == "__main__":
    app.run(main)
