"""Which call of which layer explains which variable, and what a rule is shown of it."""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_influence.gradients.calls import LayerCall
from keras_influence.gradients.factors import Factor
from keras_influence.gradients.rules import registry

LAYER_FALLBACK = "forward mode, this layer"
NETWORK_FALLBACK = "forward mode, whole network"

Key = tuple[int, int]


class Stretch(NamedTuple):
    """How a tensor that is the same for all examples is given their axis.

    Attributes:
        shape: the tensor's own.
        rank: the rank to give it.
    """

    shape: tuple[int, ...]
    rank: int

    @property
    def _leading(self) -> bool:
        """Whether it has an axis of one where the examples belong."""
        return len(self.shape) == self.rank

    @property
    def _tail(self) -> tuple[int, ...]:
        return self.shape[1:] if self._leading else self.shape

    def output(self, tensor: tf.Tensor, size: Any) -> tf.Tensor:
        """shape -> [B, 1..., *tail], of the wanted rank."""
        ones = [1] * (self.rank - 1 - len(self._tail))
        tensor = tf.reshape(tensor, [1, *ones, *self._tail])
        return tf.broadcast_to(tensor, [size, *ones, *self._tail])

    def gradient(self, tensor: tf.Tensor) -> tf.Tensor:
        """[B, 1..., *tail] -> [B, *tail]."""
        return tf.reshape(tensor, [-1, *self._tail])

    def argument(self, tensor: tf.Tensor, size: Any) -> tf.Tensor:
        """What entered the call -> [B, ...]."""
        if self._leading and tensor.shape.rank and tensor.shape[0] == 1:
            tensor = tensor[0]
        return tf.broadcast_to(tensor, [size, *tensor.shape])


@dataclasses.dataclass
class Unit:
    """A call that explains some variables.

    Attributes:
        layer: the layer that is called.
        rule: name of the rule that explains the variables `explained`; None without one.
        explained: positions of variables that the rule explains.
        implicit: positions of variables that forward mode through the call explains.
        linear: positions of the variables explained in which, together, the call is linear; see
            `register_rule`.
        stretch: of the output, where it lacks the batch axis.
        batched: for each tensor among the arguments, whether it has the batch axis.
        plain: whether the call holds no loop, no branch and nothing compiled by itself.
    """

    layer: keras.layers.Layer
    rule: str | None
    explained: tuple[int, ...]
    implicit: tuple[int, ...]
    linear: tuple[int, ...]
    stretch: Stretch | None
    batched: tuple[bool, ...]
    plain: bool


class Served(NamedTuple):
    """What serves one variable: a row of `summary`."""

    layer: str
    variable: str
    parameters: int
    rule: str


