"""Per-example gradients in Kronecker-factored bases: what KFAC and EKFAC ask of a batch.

The gradient of a layer's kernel for one example is a sum over positions of outer products a_t d_t'
(with a one at the end of a_t, where the layer has a bias): a matrix [m, n]. A basis is a pair of
orthonormal ones, U of the left sides and V of the right sides; the gradient in it is U' (sum_t a_t
d_t') V. U may have fewer columns than rows: what it leaves out is then told by its size alone, for
each column of V.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_influence.gradients.blocks import of_shape, over_examples, summed_over_examples
from keras_influence.gradients.factors import Factor, Outer, Rows
from keras_influence.gradients.fisher_blocks import (
    DIAGONAL,
    KRONECKER,
    ROWS,
    Basis,
    Block,
    Spectrum,
)
from keras_influence.gradients.linearization import Linearization
from keras_influence.gradients.squares import (
    diagonal_forms,
    diagonal_square_sums,
    of_products,
    products_with,
    row_forms,
    row_squares,
)


def _kernel(found: Linearization, block: Block) -> Factor | None:
    """None where no example has a gradient."""
    factors = found.factors.get(block.positions[0], [])
    return factors[0] if factors else None


def _sides(block: Block, factor: Factor) -> tuple[tf.Tensor, tf.Tensor]:
    """left [B, G, m, T], right [B, G, T, n], with the bias's row."""
    assert isinstance(factor, Outer)
    left, right = factor.sides()
    if block.has_bias:
        ones = tf.ones_like(left[:, :, :1])
        left = tf.concat([left, ones], axis=2)
    return left, right


def _bytes(block: Block, factor: Factor, width: int = 0) -> float:
    """Of what one example takes on the way."""
    groups, rows, columns = block.sizes
    positions = getattr(factor, "positions", None) or 64
    both = positions * (2 * rows + columns + width)
    if positions > 1:
        both += rows * columns + (width or rows) * columns
    return 4.0 * groups * both


def factor_sums(
    found: Linearization, blocks: Sequence[Block], weights: tf.Tensor, left: bool = True
) -> list[Any]:
    """For each block, the sums of a a' [G, m, m] and d d' [G, n, n], and their positions [].

    Of several positions of an example, those count to which a gradient came back: padding of
    sequences is none, and what entered there, whatever it was, is left out.

    Of rows, the first is a diagonal [m]: how often each is named. Of diagonals there is nothing.

    Args:
        weights: of the examples, which the losses have as well: 0 for padding.
        left: whether to sum the left sides too, which do not depend on labels; else they are zero.
    """
    sums: list[Any] = []
    for block in blocks:
        factor = _kernel(found, block)
        dtype = found.parameters.dtype
        groups, rows, columns = block.sizes
        if block.kind == DIAGONAL:
            sums.append((tf.zeros([0], dtype), tf.zeros([0], dtype), tf.zeros([], dtype)))
            continue
        right_side = tf.zeros([groups, columns, columns], dtype)
        left_side = tf.zeros([rows] if block.kind == ROWS else [groups, rows, rows], dtype)
        positions = tf.zeros([], dtype)
        if block.kind == ROWS and isinstance(factor, Rows):
            values = tf.reshape(factor.tensors[1], [1, -1, columns])
            right_side = tf.matmul(values, values, transpose_a=True)
            if left:
                ids = factor.tensors[0]
                named = tf.cast(weights, dtype)[:, tf.newaxis] * _active(factor.tensors[1], [2])
                left_side = tf.math.unsorted_segment_sum(
                    tf.reshape(named, [-1]), tf.reshape(ids, [-1]), rows
                )
                positions = tf.reduce_sum(named)
        elif block.kind == KRONECKER and factor is not None:

            def one_block(
                weights: tf.Tensor, *tensors: tf.Tensor, block: Block = block, factor: Any = factor
            ) -> Any:
                lefts, rights = _sides(block, factor.with_tensors(tensors))
                groups, rows, columns = block.sizes
                active = _active(rights, [1, 3])  # [B, T]
                # Positions of all examples in one product.
                rights = tf.reshape(tf.transpose(rights, [1, 0, 2, 3]), [groups, -1, columns])
                right_side = tf.matmul(rights, rights, transpose_a=True)
                if not left:
                    return right_side
                active *= tf.cast(weights, lefts.dtype)[:, tf.newaxis]
                lefts *= active[:, tf.newaxis, tf.newaxis]
                lefts = tf.reshape(tf.transpose(lefts, [1, 0, 3, 2]), [groups, -1, rows])
                return (
                    right_side,
                    tf.matmul(lefts, lefts, transpose_a=True),
                    tf.reduce_sum(active),
                )

            summed = summed_over_examples(
                one_block, [weights, *factor.tensors], _bytes(block, factor), found.how.budget
            )
            if left:
                right_side, left_side, positions = summed
            else:
                right_side = summed
        sums.append((left_side, right_side, positions))
    return sums


