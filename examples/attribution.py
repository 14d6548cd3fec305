"""The attribution methods of the examples, by name."""

import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras

import keras_influence as ki
from keras_influence.checkpoints import Checkpoint
from keras_influence.methods import InfluenceMethod

METHODS = ("arnoldi", "random_projection", "tracin", "gradient_dot", "ekfac", "lissa")
WITH_RANK = ("arnoldi", "random_projection")


class MethodSettings(NamedTuple):
    """What the methods are told, but for rank and checkpoints.

    Attributes:
        batch_size: Examples computed together.
        seed: Seed of every draw of a method.
        num_iterations: Hessian-vector products of Arnoldi; None for its default.
        num_hessian_examples: Training examples in Arnoldi's Hessian; None for all.
        lissa_depth: Steps of LiSSA's recursion.
        lissa_damping: Added to the eigenvalues of LiSSA's Hessian.
        lissa_scale: What LiSSA divides the Hessian by; as it measures where none is given.
        lissa_batch_size: Examples of the Hessian in each step of LiSSA.
        shared: Further arguments that every method takes, such as `variables`.
    """

    batch_size: int
    seed: int
    num_iterations: int | None = None
    num_hessian_examples: int | None = None
    lissa_depth: int = 100
    lissa_damping: float = 0.01
    lissa_scale: float | None = None
    lissa_batch_size: int = 32
    # As published: for finding wrong labels the eigenvectors are enough.
    complement: str | None = None
    shared: Mapping[str, Any] = types.MappingProxyType({})


def build(
    name: str,
    model: keras.Model,
    settings: MethodSettings,
    rank: int | None = None,
    checkpoints: Sequence[Checkpoint] = (),
) -> InfluenceMethod:
    """Returns the unfitted method of one of the names in `METHODS`.

    Args:
        name: One of `METHODS`.
        model: A trained model.
        settings: What the method is told.
        rank: Length of the encodings of a method in `WITH_RANK`.
        checkpoints: Checkpoints that TracIn sums over.
    """
    if (name in WITH_RANK) != (rank is not None):
        raise ValueError(
            f"A rank belongs to {' and '.join(WITH_RANK)}, and to no other method. "
            f"Received: method {name!r}, rank {rank}."
        )
    options: dict[str, Any] = {"batch_size": settings.batch_size, **settings.shared}
    if name in WITH_RANK:
        options["rank"] = rank
    match name:
        case "arnoldi":
            return ki.Arnoldi(
                model,
                num_iterations=settings.num_iterations,
                complement=settings.complement,
                damping=0.0,
                num_examples=settings.num_hessian_examples,
                seed=settings.seed,
                **options,
            )
        case "random_projection":
            return ki.RandomProjection(model, seed=settings.seed, **options)
        case "tracin":
            return ki.TracIn(model, checkpoints=checkpoints, **options)
        case "gradient_dot":
            return ki.GradientDot(model, **options)
        case "ekfac":
            return ki.EKFAC(
                model,
                num_examples=settings.num_hessian_examples,
                seed=settings.seed,
                **options,
            )
        case "lissa":
            return ki.LiSSA(
                model,
                depth=settings.lissa_depth,
                damping=settings.lissa_damping,
                scale_factor="auto" if settings.lissa_scale is None else settings.lissa_scale,
                hessian_batch_size=settings.lissa_batch_size,
                seed=settings.seed,
                **options,
            )
    raise ValueError(f"The method must be one of {METHODS}. Received: {name!r}.")
