"""Every inverse of the curvature: its error, what it predicts of retraining, and what it costs.

    python benchmarks/inverses.py --banks=DIRECTORY --data_dir=DIRECTORY

The banks are those of benchmarks/banks.py; one that is not there is made, which takes its time.
Each setting is written to benchmarks/results/inverses-SETTING.json, with a row for each method,
rank and damping: the relative error of its scores against the reference (the exact inverse, or
conjugate gradients where the matrix is too large) at the same damping, the linear datamodeling
score against retraining with bootstrap intervals, seconds, and memory.
`python benchmarks/inverses.py --figure` draws docs/inverses.png from these files.
"""

import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging
from matplotlib import ticker

import keras_influence as ki
import projection
from keras_influence.methods.resident import MemoryWatch

# `projection` has put the examples where they are found.
import image_data  # isort: skip
import models  # isort: skip
import problems  # isort: skip
import runs  # isort: skip

RESULTS = pathlib.Path(__file__).parent / "results"
FIGURE = pathlib.Path(__file__).parents[1] / "docs" / "inverses.png"
SEED = 0


class Setting(NamedTuple):
    """What is measured on.

    Attributes:
        problem: data_dir -> the recipe and its data.
        has_bank: whether there is a bank of retrainings of this name.
        exact: whether the reference is the exact inverse, or conjugate gradients.
        measurements: "loss", "margin". Of others than the first, the methods of full rank alone.
        lissa_depth: 0 for no LiSSA.
        from_run: whether the damping is that of the run's record.
        tolerance: of conjugate gradients.
    """

    problem: Callable[[str | None], problems.Problem]
    has_bank: bool = True
    exact: bool = True
    measurements: tuple[str, ...] = ("loss",)
    lissa_depth: int = 0
    from_run: bool = True
    tolerance: float = 1e-3


def small_cnn_model() -> keras.Model:
    model = models.small_cnn((28, 28, 1), 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05), loss)
    return model


def small_cnn(data_dir: str | None) -> problems.Problem:
    """2,000 images of MNIST and 100 queries, 20 epochs."""
    data = image_data.load("mnist", data_dir, 2000)
    return problems.Problem(
        small_cnn_model,
        (data.train_images, data.train_labels),
        (data.test_images[:100], data.test_labels[:100]),
        ki.trainers.random_subsets(2000, 2),
        fit={"epochs": 20, "batch_size": 64},
        curvature="gauss_newton",
    )


SETTINGS = {
    "digits-1e-2": Setting(problems.PROBLEMS["digits-1e-2"], lissa_depth=400, from_run=False),
    "digits-1e-3": Setting(problems.PROBLEMS["digits-1e-3"], lissa_depth=400, from_run=False),
    "mnist-one": Setting(problems.PROBLEMS["mnist-one"]),
    "mnist-own": Setting(problems.PROBLEMS["mnist-own"]),
    "mnist-own-narrow": Setting(problems.PROBLEMS["mnist-own-narrow"]),
    "small_cnn": Setting(small_cnn, has_bank=False, lissa_depth=200),
    "fashion": Setting(
        problems.PROBLEMS["fashion"],
        exact=False,
        tolerance=1e-2,
        measurements=("loss", "margin"),
    ),
}
RANKS = (10, 50, 100)

_SETTINGS = flags.DEFINE_list("settings", list(SETTINGS), "What to measure on.")
_BANKS = flags.DEFINE_string("banks", "banks", "Directory of the banks.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of tensorflow_datasets.")
_TIMES = flags.DEFINE_list(
    "times", ["1", "0.1", "10"], "Dampings, in units of the one that is chosen by itself."
)
_FIGURE = flags.DEFINE_bool("figure", False, "Draw the figure from the results, measure nothing.")


def trained(problem: problems.Problem, setting: Setting, directory: str) -> tuple[Any, str | None]:
    """The model, and the record of its run if that says the damping."""
    if not setting.from_run:
        return problem.trained(), None
    recorder = ki.callbacks.TracInCheckpoint(directory)
    return problem.trained([recorder]), directory


