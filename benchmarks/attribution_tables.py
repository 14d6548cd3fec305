"""The tables of what methods find: wrong labels, and what retraining would give."""

import statistics
from collections.abc import Sequence
from typing import Any

from result_files import read_results, spread

_NAMES = {
    "arnoldi": "`Arnoldi`",
    "random_projection": "`RandomProjection`",
    "tracin": "`TracIn`",
    "gradient_dot": "`GradientDot`",
    "ekfac": "`EKFAC`",
    "lissa": "`LiSSA`",
    "loss": "training loss (baseline)",
    "chance": "chance (baseline)",
}


def _percent(rows: Sequence[dict[str, Any]], key: str) -> str:
    """A measure over seeds; of one seed, with its bootstrap interval over the examples."""
    values = [100 * row[key] for row in rows]
    if len(rows) > 1 or rows[0]["method"] == "chance":
        return spread(values)
    low, high = (100 * end for end in rows[0][f"{key}_interval"])
    return f"{values[0]:.1f} ({low:.1f} to {high:.1f})"


def _method(row: dict[str, Any]) -> str:
    name = _NAMES[row["method"]]
    if row["checkpoints"] is not None:
        return f"{name}, {row['checkpoints']} checkpoint{'s' * (row['checkpoints'] > 1)}"
    return name if row["rank"] is None else f"{name}, rank {row['rank']}"


def _setting(results: Sequence[dict[str, Any]]) -> str:
    settings = [result["settings"] for result in results]
    first = settings[0]
    seeds = f"seed{'s' * (len(settings) > 1)} " + ", ".join(str(e["seed"]) for e in settings)
    rates = spread([each["matmul_gflops"] for each in settings], 0)
    accuracy = spread([100 * each["test_accuracy"] for each in settings])
    return (
        f"{first['dataset']}, {first['model']} ({first['num_parameters']:,} parameters), "
        f"{first['num_train_examples']:,} training images, {first['num_mislabeled']:,} labels "
        f"replaced, {first['epochs']} epochs; test accuracy {accuracy}%; {seeds}; "
        f"{rates} GFLOP/s in matrix products"
    )


def mislabeled(name: str) -> str:
    """AUC and AP of self-influence for replaced labels, by method, over the seeds that were run.

    Args:
        name: of `benchmarks.mislabeled.SETTINGS`.
    """
    results = read_results(f"mislabeled-{name}-")
    lines = [
        f"{_setting(results)}:",
        "",
        "| method | fit, s | score, ms an example | AUC, % | AP, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for row in result["rows"]:
            rows.setdefault(_method(row), []).append(row)
    total = results[0]["settings"]["num_train_examples"]
    for name, found in rows.items():
        scored = found[0]["num_scored"]
        if scored != total:
            name += f", on {scored} images drawn at random"
        fit = statistics.median(row["fit_seconds"] for row in found)
        each = statistics.median(row["seconds_per_example"] for row in found)
        auc, precision = _percent(found, "auc"), _percent(found, "average_precision")
        lines.append(f"| {name} | {fit:.1f} | {1000 * each:.2f} | {auc} | {precision} |")
    return "\n".join(lines)


def loss_and_gradient() -> str:
    """The squared gradient of the last layer, taken apart."""
    (result,) = read_results("loss-and-gradient")
    names = {
        "loss": "the loss, -log p_y",
        "outputs": "‖p - y‖²",
        "activations": "‖a‖²",
        "last_kernel": "‖p - y‖² ‖a‖²: squared gradient of the last kernel",
    }
    lines = ["| score | AUC, % | AP, % |", "| --- | --- | --- |"]
    for key, name in names.items():
        row = result["rows"][key]
        lines.append(f"| {name} | {100 * row['auc']:.1f} | {100 * row['average_precision']:.1f} |")
    return "\n".join(lines)


def datamodels() -> str:
    """Scores on held-out subsets, of methods from one model and of datamodels from many."""
    (result,) = read_results("datamodels")
    rows = [(f"`{name}`", "1", row) for name, row in result["methods"].items()]
    rows += [("`Datamodels`", f"{row['runs']:,}", row) for row in result["datamodels"]]
    lines = ["| method | trainings | LDS | over other queries |", "| --- | --- | --- | --- |"]
    for name, trainings, row in rows:
        low, high = row["query_interval"]
        lines.append(f"| {name} | {trainings} | {row['lds']:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def removals() -> str:
    """Predicted changes of a query's loss against those of retraining without one example."""
    results = sorted(read_results("removals-"), key=lambda each: each["num_parameters"])
    lines = [
        "| model (parameters), examples | removals, largest influence first | r | Spearman's "
        "| slope | largest change | change without a removal |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines.append(
            f"| {result['model']} ({result['num_parameters']:,}), {result['num_train']:,} "
            f"| {result['num_removed']} | {result['pearson']:.4f} | {result['spearman']:.4f} "
            f"| {result['slope']:.2f} | {result['largest_change']:.3f} | {result['control']:.1e} |"
        )
    return "\n".join(lines)


def stacking() -> str:
    """Seconds of a bank whose models train one by one, and stacked."""
    (result,) = read_results("stacking")
    settings = result["settings"]
    lines = [
        "| epochs | runs together | one by one, s | stacked, s | ratio | runs that agree to 1e-5 "
        "| median difference | largest, in float64 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        low, middle, high = row["ratio"]
        lines.append(
            f"| {row['epochs']} | {row['runs']} | {row['alone_seconds']:.1f} "
            f"| {row['stacked_seconds']:.1f} | {middle:.1f} ({low:.1f} to {high:.1f}) "
            f"| {row['equal_runs']} | {row['median_difference']:.0e} "
            f"| {row['largest_difference_float64']:.0e} |"
        )
    lines += [
        "",
        f"mlp, {result['rows'][0]['num_train']:,} images a run, batches of "
        f"{settings['batch_size']}; medians of {settings['turns']} turns; seed {settings['seed']}, "
        f"{settings['matmul_gflops']:.0f} GFLOP/s in matrix products.",
    ]
    return "\n".join(lines)


def recording() -> str:
    """What a step of training costs more when it is recorded."""
    (result,) = read_results("recording")
    settings = result["settings"]
    kinds = list(dict.fromkeys(row["record"] for row in result["rows"]))
    lines = [
        "| model (parameters) | a step, ms | " + " | ".join(kinds) + " |",
        "| --- | --- |" + " --- |" * len(kinds),
    ]
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["model"] == model]
        step = statistics.median(row["step_milliseconds"][1] for row in rows)
        cells = []
        for row in rows:
            low, middle, high = (100 * (ratio - 1) for ratio in row["ratio"])
            cells.append(f"{middle:+.0f}% ({low:+.0f} to {high:+.0f})")
        lines.append(
            f"| {model} ({rows[0]['num_parameters']:,}) | {step:.1f} | " + " | ".join(cells) + " |"
        )
    lines += [
        "",
        f"Medians and quartiles of {settings['turns']} turns of {settings['steps']} steps, batches "
        f"of {settings['batch_size']}; seed {settings['seed']}, "
        f"{settings['matmul_gflops']:.0f} GFLOP/s in matrix products.",
    ]
    return "\n".join(lines)
