"""Per-example gradients of one variable, unformed: what entered a layer, and what came back to it.

A `Factor` stands for the gradients [B, *shape] of a batch with respect to one variable, and answers
for them without holding them all:

    project     <gradient_i, V_j>          [B, k]
    norms       |gradient_i|^2             [B]
    gradients   gradient_i                 [B, *shape]

`Outer` is for weights that multiply (a sum over positions of outer products), `Rows` for tables of
which an example touches a few rows, `Explicit` for gradients that are small enough to be held.
Directions are laid out once for the way in which they will be multiplied (`prepare`), and then
serve every batch. The way is chosen from the flops and bytes that each costs.
"""

from keras_influence.gradients.factors.base import (
    CONTRACTIONS,
    Contraction,
    Explicit,
    Factor,
    Prepared,
)
from keras_influence.gradients.factors.outer import Layout, Outer
from keras_influence.gradients.factors.rows import Rows

__all__ = [
    "CONTRACTIONS",
    "Contraction",
    "Explicit",
    "Factor",
    "Layout",
    "Outer",
    "Prepared",
    "Rows",
]
