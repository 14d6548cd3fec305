"""What an Arnoldi iteration costs beside its Hessian products.

    python benchmarks/arnoldi.py

200 iterations on large_cnn over 2,000 random images: the time in Hessian products, in everything
else, and how orthonormal the basis is in the end. What the two must cost: a product is 8 network
passes of 2,000 images where one forward pass is 1; orthogonalising against j vectors of p numbers
reads the basis three times, 12 j p bytes. Writes benchmarks/results/arnoldi-overhead.json.
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
_OUTPUT = flags.DEFINE_string(
    "output", str(ROOT / "benchmarks" / "results" / "arnoldi-overhead.json"), "File to write."
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


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    result = measure(_EXAMPLES.value, _ITERATIONS.value)
    text = json.dumps(result, indent=1)
    print(text)
    pathlib.Path(_OUTPUT.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
