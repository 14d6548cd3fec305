"""Linear algebra on flat vectors and functions. Knows no model and no dataset."""

from keras_influence.linalg.krylov import ArnoldiResult, Eigenbasis, arnoldi, distill

__all__ = ["ArnoldiResult", "Eigenbasis", "arnoldi", "distill"]
