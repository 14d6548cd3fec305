"""Attribution methods, one to a file."""

from keras_influence.methods.arnoldi import Arnoldi
from keras_influence.methods.base import InfluenceMethod
from keras_influence.methods.conjugate_gradient import ConjugateGradient
from keras_influence.methods.datamodels import Datamodels
from keras_influence.methods.diagonal_fisher import DiagonalFisher
from keras_influence.methods.direction import DirectionMethod
from keras_influence.methods.encoding import EncodingMethod
from keras_influence.methods.exact import ExactInfluence
from keras_influence.methods.gradient_dot import GradientDot
from keras_influence.methods.inverse import InverseMethod
from keras_influence.methods.kfac import EKFAC, KFAC
from keras_influence.methods.lissa import LiSSA
from keras_influence.methods.memorization import Memorization, MemorizedExamples
from keras_influence.methods.random_projection import RandomProjection
from keras_influence.methods.table import TableMethod
from keras_influence.methods.tracin import TracIn

__all__ = [
    "EKFAC",
    "KFAC",
    "Arnoldi",
    "ConjugateGradient",
    "Datamodels",
    "DiagonalFisher",
    "DirectionMethod",
    "EncodingMethod",
    "ExactInfluence",
    "GradientDot",
    "InfluenceMethod",
    "InverseMethod",
    "LiSSA",
    "Memorization",
    "MemorizedExamples",
    "RandomProjection",
    "TableMethod",
    "TracIn",
]
