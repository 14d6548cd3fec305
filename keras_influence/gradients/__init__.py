"""One model and one batch: per-example losses, and the linear maps of their gradients."""

from keras_influence.gradients.losses import PerExampleLoss
from keras_influence.gradients.maps import LossMaps
from keras_influence.gradients.parameters import ParameterVector, select_variables

__all__ = ["LossMaps", "ParameterVector", "PerExampleLoss", "select_variables"]
