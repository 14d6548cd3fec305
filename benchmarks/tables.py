"""Writes the pages' tables from benchmarks/results, so that none can drift from its run.

python benchmarks/tables.py          rewrites the tables in README.md and docs/*.md
python benchmarks/tables.py --check  fails when these do not hold them as they should be

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app, flags

import inverse_tables

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_CHECK = flags.DEFINE_bool("check", False, "Compare the pages, and write nothing.")

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


def iteration() -> str:
    """Products until the top pairs have converged, by the way in which they are found."""
    (result,) = read_results("iteration")
    settings, rows = result["settings"], result["rows"]
    num_draws = len(rows[0]["products"])
    lines = [
        f"The {settings['rank']} pairs of largest magnitude over {settings['num_examples']} "
        f"digits, residuals within {settings['tolerance']:g} of the largest eigenvalue; "
        f"{num_draws} draw{'s' * (num_draws > 1)} of the starting vectors:",
        "",
        "| model (parameters) | from | products | restarts | vectors held | pairs missed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        numbers = [_spread(row[key], 0) for key in ("products", "restarts", "held", "missed")]
        name = f"{row['model']} ({row['num_parameters']:,})"
        lines.append(f"| {name} | {row['way']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def arnoldi_storage() -> str:
    """What bfloat16 storage of the basis costs in accuracy."""
    (result,) = read_results("arnoldi-storage")
    exact, rounded = result["orthogonality"]
    return (
        f"Stored in bfloat16 on {result['model']} ({result['num_parameters']:,} parameters, "
        f"{result['num_iterations']} iterations), the {result['rank']} largest eigenvalues are off "
        f"by at most {result['eigenvalue_error']:.1e} of the largest, self-influences by "
        f"{result['self_influence_error']:.1e} of their mean; max |Q'Q - I| = {rounded:.1e} "
        f"instead of {exact:.1e}."
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


def _of_models(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def projection() -> str:
    """Rates and memory of per-example projections by three routes."""
    results = sorted(
        read_results("projection-"), key=lambda each: each["rows"][0]["num_parameters"]
    )
    rows = [row for result in results for row in result["rows"]]
    settings = results[0]["settings"]
    routes = ("engine", "forward", "vectorised")
    sizes = _of_models({row["model"]: str(row["batch_size"]) for row in rows})
    rates = [row["matmul_gflops"][1] for row in rows]
    lines = [
        f"Batches: {sizes}; medians of {settings['repeats']} turns, a ratio with its quartiles; "
        f"seed {settings['seed']}; {_spread(rates, 0)} GFLOP/s in matrix products:",
        "",
        "| model (parameters) | directions | engine, examples/s | forward mode, examples/s "
        "| vectorised, examples/s | engine / forward mode | engine's share of the matrix-product "
        "rate, % | extra memory of the three, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        speeds = [row["routes"][route]["examples_per_second"][1] for route in routes]
        memory = [row["routes"][route]["extra_memory_mb"] for route in routes]
        low, ratio, high = row["ratio_to_forward"]
        cells = [
            f"{row['model']} ({row['num_parameters']:,})",
            str(row["rank"]),
            *(f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}" for speed in speeds),
            f"{ratio:.1f} ({low:.1f} to {high:.1f})",
            f"{100 * row['share_of_matmul_rate'][1]:.0f}",
            ", ".join(f"{each:,.0f}" for each in memory),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    norms = _of_models(
        {
            result["norms"]["model"]: f"{result['norms']['norms_over_gradient'][1]:.1f}"
            for result in results
        }
    )
    lines += ["", f"All squared norms of a batch, in times of its one gradient: {norms}."]
    for rough in (result["bfloat16"] for result in results if "bfloat16" in result):
        lines[-1] += (
            f" Contracting in bfloat16 ({rough['model']}, {rough['rank']} directions): "
            f"{rough['gain'][1]:.2f} times the rate, and errors of up to "
            f"{rough['difference']:.1e} of the largest entry."
        )
    return "\n".join(lines)


def curvature() -> str:
    """Products with the Hessian and the Gauss-Newton matrix, in times of a gradient."""
    (result,) = read_results("curvature")
    # Results of before there was a Gauss-Newton product have no such column.
    orders = [
        order
        for order in ("forward over reverse", "reverse over reverse", "Gauss-Newton")
        if order in result["rows"][0]["over_gradient"]
    ]
    heads = [f"{order} / gradient" for order in orders]
    settings = result["settings"]
    rates = [row["matmul_gflops"][1] for row in result["rows"]]
    lines = [
        f"Medians of {settings['repeats']} turns, with their quartiles; seed {settings['seed']}; "
        f"{_spread(rates, 0)} GFLOP/s in matrix products:",
        "",
        f"| model (parameters), batch | gradient, ms | {' | '.join(heads)} | largest difference |",
        "| --- " * (3 + len(heads)) + "|",
    ]
    for row in result["rows"]:
        over = [
            f"{median:.2f} ({low:.2f} to {high:.2f})"
            for low, median, high in (row["over_gradient"][order] for order in orders)
        ]
        cells = [
            f"{row['model']} ({row['num_parameters']:,}), {row['batch_size']}",
            f"{1000 * row['seconds']['gradient'][1]:.1f}",
            *over,
            f"{row['difference']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def index() -> str:
    """How long an index takes."""
    (result,) = read_results("index")
    seconds = result["index_seconds"]
    return (
        f"{result['num_images']:,} images of {result['dataset']}, {result['model']} "
        f"({result['num_parameters']:,} parameters), rank {result['rank']}: "
        f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f} in "
        f"{len(seconds)} runs), {result['images_per_second']:,.0f} images a second; one query is "
        f"answered in {result['query_milliseconds']:.0f} ms ({result['matmul_gflops']:.0f} GFLOP/s "
        "in matrix products)."
    )


def ekfac() -> str:
    """How long EKFAC takes."""
    (result,) = read_results("ekfac")
    fit, score = (min(result[f"{stage}_seconds"]) for stage in ("fit", "score"))
    check = ""
    if "check" in result:
        check = (
            f" With {result['check']['max_rank']} eigenvectors of the widest factor instead of "
            f"{result['max_rank']}, self-influence correlates by "
            f"{result['check']['correlation']:.4f}."
        )
    return (
        f"{result['num_images']:,} images of {result['dataset']}, {result['model']} "
        f"({result['num_parameters']:,} parameters): {fit:.0f} s for factors and eigenvalues, "
        f"{score:.0f} s for self-influence, {result['peak_megabytes']:,.0f} MB at most "
        f"({result['matmul_gflops']:.0f} GFLOP/s in matrix products).{check}"
    )


def coverage() -> str:
    """What serves the parameters of library models."""
    (result,) = read_results("coverage")
    lines = [
        "| family | model | parameters | weights | error | served by, % of the parameters |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        images = [" x ".join(map(str, shape)) for shape in row["inputs"] if len(shape) == 3]
        cells = [
            row["family"],
            ", ".join([f"`{row['member']}`", *images]),
            f"{row['num_parameters']:,}",
            f"{row['num_variables']:,}",
            f"{row['error']:.0e}",
            ", ".join(f"{rule} {100 * share:.2f}" for rule, share in row["shares"].items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def large() -> str:
    """What lies on the disk, beside what lies in memory."""
    (basis,) = read_results("large-basis")
    (index,) = read_results("large-index")
    (search,) = read_results("large-search")
    memory, disk = basis["rows"]
    few, many = index["rows"]
    (found,) = search["rows"]
    lines = [
        f"Arnoldi, {disk['num_iterations']} products over {disk['num_examples']:,} examples, "
        f"{disk['num_parameters']:,} parameters (a basis of {disk['basis_mb']:,.0f} MB):",
        "",
        "| the basis lies | seconds | of these in Hessian products | most resident, MB |",
        "| --- | --- | --- | --- |",
    ]
    for row, place in ((memory, "in memory"), (disk, "on the disk")):
        lines.append(
            f"| {place} | {row['seconds']:,.0f} | {row['product_seconds']:,.0f} "
            f"| {row['resident_mb']:,.0f} |"
        )
    lines += ["", f"On the disk it takes {disk['seconds'] / memory['seconds']:.2f} times as long."]
    rates = ", ".join(
        f"{name} {1000 * median:,.0f} ms ({1000 * low:,.0f} to {1000 * high:,.0f})"
        for name, (low, median, high) in found["seconds"].items()
    )
    missing = ", ".join(
        f"{name} finds {share:.1%} of them (made in {found['build_seconds'][name]:,.1f} s)"
        for name, share in found["recall"].items()
        if name.startswith("FAISS")
    )
    lines += [
        "",
        f"An index in a directory, {many['model']}, rank {many['rank']}: {many['num_examples']:,} "
        f"examples at {many['examples_per_second']:,.0f} a second (one batch is projected over and "
        f"over at {many['projected_per_second']:,.0f}), at most "
        f"{many['resident_mb']:,.0f} MB resident ({few['resident_mb']:,.0f} for "
        f"{few['num_examples']:,}). The top {found['k']} of both signs for {found['num_queries']} "
        f"queries among {found['num_examples']:,} encodings of {found['rank']} numbers"
        f": {rates}; {missing}.",
    ]
    return "\n".join(lines)


def tpu_compile() -> str:
    """What the TPU's compiler reports of the step functions."""
    results = sorted(read_results("tpu-compile-"), key=lambda each: each["num_parameters"])
    first = results[0]["rows"][0]
    lines = [
        f"One chip of a {results[0]['settings']['topology']} topology ({first['device']}); libtpu "
        f"{first['versions']['libtpu']}:",
        "",
        "| model (parameters) | step | batch | GFLOP | GB moved | memory, MB: arguments, results, "
        "temporary | compiled in, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for row in result["rows"]:
            memory = [row[f"{kind}_bytes"] / 1e6 for kind in ("argument", "output", "temp")]
            number = {
                "curvature_loop": "batches",
                "project": "directions",
                "orthogonalize": "rows",
                "orthogonalize_shard": f"rows, on each of {row.get('chips')} chips",
            }.get(row["step"])
            cells = [
                f"{result['model']} ({result['num_parameters']:,})",
                f"`{row['step']}`" + (f", {row['rank']} {number}" if number else ""),
                "" if row["batch_size"] is None else str(row["batch_size"]),
                f"{row['flops'] / 1e9:,.1f}",
                f"{row['bytes_accessed'] / 1e9:,.2f}",
                ", ".join(f"{each:,.1f}" for each in memory),
                # Of a program that was compiled beside other work, the time says nothing.
                "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plan() -> str:
    """A plan, as it is printed."""
    (result,) = read_results("plan-mlp")
    return f"```text\n{result['predicted']['table']}\n```"


def plan_errors() -> str:
    """What plans predicted, and what the work took."""
    lines = [
        "| model (parameters), examples | seconds: predicted, measured | error, % "
        "| MB added: predicted, measured | error, % | MB at the peak: predicted, measured "
        "| error, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    results = read_results("plan-")
    for result in sorted(results, key=lambda each: each["predicted"]["num_parameters"]):
        told, took, errors = result["predicted"], result["measured"], result["errors"]
        cells = [
            f"{result['model']} ({told['num_parameters']:,}), {result['settings']['num_train']:,}",
            f"{told['seconds']:.1f}, {took['seconds']:.1f}",
            f"{100 * errors['seconds']:+.0f}",
        ]
        for key in ("added_mb", "peak_mb"):
            cells += [f"{told[key]:,.0f}, {took[key]:,.0f}", f"{100 * errors[key]:+.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    rates = [each[part]["matmul_gflops"] for each in results for part in ("predicted", "measured")]
    lines += ["", f"{_spread(rates, 0)} GFLOP/s in matrix products."]
    return "\n".join(lines)


def growth() -> str:
    """Time and memory along each axis, and the exponents of the fitted power laws."""
    (result,) = read_results("scaling")
    lines = [
        "| what grows | sizes | fit, s | self-influence, s | MB added | exponents of the three |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rates = []
    for axis, found in result["axes"].items():
        columns = [
            ", ".join(f"{row[key]:,.{digits}f}" for row in found["rows"])
            for key, digits in (("fit_seconds", 1), ("score_seconds", 2), ("added_mb", 0))
        ]
        sizes = ", ".join(f"{size:,}" for size in found["sizes"])
        exponents = ", ".join(f"{value:.2f}" for value in found["exponents"].values())
        lines.append(f"| {' | '.join([axis, sizes, *columns, exponents])} |")
        rates += [row["matmul_gflops"] for row in found["rows"]]
    lines += ["", f"{_spread(rates, 0)} GFLOP/s in matrix products."]
    return "\n".join(lines)


class _Chip(NamedTuple):
    """Published peaks of one core of a TPU v2, or one chip of a v5e (which has one core)."""

    name: str
    flops: float
    bytes_per_second: float
    memory: float


_CHIPS = (
    _Chip("TPU v2 core", 22.5e12, 300e9, 8e9),
    _Chip("TPU v5e chip", 197e12, 819e9, 16e9),
)
_NUM_CHIPS = 32
_UTILISATION = 0.4  # Assumed: nothing was run on either.
_SAMPLE, _ALL = 100_000, 100_000_000
_ITERATIONS = 200
_PUBLISHED = 2.2e6  # Examples an hour, on 32 TPU v2 cores.


def _seconds(chip: _Chip, flops: float, moved: float) -> float:
    """Of one example on one chip: what takes longer, arithmetic or memory."""
    return max(flops / (_UTILISATION * chip.flops), moved / chip.bytes_per_second)


def scaling() -> str:
    """What the translation model would cost, from the compiler's counts and published peaks."""
    (result,) = read_results("tpu-compile-translation")
    product, scoring = result["rows"]
    size, batch = 4 * result["num_parameters"], scoring["batch_size"]
    counts = {rank: flops["contractions"] for rank, flops in result["required_flops"].items()}
    direction = (counts["100"] - counts["10"]) / 90
    passes = sum(result["required_flops"]["10"][way] for way in ("forward_pass", "backward_pass"))
    fixed = passes + counts["10"] - 10 * direction
    moved = (scoring["bytes_accessed"] - scoring["rank"] * size) / batch
    product_flops, product_bytes = (
        product[key] / product["batch_size"] for key in ("flops", "bytes_accessed")
    )
    lines = [
        f"Of one example (F flops, M bytes): Hessian product F = {product['flops']:.4g} / "
        f"{product['batch_size']} = {product_flops:.4g}, M = {product['bytes_accessed']:.4g} / "
        f"{product['batch_size']} = {product_bytes:.4g}. Scoring on k directions in s parts: "
        f"F = s x {fixed:.4g} + k x {direction:.4g}, M = s x ({scoring['bytes_accessed']:.4g} - "
        f"{scoring['rank']} x {size:.4g}) / {batch} = s x {moved:.4g}. A direction takes "
        f"{size:.4g} bytes, the weights as much, and the step {scoring['temp_bytes']:.4g}.",
        "",
        "| what | how | " + " | ".join(f"{_NUM_CHIPS} x {chip.name}" for chip in _CHIPS) + " |",
        "| --- | --- | --- | --- |",
    ]
    products = [_seconds(chip, product_flops, product_bytes) for chip in _CHIPS]
    limits = [
        f"max({1e3 * product_flops / _UTILISATION / chip.flops:.2f}, "
        f"{1e3 * product_bytes / chip.bytes_per_second:.2f}) = {1e3 * each:.2f} ms"
        for chip, each in zip(_CHIPS, products, strict=True)
    ]
    lines.append(f"| one example's part of a product, t | {_HOW} | {' | '.join(limits)} |")
    for what, how, count in (
        (f"a product over {_SAMPLE:,} examples", f"{_SAMPLE:,} t / {_NUM_CHIPS}", _SAMPLE),
        (f"{_ITERATIONS} of them", f"{_ITERATIONS} times that", _ITERATIONS * _SAMPLE),
        (f"a product over {_ALL:,}", f"{_ALL:,} t / {_NUM_CHIPS}", _ALL),
    ):
        times = [_duration(count * each / _NUM_CHIPS) for each in products]
        lines.append(f"| {what} | {how} | {' | '.join(times)} |")
    for rank in (10, 100):
        cells = []
        for chip in _CHIPS:
            room = int((chip.memory - size - scoring["temp_bytes"]) // size)
            parts = -(-rank // room)
            each = _seconds(chip, parts * fixed + rank * direction, parts * moved)
            rate = 3600 * _NUM_CHIPS / each
            cells.append(
                f"{room} directions fit, s = {parts}; t = {1e3 * each:.1f} ms; "
                f"{rate / 1e6:.2f} million an hour, {_duration(_ALL / rate * 3600)}"
                + (f"; published: {_PUBLISHED / 1e6:.1f} million" if chip is _CHIPS[0] else "")
            )
        how = f"{_HOW}; 3,600 x {_NUM_CHIPS} / t an hour"
        lines.append(f"| scoring {_ALL:,}, rank {rank} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines)


_HOW = f"t = max(F / ({_UTILISATION} peak), M / bandwidth)"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


TABLES: dict[str, Callable[[], str]] = {
    "mnist-large_cnn": lambda: mislabeled("mnist-large_cnn"),
    "fashion_mnist-large_cnn": lambda: mislabeled("fashion_mnist-large_cnn"),
    "mnist-small_cnn": lambda: mislabeled("mnist-small_cnn"),
    "fashion_mnist-small_cnn": lambda: mislabeled("fashion_mnist-small_cnn"),
    "digits-large_cnn": lambda: mislabeled("digits-large_cnn"),
    "loss-and-gradient": loss_and_gradient,
    "datamodels": datamodels,
    "removals": removals,
    "arnoldi-overhead": arnoldi_overhead,
    "iteration": iteration,
    "arnoldi-storage": arnoldi_storage,
    "growth": growth,
    "projection": projection,
    "curvature": curvature,
    "index": index,
    "ekfac": ekfac,
    "coverage": coverage,
    "large": large,
    "conjugate-gradient": inverse_tables.conjugate_gradient,
    "inverses": inverse_tables.inverses,
    "inverses-details": inverse_tables.inverses_details,
    "plan": plan,
    "plan-errors": plan_errors,
    "tpu-compile": tpu_compile,
    "scaling": scaling,
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
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        rendered = render(text)
        if not _CHECK.value:
            page.write_text(rendered, encoding="utf-8")
        elif rendered != text:
            raise SystemExit(
                f"{page.relative_to(ROOT)} differs from the results: run python "
                "benchmarks/tables.py."
            )


if __name__ == "__main__":
    app.run(main)
