"""How long an index of 60,000 images takes.

    python benchmarks/index.py --data_dir=DIRECTORY

Trains large_cnn on Fashion-MNIST for one epoch, fits Arnoldi at rank 10 on the Hessian of 500
images, and times `scorer.index` over the whole training set, as often as `--repeats` says. What it
must cost: see benchmarks/projection.py; a call for one query of the index is timed too. Writes
benchmarks/results/index.json.
"""

import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

import keras_influence as ki

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import image_data  # noqa: E402
import runs  # noqa: E402
import training  # noqa: E402

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Directory of tensorflow_datasets.")
_DATASET = flags.DEFINE_string("dataset", "fashion_mnist", "Data set of examples/image_data.py.")
_NUM_TRAIN = flags.DEFINE_integer("num_train", 0, "Images to index; 0 for all.")
_RANK = flags.DEFINE_integer("rank", 10, "Numbers an image.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 500, "Images computed together.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Times to index.")
_OUTPUT = flags.DEFINE_string(
    "output", str(ROOT / "benchmarks" / "results" / "index.json"), "File to write."
)


def measure(
    data: image_data.ImageData, rank: int, batch_size: int, repeats: int, seed: int = 0
) -> dict[str, Any]:
    """Times indexing, after one batch that traces the graph."""
    with tempfile.TemporaryDirectory() as directory:
        model = training.train(data, "large_cnn", directory, 1, 64, 0.01, seed).model
    train = (data.train_images, data.train_labels)
    arnoldi = ki.Arnoldi(
        model, rank, num_examples=min(500, len(train[1])), batch_size=batch_size, seed=seed
    )
    arnoldi.fit(train)
    first = tuple(array[:batch_size] for array in train)
    arnoldi.encode(first)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        scorer = ki.InfluenceScorer(arnoldi, k=10).index(train)
        seconds.append(time.perf_counter() - start)
    query = tuple(array[:1] for array in (data.test_images, data.test_labels))
    scorer(query)
    answers = []
    for _ in range(20):
        start = time.perf_counter()
        scorer(query)
        answers.append(time.perf_counter() - start)
    median = float(np.median(seconds))
    return {
        "model": model.name,
        "num_parameters": model.count_params(),
        "num_images": len(train[1]),
        "rank": rank,
        "batch_size": batch_size,
        "seed": seed,
        "index_seconds": seconds,
        "images_per_second": len(train[1]) / median,
        "query_milliseconds": 1e3 * float(np.median(answers)),
        "matmul_gflops": runs.matmul_gflops(),
        "versions": runs.versions(),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    data = image_data.load(_DATASET.value, _DATA_DIR.value, _NUM_TRAIN.value)
    result = measure(data, _RANK.value, _BATCH_SIZE.value, _REPEATS.value)
    result["dataset"] = _DATASET.value
    runs.write_json(pathlib.Path(_OUTPUT.value), result)
    print(
        f"{result['num_images']:,} images at rank {result['rank']} in "
        f"{np.median(result['index_seconds']):.1f} s: {result['images_per_second']:,.0f} a second; "
        f"a query in {result['query_milliseconds']:.1f} ms"
    )


if __name__ == "__main__":
    app.run(main)
