"""Scores the training pairs of a BERT by a method, and explains its predictions by them."""

import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

import attribution
import keras_influence as ki
import runs
import sentence_pairs
import throughput
import training
from keras_influence.checkpoints import Checkpoint
from keras_influence.methods import InfluenceMethod
from mislabel_report import Suspicion
from sentence_pairs import Tokens


class Task(NamedTuple):
    """A trained BERT and its training set, in the order in which it is scored.

    Attributes:
        model: The trained model.
        checkpoints: Of its training.
        tokens: Training pairs, as the model reads them.
        buckets: Lengths that they are padded to.
        order: Position in `tokens` of the i-th pair of `dataset`.
        dataset: Batches of the training pairs, those of one bucket together.
    """

    model: keras.Model
    checkpoints: Sequence[Checkpoint]
    tokens: Tokens
    buckets: Sequence[int]
    order: NDArray[np.int64]
    dataset: tf.data.Dataset

    def in_place(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores of the pairs of `dataset`, put where the pairs are in `tokens`."""
        placed = np.empty_like(scores)
        placed[..., self.order] = scores
        return placed


class Variant(NamedTuple):
    """A method, with its rank or its number of checkpoints if it has one."""

    name: str
    rank: int | None = None
    num_checkpoints: int | None = None

    def place(self, directory: pathlib.Path) -> pathlib.Path:
        """Of its fit, and with a suffix of its scores."""
        return directory / f"{self.name}_{self.rank or self.num_checkpoints or 0}"


class Scored(NamedTuple):
    """A method's self-influences, and what they took."""

    suspicion: Suspicion
    throughput: throughput.Throughput


def make_task(
    model: keras.Model,
    checkpoints: Sequence[Checkpoint],
    tokens: Tokens,
    buckets: Sequence[int],
    batch_size: int,
) -> Task:
    """The training pairs, laid out for the methods."""
    chosen = sentence_pairs.in_order(tokens.lengths, buckets, batch_size)
    dataset = sentence_pairs.batches(tokens, buckets, chosen)
    return Task(model, checkpoints, tokens, buckets, np.concatenate(chosen), dataset)


def predict(
    model: keras.Model, tokens: Tokens, buckets: Sequence[int], batch_size: int
) -> NDArray[np.float32]:
    """The logits of each pair, `[N, classes]`."""
    chosen = sentence_pairs.in_order(tokens.lengths, buckets, batch_size)
    parts = [model.predict_on_batch(x) for x, _ in sentence_pairs.batches(tokens, buckets, chosen)]
    logits = np.empty((len(tokens.labels), parts[0].shape[1]), np.float32)
    logits[np.concatenate(chosen)] = np.concatenate(parts)
    return logits


def score(
    task: Task, variant: Variant, settings: attribution.MethodSettings, directory: pathlib.Path
) -> Scored:
    """The self-influence of every training pair by one method, computed once in `directory`.

    The seconds of an Arnoldi fit that was killed are those since it went on.
    """
    place = variant.place(directory)

    def compute() -> dict[str, Any]:
        method = _build(task, variant, settings)
        start = time.perf_counter()
        _fit(method, task, place)
        fitted = time.perf_counter()
        scores = task.in_place(method.self_influence(task.dataset))
        end = time.perf_counter()
        flops = throughput.flops_per_example(method, task.dataset, variant.rank or 1)
        flops *= len(method.checkpoints) if isinstance(method, ki.TracIn) else 1
        tokens = int(task.tokens.lengths.sum())
        rates = throughput.measure(end - fitted, scores.size, tokens, flops)
        return {"scores": scores, "seconds": (fitted - start, end - fitted), "rates": rates}

    kept = runs.computed(place.with_suffix(".npz"), compute)
    suspicion = Suspicion(
        variant.name,
        kept["scores"],
        np.arange(kept["scores"].size),
        *kept["seconds"].tolist(),
        variant.rank,
        variant.num_checkpoints,
    )
    return Scored(suspicion, throughput.Throughput(*kept["rates"].tolist()))


def fitted_method(
    task: Task, variant: Variant, settings: attribution.MethodSettings, directory: pathlib.Path
) -> InfluenceMethod:
    """A method fitted to the training pairs; an iteration that `score` left is read."""
    method = _build(task, variant, settings)
    _fit(method, task, variant.place(directory))
    return method


def _build(task: Task, variant: Variant, settings: attribution.MethodSettings) -> InfluenceMethod:
    count = variant.num_checkpoints
    chosen = training.evenly_spaced(task.checkpoints, count) if count else []
    return attribution.build(variant.name, task.model, settings, variant.rank, chosen)


def _fit(method: InfluenceMethod, task: Task, directory: pathlib.Path) -> None:
    """Fits a method; an Arnoldi iteration step by step in `directory`, so that a kill costs one."""
    if isinstance(method, ki.Arnoldi):
        method.fit(task.dataset, directory=directory)
    else:
        method.fit(task.dataset)


def score_all(
    task: Task,
    variants: Sequence[Variant],
    settings: attribution.MethodSettings,
    directory: pathlib.Path,
) -> list[Scored]:
    """Scores by every method, rank and number of checkpoints, and prints what each took."""
    directory.mkdir(exist_ok=True)
    scored = []
    for variant in variants:
        scored.append(score(task, variant, settings, directory))
        print(f"{scored[-1].suspicion.label}: {scored[-1].throughput}")
    return scored


def explain(method: InfluenceMethod, task: Task, queries: Tokens, k: int) -> ki.Influences:
    """The top proponents and opponents of each query among the training pairs."""
    together = [np.arange(len(queries.labels))]
    batch = sentence_pairs.batches(queries, task.buckets, together)
    return ki.top_influences(task.in_place(method.scores(batch, task.dataset)), k)
