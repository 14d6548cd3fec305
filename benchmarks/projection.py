"""Per-example gradient projections: what the rules make of them beside the two usual ways.

    python benchmarks/projection.py

<grad l_i, v_j> for the examples of a batch and random directions, by three routes:

    engine      `LossMaps.project`: one forward and one backward pass, and a rule for each layer
    forward     forward mode through the whole network, a pass a direction
    vectorised  each example's gradient by `tf.vectorized_map`, and a product with the directions

Times are taken in one process, the routes by turns, and a ratio is the median over the turns of the
two times of one turn, so that what else the machine does falls on both. Forward mode is timed on 10
directions at most, in one graph, and the vectorised gradients on one block: the one costs the same
for each ten directions, the other for each block, and their rates are reckoned so. Peak memory is
that of a process of its own for each measurement: what the first two calls, tracing included, add
to what is resident when the model, the batch and the directions, as the route wants them, are in
place (Linux counts it). Random weights, inputs and directions of the recorded seed. The
transformer's 100 directions take 16 GB of memory. Writes benchmarks/results/projection-MODEL.json.
"""

import concurrent.futures
import ctypes
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from keras_influence.gradients import Contraction, LossMaps, projection_flops

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "examples"))

import models  # noqa: E402
import runs  # noqa: E402

BATCH_SIZES = {"small_cnn": 500, "large_cnn": 500, "mlp": 500, "transformer": 64}
RANKS = {"transformer": [1, 10, 20, 100]}
DEFAULT_RANKS = [1, 10, 100]
SEED = 0
# Directions that forward mode takes in one graph: tracing a hundred takes minutes.
FORWARD_DIRECTIONS = 10
# Of the gradients that `tf.vectorized_map` makes at once.
BLOCK_BYTES = 256 * 2**20
# Where precision of the products is compared: (model, rank).
BFLOAT16 = ("large_cnn", 100)
_LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Problem(NamedTuple):
    """A model and its loss, and a batch of random examples."""

    maps: LossMaps
    batch: Any
    batch_size: int


class Timed(NamedTuple):
    """A route's call, and what of the whole it does: so many examples and directions."""

    call: Callable[[], tf.Tensor]
    num_examples: int
    num_directions: int


class Turns(NamedTuple):
    """Calls timed by turns.

    Attributes:
        first: what each call gave at first; this one, which traces its graph, is not timed.
        seconds: of each call, by turns.
        gflops: rate of float32 matrix products, by turns.
    """

    first: dict[str, tf.Tensor]
    seconds: dict[str, np.ndarray]
    gflops: np.ndarray


def define_flags() -> None:
    """The flags of this program and of benchmarks/curvature.py.

    Defined when a program starts, not when it is imported: the examples have flags of these names.
    """
    flags.DEFINE_list("models", list(BATCH_SIZES), "What to measure.")
    flags.DEFINE_integer("batch_size", None, f"Examples of a batch; by default {BATCH_SIZES}.")
    flags.DEFINE_integer("repeats", 7, "Turns of each measurement.", lower_bound=1)


def problem(name: str, batch_size: int | None, contraction: Contraction | None = None) -> Problem:
    """A model of `examples/models.py` with random weights, and random examples of its shapes."""
    keras.utils.set_random_seed(SEED)
    batch_size = batch_size or BATCH_SIZES[name]
    if name == "transformer":
        return token_problem(models.transformer(), batch_size, contraction)
    random = np.random.default_rng(SEED)
    model = models.MODELS[name]((28, 28, 1), 10)
    images = random.standard_normal((batch_size, 28, 28, 1), np.float32)
    batch = (tf.constant(images), tf.constant(random.integers(0, 10, batch_size)))
    return Problem(LossMaps(model, _LOSS, contraction=contraction), batch, batch_size)


def token_problem(
    model: keras.Model, batch_size: int, contraction: Contraction | None = None
) -> Problem:
    """`models.transformer` of any size, and random tokens."""
    random = np.random.default_rng(SEED)
    num_tokens, vocabulary = model.output_shape[1:]
    source, target, labels = tf.constant(
        random.integers(0, vocabulary, (3, batch_size, num_tokens), np.int32)
    )
    batch = ((source, target), labels)
    return Problem(LossMaps(model, _LOSS, contraction=contraction), batch, batch_size)