def methods(
    model: keras.Model,
    problem: problems.Problem,
    setting: Setting,
    recorded: str | None,
    damping: float,
    measurement: str,
) -> Iterator[tuple[dict[str, Any], ki.methods.InfluenceMethod]]:
    """Rows' keys, and the methods, all of one damping but for Fisher approximations' own."""
    common: dict[str, Any] = {"measurement": measurement, "seed": SEED}
    inverse: dict[str, Any] = {
        **common,
        "damping": damping,
        "l2": problem.l2,
        "curvature": problem.curvature,
    }
    yield {"method": "GradientDot"}, ki.GradientDot(model, measurement=measurement)
    yield (
        {"method": "GradientDot", "similarity": "cosine"},
        ki.GradientDot(model, similarity="cosine", measurement=measurement),
    )
    yield (
        {"method": "RandomProjection", "rank": RANKS[-1]},
        ki.RandomProjection(model, RANKS[-1], **common),
    )
    if recorded is not None:
        yield {"method": "TracIn"}, ki.TracIn(model, recorded, measurement=measurement)
    yield (
        {"method": "DiagonalFisher"},
        ki.DiagonalFisher(model, damping=damping + problem.l2, **common),
    )
    for kind in (ki.KFAC, ki.EKFAC):
        yield {"method": kind.__name__}, kind(model, damping=damping + problem.l2, **common)
    yield {"method": "EKFAC", "damping": "own"}, ki.EKFAC(model, **common)
    # Eigenvectors of a fifth of the examples, by few products of many vectors.
    few = len(problem.train[1]) // 5
    yield (
        {"method": "Arnoldi", "rank": RANKS[-1], "complement": "rayleigh", "refine": 0, "of": few},
        ki.Arnoldi(model, RANKS[-1], block_size=50, num_examples=few, **inverse),
    )
    first = measurement == setting.measurements[0]
    for rank in RANKS if first else RANKS[-1:]:
        for complement in (None, "trace", "damping", "rayleigh") if first else (None, "rayleigh"):
            if complement == "damping" and damping == 0:
                continue
            yield (
                {"method": "Arnoldi", "rank": rank, "complement": complement, "refine": 0},
                ki.Arnoldi(model, rank, complement=complement, **inverse),
            )
        yield (
            {"method": "Arnoldi", "rank": rank, "complement": "rayleigh", "refine": 2},
            ki.Arnoldi(model, rank, refine=2, **inverse),
        )
    if setting.lissa_depth:
        yield (
            {"method": "LiSSA", "depth": setting.lissa_depth},
            ki.LiSSA(model, setting.lissa_depth, **inverse),
        )
    if setting.exact:
        yield (
            {"method": "ConjugateGradient"},
            ki.ConjugateGradient(model, setting.tolerance, 500, **inverse),
        )


def reference(
    model: keras.Model,
    problem: problems.Problem,
    setting: Setting,
    damping: float,
    measurement: str,
) -> ki.methods.InfluenceMethod:
    """What the others are compared with."""
    inverse: dict[str, Any] = {
        "damping": damping,
        "l2": problem.l2,
        "curvature": problem.curvature,
        "measurement": measurement,
        "seed": SEED,
    }
    if setting.exact:
        return ki.ExactInfluence(model, **inverse)
    # The same inverse, in fewer passes.
    nearly = ki.Arnoldi(model, RANKS[-1], **inverse).fit(problem.train)
    return ki.ConjugateGradient(model, setting.tolerance, 500, preconditioner=nearly, **inverse)


def measure(
    method: ki.methods.InfluenceMethod, problem: problems.Problem
) -> tuple[np.ndarray, dict[str, float]]:
    """The scores, and what they cost."""
    with MemoryWatch() as memory:
        start = time.perf_counter()
        method.fit(problem.train)
        fitted = time.perf_counter()
        scores = method.scores(problem.queries, problem.train)
        done = time.perf_counter()
    return scores, {
        "fit_seconds": fitted - start,
        "scores_seconds": done - fitted,
        "memory_mb": (memory.peak - memory.before) / 1e6,
    }


def judged(
    scores: np.ndarray,
    expected: np.ndarray,
    problem: problems.Problem,
    outputs: np.ndarray | None,
    measurement: str,
) -> dict[str, Any]:
    """The error against the reference, and the datamodeling score where there is a bank."""
    row: dict[str, Any] = {
        "error": float(np.linalg.norm(scores - expected) / np.linalg.norm(expected))
    }
    if outputs is not None:
        # A rise of the margin is what a fall of the loss is.
        signed = scores if measurement == "loss" else -scores
        found = ki.evaluation.linear_datamodeling_score(signed, problem.masks, outputs, seed=SEED)
        row["lds"] = found.mean
        row["lds_queries"] = list(found.query_interval)
        row["lds_subsets"] = list(found.subset_interval)
    return row


