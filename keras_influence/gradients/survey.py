"""Which call of which layer explains which variable, and by which rule.

The model is traced twice, with batches of two sizes, and nothing is run. The operations that read a
variable tell the calls that use it; the shapes tell where the examples lie. A variable is explained
by the innermost calls around its uses whose outputs have the examples along their first axis, and
are the only way by which the use goes on. What no call explains is left to the whole network.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from keras_influence.gradients.calls import LayerCall, Observer, all_layers, observed
from keras_influence.gradients.coverage import (
    Coverage,
    Stretch,
    Unit,
    describe,
    explain,
    floating,
    merge,
    tensors,
    with_gradients,
)
from keras_influence.gradients.factors import Factor
from keras_influence.gradients.graphs import is_plain, leaks, reads
from keras_influence.gradients.rules import registry

# Batch sizes of the two traces: primes, so that a multiple of one is no multiple of the other.
_SIZES = (3, 5)

# Operations through which a tensor without batch axis may be broadcast beforehand.
_ELEMENTWISE = {"Add", "AddV2", "Sub", "Mul", "RealDiv", "Maximum", "Minimum", "SquaredDifference"}
_TRANSPARENT = {"Cast", "Identity", "StopGradient"}


def survey(
    model: keras.Model,
    variables: Sequence[keras.Variable],
    losses: Callable[[Any], tf.Tensor],
    specifications: Any,
    dtype: tf.DType,
) -> Coverage:
    """Finds out what explains each of the variables.

    Args:
        model: the model.
        variables: to differentiate by.
        losses: (x, y[, sample_weight]) -> [B].
        specifications: nest of `tf.TensorSpec`s of a batch; their first axis is ignored.
        dtype: in which factors are computed.
    """
    coverage = Coverage(variables)
    layers = all_layers(model)
    traces = []
    try:
        for size in _SIZES:
            trace = _Trace(layers, dtype)
            traces.append(trace)
            trace.run(losses, _sized(specifications, size))
        small, large = traces
        if [call.key for call in large.calls] != [call.key for call in small.calls]:
            raise ValueError("the layers that are called depend on the number of examples")
    except Exception as error:
        # The user's own mistake (a wrong shape, a wrong loss) shows again, and is raised, when the
        # losses themselves are computed. What remains is a model of one batch size.
        coverage.reason = f"{type(error).__name__}: {error}"
        logging.warning(
            "The calls of %r cannot be seen (%s); all of it runs in forward mode through the whole "
            "network, which is slow.",
            model.name,
            str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
        )
    else:
        _assign(coverage, layers, small, large)
    describe(coverage)
    return coverage


def _sized(specifications: Any, size: int) -> Any:
    return tf.nest.map_structure(
        lambda s: tf.TensorSpec([size, *s.shape[1:]], s.dtype), specifications
    )


class _Trace(Observer):
    """The calls of one trace, in the order in which they began."""

    def __init__(self, layers: Sequence[keras.layers.Layer], dtype: tf.DType):
        self.layers = layers
        self.dtype = dtype
        self.numbers = {id(layer): number for number, layer in enumerate(layers)}
        self.counts: collections.Counter[int] = collections.Counter()
        self.calls: list[LayerCall] = []
        self.stack: list[int] = []
        self.graph: Any = None

    def run(self, losses: Callable[[Any], tf.Tensor], specifications: Any) -> None:
        def traced(batch: Any) -> tf.Tensor:
            self.graph = tf.compat.v1.get_default_graph()
            with observed(self.layers, self):
                return losses(batch)

        with tf.init_scope():
            # Kept: tensors of the calls belong to its graph.
            self.function = tf.function(traced, autograph=False).get_concrete_function(
                specifications
            )

    def call(
        self,
        layer: keras.layers.Layer,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        number = self.numbers[id(layer)]
        seen = LayerCall(layer, args, kwargs)
        seen.key = (number, self.counts[number])
        self.counts[number] += 1
        seen.rerun = original
        seen.dtype = self.dtype
        seen.graph = tf.compat.v1.get_default_graph()
        seen.parent = self.stack[-1] if self.stack else None
        self.stack.append(len(self.calls))
        self.calls.append(seen)
        start = len(self.graph.get_operations())
        try:
            seen.outputs = original(*args, **kwargs)
        finally:
            self.stack.pop()
        seen.operations = (start, len(self.graph.get_operations()))
        return seen.outputs

    def activation(self, layer: keras.layers.Layer, tensor: tf.Tensor) -> tf.Tensor:
        current = self.calls[self.stack[-1]] if self.stack else None
        if current is not None and current.layer is layer:
            current.linear_outputs.append(tensor)
        return tensor


def _assign(
    coverage: Coverage, layers: Sequence[keras.layers.Layer], small: _Trace, large: _Trace
) -> None:
    graph = small.graph
    operations = graph.get_operations()
    positions = {operation.name: i for i, operation in enumerate(operations)}
    owners = [-1] * len(operations)
    for index, call in enumerate(small.calls):
        if call.graph is graph:
            start, end = call.operations
            owners[start:end] = [index] * (end - start)
    uses = reads(graph, coverage.variables, positions)
    usable = [
        _Placed(call, other, graph, positions).check()
        for call, other in zip(small.calls, large.calls, strict=True)
    ]
    used: dict[int, set[int]] = collections.defaultdict(set)
    for variable, operation_positions in enumerate(uses):
        for position in operation_positions:
            for index in _chain(small.calls, owners[position]):
                used[index].add(variable)

    explanations: dict[int, tuple[str, dict[int, list[Factor]]]] = {}

    def explained(index: int) -> tuple[str, dict[int, list[Factor]]]:
        if index not in explanations:
            with graph.as_default():
                explanations[index] = _ask_rule(
                    small.calls[index], coverage.variables, used[index], usable[index]
                )
        return explanations[index]

    chosen: dict[int, dict[int, bool]] = collections.defaultdict(dict)
    network = []
    for variable, operation_positions in enumerate(uses):
        found = _explaining_calls(
            variable, operation_positions, owners, small.calls, usable, explained, operations
        )
        if found is None:
            network.append(variable)
        else:
            for index, by_rule in found.items():
                chosen[index][variable] = by_rule
    coverage.network = tuple(network)
    coverage.plain = is_plain(operations, graph)
    templates: dict[int, list[Factor]] = collections.defaultdict(list)
    for index in sorted(chosen):
        call, place = small.calls[index], usable[index]
        ruled = tuple(v for v, rule in chosen[index].items() if rule)
        implicit = tuple(v for v, rule in chosen[index].items() if not rule)
        start, end = call.operations
        coverage.units[call.key] = Unit(
            layer=call.layer,
            rule=explained(index)[0] if ruled else None,
            explained=ruled,
            implicit=implicit,
            linear=_linear(call, place, coverage.variables, ruled),
            stretch=place.stretch,
            batched=place.batched,
            plain=is_plain(operations[start:end], graph),
        )
        with graph.as_default():
            for variable in ruled:
                for factor in explained(index)[1][variable]:
                    templates[variable] = merge(templates[variable], factor)
    coverage.templates = dict(templates)


def _chain(calls: Sequence[LayerCall], index: int | None) -> Iterator[int]:
    """A call and those around it, the innermost first."""
    while index is not None and index >= 0:
        yield index
        index = calls[index].parent


class _Placed:
    """Where the examples lie in what enters and leaves a call."""

    def __init__(self, call: LayerCall, other: LayerCall, graph: Any, positions: dict[str, int]):
        self.call = call
        self.other = other
        self.graph = graph
        self.positions = positions
        self.works = False
        self.stretch: Stretch | None = None
        self.batched: tuple[bool, ...] = ()
        self.rule_works = False

    def check(self) -> "_Placed":
        outputs, others = floating(self.call.outputs), floating(self.other.outputs)
        if not outputs or len(outputs) != len(others):
            return self
        if any(getattr(output, "graph", None) is not self.graph for output in outputs):
            return self
        places = [_place(*pair) for pair in zip(outputs, others, strict=True)]
        arguments = tensors((self.call.args, self.call.kwargs))
        other_arguments = tensors((self.other.args, self.other.kwargs))
        if len(arguments) != len(other_arguments):
            return self
        argument_places = [_place(*pair) for pair in zip(arguments, other_arguments, strict=True)]
        self.batched = tuple(place == "batch" for place in argument_places)
        if None in argument_places:
            return self
        if all(place == "batch" for place in places):
            self.works = True
            self.rule_works = bool(argument_places) and argument_places[0] == "batch"
        elif places == ["constant"] and not any(self.batched):
            self.stretch = self._stretch(outputs[0])
            self.works = self.rule_works = self.stretch is not None
        return self

    def _stretch(self, output: tf.Tensor) -> Stretch | None:
        """How to stretch it, where each use is an elementwise operation with the batch."""
        ranks: set[int | None] = set()
        pending = [output]
        end = self.call.operations[1]
        while pending:
            tensor = pending.pop()
            for operation in tensor.consumers():
                if self.positions[operation.name] < end:
                    continue
                if operation.type in _TRANSPARENT:
                    pending.extend(operation.outputs)
                elif operation.type in _ELEMENTWISE and _first(operation.outputs[0]) == _SIZES[0]:
                    ranks.add(operation.outputs[0].shape.rank)
                else:
                    return None
        if len(ranks) != 1:
            return None
        (rank,) = ranks
        shape = output.shape
        if rank is None or not shape.is_fully_defined():
            return None
        # Of the batch's rank, its first axis must be one that is stretched already.
        if shape.rank > rank or (shape.rank == rank and shape[0] != 1):
            return None
        return Stretch(tuple(shape), rank)


def _first(tensor: tf.Tensor) -> int | None:
    return tensor.shape[0] if tensor.shape.rank else None


def _place(small: tf.Tensor, large: tf.Tensor) -> str | None:
    """`"batch"`: examples along the first axis; `"constant"`: the same for all; None: unknown."""
    a, b = small.shape, large.shape
    if a.rank is None or a.rank != b.rank:
        return None
    if a.as_list() == b.as_list() and a.is_fully_defined():
        return "constant"
    # As lists: dimensions that only a run can tell may stand behind the examples.
    if a.rank and [a[0], b[0]] == list(_SIZES) and a[1:].as_list() == b[1:].as_list():
        return "batch"
    return None


def _ask_rule(
    call: LayerCall, variables: Sequence[keras.Variable], used: Iterable[int], place: _Placed
) -> tuple[str, dict[int, list[Factor]]]:
    """The rule of the call's layer, and what it explains, asked with gradients of zero."""
    rule = registry.find(call.layer)
    if rule is None or not place.rule_works:
        return "", {}
    used = sorted(used)
    call.variables = [variables[v] for v in used]
    asked = with_gradients(
        call,
        tf.nest.map_structure(
            lambda leaf: tf.zeros_like(leaf) if tf.is_tensor(leaf) else None, call.outputs
        ),
        None if call.linear_output is None else tf.zeros_like(call.linear_output),
        place.stretch,
        _SIZES[0],
    )
    return registry.name(rule), explain(rule, asked, variables, used)