class Coverage:
    """The units of a model, for batches of one structure.

    Attributes:
        units: by the number of the layer in `all_layers`, and of its call.
        network: positions of the variables that only the whole network explains.
        plain: the same of the whole network; see `is_plain`.
        templates: for each variable that rules explain, factors that stand for nothing: the layout
            of directions is read off them.
        served: a row for each variable.
        layout: equal for two coverages whose directions are laid out alike.
        reason: why nothing could be seen of the layers' calls, where nothing could.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self.variables = list(variables)
        self.units: dict[Key, Unit] = {}
        self.network: tuple[int, ...] = tuple(range(len(variables)))
        self.plain = False
        self.templates: dict[int, list[Factor]] = {}
        self.served: list[Served] = []
        self.reason: str | None = None

    @functools.cached_property
    def linear(self) -> dict[Key, tuple[int, ...]]:
        """The calls that are linear in variables of which every use is of this kind, and these."""
        other = set(self.network)
        for unit in self.units.values():
            other.update(unit.implicit, set(unit.explained) - set(unit.linear))
        found = {
            key: tuple(position for position in unit.linear if position not in other)
            for key, unit in self.units.items()
        }
        return {key: positions for key, positions in found.items() if positions}

    @functools.cached_property
    def layout(self) -> tuple[Any, ...]:
        implicit = {v for unit in self.units.values() for v in unit.implicit}.union(self.network)
        kinds = [
            tuple(
                (type(factor).__name__, getattr(factor, "layout", factor.shape))
                for factor in self.templates.get(position, [])
            )
            for position in range(len(self.variables))
        ]
        return (*kinds, tuple(sorted(implicit)))

    def shares(self) -> dict[str, float]:
        """Share of the parameters that each rule serves, the largest first."""
        counts: collections.Counter[str] = collections.Counter()
        for row in self.served:
            counts[row.rule] += row.parameters
        total = sum(counts.values())
        return {rule: count / total for rule, count in counts.most_common()}


def describe(coverage: Coverage) -> None:
    """Fills `coverage.served` in."""
    owners: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
    for unit in coverage.units.values():
        for variable in unit.explained:
            owners[variable].append((unit.layer.name, unit.rule or ""))
        for variable in unit.implicit:
            owners[variable].append((unit.layer.name, LAYER_FALLBACK))
    for variable in coverage.network:
        owners[variable].append(("", NETWORK_FALLBACK))
    for position, variable in enumerate(coverage.variables):
        size = 1
        for dimension in variable.shape:
            size *= dimension
        rules = sorted({rule for _, rule in owners[position]}) or ["unused"]
        names = sorted({name for name, _ in owners[position]})
        coverage.served.append(
            Served(", ".join(filter(None, names)), variable.path, size, " + ".join(rules))
        )


def merge(factors: list[Factor], factor: Factor) -> list[Factor]:
    """The factors of one variable, and one more."""
    for position, other in enumerate(factors):
        both = other.merged(factor)
        if both is not None:
            return [*factors[:position], both, *factors[position + 1 :]]
    return [*factors, factor]


def explain(
    rule: registry.Rule,
    call: LayerCall,
    variables: Sequence[keras.Variable],
    wanted: Iterable[int],
) -> dict[int, list[Factor]]:
    """The rule's factors, by the positions of their variables."""
    found: dict[int, list[Factor]] = collections.defaultdict(list)
    wanted = list(wanted)
    for variable, factor in rule(call):
        position = next((v for v in wanted if variables[v] is variable), None)
        if position is None:
            continue
        if factor.shape != tuple(variable.shape):
            raise ValueError(
                f"The rule {registry.name(rule)!r} gives gradients of shape {factor.shape} for "
                f"{variable.path!r}, whose shape is {tuple(variable.shape)}."
            )
        found[position].append(factor)
    return dict(found)


def with_gradients(
    call: LayerCall,
    output_gradients: Any,
    linear_gradient: tf.Tensor | None,
    stretch: Stretch | None,
    size: Any,
) -> LayerCall:
    """The call as its rule sees it; one without batch axis as if every example had made it."""

    def of_batch(tensor: Any) -> Any:
        return (
            tensor
            if stretch is None or not tf.is_tensor(tensor)
            else stretch.argument(tensor, size)
        )

    def gradient(tensor: Any) -> Any:
        if tensor is None or not tensor.dtype.is_floating:
            return None
        tensor = tf.cast(tensor, call.dtype)
        return tensor if stretch is None else stretch.gradient(tensor)

    seen = LayerCall(
        call.layer,
        tf.nest.map_structure(of_batch, call.args),
        tf.nest.map_structure(of_batch, call.kwargs),
    )
    seen.rerun = call.rerun
    seen.dtype = call.dtype
    seen.variables = call.variables
    seen.outputs = call.outputs
    seen.linear_outputs = call.linear_outputs
    seen.output_gradients = tf.nest.map_structure(gradient, output_gradients)
    seen.linear_gradient = gradient(linear_gradient)
    return seen


def tensors(nest: Any) -> list[tf.Tensor]:
    """The tensors among the leaves of a nest."""
    return [leaf for leaf in tf.nest.flatten(nest) if tf.is_tensor(leaf)]


def floating(nest: Any) -> list[tf.Tensor]:
    """The floating-point tensors among the leaves of a nest."""
    return [leaf for leaf in tensors(nest) if leaf.dtype.is_floating]
