"""Where an iteration keeps its vectors, and in which precision."""

import os
from typing import Any

import keras

from keras_influence.gradients import LossMaps
from keras_influence.linalg import DeviceBasis, HostBasis, OneDevice
from keras_influence.linalg.basis import BFLOAT16
from keras_influence.replicas import replicas

# Those that are no directory.
PLACES = ("host", "device")


def checked_place(basis: str | os.PathLike) -> str:
    """`basis` as a string.

    Raises:
        ValueError: a place in a bucket.
    """
    place = os.fspath(basis)
    if "://" in place:
        raise ValueError(
            f"`basis` must be on a local disk, where each step's vector is read again. "
            f"Received: {place!r}."
        )
    return place


def checked_dtype(basis_dtype: str | None, maps: LossMaps) -> Any:
    """The dtype of stored vectors.

    Raises:
        ValueError: neither that of the parameters, nor bfloat16 for parameters of float32.
    """
    dtype = maps.parameters.dtype.as_numpy_dtype
    if basis_dtype in (None, maps.parameters.dtype.name):
        return dtype
    if basis_dtype == "bfloat16" and maps.parameters.dtype.name == "float32":
        return BFLOAT16
    raise ValueError(
        "`basis_dtype` must be None, or 'bfloat16' for parameters of float32. Received: "
        f"{basis_dtype!r} for parameters of {maps.parameters.dtype.name}."
    )


def device_arguments(
    num_rows: int, maps: LossMaps, model: keras.Model, stored_dtype: Any
) -> tuple[Any, ...]:
    """Of a `DeviceBasis` where the model computes.

    Raises:
        NotImplementedError: a strategy of several processes.
    """
    parameters = maps.parameters
    where = replicas(model) or OneDevice(parameters.values[0].device)
    return num_rows, parameters.size, parameters.dtype.as_numpy_dtype, stored_dtype, where


def new_basis(
    place: str, num_rows: int, maps: LossMaps, model: keras.Model, stored_dtype: Any
) -> HostBasis | DeviceBasis:
    """An empty basis in one of `PLACES`."""
    arguments = (num_rows, maps, model, stored_dtype)
    if place == "device":
        return DeviceBasis(*device_arguments(*arguments))
    parameters = maps.parameters
    return HostBasis(num_rows, parameters.size, parameters.dtype.as_numpy_dtype, stored_dtype)