def random_directions(maps: LossMaps, rank: int) -> tf.Tensor:
    """[rank, p]."""
    return tf.random.stateless_normal([rank, maps.parameters.size], [SEED, rank])


def engine(problem: Problem, directions: tf.Tensor) -> Timed:
    maps, batch, batch_size = problem
    prepared = maps.prepare(directions, batch)
    return Timed(lambda: maps.project(batch, prepared), batch_size, directions.shape[0])


def forward(problem: Problem, directions: tf.Tensor) -> Timed:
    maps, batch, batch_size = problem
    some = directions[:FORWARD_DIRECTIONS]
    return Timed(lambda: maps.forward_project(batch, some), batch_size, some.shape[0])


def vectorised(problem: Problem, directions: tf.Tensor) -> Timed:
    maps, batch, batch_size = problem
    values, sizes = maps.parameters.values, maps.parameters.sizes
    count = min(batch_size, max(1, BLOCK_BYTES // (4 * maps.parameters.size)))
    block = tf.nest.map_structure(lambda leaf: leaf[:count], batch)
    # By variables, so that the gradients need not be copied into one matrix.
    columns = [
        tf.transpose(directions[:, end - size : end])
        for size, end in zip(sizes, np.cumsum(sizes), strict=True)
    ]
    # Mute TensorFlow's remarks on the operations that it maps by a loop.
    tf.get_logger().setLevel("ERROR")

    def one_example(example: Any) -> list[tf.Tensor]:
        x, y = tf.nest.map_structure(lambda leaf: leaf[tf.newaxis], example)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            loss = maps.loss(y, maps.model(x, training=False))
        return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, values)]

    @tf.function(autograph=False)
    def project(block: Any, columns: Sequence[tf.Tensor]) -> tf.Tensor:
        gradients = tf.vectorized_map(one_example, block)
        return tf.add_n(
            [
                tf.matmul(tf.reshape(gradient, [count, size]), part)
                for gradient, size, part in zip(gradients, sizes, columns, strict=True)
            ]
        )

    return Timed(lambda: project(block, columns), count, directions.shape[0])


ROUTES: dict[str, Callable[[Problem, tf.Tensor], Timed]] = {
    "engine": engine,
    "forward": forward,
    "vectorised": vectorised,
}


def in_turns(calls: Mapping[str, Callable[[], tf.Tensor]], repeats: int) -> Turns:
    """Times the calls by turns, and beside each turn the machine's own products of matrices."""
    first = {name: call() for name, call in calls.items()}
    seconds = {name: np.zeros(repeats) for name in calls}
    gflops = np.zeros(repeats)
    for turn in range(repeats):
        gflops[turn] = runs.matmul_gflops()
        for name, call in calls.items():
            start = time.perf_counter()
            call().numpy()
            seconds[name][turn] = time.perf_counter() - start
    return Turns(first, seconds, gflops)


def quartiles(values: np.ndarray) -> list[float]:
    """First quartile, median, third quartile."""
    return [float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]


def difference(found: tf.Tensor, expected: tf.Tensor) -> float:
    """Largest difference of two entries, in units of the largest entry expected."""
    return float(tf.reduce_max(tf.abs(found - expected)) / tf.reduce_max(tf.abs(expected)))


