"""Writes the README's tables from benchmarks/results, so that none can drift from its run.

python benchmarks/tables.py          rewrites the tables in README.md
python benchmarks/tables.py --check  fails when README.md does not hold them as they should be

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"

_CHECK = flags.DEFINE_bool("check", False, "Compare README.md, and write nothing.")

_NAMES = {
    "arnoldi": "`Arnoldi`",
    "random_projection": "`RandomProjection`",
    "tracin": "`TracIn`",
    "gradient_dot": "`GradientDot`",
    "lissa": "`LiSSA`",
    "loss": "training loss (baseline)",
    "chance": "chance (baseline)",
}


def read_results(prefix: str) -> list[dict[str, Any]]:
    """The results whose file name begins with `prefix`, in the order of their names."""
    files = sorted(RESULTS.glob(f"{prefix}*.json"))
    if not files:
        raise FileNotFoundError(f"There is no result {prefix}*.json in {RESULTS}.")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and the range where they differ."""
    mean, low, high = (
        f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def _percent(rows: Sequence[dict[str, Any]], key: str) -> str:
    """A measure over seeds; of one seed, with its bootstrap interval over the examples."""
    values = [100 * row[key] for row in rows]
    if len(rows) > 1 or rows[0]["method"] == "chance":
        return _spread(values)
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
    rates = _spread([each["matmul_gflops"] for each in settings], 0)
    accuracy = _spread([100 * each["test_accuracy"] for each in settings])
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


def arnoldi_overhead() -> str:
    """What the iteration costs beside its Hessian products."""
    (result,) = read_results("arnoldi-overhead")
    return (
        f"{result['num_iterations']} iterations on {result['model']} "
        f"({result['num_parameters']:,} parameters) over {result['num_examples']:,} examples: "
        f"{result['product_seconds']:.0f} s in Hessian products, "
        f"{result['other_seconds']:.1f} s ({result['overhead']:.1%} of that) in orthogonalisation "
        f"and everything else; max |Q'Q - I| = {result['orthogonality']:.1e} "
        f"({result['matmul_gflops']:.0f} GFLOP/s in matrix products)."
    )


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


TABLES: dict[str, Callable[[], str]] = {
    "mnist-large_cnn": lambda: mislabeled("mnist-large_cnn"),
    "fashion_mnist-large_cnn": lambda: mislabeled("fashion_mnist-large_cnn"),
    "mnist-small_cnn": lambda: mislabeled("mnist-small_cnn"),
    "fashion_mnist-small_cnn": lambda: mislabeled("fashion_mnist-small_cnn"),
    "digits-large_cnn": lambda: mislabeled("digits-large_cnn"),
    "loss-and-gradient": loss_and_gradient,
    "arnoldi-overhead": arnoldi_overhead,
}


def render(text: str) -> str:
    """`text` with every table in it made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(
        r"(<!-- table: ([\w-]+) -->)\n.*?(<!-- end of table -->)", table, text, flags=re.DOTALL
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    text = README.read_text(encoding="utf-8")
    rendered = render(text)
    if not _CHECK.value:
        README.write_text(rendered, encoding="utf-8")
    elif rendered != text:
        raise SystemExit("README.md differs from the results: run python benchmarks/tables.py.")


if __name__ == "__main__":
    app.run(main)
