"""Tables and results of the translation example."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import keras_influence as ki
import runs
import throughput
import translation_scoring
from translation_data import Corpus


def results(directory: pathlib.Path, corpus: Corpus, ranks: tuple[int, ...]) -> dict[str, Any]:
    """All that the stages found, for results.json.

    Args:
        directory: Of the run.
        corpus: Its pairs.
        ranks: That were scored by.
    """
    found: dict[str, Any] = {
        "num_pairs": len(corpus.splits["train"]),
        "num_noisy": int(corpus.is_noisy.sum()),
        "num_held_out": len(corpus.splits["held_out"]),
        "retrieval": [],
        "selection": [],
        "costs": {path.stem: runs.read_json(path) for path in _records(directory / "scores")},
        "training": runs.read_json(directory / "run" / "training.json"),
        "bleu": runs.read_json(directory / "run" / "bleu.json"),
    }
    forward_mode = directory / "forward_mode.json"
    if forward_mode.exists():
        found["forward_mode"] = runs.read_json(forward_mode)
    if corpus.is_noisy.any():
        scores = translation_scoring.scores(directory / "scores", ranks, corpus.num_target_tokens)
        for name, (ids, values) in scores.items():
            inside = np.isin(ids, corpus.splits["train"])
            truth = corpus.is_noisy[ids[inside]]
            retrieval = ki.evaluation.mislabel_retrieval(values[inside], truth)
            interval = ki.evaluation.mislabel_retrieval_interval(values[inside], truth)
            found["retrieval"].append(
                {
                    "score": name,
                    "auc": retrieval.auc,
                    "average_precision": retrieval.average_precision,
                    "auc_interval": interval.auc,
                    "average_precision_interval": interval.average_precision,
                }
            )
    for place in sorted((directory / "selected").glob("*/bleu.json")):
        choice = runs.read_json(place.with_name("choice.json"))
        found["selection"].append({**choice, **runs.read_json(place)})
    return found


def format_costs(scores: pathlib.Path) -> str:
    """What each pass over the pairs took."""
    rows = [["pass", "fit s", "pairs/h", "tokens/s", "peak MB", "MFLOP/pair"]]
    for path in _records(scores):
        cost = runs.read_json(path)
        rows.append(
            [
                path.stem,
                f"{cost['fit_seconds']:.0f}",
                f"{cost['pairs_per_hour']:,.0f}",
                f"{cost['tokens_per_second']:,.0f}",
                f"{cost['peak_bytes'] / 1e6:,.0f}",
                f"{cost['flops_per_pair'] / 1e6:,.0f}",
            ]
        )
    published = f"published, on 32 TPU v2 cores: {throughput.PUBLISHED_PER_HOUR:,.0f} pairs/h"
    return f"{_table(rows)}\n{published}"


def format_results(found: dict[str, Any]) -> str:
    """AUC and AP in per cent by score; BLEU by choice."""
    text = []
    if found["retrieval"]:
        rows = [["score", "AUC", "AP"]]
        for row in found["retrieval"]:
            values = (f"{100 * row[key]:.1f}" for key in ("auc", "average_precision"))
            rows.append([row["score"], *values])
        title = f"{found['num_noisy']} wrong references of {found['num_pairs']} pairs"
        text += [title, _table(rows)]
    if found["selection"]:
        rows = [["chosen by", "kept", "wrong", "BLEU"]]
        for row in found["selection"]:
            shares = (f"{100 * row[key]:.1f}%" for key in ("share", "noisy_share"))
            rows.append([row["method"], *shares, f"{row['bleu']:.2f}"])
        text.append(_table(rows))
    text.append(f"BLEU of the model that scored: {found['bleu']['bleu']:.2f}")
    text.append(found["bleu"]["signature"])
    if "forward_mode" in found:
        text.append(
            f"{found['forward_mode']['ratio']:.1f} times the rate of forward mode through the "
            f"whole network, on {found['forward_mode']['num_pairs']} pairs"
        )
    return "\n".join(text)


def _records(scores: pathlib.Path) -> list[pathlib.Path]:
    return sorted(scores.glob("*.json"))


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
