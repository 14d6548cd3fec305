"""Linear algebra on flat vectors and functions. Knows no model and no dataset."""

from keras_influence.linalg.basis import Basis, HostBasis
from keras_influence.linalg.conjugate_gradient import Solutions, conjugate_gradient
from keras_influence.linalg.krylov import (
    ArnoldiResult,
    Eigenbasis,
    Journal,
    Step,
    arnoldi,
    distill,
)

__all__ = [
    "ArnoldiResult",
    "Basis",
    "Eigenbasis",
    "HostBasis",
    "Journal",
    "Solutions",
    "Step",
    "arnoldi",
    "conjugate_gradient",
    "distill",
]
