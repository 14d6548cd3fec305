"""Training-data attribution for Keras and TensorFlow: which examples made this prediction?"""

from keras_influence import _backend as _backend  # isort: skip - it checks what the others need.
from keras_influence import (
    callbacks,
    checkpoints,
    data,
    evaluation,
    gradients,
    linalg,
    report,
    trainers,
)
from keras_influence.methods import (
    EKFAC,
    KFAC,
    Arnoldi,
    ConjugateGradient,
    Datamodels,
    DiagonalFisher,
    ExactInfluence,
    GradientDot,
    LiSSA,
    Memorization,
    RandomProjection,
    TracIn,
)
from keras_influence.retrieval import (
    FaissFlat,
    FaissIVF,
    Influences,
    TopExamples,
    top_influences,
)
from keras_influence.scorer import InfluenceScorer, load

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "Arnoldi",
    "ConjugateGradient",
    "Datamodels",
    "DiagonalFisher",
    "ExactInfluence",
    "FaissFlat",
    "FaissIVF",
    "GradientDot",
    "InfluenceScorer",
    "Influences",
    "LiSSA",
    "Memorization",
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
    "trainers",
]
