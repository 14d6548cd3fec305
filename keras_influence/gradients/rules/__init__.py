"""One small file a family of layers: how per-example gradients follow from a layer's call."""

from keras_influence.gradients.rules import (
    conv,
    dense,
    elementwise,
    embedding,
    recurrent,
)
from keras_influence.gradients.rules.registry import register_rule

__all__ = [
    "conv",
    "dense",
    "elementwise",
    "embedding",
    "recurrent",
    "register_rule",
]
