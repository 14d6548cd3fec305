"""Scores the pairs of the translation example by every method, in parts that need be done once."""

import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from numpy.typing import NDArray

import keras_influence as ki
import runs
import training
import translation_model
from keras_influence import data
from keras_influence.checkpoints import Checkpoint
from keras_influence.gradients import LossMaps, Projector, graph_flops, projection_flops
from keras_influence.methods import EncodingMethod
from keras_influence.methods.resident import MemoryWatch
from translation_data import Batches

METHODS = ("arnoldi", "random_projection", "tracin", "loss")
_SCOPES = ("all", "last")
# With one choice of variables, of those that can have two.
NAMES = (*METHODS, *(f"{name}-{scope}" for name in METHODS[:2] for scope in _SCOPES))
# Pairs of a part: what a kill can cost.
_PART = 4096


class Settings(NamedTuple):
    """What the methods are told.

    Attributes:
        batch_size: Pairs that are computed together.
        ranks: Lengths of encodings to report, of which the longest is computed.
        num_iterations: Products with the Hessian for Arnoldi's basis.
        num_hessian_pairs: Training pairs in that Hessian.
        last_layers: Decoder layers of the smaller choice of variables.
        num_checkpoints: That TracIn sums over.
        seed: Of every draw.
    """

    batch_size: int
    ranks: tuple[int, ...]
    num_iterations: int
    num_hessian_pairs: int
    last_layers: int
    num_checkpoints: int
    seed: int


class Task(NamedTuple):
    """One pass over the pairs.

    Attributes:
        name: Of the files that hold what it finds.
        prepare: What comes first, once; gives `compute`, a dataset's rows [n, ...], and weights of
            the squares of a row's numbers, or None where rows are scores.
        flops: Of one pair, from a batch.
    """

    name: str
    prepare: Callable[[], tuple[Callable[[Any], np.ndarray], np.ndarray | None]]
    flops: Callable[[Any], float]


def tasks(
    names: tuple[str, ...],
    model: keras.Model,
    train: Batches,
    checkpoints: list[Checkpoint],
    settings: Settings,
    directory: pathlib.Path,
) -> Iterator[Task]:
    """The passes of some methods.

    Args:
        names: Of `NAMES`; "all" are all variables, "last" those of the last decoder layers.
        model: As it was trained.
        train: Its training pairs.
        checkpoints: Of the run.
        settings: Of the methods.
        directory: Where a fit that takes long keeps its steps.
    """
    for name in names:
        method, _, scope = name.partition("-")
        if method == "loss":
            yield _loss(model, settings.batch_size)
        elif method == "tracin":
            yield _tracin(model, train, checkpoints, settings)
        else:
            for each in [scope] if scope else _SCOPES:
                yield _encoding(method, each, model, train, settings, directory)


def run(task: Task, batches: Batches, directory: pathlib.Path) -> None:
    """Does what is left of a pass: files of its name in `directory`, the JSON one last.

    The rows stand in the order of `batches.ids`.
    """
    if (directory / f"{task.name}.json").exists():
        return
    logging.info("Scoring by %s", task.name)
    directory.mkdir(parents=True, exist_ok=True)
    with MemoryWatch() as watch:
        start = time.perf_counter()
        compute, weights = task.prepare()
        fit_seconds = time.perf_counter() - start
        parts, loaded = [], []
        for first in range(0, len(batches.ids), _PART):
            path = directory / f"{task.name}-{first:08d}.npz"
            loaded.append(runs.computed(path, functools.partial(_part, compute, batches, first)))
            parts.append(path)
    rows = np.concatenate([part["rows"] for part in loaded])
    found = {"ids": batches.ids, "rows": rows}
    if weights is not None:
        found["weights"] = weights
    np.savez(directory / f"{task.name}.npz", **found)
    seconds = float(sum(part["seconds"] for part in loaded))
    runs.write_json(
        directory / f"{task.name}.json",
        {
            "fit_seconds": fit_seconds,
            "score_seconds": seconds,
            "num_scored": len(batches.ids),
            "pairs_per_hour": 3600 * len(batches.ids) / seconds,
            "tokens_per_second": batches.num_tokens / seconds,
            "peak_bytes": watch.peak,
            "flops_per_pair": batches.mean(task.flops),
        },
    )
    for path in parts:
        path.unlink()


def _part(
    compute: Callable[[Any], np.ndarray], batches: Batches, first: int
) -> dict[str, np.ndarray | float]:
    start = time.perf_counter()
    rows = compute(batches.in_order(first, first + _PART))
    return {"rows": rows, "seconds": time.perf_counter() - start}


