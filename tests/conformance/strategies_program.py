"""Computes every method's golden under one strategy, in a process of its own.

TensorFlow fixes its devices and its cluster once for a process. The arguments are one JSON object;
see `main`.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

import keras_influence as ki
from keras_influence import distribution
from tests import cases
from tests.conformance.methods_test import GOLDENS

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "several_workers.md"
NUM_TRAIN = 23  # A prime: no number of replicas divides it, nor a batch of 6.


class OwnProduct(keras.layers.Layer):
    """A layer without a rule."""

    def build(self, shape):
        self.matrix = self.add_weight(shape=(shape[-1], shape[-1]))

    def call(self, x):
        return tf.tanh(x @ self.matrix)


class OwnCall(keras.Model):
    """Layers with rules, one without, and a kernel that only the whole network explains."""

    def __init__(self):
        super().__init__()
        self.body = keras.Sequential(
            [
                keras.Input((6, 6, 1)),
                keras.layers.Conv2D(3, 3, activation="tanh"),
                keras.layers.BatchNormalization(),
                keras.layers.Flatten(),
                keras.layers.Dense(5),
                OwnProduct(),
            ]
        )
        self.hidden = keras.layers.Dense(5)
        self.head = keras.layers.Dense(3)

    def call(self, x):
        features = self.body(x)
        return self.head(self.hidden(features) + tf.matmul(features, self.hidden.kernel))


def golden_results(new_scope, inside=False, run=None, names=GOLDENS):
    """What each method gives, by name.

    Args:
        new_scope: () -> the scope of the strategy.
        inside: whether everything happens in it, and not only the making of the model.
        run: directory of a training run to give to TracIn; by default it trains one.
    """
    train, queries = cases.images(NUM_TRAIN), cases.images(3, seed=5)
    found = {}
    for name in names:
        keras.utils.set_random_seed(0)
        with new_scope():
            model = cases.image_model()
        directory = pathlib.Path(tempfile.mkdtemp())
        with new_scope() if inside else contextlib.nullcontext():
            if name == "tracin" and run is not None:
                method = ki.TracIn(model, checkpoints=run, batch_size=6)
            else:
                method = GOLDENS[name](model, directory, batch_size=6)
            method.fit(train)
            found[f"{name}: scores"] = method.scores(queries, train)
            found[f"{name}: self-influence"] = method.self_influence(train)
            # Fewer examples than replicas, in a dataset and in its last batch.
            one = tuple(array[:1] for array in train)
            found[f"{name}: one example"] = method.scores(one, one)
            if hasattr(method, "encode"):
                found[f"{name}: encodings"] = method.encode(train)
                top = ki.InfluenceScorer(method, k=4).index(train)(queries)
                found[f"{name}: top"] = top.opponents.scores.numpy()
            if name == "arnoldi":
                found["eigenvalues"] = method.eigenbasis.values
                semidefinite = ki.Arnoldi(model, 2, 4, curvature="fisher", batch_size=6).fit(train)
                found["arnoldi: eigenvalues of Fisher"] = semidefinite.eigenbasis.values
    return found


def looped_results(new_scope, place="device", steps=3):
    """What Arnoldi gives with three of its four batches in one execution.

    Args:
        new_scope: see `golden_results`.
        place: of its vectors; those on the devices are on the disk as well.
        steps: batches in one execution.
    """
    train = cases.images(NUM_TRAIN)
    keras.utils.set_random_seed(0)
    with new_scope():
        model = cases.image_model()
    arnoldi = ki.Arnoldi(
        model, 4, 12, l2=0.1, batch_size=6, basis=place, steps_per_execution=steps
    ).fit(train, tempfile.mkdtemp() if place == "device" else None)
    assert arnoldi.orthogonality < 1e-6
    return {
        "looped: eigenvalues": arnoldi.eigenbasis.values,
        "looped: self-influence": arnoldi.self_influence(train),
    }


def mixed_results(new_scope):
    """The same of a model that every kind of rule and fallback serves, and which serve it."""
    train = cases.images(NUM_TRAIN)
    keras.utils.set_random_seed(0)
    with new_scope():
        model = OwnCall()
        model(train[0][:1])
        model.compile("sgd", cases.SPARSE)
    arnoldi = ki.Arnoldi(model, 3, 12, batch_size=6).fit(train)
    dot = ki.GradientDot(model, batch_size=6).fit(train)
    exact = ki.ExactInfluence(
        model, damping=0.1, curvature="gauss_newton", variables=model.body.layers[0], batch_size=6
    ).fit(train)
    assert exact.num_roots == 3
    return {
        "mixed: exact eigenvalues": exact.eigenvalues,
        "mixed: eigenvalues": arnoldi.eigenbasis.values,
        "mixed: self-influence": arnoldi.self_influence(train),
        "mixed: products": dot.scores(train, train),
        "mixed: rules": np.array([row.rule for row in arnoldi.maps.known_coverage.served]),
    }


def complaints(new_scope, worker=None):
    """The errors that bad data raise.

    Args:
        worker: the number of this worker, where there are several. The second is then given other
            data than the first, too.
    """
    keras.utils.set_random_seed(0)
    with new_scope():
        model = cases.image_model()
    x, y = cases.images(NUM_TRAIN)
    method = ki.GradientDot(model, batch_size=6).fit((x, y))
    nan = x.copy()
    nan[17] = np.nan
    datasets = {"empty": (x[:0], y[:0]), "not finite": (nan, y)}
    if worker is not None:
        datasets["other order"] = (x, y) if worker == 0 else (x[::-1], y[::-1])
        datasets["shard"] = (x, y) if worker == 0 else (x[:7], y[:7])
    found = {}
    for name, dataset in datasets.items():
        try:
            method.self_influence(dataset)
        except (FloatingPointError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    if worker is not None:
        try:
            ki.Arnoldi(model, 2, 4, basis="device").fit((x, y))
        except NotImplementedError as error:
            found["device"] = str(error)
    return found


def document_results(strategy):
    """The program of the document, and what one device makes of the same training."""
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    program = program.replace("tf.distribute.MultiWorkerMirroredStrategy()", "strategy")
    train = tf.data.Dataset.from_tensor_slices(cases.images()).batch(8)
    # Makes the strategy given, since a process can have no second one of this kind.
    names = {"strategy": strategy, "train": train, "build_model": cases.image_model}
    exec(program, names)
    model = names["model"]
    return {
        "document: weights": np.concatenate([w.ravel() for w in model.get_weights()]),
        "document: self-influence": names["suspects"],
    }


def die_at(exchange):
    """Lets this process be killed at the n-th exchange of results."""
    original = distribution._reduced
    seen = []

    def reduced(*args):
        seen.append(args)
        if len(seen) == exchange:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    distribution._reduced = reduced


def main(kind, output, replicas=1, inside=False, run=None, names=None, whole=False, dies_at=None):
    """Writes arrays to `output`, and complaints to the .json beside it.

    Args:
        kind: "mirrored", "one device" or "workers".
        replicas: logical devices of "mirrored".
        inside, run, names: see `golden_results`.
        whole: adds `document_results` on workers, and `mixed_results` elsewhere.
        dies_at: see `die_at`.
    """
    worker = None
    if kind == "workers":
        worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    elif kind == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        logical = [tf.config.LogicalDeviceConfiguration()] * replicas
        tf.config.set_logical_device_configuration(cpu, logical)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    else:
        strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    if dies_at is not None:
        die_at(dies_at)
    found = golden_results(strategy.scope, inside, run, names or GOLDENS)
    if whole and kind == "workers":
        found |= document_results(strategy)
    elif whole:
        found |= mixed_results(strategy.scope)
    found |= looped_results(strategy.scope, "host" if kind == "workers" else "device")
    errors = complaints(strategy.scope, worker)
    pathlib.Path(output).with_suffix(".json").write_text(json.dumps(errors))
    np.savez(output, **found)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
