"""Questions to a traced graph."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_influence.gradients.calls import LayerCall
from keras_influence.gradients.coverage import tensors

_CONTROL_FLOW = {"While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase"}


def tensor_bytes(graph: Any) -> int:
    """Size of all tensors of known shape that the operations of a graph put out."""
    return sum(
        tensor.shape.num_elements() * tensor.dtype.size
        for operation in graph.get_operations()
        for tensor in operation.outputs
        if tensor.shape.is_fully_defined() and tensor.dtype not in (tf.resource, tf.variant)
    )


def reads(
    graph: Any, variables: Sequence[keras.Variable], positions: dict[str, int]
) -> list[list[int]]:
    """For each variable, the operations of the graph that use its handle."""
    inside = {id(outer): inner for outer, inner in graph.captures}
    found = []
    for variable in variables:
        value = variable.value
        handles = [each.handle for each in getattr(value, "values", [value])]
        operations = [
            positions[operation.name]
            for handle in handles
            if id(handle) in inside
            for operation in inside[id(handle)].consumers()
        ]
        found.append(sorted(set(operations)))
    return found


def leaks(
    operations: Sequence[Any], position: int, call: LayerCall, also: Sequence[tf.Tensor] = ()
) -> bool:
    """Whether something computed from the variable leaves the call otherwise than as an output.

    Args:
        also: tensors of the call that may leave it too.
    """
    start, end = call.operations
    outputs = {id(tensor) for tensor in [*tensors(call.outputs), *also]}
    inside = {operation.name for operation in operations[start:end]}
    seen = {operations[position].name}
    pending = [operations[position]]
    while pending:
        for tensor in pending.pop().outputs:
            if not (tensor.dtype.is_floating or tensor.dtype == tf.variant):
                continue
            for consumer in tensor.consumers():
                if consumer.name not in inside:
                    if id(tensor) not in outputs:
                        return True
                elif consumer.name not in seen:
                    seen.add(consumer.name)
                    pending.append(consumer)
    return False


def is_plain(operations: Sequence[Any], graph: Any) -> bool:
    """Whether all differentiation is right, and `tf.vectorized_map` works, on these operations.

    The latter fails on loops, and on branches, when it runs. And forward mode leaves what is
    compiled by itself: Keras compiles grouped convolutions on a CPU, because TensorFlow's are wrong
    there without; the derivatives that forward mode makes of them are not compiled, and are wrong.
    """
    if any(_is_special(operation.node_def) for operation in operations):
        return False
    calls = any(
        attribute.HasField("func")
        for operation in operations
        for attribute in operation.node_def.attr.values()
    )
    if not calls:
        return True
    library = graph.as_graph_def().library.function
    return not any(_is_special(node) for function in library for node in function.node_def)


def _is_special(node: Any) -> bool:
    return node.op in _CONTROL_FLOW or node.attr["_XlaMustCompile"].b