def scores(
    directory: pathlib.Path, ranks: tuple[int, ...], num_tokens: NDArray[np.int64]
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Name -> ids of pairs, and how suspicious each is.

    An encoding's first numbers are that of a lower rank: Arnoldi's pairs stand by the magnitude of
    their eigenvalues, and random directions are independent.

    A gradient of the mean over T tokens, were theirs independent, would have a square that falls as
    1/T: short pairs would come first. So self-influences are given times T, too, under names that
    end in -tokens.

    Args:
        directory: Of the passes' files.
        ranks: Of encodings.
        num_tokens: Of each reference of the corpus.
    """
    found = {}
    for record in sorted(directory.glob("*.json")):
        name = record.stem
        stored = dict(np.load(directory / f"{name}.npz"))
        ids, rows = stored["ids"], stored["rows"].astype(np.float64)
        if name == "loss":
            found["loss_per_token"], found["loss"] = (ids, rows[:, 0]), (ids, rows[:, 1])
        elif "weights" not in stored:
            found[name] = ids, rows
        else:
            for rank in ranks:
                squares = np.square(rows[:, :rank])
                found[f"{name}-{rank}"] = ids, squares @ stored["weights"][:rank]
    for name, (ids, values) in list(found.items()):
        if not name.startswith("loss"):
            found[f"{name}-tokens"] = ids, values * num_tokens[ids]
    return found


def forward_mode_ratio(
    model: keras.Model, batches: Batches, rank: int, seed: int
) -> dict[str, float]:
    """Rates of projections by layers' rules and by forward mode through the whole network.

    On the same pairs, after a first call of each for each shape, which traces.
    """
    maps = LossMaps(model)
    directions = tf.random.stateless_normal([rank, maps.parameters.size], [seed, 0])
    found = [
        (batch.num_examples, tf.nest.map_structure(tf.constant, batch.examples))
        for batch in data.batches(batches.in_order(), batches.batch_size)
    ]
    routes = {
        "rules": Projector(maps, lambda: directions),
        "forward_mode": lambda batch: maps.forward_project(batch, directions),
    }
    seconds = {}
    for name, route in routes.items():
        for _, batch in {leaf.shape: (n, b) for n, b in found for leaf in [b[1]]}.values():
            route(batch)
        start = time.perf_counter()
        for _, batch in found:
            route(batch).numpy()
        seconds[name] = time.perf_counter() - start
    total = sum(count for count, _ in found)
    return {
        "num_pairs": total,
        "rank": rank,
        "pairs_per_second": total / seconds["rules"],
        "forward_mode_pairs_per_second": total / seconds["forward_mode"],
        "ratio": seconds["forward_mode"] / seconds["rules"],
    }


def _encoding(
    name: str,
    scope: str,
    model: keras.Model,
    train: Batches,
    settings: Settings,
    directory: pathlib.Path,
) -> Task:
    rank = max(settings.ranks)
    options: dict[str, Any] = {
        "rank": rank,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "scale": "raw",
    }
    if scope == "last":
        options["variables"] = translation_model.last_decoder_variables(model, settings.last_layers)
    method: EncodingMethod
    if name == "arnoldi":
        method = ki.Arnoldi(
            model,
            num_iterations=settings.num_iterations,
            # As published: for finding wrong references the eigenvectors are enough.
            complement=None,
            damping=0.0,
            num_examples=min(settings.num_hessian_pairs, len(train.ids)),
            **options,
        )
    else:
        method = ki.RandomProjection(model, **options)

    def prepare():
        if isinstance(method, ki.Arnoldi):
            method.fit(train.in_order(), directory / f"{name}-{scope}.fit")
        else:
            method.fit(train.in_order())
        method.summary(logging.info)
        return method.encode, method.metric

    everything = LossMaps(model)

    def flops(batch):
        counted = projection_flops(method.maps, batch, rank)
        # What comes before the chosen variables is passed forward, too.
        counted["forward_pass"] = projection_flops(everything, batch, 1)["forward_pass"]
        return sum(counted.values())

    return Task(f"{name}-{scope}", prepare, flops)


def _tracin(
    model: keras.Model, train: Batches, checkpoints: list[Checkpoint], settings: Settings
) -> Task:
    chosen = training.evenly_spaced(checkpoints, min(settings.num_checkpoints, len(checkpoints)))
    method = ki.TracIn(model, checkpoints=chosen, batch_size=settings.batch_size)

    def prepare():
        method.fit(train.in_order())
        return method.self_influence, None

    def flops(batch):
        size = len(batch[1])
        return len(chosen) * graph_flops(method.maps.squared_norms, batch) / size

    return Task("tracin", prepare, flops)


def _loss(model: keras.Model, batch_size: int) -> Task:
    maps = LossMaps(model)

    def compute(dataset: Any) -> np.ndarray:
        found = []
        for batch in data.batches(dataset, batch_size):
            count = batch.num_examples
            losses = maps.losses(tf.nest.map_structure(tf.constant, batch.examples)).numpy()[:count]
            tokens = np.count_nonzero(batch.examples[2], axis=1)[:count]
            found.append(np.stack([losses, losses * tokens], axis=1))
        return np.concatenate(found)

    return Task(
        "loss",
        lambda: (compute, None),
        lambda batch: projection_flops(maps, batch, 1)["forward_pass"],
    )
