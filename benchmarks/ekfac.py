"""How long EKFAC takes for 10,000 images of a network of 793,894 parameters.

    python benchmarks/ekfac.py --data_dir=DIRECTORY

Trains large_cnn on Fashion-MNIST for one epoch, fits EKFAC, by labels drawn from the model, on the
first 10,000 images, and takes their self-influence: as often as `--repeats` says, in one process,
of which the first time traces the graphs. The layer of 9,217 inputs (the bias's one among them) and
84 outputs is the largest part of it. `--check_rank` fits once more with so many eigenvectors, and
compares self-influence. Writes benchmarks/results/ekfac.json.
"""

import pathlib
import resource
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


def measure(
    data: image_data.ImageData,
    batch_size: int,
    max_rank: int,
    check_rank: int,
    repeats: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Times `fit` and `self_influence`."""
    with tempfile.TemporaryDirectory() as directory:
        model = training.train(data, "large_cnn", directory, 1, 64, 0.01, seed).model
    train = (data.train_images, data.train_labels)
    options = {"batch_size": batch_size, "seed": seed}
    ekfac = ki.EKFAC(model, max_rank=max_rank, **options)
    fits, scores = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        ekfac.fit(train)
        fits.append(time.perf_counter() - start)
        start = time.perf_counter()
        own = ekfac.self_influence(train)
        scores.append(time.perf_counter() - start)
    result = {
        "model": model.name,
        "num_parameters": model.count_params(),
        "num_images": len(train[1]),
        "batch_size": batch_size,
        "max_rank": max_rank,
        "seed": seed,
        "fit_seconds": fits,
        "score_seconds": scores,
        # Of the whole process, in kilobytes on Linux.
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "matmul_gflops": runs.matmul_gflops(),
        "versions": runs.versions(),
    }
    if check_rank:
        finer = ki.EKFAC(model, max_rank=check_rank, **options).fit(train).self_influence(train)
        differences = np.abs(own - finer) / finer
        result["check"] = {
            "max_rank": check_rank,
            "correlation": float(np.corrcoef(own, finer)[0, 1]),
            "median_difference": float(np.median(differences)),
        }
    return result


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    options = flags.FLAGS
    data = image_data.load(options.dataset, options.data_dir, options.num_train)
    result = measure(
        data, options.batch_size, options.max_rank, options.check_rank, options.repeats
    )
    result["dataset"] = options.dataset
    runs.write_json(pathlib.Path(options.output), result)
    print(
        f"{result['num_images']:,} images: fit in {min(result['fit_seconds']):.1f} s, "
        f"self-influence in {min(result['score_seconds']):.1f} s"
    )


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", None, "Directory of tensorflow_datasets.")
    flags.DEFINE_string("dataset", "fashion_mnist", "Data set of examples/image_data.py.")
    flags.DEFINE_integer("num_train", 10_000, "Images; 0 for all.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 500, "Images computed together.", lower_bound=1)
    flags.DEFINE_integer("max_rank", 1024, "See `KFAC`.", lower_bound=1)
    flags.DEFINE_integer("check_rank", 0, "Rank to compare with; 0 for none.", lower_bound=0)
    flags.DEFINE_integer("repeats", 2, "Times to measure.", lower_bound=1)
    flags.DEFINE_string(
        "output", str(ROOT / "benchmarks" / "results" / "ekfac.json"), "File to write."
    )
    app.run(main)
