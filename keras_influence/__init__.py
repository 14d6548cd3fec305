"""Training-data attribution for Keras and TensorFlow: which examples made this prediction?"""

_NEEDED = (
    "keras_influence needs Keras on TensorFlow: set the environment variable "
    'KERAS_BACKEND=tensorflow (or "backend": "tensorflow" in ~/.keras/keras.json) before Keras is '
    "imported."
)
try:
    import keras as _keras
except ImportError as _error:
    # Keras imports its backend's own package, which need not be there.
    raise ImportError(f"{_NEEDED} Keras cannot be imported: {_error}.") from _error

if _keras.backend.backend() != "tensorflow":
    raise ImportError(f"{_NEEDED} The Keras backend is {_keras.backend.backend()!r}.")

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
