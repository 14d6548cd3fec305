"""One model and one batch: per-example losses, and the linear maps of their gradients."""

from keras_influence.gradients.calls import LayerCall
from keras_influence.gradients.convexity import CURVATURES, check_curvature, declare_convex
from keras_influence.gradients.factors import Contraction, Explicit, Outer, Rows
from keras_influence.gradients.flops import graph_flops, projection_flops
from keras_influence.gradients.losses import PerExampleLoss
from keras_influence.gradients.maps import LossMaps
from keras_influence.gradients.measurements import MEASUREMENTS
from keras_influence.gradients.outputs import OutputMaps
from keras_influence.gradients.parameters import ParameterVector, select_variables
from keras_influence.gradients.projector import Projector
from keras_influence.gradients.roots import gram, num_roots
from keras_influence.gradients.rules import register_rule
from keras_influence.gradients.rules.elementwise import elementwise

__all__ = [
    "CURVATURES",
    "MEASUREMENTS",
    "Contraction",
    "Explicit",
    "LayerCall",
    "LossMaps",
    "Outer",
    "OutputMaps",
    "ParameterVector",
    "PerExampleLoss",
    "Projector",
    "Rows",
    "check_curvature",
    "declare_convex",
    "elementwise",
    "gram",
    "graph_flops",
    "num_roots",
    "projection_flops",
    "register_rule",
    "select_variables",
]
