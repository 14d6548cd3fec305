"""What entered and what left each call of a layer, seen while a model runs."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

_lock = threading.RLock()
_watching = threading.local()


class LayerCall:
    """One call of a layer, as a rule sees it.

    Attributes:
        layer: the layer.
        args, kwargs: what its `call` was given.
        outputs: what its `call` returned.
        linear_output: what its activation was given, where it has one; else its output.
        output_gradients: the losses' gradients by `outputs`, a nest of the same structure (`None`
            where an output is not floating point).
        linear_gradient: the losses' gradient by `linear_output`, [B, ...].
        variables: the chosen variables that the call uses.
        dtype: in which to compute: float32 or float64.
    """

    def __init__(self, layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.layer = layer
        self.args = args
        self.kwargs = kwargs
        self.outputs: Any = None
        self.linear_outputs: list[tf.Tensor] = []
        self.output_gradients: Any = None
        self.linear_gradient: Any = None
        self.variables: Sequence[keras.Variable] = ()
        self.dtype = tf.float32
        self.rerun: Callable[..., Any] = layer.call
        # Where in the graph it happened; set by `gradients.survey`.
        self.key = (0, 0)
        self.parent: int | None = None
        self.graph: Any = None
        self.operations = (0, 0)

    @property
    def inputs(self) -> tf.Tensor:
        """The first argument, in the dtype to compute in."""
        value = self.args[0] if self.args else next(iter(self.kwargs.values()))
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        return self.cast(value)

    @property
    def linear_output(self) -> Any:
        """The activation's argument, where it was called once; the output, where it has none."""
        if getattr(self.layer, "activation", None) is None:
            return self.outputs
        return self.linear_outputs[0] if len(self.linear_outputs) == 1 else None

    @property
    def output_gradient(self) -> tf.Tensor:
        """The losses' gradient by the one output, [B, ...]."""
        return self.output_gradients

    def cast(self, tensor: Any) -> tf.Tensor:
        tensor = tf.convert_to_tensor(tensor)
        return tf.cast(tensor, self.dtype) if tensor.dtype.is_floating else tensor

    def uses(self, variable: Any) -> bool:
        """Whether gradients with respect to `variable` are wanted."""
        return variable is not None and any(variable is each for each in self.variables)


class Observer:
    """Sees the calls of layers. The base class lets all pass."""

    def call(
        self,
        layer: keras.layers.Layer,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """In place of `original(*args, **kwargs)`."""
        return original(*args, **kwargs)

    def activation(self, layer: keras.layers.Layer, tensor: tf.Tensor) -> tf.Tensor:
        """In place of what the layer's activation is given."""
        del layer
        return tensor


@contextlib.contextmanager
def observed(layers: Sequence[keras.layers.Layer], observer: Observer) -> Iterator[None]:
    """Shows `observer` the calls that this thread makes to `layers`.

    Each layer's `call` (and `activation`) is replaced while the context lasts, and put back after.
    Other threads that call the layers meanwhile run the originals.
    """
    with _lock:
        for layer in layers:
            _replace(layer)
    try:
        with observing({id(layer): observer for layer in layers}):
            yield
    finally:
        with _lock:
            for layer in layers:
                _restore(layer)


@contextlib.contextmanager
def observing(observers: dict[int, Observer]) -> Iterator[None]:
    """Calls of this thread that these observers see, by their layers' `id`, and no others."""
    previous = getattr(_watching, "observers", {})
    _watching.observers = observers
    try:
        yield
    finally:
        _watching.observers = previous


def unobserved() -> contextlib.AbstractContextManager[None]:
    """Calls of layers that no observer sees: a layer's second run."""
    return observing({})


def _observer(layer: keras.layers.Layer) -> Observer | None:
    """Who watches this layer in this thread: another thread may have replaced its call."""
    return getattr(_watching, "observers", {}).get(id(layer))


_MISSING = object()
_REPLACED = "_keras_influence_replaced"


def _replace(layer: keras.layers.Layer) -> None:
    state = layer.__dict__.get(_REPLACED)
    if state is not None:
        state["users"] += 1
        return
    saved = {}
    quantized = getattr(layer, "quantization_mode", None) is not None
    for name in ("call", "quantized_call") if quantized else ("call",):
        saved[name] = layer.__dict__.get(name, _MISSING)
        object.__setattr__(layer, name, _observed_call(layer, getattr(layer, name)))
    if layer.__dict__.get("_remat_mode") is not None:
        # Rematerialisation runs the call in a graph of its own, of which nothing is seen outside.
        saved["_remat_mode"] = layer.__dict__["_remat_mode"]
        object.__setattr__(layer, "_remat_mode", None)
    activation = layer.__dict__.get("activation")
    if callable(activation):
        saved["activation"] = activation
        object.__setattr__(layer, "activation", _observed_activation(layer, activation))
    object.__setattr__(layer, _REPLACED, {"users": 1, "saved": saved})


def _restore(layer: keras.layers.Layer) -> None:
    state = layer.__dict__[_REPLACED]
    state["users"] -= 1
    if state["users"]:
        return
    for name, value in state["saved"].items():
        if value is _MISSING:
            object.__delattr__(layer, name)
        else:
            object.__setattr__(layer, name, value)
    object.__delattr__(layer, _REPLACED)


def _observed_call(layer: keras.layers.Layer, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        observer = _observer(layer)
        if observer is None:
            return original(*args, **kwargs)
        return observer.call(layer, original, args, kwargs)

    return call


def _observed_activation(
    layer: keras.layers.Layer, original: Callable[..., Any]
) -> Callable[..., Any]:
    def activation(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        observer = _observer(layer)
        if observer is not None:
            tensor = observer.activation(layer, tensor)
        return original(tensor, *args, **kwargs)

    return activation


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The model, and every layer in it at any depth."""
    found = {id(model): model}
    for layer in model._flatten_layers(include_self=True, recursive=True):
        found.setdefault(id(layer), layer)
    return list(found.values())
