"""The tables of benchmarks/inverses.py: what each inverse predicts of retraining, and its cost."""

from collections.abc import Callable
from typing import Any

from result_files import read_results

Row = dict[str, Any]


def _arnoldi(rank: int, complement: str | None, refine: int = 0) -> Callable[[Row], bool]:
    return lambda row: (
        row["method"] == "Arnoldi"
        and "of" not in row
        and (row["rank"], row["complement"], row["refine"]) == (rank, complement, refine)
    )


def _named(name: str) -> Callable[[Row], bool]:
    return lambda row: row["method"] == name and not (row.get("own") or row.get("similarity"))


# A line of the summary: what it is called, and which row it is of.
LINES: dict[str, Callable[[Row], bool]] = {
    "`GradientDot`": _named("GradientDot"),
    "`GradientDot`, cosine": lambda row: row.get("similarity") == "cosine",
    "`RandomProjection`, rank 100": _named("RandomProjection"),
    "`TracIn`": _named("TracIn"),
    "`Arnoldi`, rank 100, `complement=None` (as published)": _arnoldi(100, None),
    "`Arnoldi`, rank 10": _arnoldi(10, "rayleigh"),
    "`Arnoldi`, rank 50": _arnoldi(50, "rayleigh"),
    "`Arnoldi`, rank 100": _arnoldi(100, "rayleigh"),
    "`Arnoldi`, rank 100, of a fifth of the examples": lambda row: "of" in row,
    "`Arnoldi`, rank 50, `refine=2`": _arnoldi(50, "rayleigh", 2),
    "`EKFAC`": lambda row: row["method"] == "EKFAC" and bool(row.get("own")),
    "`EKFAC`, with the others' damping": _named("EKFAC"),
    "`KFAC`, with the others' damping": _named("KFAC"),
    "`DiagonalFisher`": _named("DiagonalFisher"),
    "`LiSSA`": _named("LiSSA"),
    "`ConjugateGradient`": _named("ConjugateGradient"),
    "`ExactInfluence`": _named("ExactInfluence"),
}

# Settings of the summary.
SUMMARY = ("digits-1e-3", "mnist-one", "mnist-own", "mnist-own-narrow")


def results() -> list[dict[str, Any]]:
    """Of each setting that was measured, `own` marked where a method chose its own damping."""
    found = []
    for result in read_results("inverses-"):
        for row in result["rows"]:
            if row["damping"] == "own":
                row.update(own=True, damping=result["damping"])
        found.append(result)
    return found


def _at_the_damping(result: dict[str, Any], measurement: str = "loss") -> list[Row]:
    return [
        row
        for row in result["rows"]
        if row["damping"] == result["damping"] and row["measurement"] == measurement
    ]


def _seconds(row: Row) -> float:
    return row["fit_seconds"] + row["scores_seconds"]


def _scores(columns: dict[str, list[Row]], key: str) -> list[str]:
    """Linear datamodeling scores and seconds, a line for each method.

    Args:
        columns: the rows of each.
        key: of the interval.
    """
    lines = [
        "| method | " + " | ".join(f"{head} | s" for head in columns) + " |",
        "| --- |" + " --- | --- |" * len(columns),
    ]
    for name, chosen in LINES.items():
        cells = []
        for rows in columns.values():
            row = next(filter(chosen, rows), None)
            if row is None:
                cells.append("- | -")
                continue
            low, high = row[key]
            cells.append(f"{row['lds']:.3f} ({low:.3f} to {high:.3f}) | {_seconds(row):.1f}")
        if set(cells) != {"- | -"}:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def inverses() -> str:
    """What methods predict of retraining, in several settings."""
    named = {result["setting"]: result for result in results()}
    found = [named[name] for name in SUMMARY]
    columns = {f"{each['setting']}: LDS": _at_the_damping(each) for each in found}
    lines = _scores(columns, "lds_subsets")
    return "\n".join([*lines, "", *(_setting(result) for result in found)])


def fashion() -> str:
    """The same of a network that was retrained with a seed for each run."""
    (result,) = (each for each in results() if each["setting"] == "fashion")
    columns = {
        f"{measurement}: LDS": _at_the_damping(result, measurement)
        for measurement in ("loss", "margin")
    }
    return "\n".join([*_scores(columns, "lds_queries"), "", _setting(result)])


def _setting(result: dict[str, Any]) -> str:
    bank = ""
    if result["num_subsets"]:
        bank = f", {result['num_subsets']} half-subsets retrained {result['repeats']} times each"
    return (
        f"- {result['setting']}: {result['parameters']:,} parameters, {result['num_train']:,} "
        f"training examples, {result['num_queries']} queries{bank}; curvature "
        f"{result['curvature']}, l2 {result['l2']:g}, damping {result['damping']:.3g} "
        f"({'the run' if result['damping_from_run'] else 'the trace'}); seed {result['seed']}, "
        f"{result['machine']['matmul_gflops']:.0f} GFLOP/s in matrix products"
    )


def inverses_details() -> str:
    """Every row of every setting."""
    parts = []
    for result in results():
        parts += [f"**{result['setting']}**", "", _setting(result), ""]
        parts += [
            "| method | damping | measured | error | LDS (subsets) | fit, s | scores, s | MB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in result["rows"]:
            name = row["method"]
            name += f", rank {row['rank']}" if "rank" in row else ""
            name += f", {row['complement']}" if "complement" in row else ""
            name += f", refine={row['refine']}" if row.get("refine") else ""
            name += f", of {row['of']} examples" if "of" in row else ""
            name += f", {row['similarity']}" if "similarity" in row else ""
            if row.get("reference"):
                name += " (reference)"
            score = "-"
            if "lds" in row:
                low, high = row["lds_subsets"]
                score = f"{row['lds']:.3f} ({low:.3f} to {high:.3f})"
            damping = "its own" if row.get("own") else f"{row['damping']:.3g}"
            parts.append(
                f"| {name} | {damping} | {row['measurement']} | {row['error']:.4f} | {score} | "
                f"{row['fit_seconds']:.1f} | {row['scores_seconds']:.1f} | {row['memory_mb']:.0f} |"
            )
        parts.append("")
    return "\n".join(parts).rstrip()


def conjugate_gradient() -> str:
    """What blocks of queries and preconditioners bring."""
    (result,) = read_results("conjugate-gradient")
    lines = [
        f"{result['num_queries']} queries, {result['num_train']} examples, to a residual of "
        f"{result['tolerance']:g}; medians of {result['turns']} turns, of the queries' steps; seed "
        f"{result['seed']}; {result['machine']['matmul_gflops']:.0f} GFLOP/s in matrix products:",
        "",
        "| model (parameters) | damping | together, s | one at a time, s | ratio "
        "| steps together: plain | by 50 Arnoldi pairs | by EK-FAC "
        "| one at a time: plain | by 50 Arnoldi pairs | by EK-FAC |",
        "|" + " --- |" * 11,
    ]
    for row in result["rows"]:
        counts = [
            f"{row['steps'][helper][block]:.0f}"
            for block in ("together", "alone")
            for helper in ("none", "Arnoldi, 50 pairs", "EKFAC")
        ]
        lines.append(
            f"| {row['model']} ({row['parameters']:,}) | {row['damping']:.2g} | "
            f"{row['together_seconds']:.2f} | "
            f"{row['alone_seconds']:.1f} | {row['alone_seconds'] / row['together_seconds']:.1f} | "
            f"{' | '.join(counts)} |"
        )
    return "\n".join(lines)
