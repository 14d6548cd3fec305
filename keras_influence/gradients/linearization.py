"""One forward and one backward pass of a batch, and everything that per-example gradients tell.

What entered and what left each layer is captured, and the losses' gradients by what left it; from
these every projection, norm and product of per-example gradients follows by matrix products. No
gradient of a whole model is held for more than a few examples.
"""

import collections
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_influence.gradients import coverage as coverages
from keras_influence.gradients.blocks import over_examples
from keras_influence.gradients.calls import LayerCall, unobserved
from keras_influence.gradients.capture import Capture, is_float
from keras_influence.gradients.factors import Contraction, Explicit, Factor, Prepared
from keras_influence.gradients.implicit import Implicit
from keras_influence.gradients.parameters import ParameterVector
from keras_influence.gradients.rules import registry


class Directions(NamedTuple):
    """k directions in parameter space, laid out for the products that a model's layers ask for.

    Attributes:
        parts: for each variable, what each of its factors multiplies with.
        natural: for each variable that forward mode serves, its part [k, *shape]; else empty.
    """

    parts: tuple[tuple[Prepared, ...], ...]
    natural: tuple[tuple[tf.Tensor, ...], ...]


class Linearization:
    """The per-example losses of one batch, linearised at the model's weights.

    Attributes:
        losses: l_i, [B].
        factors: for each variable, by its position, the factors whose sum its gradients are. Empty
            where the gradients are zero, or forward mode serves.
    """

    def __init__(
        self,
        parameters: ParameterVector,
        losses: tf.Tensor,
        factors: dict[int, list[Factor]],
        implicits: list[tuple[tuple[int, ...], Implicit]],
        how: Contraction,
    ):
        self.parameters = parameters
        self.losses = losses
        self.factors = factors
        self.implicits = implicits
        self.how = how

    @property
    def _batch(self) -> Any:
        return tf.shape(self.losses)[0]

    def project(self, directions: Directions) -> tf.Tensor:
        """<grad l_i, v_j>, [B, k]."""
        total = []
        for position, factors in self.factors.items():
            parts = directions.parts[position]
            for factor, prepared in zip(factors, parts, strict=True):
                total.append(factor.project(prepared, self.how))
        for positions, implicit in self.implicits:
            natural = [directions.natural[position][0] for position in positions]
            total.append(implicit.project(natural, self.how))
        if not total:
            return tf.zeros([self._batch, 0], self.parameters.dtype)
        return _sum(total)

    def squared_norms(self) -> tf.Tensor:
        """|grad l_i|^2, [B]."""
        total = [tf.zeros([self._batch], self.parameters.dtype)]
        shared = {
            position
            for positions, _ in self.implicits
            for position in positions
            if self._times(position) > 1
        }
        for positions, implicit in self.implicits:
            if not shared.intersection(positions):
                total.append(implicit.squared_norms(self.how))
        loose: dict[int, list[Factor]] = collections.defaultdict(list)
        for positions, implicit in self.implicits:
            if shared.intersection(positions):
                for position, values in zip(positions, implicit.gradients(self.how), strict=True):
                    loose[position].append(Explicit(values))
        for position in self.factors.keys() | loose.keys():
            factors = [*self.factors.get(position, []), *loose[position]]
            if len(factors) == 1:
                total.append(factors[0].squared_norms(self.how))
            else:
                total.append(self._norms_of_sum(factors))
        return _sum(total)

    def gradients(self) -> list[tf.Tensor]:
        """grad l_i by each variable: [B, *shape]."""
        parts: dict[int, list[tf.Tensor]] = collections.defaultdict(list)
        for position, factors in self.factors.items():
            parts[position] += [factor.all_gradients(self.how) for factor in factors]
        for positions, implicit in self.implicits:
            for position, values in zip(positions, implicit.gradients(self.how), strict=True):
                parts[position].append(values)
        shapes = self.parameters.shapes
        return [
            _sum(parts[position])
            if parts[position]
            else tf.zeros([self._batch, *shapes[position]], self.parameters.dtype)
            for position in range(len(shapes))
        ]

    def rows(self) -> tf.Tensor:
        """The same as vectors, [B, p]."""
        sizes = self.parameters.sizes
        parts = zip(self.gradients(), sizes, strict=True)
        return tf.concat([tf.reshape(part, [-1, size]) for part, size in parts], axis=1)

    def as_directions(self) -> Directions:
        """The gradients themselves as directions, in factors where that is cheaper to multiply."""
        gradients: list[tf.Tensor] = []
        parts: list[tuple[Prepared, ...]] = []
        natural: list[tuple[tf.Tensor, ...]] = []
        served = {position for positions, _ in self.implicits for position in positions}
        if served or any(len(factors) > 1 for factors in self.factors.values()):
            gradients = self.gradients()
        for position in range(len(self.parameters.shapes)):
            factors = self.factors.get(position, [])
            natural.append((gradients[position],) if gradients and position in served else ())
            if len(factors) == 1 and position not in served:
                parts.append((factors[0].as_directions(self.how),))
            else:
                parts.append(tuple(f.prepare(gradients[position], self.how) for f in factors))
        return Directions(tuple(parts), tuple(natural))

    def _times(self, position: int) -> int:
        own = sum(position in positions for positions, _ in self.implicits)
        return own + len(self.factors.get(position, []))

    def _norms_of_sum(self, factors: Sequence[Factor]) -> tf.Tensor:
        counts = [len(factor.tensors) for factor in factors]

        def one_block(*tensors: tf.Tensor) -> tf.Tensor:
            gradients, start = [], 0
            for factor, count in zip(factors, counts, strict=True):
                gradients.append(factor.with_tensors(tensors[start : start + count]).gradients())
                start += count
            total = _sum(gradients)
            return tf.reduce_sum(total * total, axis=list(range(1, total.shape.rank)))

        tensors = [tensor for factor in factors for tensor in factor.tensors]
        each = sum(factor.gradient_bytes for factor in factors)
        return over_examples(one_block, tensors, each, self.how.budget)


