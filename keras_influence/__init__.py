"""Training-data attribution for Keras and TensorFlow: which examples made this prediction?"""

from keras_influence import _backend as _backend  # isort: skip - it checks what the others need.
from keras_influence import callbacks, checkpoints, data, evaluation, gradients, linalg, report
from keras_influence.methods import Arnoldi, GradientDot, LiSSA, RandomProjection, TracIn
from keras_influence.scorer import (
    Influences,
    InfluenceScorer,
    TopExamples,
    load,
    top_influences,
)

__version__ = "0.1.0"

__all__ = [
    "Arnoldi",
    "GradientDot",
    "InfluenceScorer",
    "Influences",
    "LiSSA",
    "RandomProjection",
    "TopExamples",
    "TracIn",
    "callbacks",
    "checkpoints",
    "data",
    "evaluation",
    "gradients",
    "linalg",
    "load",
    "report",
    "top_influences",
]