def _linear(
    call: LayerCall, place: _Placed, variables: Sequence[keras.Variable], ruled: Iterable[int]
) -> tuple[int, ...]:
    """Those of the variables in which the call is linear."""
    if place.stretch is not None or not tf.is_tensor(call.linear_output):
        return ()
    weights = registry.linear_weights(call.layer)
    return tuple(v for v in ruled if any(variables[v] is weight for weight in weights))


def _explaining_calls(
    variable: int,
    operation_positions: Sequence[int],
    owners: Sequence[int],
    calls: Sequence[LayerCall],
    usable: Sequence[_Placed],
    explained: Callable[[int], tuple[str, dict[int, list[Factor]]]],
    operations: Sequence[Any],
) -> dict[int, bool] | None:
    """The calls that explain a variable, and whether by their rule; None for the network."""
    found: dict[int, bool] = {}
    for position in operation_positions:
        # Not the model itself: that is the whole network.
        around = [
            index
            for index in _chain(calls, owners[position])
            if usable[index].works and calls[index].parent is not None
        ]
        candidates = [index for index in around if not leaks(operations, position, calls[index])]
        by_rule = next(
            (
                index
                for index in around
                if variable in explained(index)[1]
                and (
                    index in candidates
                    or not leaks(operations, position, calls[index], _logits(calls[index]))
                )
            ),
            None,
        )
        if by_rule is not None:
            found[by_rule] = True
        elif candidates:
            found.setdefault(candidates[0], False)
        else:
            return None
    # A call explains all that happens in it: within another one that uses the variable too, it
    # would count twice.
    for index in list(found):
        around = [other for other in _chain(calls, calls[index].parent) if other in found]
        if around:
            del found[index]
            for other in around:
                found[other] = found[other] and False
    return found or {}


def _logits(call: LayerCall) -> Sequence[tf.Tensor]:
    """What may go past the activation of a call whose rule asks what came back before it.

    A cross-entropy takes the argument of a softmax or sigmoid, and not what that makes of it.
    """
    return call.linear_outputs if registry.linear_weights(call.layer) else ()
