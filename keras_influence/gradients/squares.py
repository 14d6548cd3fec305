"""Squares of per-example gradients, entry by entry, and weighted sums of them."""

import functools
import operator
from typing import Any

import tensorflow as tf

from keras_influence.gradients.blocks import over_examples, summed_over_examples
from keras_influence.gradients.factors import Factor, Outer, Rows
from keras_influence.gradients.fisher_blocks import Block, Spectrum
from keras_influence.gradients.linearization import Linearization


def diagonal_square_sums(found: Linearization, block: Block) -> Spectrum:
    """The sums over examples of the squares of one variable's gradients."""
    columns, dtype = block.sizes[2], found.parameters.dtype
    only = _only(found, block)
    if isinstance(only, Rows):
        return row_squares(only, None, rows=only.shape[0])
    total: Any = tf.zeros([columns], dtype)
    if isinstance(only, Outer) and only.positions == 1:
        total = only.layout.from_matrices(of_products(*_squared_sides(only)))
    elif only is not None:
        factor = only
        total = summed_over_examples(
            lambda *tensors: tf.reduce_sum(
                tf.square(factor.with_tensors(tensors).gradients()), axis=0
            ),
            factor.tensors,
            2 * factor.gradient_bytes,
            found.how.budget,
        )
    else:
        for gradients in _gradients(found, block.positions[0]):
            total = tf.reduce_sum(tf.square(gradients), axis=0)
    return Spectrum(tf.reshape(total, [1, 1, columns]), tf.zeros([1, columns], dtype))


def diagonal_forms(found: Linearization, block: Block, inverse: Spectrum) -> Any:
    """sum_p inverse_p gradient_ip^2, [B]."""
    weights = tf.reshape(inverse.values, [-1])
    only = _only(found, block)
    if isinstance(only, Rows):
        return row_forms(only, None, tf.reshape(weights, only.shape))
    if isinstance(only, Outer) and only.positions == 1:
        matrices = only.layout.to_matrices(tf.reshape(weights, [1, *only.shape]))[0]
        return products_with(*_squared_sides(only), matrices)

    def weighted(gradients: tf.Tensor) -> tf.Tensor:
        flat = tf.reshape(gradients, [-1, block.sizes[2]])
        return tf.linalg.matvec(tf.square(flat), weights)

    if only is not None:
        factor = only
        return over_examples(
            lambda *tensors: weighted(factor.with_tensors(tensors).gradients()),
            factor.tensors,
            2 * factor.gradient_bytes,
            found.how.budget,
        )
    total: Any = 0.0
    for gradients in _gradients(found, block.positions[0]):
        total = weighted(gradients)
    return total


def _only(found: Linearization, block: Block) -> Factor | None:
    """The one thing of which the variable's gradients are made, where that is a factor."""
    position = block.positions[0]
    factors = found.factors.get(position, [])
    implicit = any(position in positions for positions, _ in found.implicits)
    return factors[0] if len(factors) == 1 and not implicit else None


def _gradients(found: Linearization, position: int) -> list[tf.Tensor]:
    """[B, *shape], in a list of one; none where there is none."""
    parts = [factor.all_gradients(found.how) for factor in found.factors.get(position, [])]
    for positions, implicit in found.implicits:
        if position in positions:
            parts.append(implicit.gradients(found.how)[positions.index(position)])
    return [functools.reduce(operator.add, parts)] if parts else []


def _squared_sides(factor: Outer) -> tuple[tf.Tensor, tf.Tensor]:
    """Of one position: [B, G, m], [B, G, n]."""
    left, right = factor.sides()
    return tf.square(left[..., 0]), tf.square(right[:, :, 0])


def of_products(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """sum_b left_bgm right_bgn: [G, m, n] of [B, G, m] and [B, G, n]."""
    left, right = tf.transpose(left, [1, 2, 0]), tf.transpose(right, [1, 0, 2])
    return tf.matmul(left, right)


def products_with(left: tf.Tensor, right: tf.Tensor, matrices: tf.Tensor) -> tf.Tensor:
    """sum_gmn left_bgm right_bgn matrices_gmn: [B]."""
    through = tf.matmul(tf.transpose(left, [1, 0, 2]), matrices)  # [G, B, n]
    return tf.reduce_sum(through * tf.transpose(right, [1, 0, 2]), axis=[0, 2])


def _row_sums(factor: Rows, right: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """ids [B, T], and the squares of each row's gradient, [B, T, n], where it stands first."""
    ids, values = factor.tensors
    if right is not None:
        values = tf.tensordot(values, right, 1)
    same = ids[:, :, tf.newaxis] == ids[:, tf.newaxis, :]
    sums = tf.matmul(tf.cast(same, values.dtype), values)
    earlier = tf.linalg.band_part(tf.cast(same, tf.int32), -1, 0) - tf.eye(
        tf.shape(ids)[1], dtype=tf.int32
    )
    first = tf.reduce_sum(earlier, axis=2) == 0
    return ids, tf.where(first[..., tf.newaxis], tf.square(sums), tf.zeros([], sums.dtype))


def row_squares(factor: Rows, right: tf.Tensor | None, rows: int) -> Spectrum:
    ids, squares = _row_sums(factor, right)
    columns = factor.shape[1]
    total = tf.math.unsorted_segment_sum(
        tf.reshape(squares, [-1, columns]), tf.reshape(ids, [-1]), rows
    )
    shape = [1, rows, columns] if right is not None else [1, 1, rows * columns]
    rest = tf.zeros([1, shape[2]], squares.dtype)
    return Spectrum(tf.reshape(total, shape), rest)


def row_forms(factor: Rows, right: tf.Tensor | None, table: tf.Tensor) -> tf.Tensor:
    ids, squares = _row_sums(factor, right)
    return tf.reduce_sum(squares * tf.gather(table, ids), axis=[1, 2])
