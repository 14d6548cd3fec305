"""What an Arnoldi iteration costs beside its products, and what storing it in bfloat16 costs.

    python benchmarks/arnoldi.py --parts=overhead,storage

overhead  200 iterations on large_cnn over 2,000 random images: the time in Hessian products, in
          everything else, and how orthonormal the basis is in the end. What the two must cost: a
          product is 8 network passes of 2,000 images where one forward pass is 1; orthogonalising
          against j vectors of p numbers reads the basis three times, 12 j p bytes.
storage   Accuracy on small_cnn with the vectors in bfloat16: an entry is rounded by 2^-8 of it at
          the most, and the product of two vectors of p numbers by 2^-8 / sqrt(p) in size.

Writes benchmarks/results/arnoldi-PART.json.
"""

import json
import pathlib
import sys
import time
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_influence as ki

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import models  # noqa: E402
import runs  # noqa: E402

_EXAMPLES = flags.DEFINE_integer("num_examples", 2_000, "Examples of the Hessian.")
_ITERATIONS = flags.DEFINE_integer("num_iterations", 200, "Hessian-vector products.")
_PARTS = flags.DEFINE_list("parts", ["overhead", "storage"], "What to measure.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", str(ROOT / "benchmarks" / "results"), "Directory of the files."
)


def measure(num_examples: int, num_iterations: int, seed: int = 0) -> dict[str, object]:
    """Times one iteration; the first product, which traces the graph, is made beforehand."""
    keras.utils.set_random_seed(seed)
    model = models.large_cnn((28, 28, 1), 10)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(seed)
    x = tf.constant(random.standard_normal((num_examples, 28, 28, 1), np.float32))
    y = tf.constant(random.integers(0, 10, num_examples))
    maps = ki.gradients.LossMaps(model)
    size = min(500, num_examples)
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, num_examples, size)]
    seconds: list[float] = []

    def product(vector: tf.Tensor) -> np.ndarray:
        start = time.perf_counter()
        total = tf.add_n([maps.curvature(batch, vector) for batch in batches]) / num_examples
        result = total.numpy()
        seconds.append(time.perf_counter() - start)
        return result

    start_vector = tf.random.stateless_normal([maps.parameters.size], [seed, 0])
    product(start_vector)
    seconds.clear()
    start = time.perf_counter()
    result = ki.linalg.arnoldi(product, start_vector, num_iterations)
    whole = time.perf_counter() - start
    gram = result.basis @ result.basis.T
    return {
        "model": model.name,
        "num_parameters": model.count_params(),
        "num_examples": num_examples,
        "num_iterations": num_iterations,
        "seed": seed,
        "product_seconds": sum(seconds),
        "product_seconds_median": float(np.median(seconds)),
        "product_seconds_quartiles": [float(q) for q in np.quantile(seconds, (0.25, 0.75))],
        "other_seconds": whole - sum(seconds),
        "overhead": (whole - sum(seconds)) / sum(seconds),
        "orthogonality": float(np.abs(gram - np.eye(len(gram))).max()),
        "matmul_gflops": runs.matmul_gflops(),
        "versions": runs.versions(),
    }


def storage(num_examples: int = 500, rank: int = 20, seed: int = 0) -> dict[str, object]:
    """What bfloat16 storage costs in accuracy, on a small model: no time is measured."""
    keras.utils.set_random_seed(seed)
    model = models.small_cnn((28, 28, 1), 10)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(seed)
    x = random.standard_normal((num_examples, 28, 28, 1), np.float32)
    train = (x, random.integers(0, 10, num_examples))
    model.fit(*train, epochs=3, verbose=0)
    exact, rounded = (
        ki.Arnoldi(model, rank, basis_dtype=dtype, complement=None, batch_size=250, verbose=0)
        for dtype in (None, "bfloat16")
    )
    for each in (exact, rounded):
        each.fit(train)
    values = exact.eigenbasis.values
    own = [each.self_influence(train).astype(np.float64) for each in (exact, rounded)]
    return {
        "model": model.name,
        "num_parameters": model.count_params(),
        "num_examples": num_examples,
        "rank": rank,
        "num_iterations": exact.num_iterations,
        "seed": seed,
        # Of the largest eigenvalue, and of the mean self-influence: root mean squares.
        "eigenvalue_error": float(np.abs(rounded.eigenbasis.values - values).max() / values[0]),
        "self_influence_error": float(np.sqrt(np.mean((own[1] - own[0]) ** 2)) / own[0].mean()),
        "orthogonality": [exact.orthogonality, rounded.orthogonality],
        "versions": runs.versions(),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    measures = {
        "overhead": lambda: measure(_EXAMPLES.value, _ITERATIONS.value),
        "storage": storage,
    }
    for part in _PARTS.value:
        if part not in measures:
            raise app.UsageError(f"A part must be one of {sorted(measures)}. Received: {part!r}.")
        text = json.dumps(measures[part](), indent=1)
        print(text)
        path = pathlib.Path(_OUTPUT_DIR.value) / f"arnoldi-{part}.json"
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
