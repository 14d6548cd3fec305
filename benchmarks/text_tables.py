"""The tables of benchmarks/text.py: turned labels of pairs found, and passages behind others."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from result_files import read_results
from scaling_tables import published

_NAMES = {
    "arnoldi": "`Arnoldi`, rank {rank}",
    "random_projection": "`RandomProjection`, rank {rank}",
    "tracin": "`TracIn`, checkpoints: {checkpoints}",
    "gradient_dot": "`GradientDot`",
    "ekfac": "`EKFAC`",
    "loss": "training loss (baseline)",
    "memorization": "`Memorization`, {trainings} trainings",
    "held_out_loss": "loss without the pair (baseline), the same trainings",
    "mean_loss": "mean loss (baseline), the same trainings",
}


def _retrieval(row: dict[str, Any], key: str) -> str:
    low, high = (100 * end for end in row[f"{key}_interval"])
    return f"{100 * row[key]:.1f} ({low:.1f} to {high:.1f})"


def _rates(rates: dict[str, float]) -> list[str]:
    return [
        f"{rates['examples_per_hour']:,.0f}",
        f"{rates['tokens_per_second']:,.0f}",
        f"{rates['flops_per_example'] / 1e9:.2f}",
        f"{rates['examples_per_hour'] * rates['flops_per_example'] / 3.6e12:.0f}",
        f"{rates['peak_megabytes']:,.0f}",
    ]


def qnli() -> str:
    """AUC and AP of self-influence for turned labels, and what scoring took."""
    (result,) = read_results("text-qnli-")
    settings = result["settings"]
    lines = [
        f"QNLI, {settings['num_train_examples']:,} training pairs of "
        f"{settings['num_tokens'] / settings['num_train_examples']:.0f} tokens, "
        f"{settings['num_mislabeled']:,} labels turned; a MiniLM ({settings['num_parameters']:,} "
        f"parameters, {settings['num_attributed']:,} of them attributed through: those of the last "
        f"{settings['num_last_layers']} layers), {settings['epochs']} epochs; accuracy "
        f"{100 * settings['test_accuracy']:.1f}% on {settings['num_test_examples']:,} pairs held "
        f"out, {100 * settings['train_accuracy']:.1f}% on the given training labels; seed "
        f"{settings['seed']}; {settings['matmul_gflops']:.0f} GFLOP/s in matrix products:",
        "",
        "| method | fit, s | AUC, % | AP, % | with memorization | examples an hour "
        "| tokens a second | GFLOP an example | GFLOP/s | most resident so far, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        name = _NAMES[row["method"]].format(**row, trainings=settings["num_retrainings"])
        seconds = f"{row['fit_seconds']:,.0f}" if row["fit_seconds"] else ""
        correlation = row.get("memorization_correlation")
        cells = [
            name,
            seconds,
            _retrieval(row, "auc"),
            _retrieval(row, "average_precision"),
            "" if correlation is None else f"{correlation:.2f}",
        ]
        rates = row.get("throughput")
        cells += _rates(rates) if rates else [""] * 5
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", published()])


def _from_own_source(queries: Sequence[dict[str, Any]]) -> str:
    """Percent of the proponents, and the standard error of this mean over queries."""
    shares = [
        statistics.mean(100.0 * (each["source"] == query["source"]) for each in query["proponents"])
        for query in queries
    ]
    error = statistics.stdev(shares) / math.sqrt(len(shares))
    return f"{statistics.mean(shares):.1f} ± {error:.1f}"


def wikitext2() -> str:
    """How many of the top passages are of the query's own article, and what scoring took."""
    (result,) = read_results("text-wikitext2-")
    first = result["methods"][0]
    settings = first["settings"]
    lines = [
        f"WikiText-2's validation and test text, {settings['num_train_passages']:,} passages of "
        f"{settings['num_train_tokens'] / settings['num_train_passages']:.0f} tokens; a GPT of "
        f"{settings['num_layers']} layers, {settings['width']} wide "
        f"({settings['num_parameters']:,} parameters), {settings['epochs']} epochs; perplexity "
        f"{settings['train_perplexity']:.0f} on these, {settings['test_perplexity']:.0f} on what "
        f"was held out; {len(first['queries'])} queries, the {settings['k']} first passages of "
        f"each (± the standard error over queries); seed {settings['seed']}; "
        f"{settings['matmul_gflops']:.0f} GFLOP/s in matrix products:",
        "",
        "| method | from the query's article, % | of all passages, % | fit, s | examples an hour "
        "| tokens a second | GFLOP an example | GFLOP/s | most resident so far, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in result["methods"]:
        settings = found["settings"]
        name = _NAMES[settings["method"]].format(
            rank=settings["rank"][-1], checkpoints=settings["checkpoints"][-1]
        )
        if settings["method"] == "arnoldi" and settings["complement"] == "none":
            name += ", `complement=None` (as published)"
        cells = [
            name,
            _from_own_source(found["queries"]),
            f"{100 * found['from_own_source']['chance']:.1f}",
            f"{settings['fit_seconds']:,.0f}",
            *_rates(found["throughput"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", published()])
