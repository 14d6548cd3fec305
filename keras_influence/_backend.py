"""Refuses, at import, a Keras that does not run on TensorFlow."""

_NEEDED = (
    "keras_influence needs Keras on TensorFlow: set the environment variable "
    'KERAS_BACKEND=tensorflow (or "backend": "tensorflow" in ~/.keras/keras.json) before Keras is '
    "imported."
)
try:
    import keras
except (ImportError, ValueError) as error:
    # Keras imports its backend's own package, which need not be there.
    raise ImportError(f"{_NEEDED} Keras cannot be imported: {error}.") from error

if keras.backend.backend() != "tensorflow":
    raise ImportError(f"{_NEEDED} The Keras backend is {keras.backend.backend()!r}.")