def run(name: str, directory: pathlib.Path, data_dir: str | None, record: str) -> dict[str, Any]:
    """All rows of a setting, whose training is recorded in a directory."""
    setting = SETTINGS[name]
    problem = setting.problem(data_dir)
    bank = problem.bank(directory / name).run() if setting.has_bank else None
    rows: list[dict[str, Any]] = []
    model, recorded = trained(problem, setting, record)
    probe = ki.ConjugateGradient(
        model, run=recorded, l2=problem.l2, curvature=problem.curvature, seed=SEED
    )
    auto = float(probe.fit(problem.train).used_damping)
    del probe
    accuracy = float(
        np.mean(np.argmax(model.predict(problem.queries[0], verbose=0), 1) == problem.queries[1])
    )
    for measurement in setting.measurements:
        outputs = None if bank is None else bank.losses(measurement)
        for times in map(float, _TIMES.value):
            damping = times * auto
            judge = reference(model, problem, setting, damping, measurement)
            expected, cost = measure(judge, problem)
            for keys, method in methods(model, problem, setting, recorded, damping, measurement):
                # Where the damping is swept, the methods that come into question for it.
                swept = keys["method"] in ("EKFAC", "KFAC") or (
                    keys.get("rank") == RANKS[-1] and keys.get("complement") == "rayleigh"
                )
                if times != 1.0 and not (swept and keys.get("damping") != "own"):
                    continue
                scores, cost_here = measure(method, problem)
                rows.append(
                    {
                        "measurement": measurement,
                        "damping": damping,
                        **keys,
                        **cost_here,
                        **judged(scores, expected, problem, outputs, measurement),
                    }
                )
                logging.info("%s", rows[-1])
            rows.append(
                {
                    "measurement": measurement,
                    "damping": damping,
                    "method": "ExactInfluence" if setting.exact else "ConjugateGradient",
                    "reference": True,
                    **cost,
                    **judged(expected, expected, problem, outputs, measurement),
                }
            )
            logging.info("%s", rows[-1])
    return {
        "setting": name,
        "parameters": model.count_params(),
        "num_train": len(problem.train[1]),
        "num_queries": len(problem.queries[1]),
        "num_subsets": len(problem.masks) if setting.has_bank else 0,
        "repeats": problem.repeats,
        "curvature": problem.curvature,
        "l2": problem.l2,
        "damping": auto,
        "damping_from_run": setting.from_run,
        "accuracy": accuracy,
        "seed": SEED,
        "rows": rows,
        "machine": projection.machine(),
    }


def draw() -> None:
    """Error against seconds, a panel for each setting."""
    files = sorted(RESULTS.glob("inverses-*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    figure, axes = plt.subplots(1, len(results), figsize=(3.6 * len(results), 3.4), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        for label, marker, chosen in (
            (
                "GradientDot",
                "x",
                lambda row: row["method"] == "GradientDot" and "similarity" not in row,
            ),
            ("Arnoldi, truncated", "v", lambda row: row.get("complement", 0) is None),
            (
                "Arnoldi",
                "o",
                lambda row: (
                    row.get("complement") == "rayleigh" and row["refine"] == 0 and "of" not in row
                ),
            ),
            ("Arnoldi, refine=2", "s", lambda row: row.get("refine") == 2),
            ("EKFAC", "D", lambda row: row["method"] == "EKFAC" and row["damping"] != "own"),
            ("LiSSA", "P", lambda row: row["method"] == "LiSSA"),
        ):
            rows = [
                row
                for row in result["rows"]
                if row["measurement"] == "loss"
                and row["damping"] == result["damping"]
                and chosen(row)
            ]
            seconds = [row["fit_seconds"] + row["scores_seconds"] for row in rows]
            axis.plot(seconds, [row["error"] for row in rows], marker, label=label)
        axis.set(xscale="log", yscale="log", title=result["setting"], xlabel="seconds")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axes[0, 0].set_ylabel("relative error of the scores")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    if _FIGURE.value:
        draw()
        return
    for name in _SETTINGS.value:
        with tempfile.TemporaryDirectory() as record:
            result = run(name, pathlib.Path(_BANKS.value), _DATA_DIR.value, record)
        runs.write_json(RESULTS / f"inverses-{name}.json", result)


if __name__ == "__main__":
    app.run(main)
