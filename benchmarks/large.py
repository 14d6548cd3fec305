"""What does not fit: a basis on the disk, a million encodings, a search among them.

    python benchmarks/large.py --parts=basis,index,search

basis   Arnoldi on a model of 20 million parameters, its vectors in memory and on the disk: time of
        all, time in Hessian products, and what is resident at the most; in a process each. And how
        fast this machine reads memory. 100 products need 8 GB of disk, and of memory.
index   `InfluenceScorer.index` into a directory, over examples that are made as they are read: the
        rate, that of projecting one batch over and over, and what is resident at the most; for a
        tenth of the examples and for all.
search  The ten proponents and the ten opponents of 100 queries among a million encodings of 100
        numbers around a thousand centres: exactly, in memory and on the disk; and by FAISS's flat
        index and its inverted lists, with the share that they find.

What each must cost. Basis: a step of k vectors of p numbers reads k p numbers three times, so that
n steps read 6 n^2 p bytes; a product, twice 7/3 of a gradient's flops. Index: see
benchmarks/projection.py. Search: 2 Q N r flops, and 4 N r bytes. Writes
benchmarks/results/large-PART.json.
"""

import json
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_influence as ki
import projection  # It finds the examples, `runs` among them.
import runs
from keras_influence.retrieval import (
    ExactSearch,
    FaissFlat,
    FaissIVF,
    HostIndex,
    recall,
)
from keras_influence.storage import StoredIndex

PARTS = ("basis", "index", "search")
SEED = 0


