"""Linear algebra on flat vectors and functions. Knows no model and no dataset."""

from keras_influence.linalg.basis import Basis, HostBasis
from keras_influence.linalg.block_conjugate_gradient import block_conjugate_gradient
from keras_influence.linalg.conjugate_gradient import Solutions, conjugate_gradient
from keras_influence.linalg.device import DeviceBasis, OneDevice
from keras_influence.linalg.krylov import arnoldi, basis_rows, check_limits
from keras_influence.linalg.projection import Journal, Restart, Step
from keras_influence.linalg.ritz import ArnoldiResult, Eigenbasis, distill
from keras_influence.linalg.space import Space, orthogonality
from keras_influence.linalg.subspace import Leading, leading_eigenpairs

__all__ = [
    "ArnoldiResult",
    "Basis",
    "DeviceBasis",
    "Eigenbasis",
    "HostBasis",
    "Journal",
    "Leading",
    "OneDevice",
    "Restart",
    "Solutions",
    "Space",
    "Step",
    "arnoldi",
    "basis_rows",
    "block_conjugate_gradient",
    "check_limits",
    "conjugate_gradient",
    "distill",
    "leading_eigenpairs",
    "orthogonality",
]
