"""A method from the store that its `save` wrote."""

from typing import Any

import keras

from keras_influence import checkpoints
from keras_influence.methods.base import InfluenceMethod
from keras_influence.methods.basis_place import PLACES


def large_arrays(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Arrays of a store that `method_from_store` takes unread."""
    cls = InfluenceMethod._registry.get(manifest.get("kind", ""))
    if cls is None or manifest["config"].get("basis", "host") in PLACES:
        return ()
    return cls._large


def method_from_store(
    manifest: dict[str, Any], arrays: dict[str, Any], model: keras.Model
) -> InfluenceMethod:
    """The method in a store, on `model`, which must be the one that it was fitted on."""
    kind = manifest["kind"]
    if kind not in InfluenceMethod._registry:
        raise ValueError(
            f"The store holds a {kind!r}, which is none of {sorted(InfluenceMethod._registry)}."
        )
    cls = InfluenceMethod._registry[kind]
    if manifest["architecture"] != checkpoints.architecture_fingerprint(model):
        raise ValueError(
            f"The store was written for a model of another architecture than {model.name!r}: "
            "the variables' names, shapes or dtypes differ. Pass the model that it was fitted on."
        )
    method = cls.from_config(manifest["config"], model)
    method.num_train = manifest["num_train"]
    method.fit_seconds = manifest["fit_seconds"]
    method._fitted_weights = manifest["weights"]
    if method.num_train is not None:
        method._check_weights()
    method._set_state(arrays)
    return method