def _resident(field: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process, in MB."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024 / 1e6


def extra_memory(name: str, batch_size: int | None, rank: int, route: str) -> float:
    """Peak of two calls above what is resident before them, in MB; in a process of its own."""
    given = problem(name, batch_size)
    timed = ROUTES[route](given, random_directions(given.maps, rank))
    # What making the directions left: free memory, which the calls would take unseen, and a peak.
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    for _ in range(2):
        timed.call().numpy()
    return _resident("VmHWM") - before


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def measure(name: str, batch_size: int | None, rank: int, repeats: int) -> dict[str, Any]:
    """The three routes on one model and number of directions: a row of the table."""
    # First, so that not two processes hold directions at once.
    memory = {
        route: in_new_process(extra_memory, name, batch_size, rank, route) for route in ROUTES
    }
    # Anew for each rank: a traced `LossMaps` would relax its graph to any number of directions.
    given = problem(name, batch_size)
    directions = random_directions(given.maps, rank)
    timed = {route: make(given, directions) for route, make in ROUTES.items()}
    del directions
    turns = in_turns({route: each.call for route, each in timed.items()}, repeats)
    speeds = {
        route: each.num_examples * each.num_directions / rank / turns.seconds[route]
        for route, each in timed.items()
    }
    flops = projection_flops(given.maps, given.batch, rank)
    gflops = sum(flops.values()) * speeds["engine"] / 1e9
    return {
        "model": name,
        "num_parameters": given.maps.parameters.size,
        "rank": rank,
        "batch_size": given.batch_size,
        "routes": {
            route: {
                "examples_per_second": quartiles(speeds[route]),
                "timed_examples": each.num_examples,
                "timed_directions": each.num_directions,
                "extra_memory_mb": memory[route],
            }
            for route, each in timed.items()
        },
        "ratio_to_forward": quartiles(speeds["engine"] / speeds["forward"]),
        "ratio_to_vectorised": quartiles(speeds["engine"] / speeds["vectorised"]),
        "difference_from_forward": difference(
            turns.first["engine"][:, :FORWARD_DIRECTIONS], turns.first["forward"]
        ),
        "difference_from_vectorised": difference(
            turns.first["engine"][: timed["vectorised"].num_examples], turns.first["vectorised"]
        ),
        "flops_per_example": flops,
        "matmul_gflops": quartiles(turns.gflops),
        "share_of_matmul_rate": quartiles(gflops / turns.gflops),
    }


def norms(name: str, batch_size: int | None, repeats: int) -> dict[str, Any]:
    """What all squared norms cost beside one gradient, and which rules serve the parameters."""
    maps, batch, _ = problem(name, batch_size)
    seconds = in_turns(
        {"norms": lambda: maps.squared_norms(batch), "gradient": lambda: maps.gradient(batch)},
        repeats,
    ).seconds
    return {
        "norms_seconds": quartiles(seconds["norms"]),
        "gradient_seconds": quartiles(seconds["gradient"]),
        "norms_over_gradient": quartiles(seconds["norms"] / seconds["gradient"]),
        "rule_shares": maps.coverage(batch).shares(),
    }


def bfloat16(name: str, batch_size: int | None, rank: int, repeats: int) -> dict[str, Any]:
    """What contracting in bfloat16 gains, and how far it is from float32."""
    exact = problem(name, batch_size)
    rough = problem(name, batch_size, Contraction(dtype=tf.bfloat16))
    directions = random_directions(exact.maps, rank)
    calls = {
        "float32": engine(exact, directions).call,
        "bfloat16": engine(rough, directions).call,
    }
    turns = in_turns(calls, repeats)
    return {
        "model": name,
        "rank": rank,
        "gain": quartiles(turns.seconds["float32"] / turns.seconds["bfloat16"]),
        "difference": difference(turns.first["bfloat16"], turns.first["float32"]),
    }


def machine() -> dict[str, Any]:
    """What the numbers come from, beside the models."""
    return {
        "num_cpus": os.cpu_count(),
        "matmul_gflops": runs.matmul_gflops(),
        "versions": runs.versions(),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    options = flags.FLAGS
    for name in options.models:
        result: dict[str, Any] = {
            "settings": {
                "seed": SEED,
                "repeats": options.repeats,
                "forward_directions": FORWARD_DIRECTIONS,
                "block_bytes": BLOCK_BYTES,
            },
            "rows": [],
            "norms": {"model": name, **norms(name, options.batch_size, options.repeats)},
            "machine": machine(),
        }
        print(json.dumps(result["norms"]), flush=True)
        for rank in map(int, options.ranks or RANKS.get(name, DEFAULT_RANKS)):
            result["rows"].append(measure(name, options.batch_size, rank, options.repeats))
            print(json.dumps(result["rows"][-1]), flush=True)
            keras.backend.clear_session()
        if name == BFLOAT16[0]:
            result["bfloat16"] = bfloat16(name, options.batch_size, BFLOAT16[1], options.repeats)
            print(json.dumps(result["bfloat16"]), flush=True)
        runs.write_json(pathlib.Path(options.output_dir) / f"projection-{name}.json", result)


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_string("output_dir", str(RESULTS), "Directory of the files, one a model.")
    flags.DEFINE_list("ranks", None, "Numbers of directions; by default 1, 10, 100 and some more.")
    app.run(main)
