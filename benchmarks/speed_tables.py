"""The tables of what the library's parts cost, on the machines that they were measured on."""

import statistics

from result_files import read_results, spread


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
        numbers = [spread(row[key], 0) for key in ("products", "restarts", "held", "missed")]
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
        f"seed {settings['seed']}; {spread(rates, 0)} GFLOP/s in matrix products:",
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
        f"{spread(rates, 0)} GFLOP/s in matrix products:",
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