def _active(gradients: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """1 for each position of which there is a gradient, or that is its example's only one."""
    found = tf.cast(tf.reduce_any(gradients != 0, axis=axes), gradients.dtype)
    return tf.ones_like(found) if found.shape[1] == 1 else found


def square_sums(
    found: Linearization, blocks: Sequence[Block], bases: Sequence[Basis]
) -> list[Spectrum]:
    """For each block, the sums over examples of their gradients' squares in its basis."""
    return [_square_sums(found, block, basis) for block, basis in zip(blocks, bases, strict=True)]


def _square_sums(found: Linearization, block: Block, basis: Basis) -> Spectrum:
    groups, rows, columns = block.sizes
    dtype = found.parameters.dtype
    if block.kind == DIAGONAL:
        return diagonal_square_sums(found, block)
    factor = _kernel(found, block)
    if factor is None:
        width = rows if block.kind == ROWS else basis.left.shape[2]
        return Spectrum(
            tf.zeros([groups, width, columns], dtype), tf.zeros([groups, columns], dtype)
        )
    if isinstance(factor, Rows):
        return row_squares(factor, basis.right[0], rows)
    width = int(basis.left.shape[2])

    def one_block(*tensors: tf.Tensor) -> Any:
        part, last = _part(block, factor, tensors)
        if _one_position(part):
            left, right, rest = _split(block, part, basis)
            return Spectrum(of_products(left, right), tf.reduce_sum(rest * right, axis=0))
        squares, rest = _squares(block, part, last, basis)
        return Spectrum(tf.reduce_sum(squares, axis=0), tf.reduce_sum(rest, axis=0))

    each = _bytes(block, factor, width)
    tensors = _tensors(found, block, factor)
    return summed_over_examples(one_block, tensors, each, found.how.budget)


def quadratic_forms(
    found: Linearization,
    blocks: Sequence[Block],
    bases: Sequence[Basis],
    inverses: Sequence[Spectrum],
) -> tf.Tensor:
    """g_i' M g_i, [B], for the matrix with these numbers in the bases."""
    total = tf.zeros([tf.shape(found.losses)[0]], found.parameters.dtype)
    for block, basis, inverse in zip(blocks, bases, inverses, strict=True):
        total += _forms(found, block, basis, inverse)
    return total


def _forms(found: Linearization, block: Block, basis: Basis, inverse: Spectrum) -> Any:
    if block.kind == DIAGONAL:
        return diagonal_forms(found, block, inverse)
    factor = _kernel(found, block)
    if factor is None:
        return 0.0
    if isinstance(factor, Rows):
        return row_forms(factor, basis.right[0], inverse.values[0])

    def one_block(*tensors: tf.Tensor) -> tf.Tensor:
        part, last = _part(block, factor, tensors)
        if _one_position(part):
            left, right, rest = _split(block, part, basis)
            outside = tf.reduce_sum(rest * right * inverse.rest, axis=[1, 2])
            return products_with(left, right, inverse.values) + outside
        squares, rest = _squares(block, part, last, basis)
        inside = tf.reduce_sum(squares * inverse.values, axis=[1, 2, 3])
        return inside + tf.reduce_sum(rest * inverse.rest, axis=[1, 2])

    each = _bytes(block, factor, int(basis.left.shape[2]))
    return over_examples(one_block, _tensors(found, block, factor), each, found.how.budget)


def _tensors(found: Linearization, block: Block, factor: Factor) -> list[tf.Tensor]:
    """What stands for the kernel's gradients; and the bias's, before the last of them."""
    if not block.has_bias:
        return list(factor.tensors)
    (bias,) = found.factors[block.positions[1]]
    return [bias.tensors[0], *factor.tensors]


def _part(
    block: Block, factor: Factor, tensors: Sequence[tf.Tensor]
) -> tuple[Factor, tf.Tensor | None]:
    """Of some examples, the kernel's factor, and the bias's gradients."""
    if not block.has_bias:
        return factor.with_tensors(tensors), None
    return factor.with_tensors(tensors[1:]), tensors[0]


# One product for all examples: one for each, of matrices that are broadcast, is slower, and ends
# TensorFlow 2.21 on a CPU in float32 with a segmentation fault.


def _from_left(matrices: tf.Tensor, tensors: tf.Tensor) -> tf.Tensor:
    """matrices_g' tensors_bg: [B, G, r, n] of [G, m, r] and [B, G, m, n]."""
    groups, rows, width = matrices.shape
    columns = tf.shape(tensors)[3]
    flat = tf.reshape(tf.transpose(tensors, [1, 0, 3, 2]), [groups, -1, rows])
    products = tf.reshape(tf.matmul(flat, matrices), [groups, -1, columns, width])
    return of_shape(tf.transpose(products, [1, 0, 3, 2]), [None, groups, width, tensors.shape[3]])


def _from_right(tensors: tf.Tensor, matrices: tf.Tensor) -> tf.Tensor:
    """tensors_bg matrices_g: [B, G, m, s] of [B, G, m, n] and [G, n, s]."""
    groups, columns, width = matrices.shape
    rows = tf.shape(tensors)[2]
    flat = tf.reshape(tf.transpose(tensors, [1, 0, 2, 3]), [groups, -1, columns])
    products = tf.reshape(tf.matmul(flat, matrices), [groups, -1, rows, width])
    return of_shape(tf.transpose(products, [1, 0, 2, 3]), [None, groups, tensors.shape[2], width])


def _one_position(factor: Factor) -> bool:
    return isinstance(factor, Outer) and factor.positions == 1


def _split(block: Block, factor: Factor, basis: Basis) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Squares of one position's sides in the basis, [B, G, r] and [B, G, n].

    And that of what the left one leaves out, [B, G, 1].
    """
    left, right = (tf.transpose(side, [1, 0, 2, 3]) for side in _sides(block, factor))
    left, right = left[..., 0], right[:, :, 0]  # [G, B, m], [G, B, n]
    inside = tf.square(tf.matmul(left, basis.left))
    whole = tf.reduce_sum(tf.square(left), axis=2, keepdims=True)
    rest = tf.maximum(whole - tf.reduce_sum(inside, axis=2, keepdims=True), 0)
    if basis.left.shape[2] == basis.left.shape[1]:
        rest = tf.zeros_like(rest)
    right = tf.square(tf.matmul(right, basis.right))
    inside, right, rest = (tf.transpose(each, [1, 0, 2]) for each in (inside, right, rest))
    return inside, right, rest


def _squares(
    block: Block, factor: Factor, bias: tf.Tensor | None, basis: Basis
) -> tuple[tf.Tensor, tf.Tensor]:
    """Squares of the gradients in the basis: [B, G, r, n], and of what is left: [B, G, n]."""
    assert isinstance(factor, Outer)
    groups, rows, columns = block.sizes
    width = int(basis.left.shape[2])
    positions = factor.positions or 64
    cut = width < rows
    sides = positions * (rows * width + columns**2 + width * columns)
    formed = rows * columns * (positions + columns + width)
    if sides < formed and not cut:
        left, right = _sides(block, factor)
        left = _from_left(basis.left, left)  # [B, G, r, T]
        inside = tf.matmul(left, _from_right(right, basis.right))
    else:
        kernel_rows = rows - 1 if block.has_bias else rows
        gradients = tf.reshape(factor.matrices(), [-1, groups, kernel_rows, columns])
        if bias is not None:
            last = tf.reshape(bias, [-1, groups, 1, columns])
            gradients = tf.concat([gradients, last], axis=2)
        through = _from_right(gradients, basis.right)  # [B, G, m, n]
        inside = _from_left(basis.left, through)
    squares = tf.square(inside)
    rest = tf.zeros([tf.shape(squares)[0], groups, columns], squares.dtype)
    if cut:
        whole = tf.reduce_sum(tf.square(through), axis=2)
        rest = tf.maximum(whole - tf.reduce_sum(squares, axis=2), 0)
    return squares, rest


def inverse_products(
    vectors: Sequence[tf.Tensor],
    blocks: Sequence[Block],
    bases: Sequence[Basis],
    inverses: Sequence[Spectrum],
) -> list[tf.Tensor]:
    """M v_j for the matrix with these numbers in the bases.

    Args:
        vectors: for each variable, [k, *shape].

    Returns:
        the same, in the same order.
    """
    found: list[Any] = [None] * len(vectors)
    for block, basis, inverse in zip(blocks, bases, inverses, strict=True):
        kernel = vectors[block.positions[0]]
        groups, rows, columns = block.sizes
        if block.layout is None:
            flat = tf.reshape(kernel, [-1, columns]) * tf.reshape(inverse.values, [-1])
            found[block.positions[0]] = tf.reshape(flat, tf.shape(kernel))
            continue
        matrices = block.layout.to_matrices(kernel)
        if block.has_bias:
            last = tf.reshape(vectors[block.positions[1]], [-1, groups, 1, columns])
            matrices = tf.concat([matrices, last], axis=2)
        through = _from_right(matrices, basis.right)
        if block.kind == ROWS:
            result = through * inverse.values
        else:
            inside, back = _from_left(basis.left, through), tf.transpose(basis.left, [0, 2, 1])
            result = _from_left(back, inside * inverse.values)
            if basis.left.shape[2] != rows:
                outside = through - _from_left(back, inside)
                result += outside * inverse.rest[:, tf.newaxis]
        result = _from_right(result, tf.transpose(basis.right, [0, 2, 1]))
        if block.has_bias:
            bias = vectors[block.positions[1]]
            found[block.positions[1]] = tf.reshape(result[:, :, -1], tf.shape(bias))
            result = result[:, :, :-1]
        found[block.positions[0]] = block.layout.from_matrices(result)
    return found
