"""Methods that score through short encodings of examples."""

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_influence import data
from keras_influence.gradients import LossMaps, Projector
from keras_influence.methods.base import InfluenceMethod
from keras_influence.methods.scoring import Steps
from keras_influence.methods.work import Job, Load, Unit, Work, blocks


class EncodingMethod(InfluenceMethod):
    """A method that encodes an example in a few numbers, whose weighted products are the scores.

    score(z, x) = factor * sum_j metric_j e_j(z) e_j(x), with e(x) = (<grad l(x), u_j>)_j for the
    method's directions u_j.
    """

    rank: int
    # Whether an encoding ends with |grad l(x)|^2, which no product of encodings counts.
    _keeps_norms: bool = False

    @abc.abstractmethod
    def _direction_rows(self, start: int, stop: int) -> Any:
        """u_j for start <= j < stop, [stop - start, p]."""

    def _encoders(self, keep: bool = True) -> Iterator[Projector]:
        """Of all directions, as many at a time as the memory budget holds."""
        parameters = self.maps.parameters
        rows = self._rows_in_budget(parameters.size * parameters.dtype.size)
        # An iteration may have found fewer directions than it was asked for.
        count = len(self.metric) - self._keeps_norms
        # Blocks of one size, so that one graph serves nearly all.
        rows = -(-count // -(-count // rows))
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            yield Projector(
                self.maps, functools.partial(self._direction_rows, start, stop), keep=keep
            )

    def _encoding_work(self, job: Job, load: Load, held: float = 0.0) -> Iterator[Work]:
        """Of `encode`; `held` are bytes of the directions where they lie."""
        count = self._num_directions(job)
        passes, size = blocks(count, self._rows_in_budget(job.vector_bytes))
        encoded = (
            load.num_examples * (count + self._keeps_norms) * float(self.maps.parameters.dtype.size)
        )
        yield Work(
            f"laying out {size:,} directions",
            self._layout(job, size),
            passes,
            host=held,
            directions=size,
        )
        yield job.reading(load, passes)
        yield Work(
            f"projections on {size:,} directions",
            job.projection(load, size),
            (passes - self._keeps_norms) * load.num_batches,
            host=held + 2 * encoded,
            device=size * job.vector_bytes,
        )
        if self._keeps_norms:
            yield Work(
                f"projections on {size:,} directions, and norms",
                job.projection(load, size, with_norms=True),
                load.num_batches,
                host=held + 2 * encoded,
                device=size * job.vector_bytes,
            )

    def _num_directions(self, job: Job) -> int:
        return min(self.rank, job.size)

    def _layout(self, job: Job, count: int) -> Unit:
        """Some directions are laid out."""
        return job.layout(count)

    def _scores_work(self, job: Job) -> Iterator[Work]:
        assert job.queries is not None
        held = self._directions_bytes(job)
        for load in (job.queries, job.train):
            yield from self._encoding_work(job, load, held)
        num, count = job.train.num_examples, job.queries.num_examples
        # Products in float64, and as float32.
        yield Work("scores", None, host=held + 4.0 * self.rank * (num + count) + 12.0 * num * count)

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        held = self._directions_bytes(job)
        yield from self._encoding_work(job, load, held)
        # Squares in float64, beside the encodings.
        yield Work("sums of squares", None, host=held + 12.0 * self.rank * load.num_examples)

    def _directions_bytes(self, job: Job) -> float:
        """Of the directions where they lie in memory, not laid out; 0 where they are drawn."""
        del job
        return 0.0

    @property
    @abc.abstractmethod
    def metric(self) -> np.ndarray:
        """Weights of the coordinates' products, float64 [d]."""

    def _query_encoders(self) -> Iterator[Projector]:
        """For examples that come a few at a time: what is laid out once serves all of them."""
        return self._encoders()

    def encode(self, dataset: Any) -> np.ndarray:
        """<grad l(x), u_j> of every example: [N, d], float32 (float64 for a float64 model)."""
        self._check_ready()
        return self._encoded(self.maps, dataset, Steps())

    def _encoded(self, maps: LossMaps, dataset: Any, steps: Steps) -> np.ndarray:
        blocks = []
        for number, (function, encoder) in enumerate(self._passes(maps, list(self._encoders()))):
            within = steps.within(f"directions{number}")
            blocks.append(self._gather(function, dataset, "encoding", encoder.directions, within))
        return np.concatenate(blocks, axis=1)

    def _encoded_rows(self, batches: Sequence[data.Batch], encoders: list[Projector]) -> np.ndarray:
        """Encodings of a few batches."""
        blocks = [
            self._rows(function, batches, "encoding", encoder.directions)
            for function, encoder in self._passes(self.maps, encoders)
        ]
        return np.concatenate(blocks, axis=1)

    def _passes(
        self, maps: LossMaps, encoders: list[Projector]
    ) -> Iterator[tuple[Callable[..., tf.Tensor], Projector]]:
        """What gives each block of an encoding's numbers; the last one the norms as well."""
        for number, encoder in enumerate(encoders):
            last = number == len(encoders) - 1
            yield (
                maps.project_with_norms if last and self._keeps_norms else maps.project,
                encoder,
            )

    def _scores(self, queries: Any, train: Any, steps: Steps) -> np.ndarray:
        weights = self.metric * self._per_train()
        of_queries = self._encoded(self.query_maps, queries, steps.within("queries"))
        of_train = self._encoded(self.maps, train, steps.within("train"))
        return ((of_queries * weights) @ of_train.T).astype(np.float32)

    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        self._per_train()  # Complains now, and not after the pass over the data.
        return self.self_influence_of(self._encoded(self.maps, dataset, steps))

    def self_influence_of(self, encoded: np.ndarray) -> np.ndarray:
        """Self-influence from encodings [N, rank]: float32 [N]."""
        weights = self.metric * self._per_train()
        return (np.square(encoded, dtype=np.float64) @ weights).astype(np.float32)
