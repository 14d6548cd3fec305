"""Which rule explains which layer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from keras_influence.gradients.calls import LayerCall
from keras_influence.gradients.factors import Factor

# call -> pairs (variable, factor of its per-example gradients).
Rule = Callable[[LayerCall], Iterable[tuple[keras.Variable, Factor]]]

_rules: dict[Any, Rule] = {}
_linear: dict[Rule, tuple[str, ...]] = {}


def register_rule(
    *layers: type[keras.layers.Layer] | str, linear_in: Sequence[str] = ()
) -> Callable[[Rule], Rule]:
    """Declares how the per-example gradients of a layer's weights follow from one of its calls.

    A rule is a generator: given a `LayerCall`, it yields pairs of a variable of the layer and a
    factor of the gradients with respect to it (`Outer`, `Rows`, `Explicit`). Variables that it does
    not yield, and calls for which it yields nothing, are left to forward mode through the layer,
    which is right for every layer, and slower. A subclass is served by its parent's rule as long as
    it does not override `call`.

    Args:
        *layers: classes, or `"package>Name"` for a class of that name anywhere in a package that
            need not be installed.
        linear_in: names of the layer's attributes that are weights in which, taken together, what
            its activation is given is linear (its output, where it has no activation): kernel and
            bias. It saves time in Hessian products; what is not named costs it.

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
        _linear[rule] = tuple(linear_in)
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


def linear_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights in which, together, what the layer's activation is given is linear."""
    rule = find(layer)
    if rule is None or getattr(layer, "lora_enabled", False):
        return []
    weights = [getattr(layer, name, None) for name in _linear[rule]]
    return [weight for weight in weights if weight is not None]


def name(rule: Rule) -> str:
    return rule.__name__.strip("_").replace("_", " ")
