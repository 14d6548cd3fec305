"""What measurements wrote, and numbers of several runs in one cell of a table."""

import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def read_results(prefix: str) -> list[dict[str, Any]]:
    """The results whose file name begins with `prefix`, in the order of their names."""
    files = sorted(RESULTS.glob(f"{prefix}*.json"))
    if not files:
        raise FileNotFoundError(f"There is no result {prefix}*.json in {RESULTS}.")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and the range where they differ."""
    mean, low, high = (
        f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"
