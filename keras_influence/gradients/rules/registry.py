"""Which rule explains which layer."""

from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_influence.gradients.calls import LayerCall
from keras_influence.gradients.factors import Factor

# call -> pairs (variable, factor of its per-example gradients).
Rule = Callable[[LayerCall], Iterable[tuple[keras.Variable, Factor]]]

_rules: dict[Any, Rule] = {}


def register_rule(*layers: type[keras.layers.Layer] | str) -> Callable[[Rule], Rule]:
    """Declares how the per-example gradients of a layer's weights follow from one of its calls.

    A rule is a generator: given a `LayerCall`, it yields pairs of a variable of the layer and a
    factor of the gradients with respect to it (`Outer`, `Rows`, `Explicit`). Variables that it does
    not yield, and calls for which it yields nothing, are left to forward mode through the layer,
    which is right for every layer, and slower. A subclass is served by its parent's rule as long as
    it does not override `call`.

    Args:
        *layers: classes, or `"package>Name"` for a class of that name anywhere in a package that
            need not be installed.

    Example:

    >>> @ki.gradients.register_rule(Scale)
    ... def scale(call):
    ...     product = call.output_gradient * call.inputs  # [B, T, C]; the weight is [C].
    ...     yield call.layer.gain, ki.gradients.Explicit(tf.reduce_sum(product, axis=1))
    """
    if not layers:
        raise ValueError("`register_rule` needs the layer classes that the rule is for.")
    for layer in layers:
        if not (isinstance(layer, str) or issubclass(layer, keras.layers.Layer)):
            raise TypeError(f"Expected a class of Keras layers, or a name. Received: {layer!r}.")

    def register(rule: Rule) -> Rule:
        for layer in layers:
            _rules[layer] = rule
        return rule

    return register


def find(layer: keras.layers.Layer) -> Rule | None:
    """The rule for a layer: of its class, or of the parent whose `call` it has."""
    classes: tuple[Any, ...] = type(layer).__mro__
    for cls in classes:
        if cls is keras.layers.Layer:
            return None
        if not issubclass(cls, keras.layers.Layer):
            continue
        rule = _rules.get(cls) or _rules.get(f"{cls.__module__.partition('.')[0]}>{cls.__name__}")
        if rule is not None:
            return rule if type(layer).call is cls.call else None
    return None


def name(rule: Rule) -> str:
    return rule.__name__.strip("_").replace("_", " ")
