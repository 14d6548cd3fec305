"""How well influences predict what retraining without one example does, for two models.

    python benchmarks/removals.py --banks=DIRECTORY

What examples/leave_one_out.py does, of softmax regression and of a small CNN. Writes
benchmarks/results/removals-MODEL.json and docs/removals.png. --banks names a directory that keeps
the retrainings, which go on where they were left.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags
from matplotlib import figure

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import leave_one_out  # noqa: E402
import runs  # noqa: E402

_BANKS = flags.DEFINE_string("banks", "banks", "Directory of the banks.")
_REMOVED = 100


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    drawing = figure.Figure(figsize=(8, 4), layout="constrained")
    panels = drawing.subplots(1, len(leave_one_out.L2))
    for axes, (name, l2) in zip(panels, leave_one_out.L2.items(), strict=True):
        bank = pathlib.Path(_BANKS.value) / f"removals-{name}"
        found = leave_one_out.compare(name, l2, _REMOVED, bank)
        leave_one_out.scatter(axes, found)
        result = {
            **found.summary,
            "predicted": found.predicted.tolist(),
            "actual": found.actual.tolist(),
            "versions": runs.versions(),
        }
        path = ROOT / "benchmarks" / "results" / f"removals-{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(found.summary, flush=True)
    drawing.savefig(ROOT / "docs" / "removals.png", dpi=120)


if __name__ == "__main__":
    app.run(main)
