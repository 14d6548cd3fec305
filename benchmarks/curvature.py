"""What products with the Hessian and the Gauss-Newton matrix cost beside a gradient.

    python benchmarks/curvature.py

One gradient of a batch; its Hessian's product with a random vector, forward over reverse and
reverse over reverse; and that of its Gauss-Newton matrix: in one process, by turns, a ratio being
the median over the turns. Models, batches and seed are those of benchmarks/projection.py. Writes
benchmarks/results/curvature.json.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
from absl import app, flags

import projection  # It finds the examples, `runs` among them.
import runs

FORWARD_OVER_REVERSE = "forward over reverse"
REVERSE_OVER_REVERSE = "reverse over reverse"  # `LossMaps.curvature`
GAUSS_NEWTON = "Gauss-Newton"


def measure(name: str, batch_size: int | None, repeats: int) -> dict[str, Any]:
    """All products on one model: a row of the table."""
    maps, batch, batch_size = projection.problem(name, batch_size)
    (vector,) = projection.random_directions(maps, 1)
    orders = {
        FORWARD_OVER_REVERSE: lambda: maps.forward_curvature(batch, vector),
        REVERSE_OVER_REVERSE: lambda: maps.curvature(batch, vector),
        GAUSS_NEWTON: lambda: maps.gauss_newton(batch, vector),
    }
    turns = projection.in_turns(
        {"gradient": lambda: maps.gradient(batch), **orders},
        repeats,
    )
    gradient = turns.seconds["gradient"]
    return {
        "model": name,
        "num_parameters": maps.parameters.size,
        "batch_size": batch_size,
        "seconds": {call: projection.quartiles(each) for call, each in turns.seconds.items()},
        "over_gradient": {
            order: projection.quartiles(turns.seconds[order] / gradient) for order in orders
        },
        "difference": projection.difference(
            turns.first[REVERSE_OVER_REVERSE], turns.first[FORWARD_OVER_REVERSE]
        ),
        "matmul_gflops": projection.quartiles(turns.gflops),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    options = flags.FLAGS
    rows = []
    for name in options.models:
        rows.append(measure(name, options.batch_size, options.repeats))
        print(json.dumps(rows[-1]), flush=True)
        keras.backend.clear_session()
    result = {
        "settings": {"seed": projection.SEED, "repeats": options.repeats},
        "rows": rows,
        "machine": projection.machine(),
    }
    runs.write_json(pathlib.Path(options.output), result)


if __name__ == "__main__":
    projection.define_flags()
    flags.DEFINE_string("output", str(projection.RESULTS / "curvature.json"), "File to write.")
    app.run(main)
