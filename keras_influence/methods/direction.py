"""Methods that score through directions in parameter space."""

import abc
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from keras_influence import data, distribution
from keras_influence.gradients import LossMaps, Projector
from keras_influence.methods.base import InfluenceMethod
from keras_influence.methods.scoring import Steps
from keras_influence.methods.work import Job, Load, Work

# The step of a block of queries that solved for its directions.
DIRECTIONS = "directions"


class DirectionMethod(InfluenceMethod):
    """A method that turns a query's gradient into a direction, and projects training examples.

    scores = factor * <grad l(x), direction(grad l(z))>, one pass over the training set for each
    block of queries.
    """

    # Vectors [p] in memory for each query of a block.
    _vectors_per_query: ClassVar[int] = 1

    def _scores(self, queries: Any, train: Any, steps: Steps) -> np.ndarray:
        factor = self._per_train()
        blocks, ids = [], []
        for number, batch in enumerate(self._query_batches(queries)):
            blocks.append(self._block_scores(batch, train, steps.within(f"queries{number}")))
            ids.append(batch.ids)
        return (data.in_order(blocks, ids) * factor).astype(np.float32)

    def _block_scores(self, batch: data.Batch, train: Any, steps: Steps) -> np.ndarray:
        # When the first training examples ask for them: never, where all of them are done.
        projector = functools.cache(lambda: self._projector(batch, steps))
        projected = self._gather(
            self.maps.project,
            train,
            "projection",
            lambda examples: projector().directions(examples),
            steps,
        )
        steps.drop(DIRECTIONS)
        return projected.T[: batch.num_examples]

    def _products_work(self, job: Job, blocks: Load, directions: Any = None) -> Iterator[Work]:
        """The training set's products with the directions of each block of queries.

        Args:
            directions: () -> those of a block, laid out; by default vectors, which are laid out.
        """
        count, passes = blocks.batch_size, blocks.num_batches
        if directions is None:
            yield Work(f"laying out {count:,} directions", job.layout(count), passes)
        table = 4.0 * blocks.num_examples * job.train.num_examples
        held = count * job.vector_bytes
        yield job.reading(job.train, passes)
        yield Work(
            f"products with {count:,} directions",
            job.projection(job.train, count, directions),
            passes * job.train.num_batches,
            host=2 * table,
            device=held,
            directions=count,
        )
        yield Work("scores", None, host=3 * table)

    @abc.abstractmethod
    def _projector(self, batch: data.Batch, steps: Steps) -> Projector:
        """On the directions of a block of queries, those of its padding last, if it has them.

        What is costly to solve for is kept as the step `DIRECTIONS`.
        """

    def _query_batches(self, queries: Any) -> Iterator[data.Batch]:
        """The queries, as many of one shape at a time as the memory budget has room for."""
        data.check_order(queries)
        return data.batches(queries, self._query_rows(), ordered=False)

    def _query_rows(self) -> int:
        parameters = self.maps.parameters
        return self._rows_in_budget(
            parameters.size * parameters.dtype.size * self._vectors_per_query
        )


class GradientMethod(DirectionMethod):
    """A method whose directions are the queries' gradients themselves."""

    def _projector(self, batch: data.Batch, steps: Steps) -> Projector:
        del steps  # One pass of a few examples is sooner done than read.
        self._rows(self.query_maps.squared_norms, [batch], "gradient")
        projector = Projector(self.maps, functools.partial(self._gradients, batch.examples))
        if self.query_maps is self.maps:
            directions = distribution.everywhere(
                self.maps.gradient_directions, self.model, batch.examples
            )
            projector.use(batch.examples, directions)
        return projector

    def _scores_work(self, job: Job) -> Iterator[Work]:
        blocks, maps = Load.of(job.query_data, self._query_rows()), self.query_maps
        norms = job.rows("squared_norms", blocks, maps)
        yield Work("gradient norms of queries", norms, blocks.num_batches)
        if maps is not self.maps:
            gradients = job.rows("example_gradients", blocks, maps)
            yield Work("gradients of queries", gradients, blocks.num_batches)
            yield from self._products_work(job, blocks)
            return
        examples = blocks.sample[0].examples

        def directions() -> Any:
            return distribution.everywhere(self.maps.gradient_directions, self.model, examples)

        yield Work(
            "gradients of queries",
            job.once("gradient_directions", directions, "gradient_directions"),
            blocks.num_batches,
        )
        yield from self._products_work(job, blocks, directions)

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        yield job.reading(load)
        yield Work(
            "gradient norms",
            job.rows("squared_norms", load),
            load.num_batches,
            host=8.0 * load.num_examples,
        )

    def _gradients(self, examples: Any) -> tf.Tensor:
        return distribution.here(self.query_maps.example_gradients, self.model, examples)

    def _squared_norms(
        self, dataset: Any, steps: Steps, maps: LossMaps | None = None
    ) -> np.ndarray:
        function = (maps or self.maps).squared_norms
        return self._gather(function, dataset, "gradient norm", steps=steps)
