"""The tables of what is large: plans, disks, growth, and TPUs that were only compiled for."""

from typing import NamedTuple

from result_files import read_results, spread


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
    lines += ["", f"{spread(rates, 0)} GFLOP/s in matrix products."]
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
    lines += ["", f"{spread(rates, 0)} GFLOP/s in matrix products."]
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


def published() -> str:
    """The published rate, and what it comes to: the line below tables of ours."""
    (result,) = read_results("tpu-compile-translation")
    flops = sum(result["required_flops"]["10"].values())
    rate = _PUBLISHED * flops / 3600
    return (
        f"Published, on {_NUM_CHIPS} TPU v2 cores: {_PUBLISHED:,.0f} examples an hour, of neither "
        "rank nor length told. Were they at rank 10 and of "
        f"{result['num_tokens']} tokens, then by the same count, with a model of "
        f"{result['num_parameters']:,} parameters, {flops / 1e9:.1f} GFLOP an example: "
        f"{rate / 1e9:,.0f} GFLOP/s, {rate / _NUM_CHIPS / 1e9:,.0f} a core."
    )


_HOW = f"t = max(F / ({_UTILISATION} peak), M / bandwidth)"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
