"""Gradient products on random directions."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence import data
from keras_influence.gradients import Projector
from keras_influence.methods.encoding import EncodingMethod
from keras_influence.methods.work import Job, Unit, Work


class RandomProjection(EncodingMethod):
    """Gradient products, estimated on seeded random directions (RandProj of Schioppa et al., 2022).

    With directions of independent entries of variance 1/rank, the product of two encodings has the
    gradients' product as its expectation (Johnson and Lindenstrauss), with a standard deviation of
    about sqrt(2/rank) of a squared norm. No curvature: the baseline that `Arnoldi` must beat at the
    same rank. `fit` only counts the training examples. The directions are drawn as they are needed,
    no more at a time than `direction_bytes` holds; each such block is a pass over the data.

    Args:
        model: a built Keras model, trained.
        rank: number of directions: the length of an encoding.
        seed: of the directions.
        **kwargs: see `InfluenceMethod`.
    """

    def __init__(self, model: keras.Model, rank: int = 100, *, seed: int = 0, **kwargs: Any):
        super().__init__(model, **kwargs)
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1. Received: {rank}.")
        self.rank = rank
        self.seed = seed

    def _fit(self, dataset: Any) -> int:
        return data.count(dataset)

    def _fit_work(self, job: Job) -> Iterator[Work]:
        yield from job.counting()

    def _layout(self, job: Job, count: int) -> Unit:
        return job.layout(count, lambda: self._direction_rows(0, count))

    def _direction_rows(self, start: int, stop: int) -> tf.Tensor:
        parameters = self.maps.parameters
        # A seed for each row, so that row j is the same vector at every rank, up to its scale, and
        # whichever rows are drawn together.
        rows = [
            tf.random.stateless_normal([parameters.size], [self.seed, row], dtype=parameters.dtype)
            for row in range(start, stop)
        ]
        return tf.stack(rows) / self.rank**0.5

    def _query_encoders(self) -> Iterator[Projector]:
        # What does not fit into memory at once is drawn anew for each call.
        several = len(list(self._encoders())) > 1
        return self._encoders(keep=not several)

    @property
    def metric(self) -> np.ndarray:
        return np.ones(self.rank)

    def _report(self) -> Iterator[str]:
        yield f"directions: {self.rank}, seed {self.seed}"

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rank": self.rank, "seed": self.seed}
