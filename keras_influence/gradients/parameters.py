"""The chosen variables of a model, seen as one flat vector."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

Variables: TypeAlias = (
    Sequence[keras.Variable | keras.layers.Layer]
    | keras.layers.Layer
    | Callable[[keras.Variable], bool]
    | None
)


def select_variables(model: keras.Model, variables: Variables = None) -> list[keras.Variable]:
    """The model's variables that `variables` chooses, in the model's own order.

    Args:
        model: a built model.
        variables: Keras variables of `model`, or layers of it, which stand for their trainable
            variables; or a predicate `variable -> bool` that picks among
            `model.trainable_variables`; or `None` for all of those.

    Raises:
        ValueError: an unbuilt model; a choice that is empty, not of this model, not floating point,
            or made by name.
    """
    if not model.built or not model.variables:
        raise ValueError(
            f"The model {model.name!r} is not built: it has no weights yet. Call it on a batch, "
            "or fit it, first."
        )
    if variables is None:
        chosen = list(model.trainable_variables)
    elif callable(variables) and not isinstance(variables, keras.layers.Layer):
        chosen = [v for v in model.trainable_variables if variables(v)]
    else:
        wanted: list[Any] = []
        for each in [variables] if isinstance(variables, keras.layers.Layer) else variables:
            is_layer = isinstance(each, keras.layers.Layer)
            wanted.extend(each.trainable_variables if is_layer else [each])
        strange = [v for v in wanted if not isinstance(v, keras.Variable)]
        if strange:
            raise ValueError(
                "`variables` must be layers of the model, such as `model.layers[-1]`, Keras "
                "variables of it, or a predicate. "
                f"Received an element of type {type(strange[0]).__name__}: {strange[0]!r}."
            )
        identities = {id(v) for v in wanted}
        chosen = [v for v in model.variables if id(v) in identities]
        if len(chosen) != len(identities):
            mine = {id(v) for v in chosen}
            foreign = next(v for v in wanted if id(v) not in mine)
            raise ValueError(f"{foreign.path!r} is not a variable of the model {model.name!r}.")
    if not chosen:
        raise ValueError(f"`variables` chooses none of the variables of the model {model.name!r}.")
    for variable in chosen:
        if not tf.as_dtype(variable.dtype).is_floating:
            raise ValueError(
                f"{variable.path!r} has dtype {variable.dtype}: only floating-point variables have "
                "gradients."
            )
    return chosen


class ParameterVector:
    """Flattens tensors shaped like some variables into one vector [p], and back.

    The vector is float32, or float64 where every variable is, whatever the variables' own dtype.

    Args:
        variables: the Keras variables, in the order in which they lie in the vector.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self.variables = list(variables)
        # tf.autodiff.ForwardAccumulator watches tf.Variables, and not the Keras variables.
        self.values = [v.value for v in self.variables]
        self.shapes = [tuple(v.shape) for v in self.variables]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.size = sum(self.sizes)
        double = all(v.dtype == "float64" for v in self.variables)
        self.dtype = tf.float64 if double else tf.float32

    def flatten(self, tensors: Sequence[Any]) -> tf.Tensor:
        """Tensors shaped like the variables (`None` counts as zero) -> [p]."""
        parts = []
        for tensor, size in zip(tensors, self.sizes, strict=True):
            if tensor is None:
                parts.append(tf.zeros([size], self.dtype))
            else:
                # The gradient of an embedding table is IndexedSlices.
                dense = tf.convert_to_tensor(tensor)
                parts.append(tf.reshape(tf.cast(dense, self.dtype), [-1]))
        return tf.concat(parts, axis=0)

    def unflatten(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """[p] -> tensors of the variables' shapes and dtypes."""
        return [
            tf.cast(tf.reshape(part, shape), value.dtype)
            for part, shape, value in zip(
                tf.split(vector, self.sizes), self.shapes, self.values, strict=True
            )
        ]
