"""What the share that a removed example has in the curvature adds to first order.

An influence inverts the curvature of all examples, from which the removed one is missing once the
model is retrained. With A = H + damping I and, of example i, what its loss is convex in z_i (m
numbers: the logits of a classifier), J_i their derivatives by the parameters, u_i and B_i the
loss's first and second derivatives by them, its gradient is J_i'u_i and its own part of A is
(1/N) J_i'B_i J_i. One Newton step on the objective without it changes the parameters by

    (A - (1/N) J_i'B_i J_i)^-1 (1/N) J_i'u_i  =  (1/N) A^-1 J_i'(I - L_i)^-1 u_i,
    L_i = B_i K_i,   K_i = (1/N) J_i A^-1 J_i',

for (A - J'BJ/N) A^-1 J' = J'(I - B K). That is exact for squared errors of a model that is linear
in its parameters. For one output L_i is a number, the leverage h_i = l''/l'^2 times the example's
self-influence, and every score of the example is divided by 1 - h_i: Cook and Weisberg, "Residuals
and Influence in Regression" (1982), section 2.2. N stays in the objective, as in the influence.
"""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_influence import data
from keras_influence.gradients import OutputMaps, Projector
from keras_influence.methods.scoring import Steps
from keras_influence.methods.work import Job, Load, Work

if TYPE_CHECKING:
    from keras_influence.methods.inverse import InverseMethod


# Of an example: a system of so many equations is solved for each.
_MOST_OUTPUTS = 1_000


class _Removed(NamedTuple):
    """Of the examples of a batch.

    Attributes:
        changes: N times the change of the parameters without each of them, [n, p].
        forms: products of their gradients with these, [n].
    """

    changes: np.ndarray
    forms: np.ndarray


class Leverage:
    """The scores of an inverse, corrected by each training example's leverage.

    Args:
        method: fitted.
    """

    def __init__(self, method: "InverseMethod"):
        self._method = method
        # Methods that stand for the Fisher matrix alone have no choice of it.
        fisher = getattr(method, "curvature", "fisher") == "fisher"
        self._outputs = OutputMaps(method.maps, fisher)

    def scores(self, queries: Any, train: Any, steps: Steps) -> np.ndarray:
        """See `InfluenceMethod.scores`."""
        method = self._method

        def block(batch: data.Batch) -> np.ndarray:
            changes = self._removed(batch).changes
            projector = Projector(method.query_maps, functools.partial(tf.constant, changes))
            return method._gather(
                method.query_maps.project, queries, "projection", projector.directions
            )

        return self._blocks(train, block, steps, axis=1)

    def self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        """See `InfluenceMethod.self_influence`."""
        return self._blocks(dataset, lambda batch: self._removed(batch).forms, steps, axis=0)

    def _blocks(
        self,
        dataset: Any,
        compute: Callable[[data.Batch], np.ndarray],
        steps: Steps,
        axis: int,
    ) -> np.ndarray:
        data.check_order(dataset)
        first = next(data.batches(dataset, self._method.batch_size))
        size = min(len(first.weights), self.sizes(first.examples)[1])
        found = [
            steps.keep(f"removed{number}", functools.partial(compute, batch))
            for number, batch in enumerate(data.batches(dataset, size))
        ]
        factor = self._method._per_train()
        return (np.concatenate(found, axis=axis) * factor).astype(np.float32)

    def sizes(self, examples: Any) -> tuple[int, int]:
        """Of batches like this one: m; and how many examples' J_i are held together at most.

        Raises:
            ValueError: a loss that is not known to be convex in anything; too many outputs.
        """
        method = self._method
        try:
            width = self._outputs.width(examples)
        except ValueError as error:
            raise ValueError(
                f"`leverage=True` must know in what the loss is convex, and does not. {error}"
            ) from error
        if width > _MOST_OUTPUTS:
            raise ValueError(
                f"`leverage=True` solves for each output of each training example. Received: "
                f"{width:,} outputs an example, above {_MOST_OUTPUTS:,}."
            )
        return width, max(1, method._query_rows() // width)

    def gradients(self, batch: data.Batch, number: int) -> np.ndarray:
        """The row `number` of each J_i, [n, p]."""
        row = tf.constant(number)
        return self._method._rows(self._outputs.gradients, [batch], "gradient", lambda _: row)

    def _removed(self, batch: data.Batch) -> _Removed:
        method = self._method
        derivatives = method._rows(self._outputs.derivatives, [batch], "loss")
        derivatives = derivatives.astype(np.float64)
        slopes, curved = derivatives[:, 0], derivatives[:, 1:]
        rows = [self.gradients(batch, number) for number in range(slopes.shape[1])]
        jacobian = np.stack(rows, axis=1)
        count, width, size = jacobian.shape
        flat = jacobian.reshape(count * width, size)
        solved = method._inverse_products(tf.constant(flat)).numpy().reshape(jacobian.shape)
        inner = (jacobian @ solved.swapaxes(1, 2)).astype(np.float64)
        assert method.num_train is not None
        shares = curved @ (inner + inner.swapaxes(1, 2)) / (2 * method.num_train)
        self._check(batch, shares)
        weights = np.linalg.solve(np.eye(width) - shares, slopes[..., np.newaxis])[..., 0]
        changes = (weights[:, np.newaxis].astype(solved.dtype) @ solved)[:, 0]
        return _Removed(changes, np.einsum("na,nab,nb->n", slopes, inner, weights))

    def _check(self, batch: data.Batch, shares: np.ndarray) -> None:
        """Raises where an example has all of the curvature in some direction."""
        leverages = np.linalg.eigvals(shares).real.max(axis=1)
        row = int(leverages.argmax())
        epsilon = np.finfo(self._method.maps.parameters.dtype.as_numpy_dtype).eps
        if leverages[row] > 1 - np.sqrt(epsilon):
            raise ValueError(
                f"The leverage of example {batch.ids[row]} is {leverages[row]:.6g}: without it the "
                "curvature is not positive, and no optimum is near. Raise `damping`, or leave "
                "`leverage` out."
            )


def removed_work(method: "InverseMethod", job: Job, load: Load) -> Iterator[Work]:
    """Of what `Leverage` does with each block of training examples."""
    found = method.corrected
    blocks = _blocks_of(method, load)
    width, _ = found.sizes(load.sample[0].examples)
    rows = width * blocks.batch_size
    held = 3 * rows * job.vector_bytes
    unit = job.once("gradients of outputs", lambda: found.gradients(blocks.sample[0], 0))
    yield job.reading(load)
    yield Work("gradients of outputs", unit, width * blocks.num_batches, host=held)
    yield from method._solve_work(
        job, blocks._replace(batch_size=rows, num_examples=width * blocks.num_examples)
    )


def scores_work(method: "InverseMethod", job: Job) -> Iterator[Work]:
    """Of `Leverage.scores`."""
    yield from removed_work(method, job, job.train)
    assert job.queries is not None
    blocks, load = _blocks_of(method, job.train), job.queries
    count = blocks.batch_size
    yield Work(f"laying out {count:,} directions", job.layout(count), blocks.num_batches)
    yield job.reading(load, blocks.num_batches)
    yield Work(
        f"products with {count:,} directions",
        job.projection(load, count),
        blocks.num_batches * load.num_batches,
        host=8.0 * load.num_examples * blocks.num_examples,
        device=count * job.vector_bytes,
        directions=count,
    )


def _blocks_of(method: "InverseMethod", load: Load) -> Load:
    _, most = method.corrected.sizes(load.sample[0].examples)
    return load.cut(min(load.batch_size, most))