class Resident:
    """The most that was resident of this process, in MB, while it lasts."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, projection._resident("VmRSS"))

    def __enter__(self) -> "Resident":
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._ended.set()
        self._thread.join()


def wide(num_inputs: int, width: int) -> keras.Model:
    """A perceptron of two wide layers."""
    keras.utils.set_random_seed(SEED)
    model = keras.Sequential(
        [
            keras.Input((num_inputs,)),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def basis(place: str, width: int, num_iterations: int, rank: int, num: int) -> dict[str, Any]:
    """One fit; in a process of its own."""
    model = wide(784, width)
    random = np.random.default_rng(SEED)
    train = (
        random.standard_normal((num, 784), np.float32),
        random.integers(0, 10, num),
    )
    with tempfile.TemporaryDirectory() as directory:
        path = str(pathlib.Path(directory) / "fit")
        arnoldi = ki.Arnoldi(
            model,
            rank,
            num_iterations,
            batch_size=500,
            basis="host" if place == "host" else path,
            complement=None,  # It is of the iteration alone.
            verbose=0,
        )
        with Resident() as resident:
            start = time.perf_counter()
            arnoldi.fit(train)
            seconds = time.perf_counter() - start
        return {
            "place": place,
            "num_parameters": model.count_params(),
            "num_iterations": num_iterations,
            "rank": rank,
            "num_examples": num,
            "seconds": seconds,
            "product_seconds": arnoldi.product_seconds,
            "resident_mb": resident.peak,
            "basis_mb": 4 * model.count_params() * num_iterations / 1e6,
            "largest_eigenvalues": arnoldi.eigenbasis.values[:3].tolist(),
            "orthogonality": arnoldi.orthogonality,
            "matmul_gflops": runs.matmul_gflops(),
            "read_gbytes_per_second": read_rate(),
        }


def read_rate(num_rows: int = 100, columns: int = 2_000_000, repeats: int = 5) -> float:
    """How fast numpy multiplies rows in memory with a vector: the most that a basis is read at."""
    rows = np.ones((num_rows, columns), np.float32)
    vector = np.ones(columns, np.float32)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        rows @ vector
        seconds.append(time.perf_counter() - start)
    return rows.nbytes / 1e9 / float(np.median(seconds))


def generated(num: int, batch_size: int) -> tf.data.Dataset:
    """Examples that are made as they are asked for: a thousand images, each time brighter."""
    images = np.random.default_rng(SEED).random((1000, 28, 28, 1), np.float32)

    def batch(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        ids = tf.range(number * batch_size, tf.minimum((number + 1) * batch_size, num))
        brightness = 1 + tf.cast(ids // len(images), tf.float32) / num
        return tf.gather(images, ids % len(images)) * tf.reshape(
            brightness, [-1, 1, 1, 1]
        ), ids % 10

    return tf.data.Dataset.range(-(-num // batch_size)).map(batch)


def index(num: int, rank: int) -> dict[str, Any]:
    """One index; in a process of its own."""
    given = projection.problem("mlp", 500)
    model = given.maps.model
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    method = ki.RandomProjection(model, rank, batch_size=500, scale="raw", verbose=0)
    first = next(iter(generated(500, 500)))
    method.fit(first)
    method.encode(first)
    projected = statistics.median(projection_seconds(method, first) for _ in range(5))
    with tempfile.TemporaryDirectory() as directory:
        scorer = ki.InfluenceScorer(method, k=10)
        with Resident() as resident:
            start = time.perf_counter()
            scorer.index(generated(num, 500), pathlib.Path(directory) / "index")
            seconds = time.perf_counter() - start
    return {
        "model": "mlp",
        "num_examples": num,
        "rank": rank,
        "seconds": seconds,
        "examples_per_second": num / seconds,
        "projected_per_second": 500 / projected,
        "resident_mb": resident.peak,
        "matmul_gflops": runs.matmul_gflops(),
    }


def projection_seconds(method: ki.RandomProjection, examples: Any, repeats: int = 20) -> float:
    """Of a batch that is there already, on directions that are."""
    (encoder,) = method._query_encoders()
    directions = encoder.directions(examples)
    start = time.perf_counter()
    for _ in range(repeats):
        method.maps.project(examples, directions).numpy()
    return (time.perf_counter() - start) / repeats


def searches(num: int, rank: int, num_queries: int, k: int, repeats: int) -> dict[str, Any]:
    """Times by turns: in memory, on the disk, by FAISS."""
    random = np.random.default_rng(SEED)
    centres = 2 * random.standard_normal((1000, rank), np.float32)

    def drawn(count: int) -> np.ndarray:
        rows = random.standard_normal((count, rank), np.float32)
        rows += centres[random.integers(0, len(centres), count)]
        return rows

    encodings, queries = drawn(num), drawn(num_queries)
    with tempfile.TemporaryDirectory() as directory:
        stored = StoredIndex(directory, StoredIndex.create(directory, rank, np.float32))
        for start in range(0, num, 65536):
            stored.add(encodings[start : start + 65536], "", "")
        stored.end()
        memory = HostIndex(encodings)
        searchers, build_seconds = {}, {}
        for name, index, kind in (
            ("memory", memory, ExactSearch()),
            ("disk", stored, ExactSearch()),
            ("FAISS flat", memory, FaissFlat()),
            ("FAISS lists", memory, FaissIVF()),
        ):
            start = time.perf_counter()
            searchers[name] = kind.prepare(index)
            build_seconds[name] = time.perf_counter() - start
        ones = np.ones(rank, np.float32)
        shares = {name: recall(memory, each, ones, k) for name, each in searchers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in searchers}
        for turn in range(repeats + 1):
            for name, searcher in searchers.items():
                start = time.perf_counter()
                searcher(queries, k)
                if turn:  # The first reads what the others find in caches.
                    seconds[name].append(time.perf_counter() - start)
    return {
        "num_examples": num,
        "rank": rank,
        "num_queries": num_queries,
        "k": k,
        "seconds": {name: projection.quartiles(np.array(each)) for name, each in seconds.items()},
        "recall": shares,
        "build_seconds": build_seconds,
        "matmul_gflops": runs.matmul_gflops(),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    options = flags.FLAGS
    new = projection.in_new_process
    for part in options.parts:
        if part == "basis":
            given = (options.width, options.num_iterations, options.rank, options.num_train)
            rows = [new(basis, place, *given) for place in ("host", "disk")]
            rows[1]["ratio"] = rows[1]["seconds"] / rows[0]["seconds"]
        elif part == "index":
            rows = [new(index, num, 10) for num in (options.num_index // 10, options.num_index)]
        elif part == "search":
            rows = [new(searches, options.num_index, 100, 100, 10, options.repeats)]
        else:
            raise app.UsageError(f"A part must be one of {PARTS}. Received: {part!r}.")
        print(json.dumps(rows), flush=True)
        result = {"settings": {"seed": SEED}, "rows": rows, "machine": projection.machine()}
        runs.write_json(pathlib.Path(options.output_dir) / f"large-{part}.json", result)


if __name__ == "__main__":
    flags.DEFINE_list("parts", list(PARTS), "What to measure.")
    flags.DEFINE_integer("width", 4000, "Units of the wide layers: 19 million parameters.")
    flags.DEFINE_integer("num_iterations", 100, "Hessian products.")
    flags.DEFINE_integer("rank", 20, "Eigenvectors to keep.")
    flags.DEFINE_integer("num_train", 2000, "Examples of the Hessian.")
    flags.DEFINE_integer("num_index", 1_000_000, "Examples to index, and to search.")
    flags.DEFINE_integer("repeats", 7, "Searches of each kind.")
    flags.DEFINE_string("output_dir", str(projection.RESULTS), "Directory of the files.")
    app.run(main)
