"""Gauss-Newton and Fisher matrices as R'R, with as many rows for an example as its outputs have.

Column by column such a matrix takes p products, each of them some passes of the network. A row of R
is a gradient (see `labels`): a pass, and 2 p^2 flops for its outer product with itself. Where
weights serve many positions, as in convolutions, that is far less.
"""

from typing import Any

import tensorflow as tf

from keras_influence.gradients.flops import projection_flops
from keras_influence.gradients.maps import LossMaps


def num_roots(maps: LossMaps, batch: Any, kind: str) -> int:
    """Rows of R for each example; 0 where there is no such R, or columns take fewer flops.

    There is none for the Hessian, for outputs of several positions, whose terms are more than
    classes, and for Gauss-Newton matrices that depend on the labels.

    Args:
        batch: as `model.fit` takes it.
        kind: one of `CURVATURES`.
    """
    if kind == "hessian":
        return 0
    terms = maps.label_terms(batch)
    if not terms.exact or (kind == "gauss_newton" and not terms.free_of_labels):
        return 0
    # A product is at least a gradient, and so is a row.
    gradient = sum(projection_flops(maps, batch, 1).values())
    size = maps.parameters.size
    return terms.size if terms.size * (gradient + 2.0 * size**2) < size * gradient else 0


def gram(maps: LossMaps, batch: Any, terms: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """R'R, [p, p], with some rows of each example; to be compiled.

    Args:
        batch: as `model.fit` takes it.
        terms: numbers of the rows, integers [k].
        weights: of the examples, [B], 0 or 1.
    """
    size = maps.parameters.size
    # Of each example's sign in a row: it has no part in the row's outer product.
    ids = tf.zeros_like(weights, tf.int64)

    def rows(term: tf.Tensor) -> tf.Tensor:
        return maps.linearize_labels(batch, ids, weights, term, "expected", 0).rows()

    stacked = tf.map_fn(rows, terms, fn_output_signature=maps.parameters.dtype)
    stacked = tf.reshape(stacked, [-1, size])
    return tf.matmul(stacked, stacked, transpose_a=True)
