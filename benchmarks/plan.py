"""What a plan predicts, and what the work then takes.

    python benchmarks/plan.py

Of each model `Arnoldi.plan(train, queries)` in one process, and in another `fit(train)` and
`scores(queries, train)`. Predicted seconds are those of the stages and of tracing, which a new
process pays for; memory is what becomes resident on top of what was before (the model, the data,
TensorFlow), and the peak in all. The bar for the predictions is 30% in time, and 25% in memory.
Random weights and examples of the recorded seed. Writes benchmarks/results/plan-MODEL.json.
"""

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from absl import app, flags

import keras_influence as ki
import projection  # It finds the examples, `models` among them.
from keras_influence.methods.resident import MemoryWatch

import models  # isort: skip
import runs  # isort: skip

SEED = 0


class Setting(NamedTuple):
    """A piece of work that takes half a minute."""

    num_train: int
    num_queries: int
    batch_size: int
    rank: int


SETTINGS = {
    "mlp": Setting(10_000, 200, 500, 20),
    "large_cnn": Setting(1_000, 50, 250, 10),
    "transformer": Setting(512, 32, 64, 10),
}


def small_transformer() -> keras.Model:
    """An encoder and a decoder of one layer: 925,904 parameters."""
    return models.transformer(
        num_tokens=16, vocabulary=2_000, width=128, num_layers=1, num_heads=4, feed_forward=256
    )


def given(name: str, setting: Setting) -> tuple[ki.Arnoldi, Any, Any]:
    """The method, and the training examples and queries."""
    keras.utils.set_random_seed(SEED)
    random = np.random.default_rng(SEED)
    num = setting.num_train + setting.num_queries
    if name == "transformer":
        model = small_transformer()
        num_tokens, vocabulary = model.output_shape[1:]
        source, target, labels = random.integers(0, vocabulary, (3, num, num_tokens), np.int32)
        examples: Any = ((source, target), labels)
    else:
        model = models.MODELS[name]((28, 28, 1), 10)
        images = random.standard_normal((num, 28, 28, 1), np.float32)
        examples = (images, random.integers(0, 10, num))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    method = ki.Arnoldi(model, setting.rank, batch_size=setting.batch_size, verbose=0)
    (source, labels), split = examples, setting.num_train
    if isinstance(source, tuple):
        parts = [(tuple(x[cut] for x in source), labels[cut]) for cut in _cuts(split)]
    else:
        parts = [(source[cut], labels[cut]) for cut in _cuts(split)]
    return method, *parts


def _cuts(split: int) -> tuple[slice, slice]:
    return slice(split), slice(split, None)


def predicted(name: str, setting: Setting) -> dict[str, Any]:
    method, train, queries = given(name, setting)
    start = time.perf_counter()
    plan = method.plan(train, queries)
    return {
        "num_parameters": method.maps.parameters.size,
        "seconds": plan.seconds + plan.tracing_seconds,
        "tracing_seconds": plan.tracing_seconds,
        "added_mb": (plan.host_bytes - plan.host_before) / 1e6,
        "peak_mb": plan.host_bytes / 1e6,
        "hessian_products": plan.hessian_products,
        "gflop": plan.flops / 1e9,
        "took_seconds": time.perf_counter() - start,
        "table": str(plan),
        "matmul_gflops": runs.matmul_gflops(),
    }


def measured(name: str, setting: Setting) -> dict[str, Any]:
    method, train, queries = given(name, setting)
    with MemoryWatch() as watch:
        start = time.perf_counter()
        method.fit(train)
        fitted = time.perf_counter()
        method.scores(queries, train)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "fit_seconds": fitted - start,
        "added_mb": (watch.peak - watch.before) / 1e6,
        "peak_mb": watch.peak / 1e6,
        "matmul_gflops": runs.matmul_gflops(),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    options = flags.FLAGS
    for name in options.models:
        setting = SETTINGS[name]
        if options.shrink > 1:
            setting = setting._replace(
                num_train=max(setting.batch_size, setting.num_train // options.shrink)
            )
        told = projection.in_new_process(predicted, name, setting)
        took = projection.in_new_process(measured, name, setting)
        result = {
            "model": name,
            "settings": {"seed": SEED, **setting._asdict()},
            "predicted": told,
            "measured": took,
            "errors": {
                key: told[key] / took[key] - 1 for key in ("seconds", "added_mb", "peak_mb")
            },
            "machine": projection.machine(),
        }
        print(json.dumps(result), flush=True)
        runs.write_json(pathlib.Path(options.output_dir) / f"plan-{name}.json", result)


if __name__ == "__main__":
    flags.DEFINE_list("models", list(SETTINGS), "What to measure.")
    flags.DEFINE_integer("shrink", 1, "Divides the training examples, for a quick look.")
    flags.DEFINE_string("output_dir", str(projection.RESULTS), "Directory of the files.")
    app.run(main)
