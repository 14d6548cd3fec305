"""The tables of benchmarks/translation.py: wrong references found, pairs chosen, and the cost."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from result_files import read_results, spread
from scaling_tables import published

_METHODS = {
    "arnoldi": "`Arnoldi`",
    "random_projection": "`RandomProjection`",
    "tracin": "`TracIn`",
    "loss": "sum of the tokens' losses (baseline)",
    "loss_per_token": "mean of the tokens' losses (baseline)",
    "random": "chance (baseline)",
    "length_ratio": "ratio of lengths (baseline)",
    "none": "no filter (baseline)",
}
_DETAILS = {"all": "all layers", "last": "last decoder layer", "tokens": "times tokens"}


def score_name(score: str) -> str:
    """A score as a reader should see it: arnoldi-all-20, say, or tracin."""
    method, *rest = score.split("-")
    details = [f"rank {part}" if part.isdecimal() else _DETAILS[part] for part in rest]
    return ", ".join([_METHODS[method], *details])


def setting(results: Sequence[dict[str, Any]]) -> str:
    """What was run: the line above a table."""
    first = results[0]
    settings = first["settings"]
    seeds = ", ".join(str(result["settings"]["seed"]) for result in results)
    sizes = settings["num_parameters"]
    return (
        f"{settings['size']} ({sizes['all']:,} parameters; {sizes['last']:,} of them, "
        f"{sizes['last'] / sizes['all']:.0%}, in the last decoder layer), {first['num_pairs']:,} "
        f"training pairs, {first['num_noisy']:,} references wrong, "
        f"{settings['updates']:,} updates of {settings['train_batch']} pairs; BLEU "
        f"{spread([result['bleu']['bleu'] for result in results])}; "
        f"seed{'s' * (len(results) > 1)} {seeds}; "
        f"{spread([result['settings']['matmul_gflops'] for result in results], 0)} GFLOP/s in "
        "matrix products"
    )


def retrieval(name: str = "permuted") -> str:
    """AUC and AP of each score for wrong references, over the seeds that were run."""
    results = read_results(f"translation-{name}-")
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for row in result["retrieval"]:
            rows.setdefault(row["score"], []).append(row)
    scored = next(iter(results[0]["costs"].values()))["num_scored"]
    lines = [
        f"{setting(results)}; {scored:,} pairs scored:",
        "",
        "| score | AUC, % | AP, % |",
        "| --- | --- | --- |",
    ]
    for score, found in rows.items():
        cells = []
        for key in ("auc", "average_precision"):
            cell = spread([100 * row[key] for row in found])
            if len(found) == 1:
                low, high = (100 * end for end in found[0][f"{key}_interval"])
                cell += f" ({low:.1f} to {high:.1f})"
            cells.append(cell)
        lines.append(f"| {score_name(score)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(name: str) -> str:
    """What each pass over the pairs took, median over the seeds."""
    results = read_results(f"translation-{name}-")
    lines = [
        "| pass | fit, s | pairs an hour | tokens/s | GFLOP a pair | GFLOP/s | most resident, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in results[0]["costs"]:
        cost = {
            key: statistics.median(result["costs"][task][key] for result in results)
            for key in results[0]["costs"][task]
        }
        lines.append(
            f"| {score_name(task)} | {cost['fit_seconds']:.0f} | {cost['pairs_per_hour']:,.0f} "
            f"| {cost['tokens_per_second']:,.0f} | {cost['flops_per_pair'] / 1e9:.2f} "
            f"| {cost['flops_per_pair'] * cost['pairs_per_hour'] / 3.6e12:.0f} "
            f"| {cost['peak_bytes'] / 1e6:,.0f} |"
        )
    return "\n".join([*lines, "", published()])


def selection(name: str = "mixed") -> str:
    """BLEU after training on the best pairs by each score, over the seeds that were run."""
    results = read_results(f"translation-{name}-")
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for result in results:
        for row in result["selection"]:
            found.setdefault(row["method"], {}).setdefault(row["share"], []).append(row)
    kept = sorted({share for shares in found.values() for share in shares})
    head = " | ".join(f"{100 * share:g}% kept" for share in kept)
    lines = [
        f"{setting(results)}; {results[0]['settings']['select_updates']:,} updates on what is "
        f"kept, BLEU on {results[0]['num_held_out']:,} held-out pairs, and the share of wrong "
        "pairs in what is kept:",
        "",
        f"| chosen by | {head} |",
        "| --- |" + " --- |" * len(kept),
    ]
    for method, shares in found.items():
        cells = [_chosen(shares[share]) if share in shares else "" for share in kept]
        lines.append(f"| {score_name(method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _chosen(rows: Sequence[dict[str, Any]]) -> str:
    wrong = statistics.mean(row["noisy_share"] for row in rows)
    return f"{spread([row['bleu'] for row in rows])}, {wrong:.0%} wrong"


def rate(name: str = "all") -> str:
    """What scoring every pair of the file took."""
    (result,) = read_results(f"translation-{name}-")
    (cost,) = result["costs"].values()
    forward = result["forward_mode"]
    return (
        f"{setting([result])}: {cost['num_scored']:,} pairs scored at rank {forward['rank']} in "
        f"{cost['score_seconds']:,.0f} s, {cost['pairs_per_hour']:,.0f} an hour, after "
        f"{cost['fit_seconds']:,.0f} s for the basis. On {forward['num_pairs']} of them "
        f"{forward['ratio']:.1f} times as fast as forward mode through the whole network "
        f"({forward['pairs_per_second']:.1f} and {forward['forward_mode_pairs_per_second']:.1f} "
        f"pairs a second).\n\n{costs(name)}"
    )


TABLES: dict[str, Callable[[], str]] = {
    "permuted": lambda: f"{retrieval()}\n\n{costs('permuted')}",
    "mixed": lambda: f"{selection()}\n\n{costs('mixed')}",
    "all": rate,
}
