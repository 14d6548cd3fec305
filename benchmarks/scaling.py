"""How time and memory grow with the examples, the parameters, the rank and the replicas.

    python benchmarks/scaling.py

Along each axis four sizes, the others held: an `Arnoldi` fit and the self-influence of its training
examples, in a process of its own, whose first fit, of as many examples as a batch has, pays for the
tracing. Exponents are those of the power law fitted to all four (least squares of the logarithms),
of the seconds, and of the bytes that become resident on top of what was. Replicas are logical
devices of one CPU under a MirroredStrategy: they share its cores, so that time cannot fall with
them; what shows is what their coordination costs, and what memory each adds. Random weights and
examples of the recorded seed. Writes benchmarks/results/scaling.json.
"""

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_influence as ki
import projection  # It finds the examples, `runs` among them.
from keras_influence.methods.resident import MemoryWatch

import runs  # isort: skip

SEED = 0
NUM_INPUTS = 256


class Size(NamedTuple):
    """What is measured: a perceptron of three layers, two of `width` units."""

    num_examples: int = 2_000
    width: int = 512
    rank: int = 10
    replicas: int = 1


AXES: dict[str, list[Size]] = {
    "N": [Size(num_examples=num) for num in (1_000, 2_000, 4_000, 8_000)],
    "p": [Size(width=width) for width in (256, 512, 1024, 2048)],
    "rank": [Size(rank=rank) for rank in (10, 20, 40, 80)],
    "replicas": [Size(replicas=count) for count in (1, 2, 4, 8)],
}
BATCH_SIZE = 500


def perceptron(width: int) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input([NUM_INPUTS]),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def devices(count: int) -> tf.distribute.Strategy:
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * count
    )
    if count == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(count)])


def measure(size: Size) -> dict[str, Any]:
    with devices(size.replicas).scope():
        keras.utils.set_random_seed(SEED)
        model = perceptron(size.width)
    random = np.random.default_rng(SEED)
    x = random.standard_normal((size.num_examples, NUM_INPUTS), np.float32)
    y = random.integers(0, 10, size.num_examples)
    # Of the eigenvectors alone: the axis is the rank.
    method = ki.Arnoldi(
        model, size.rank, damping=0.1, complement=None, batch_size=BATCH_SIZE, verbose=0
    )
    few = x[:BATCH_SIZE], y[:BATCH_SIZE]
    method.fit(few).self_influence(few)
    with MemoryWatch() as watch:
        start = time.perf_counter()
        method.fit((x, y))
        fitted = time.perf_counter()
        method.self_influence((x, y))
        ended = time.perf_counter()
    return {
        **size._asdict(),
        "num_parameters": method.maps.parameters.size,
        "fit_seconds": fitted - start,
        "score_seconds": ended - fitted,
        "added_mb": (watch.peak - watch.before) / 1e6,
        "basis_mb": 8e-6 * size.rank * method.maps.parameters.size,
        "matmul_gflops": runs.matmul_gflops(),
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """e of values ~ sizes^e."""
    slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    options = flags.FLAGS
    axes = {}
    columns = {"N": "num_examples", "p": "num_parameters", "rank": "rank", "replicas": "replicas"}
    for axis in options.axes:
        rows = []
        for size in AXES[axis]:
            size = size._replace(num_examples=size.num_examples // options.shrink)
            rows.append(projection.in_new_process(measure, size))
            print(json.dumps(rows[-1]), flush=True)
        sizes = [row[columns[axis]] for row in rows]
        exponents = {
            what: exponent(sizes, [row[what] for row in rows])
            for what in ("fit_seconds", "score_seconds", "added_mb")
        }
        print(axis, json.dumps(exponents), flush=True)
        axes[axis] = {"sizes": sizes, "rows": rows, "exponents": exponents}
    result = {
        "settings": {"seed": SEED, "batch_size": BATCH_SIZE, "shrink": options.shrink},
        "axes": axes,
        "machine": projection.machine(),
    }
    runs.write_json(pathlib.Path(options.output_dir) / "scaling.json", result)


if __name__ == "__main__":
    flags.DEFINE_list("axes", list(AXES), "What grows.")
    flags.DEFINE_integer("shrink", 1, "Divides the examples, for a quick look.")
    flags.DEFINE_string("output_dir", str(projection.RESULTS), "Directory of the file.")
    app.run(main)
