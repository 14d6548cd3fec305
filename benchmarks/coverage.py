"""What serves the parameters of library models: rules, or forward mode.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --only BERT,MobileNet

Every architecture family of keras.applications, by its smallest member at the smallest input that
it takes, and KerasHub's BERT, GPT-2, Llama, T5, Whisper and ViT at toy sizes. Of each, two examples
are projected on two random directions by the layers' rules, and held against forward mode through
the whole network, in float64. Seconds include the traces, which are most of them at these sizes.
Writes benchmarks/results/coverage.json after each model, and keeps what it holds of others.
"""

import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import library_models  # noqa: E402
import runs  # noqa: E402

_ONLY = flags.DEFINE_list("only", [], "Families to measure; all of them by default.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, examples and directions.")
_OUTPUT = flags.DEFINE_string(
    "output", str(ROOT / "benchmarks" / "results" / "coverage.json"), "File to write."
)


def measure(chosen: library_models.LibraryModel, seed: int) -> dict[str, Any]:
    """One model's row."""
    keras.utils.clear_session()
    model, batch = library_models.problem(chosen, seed=seed)
    start = time.perf_counter()
    result = library_models.compare(model, batch, seed=seed)
    return {
        "family": chosen.family,
        "member": chosen.member,
        "library": chosen.library,
        "inputs": [list(leaf.shape[1:]) for leaf in tf.nest.flatten(batch[0])],
        "num_parameters": sum(row.parameters for row in result.coverage.served),
        "num_variables": len(result.coverage.served),
        "num_flat_variables": result.num_flat,
        "shares": result.coverage.shares(),
        "forward_mode": {
            row.variable: row.rule for row in result.coverage.served if "forward mode" in row.rule
        },
        "error": result.error,
        "reference": result.reference,
        "seconds": time.perf_counter() - start,
    }


def _show(row: dict[str, Any]) -> None:
    shares = ", ".join(f"{rule} {share:.2%}" for rule, share in row["shares"].items())
    print(
        f"{row['family']:16} {row['num_parameters']:11,} parameters  error {row['error']:.1e}  "
        f"{row['seconds']:5.0f} s  {shares}",
        flush=True,
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    import keras_hub

    families = [each.family for each in library_models.MODELS]
    unknown = sorted(set(_ONLY.value) - set(families))
    if unknown:
        raise app.UsageError(f"--only takes families of {families}. Received: {unknown}.")
    output = pathlib.Path(_OUTPUT.value)
    versions = {**runs.versions(), "keras_hub": keras_hub.__version__}
    settings = {"dtype": "float64", "num_examples": 2, "num_directions": 2, "seed": _SEED.value}
    rows = {}
    if output.exists():
        before = json.loads(output.read_text(encoding="utf-8"))
        if before["settings"] == settings and before["versions"] == versions:
            rows = {row["family"]: row for row in before["rows"]}
    for chosen in library_models.MODELS:
        if _ONLY.value and chosen.family not in _ONLY.value:
            continue
        rows[chosen.family] = measure(chosen, _SEED.value)
        _show(rows[chosen.family])
        ordered = [rows[family] for family in families if family in rows]
        runs.write_json(output, {"settings": settings, "versions": versions, "rows": ordered})


if __name__ == "__main__":
    app.run(main)