def _sum(terms: Sequence[tf.Tensor]) -> tf.Tensor:
    """In this order: TensorFlow may add the terms of a `tf.add_n` in the order of their arrival."""
    return functools.reduce(operator.add, terms)


def prepare(
    coverage: coverages.Coverage,
    parameters: ParameterVector,
    directions: tf.Tensor,
    how: Contraction,
) -> Directions:
    """Directions [k, p], laid out once for many batches."""
    if directions.shape.rank != 2 or directions.shape[1] not in (None, parameters.size):
        raise ValueError(
            f"Directions must have the shape [k, p] with p={parameters.size}, the number of "
            f"parameters that are attributed through. Received: shape {tuple(directions.shape)}."
        )
    count = -1 if directions.shape[0] is None else directions.shape[0]
    implicit = {v for unit in coverage.units.values() for v in unit.implicit}
    implicit.update(coverage.network)
    parts: list[tuple[Prepared, ...]] = []
    natural: list[tuple[tf.Tensor, ...]] = []
    start = 0
    for position, (shape, size) in enumerate(zip(parameters.shapes, parameters.sizes, strict=True)):
        part = tf.reshape(directions[:, start : start + size], [count, *shape])
        start += size
        templates = coverage.templates.get(position, [])
        parts.append(tuple(template.prepare(part, how) for template in templates))
        natural.append((part,) if position in implicit else ())
    return Directions(tuple(parts), tuple(natural))


def linearize(
    coverage: coverages.Coverage,
    parameters: ParameterVector,
    losses: Callable[[Any], tf.Tensor],
    batch: Any,
    how: Contraction,
) -> Linearization:
    """One forward and one backward pass of `batch`, all layers' factors captured.

    Args:
        losses: batch -> l_i [B].
    """
    size = tf.shape(tf.nest.flatten(batch)[0])[0]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        capture = Capture(coverage.units, tape, size, parameters.dtype)
        values = capture.run(losses, batch)
        total = tf.reduce_sum(values)
    watched = [tensor for call in capture.calls.values() for tensor in capture.watched(call)]
    gradients = iter(
        tf.convert_to_tensor(gradient)
        for gradient in tape.gradient(
            total, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
    )
    factors: dict[int, list[Factor]] = {}
    implicits = []
    for key, call in capture.calls.items():
        unit = coverage.units[key]
        own = [next(gradients) for _ in capture.watched(call)]
        linear = own.pop() if capture.has_linear(call) else None
        remaining = iter(own)
        outputs = tf.nest.map_structure(
            lambda leaf, r=remaining: next(r) if is_float(leaf) else None, call.outputs
        )
        if linear is None and is_float(call.outputs):
            linear = outputs if call.linear_output is not None else None
        call.variables = [parameters.variables[v] for v in unit.explained]
        seen = coverages.with_gradients(call, outputs, linear, unit.stretch, size)
        if unit.explained:
            rule = registry.find(unit.layer)
            assert rule is not None
            found = coverages.explain(rule, seen, parameters.variables, unit.explained)
            for position in unit.explained:
                for factor in found[position]:
                    factors[position] = coverages.merge(factors.get(position, []), factor)
        if unit.implicit:
            implicits.append((unit.implicit, _implicit(call, seen, unit, parameters)))
    if coverage.network:
        implicits.append((coverage.network, _network(coverage, parameters, losses, batch, size)))
    # The order in which `prepare` met them.
    factors = {position: factors[position] for position in sorted(factors)}
    return Linearization(parameters, tf.cast(values, parameters.dtype), factors, implicits, how)


def _implicit(
    call: LayerCall, seen: LayerCall, unit: coverages.Unit, parameters: ParameterVector
) -> Implicit:
    arguments = coverages.tensors((call.args, call.kwargs))

    def function(*replaced: tf.Tensor) -> list[tf.Tensor]:
        remaining = iter(replaced)
        args, kwargs = tf.nest.map_structure(
            lambda leaf: next(remaining) if tf.is_tensor(leaf) else leaf, (call.args, call.kwargs)
        )
        with unobserved():
            return coverages.floating(call.rerun(*args, **kwargs))

    gradients = [g for g in tf.nest.flatten(seen.output_gradients) if g is not None]
    return Implicit(
        function,
        arguments,
        unit.batched,
        gradients,
        [parameters.values[v] for v in unit.implicit],
        unit.plain,
        parameters.dtype,
    )


def _network(
    coverage: coverages.Coverage,
    parameters: ParameterVector,
    losses: Callable[[Any], tf.Tensor],
    batch: Any,
    size: Any,
) -> Implicit:
    def function(*leaves: tf.Tensor) -> list[tf.Tensor]:
        with unobserved():
            return [losses(tf.nest.pack_sequence_as(batch, leaves))]

    leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(batch)]
    return Implicit(
        function,
        leaves,
        [True] * len(leaves),
        [tf.ones([size], parameters.dtype)],
        [parameters.values[v] for v in coverage.network],
        coverage.plain,
        parameters.dtype,
    )
