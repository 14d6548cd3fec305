"""The table of benchmarks/text.py: turned labels of sentence pairs, found by each method."""

from typing import Any

from result_files import read_results

# Schioppa et al., "Scaling Up Influence Functions" (AAAI 2022), on 32 TPU v2 cores.
PUBLISHED_PER_HOUR = 2.2e6

_NAMES = {
    "arnoldi": "`Arnoldi`, rank {rank}",
    "random_projection": "`RandomProjection`, rank {rank}",
    "tracin": "`TracIn`, checkpoints: {checkpoints}",
    "gradient_dot": "`GradientDot`",
    "loss": "training loss (baseline)",
}


def _retrieval(row: dict[str, Any], key: str) -> str:
    low, high = (100 * end for end in row[f"{key}_interval"])
    return f"{100 * row[key]:.1f} ({low:.1f} to {high:.1f})"


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
        "| method | fit, s | AUC, % | AP, % | examples an hour | tokens a second "
        "| GFLOP an example | most resident so far, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        name = _NAMES[row["method"]].format(**row)
        cells = [name, "", _retrieval(row, "auc"), _retrieval(row, "average_precision")]
        if rates := row.get("throughput"):
            cells[1] = f"{row['fit_seconds']:.0f}"
            cells += [
                f"{rates['examples_per_hour']:,.0f}",
                f"{rates['tokens_per_second']:,.0f}",
                f"{rates['flops_per_example'] / 1e9:.1f}",
                f"{rates['peak_megabytes']:,.0f}",
            ]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Published, on 32 TPU v2 cores: {PUBLISHED_PER_HOUR:,.0f} examples an hour."]
    return "\n".join(lines)
