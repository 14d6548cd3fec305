"""Gradients of tables of which an example touches some rows."""

from collections.abc import Sequence

import tensorflow as tf

from keras_influence.gradients.blocks import of_shape, over_examples
from keras_influence.gradients.factors.base import (
    UNKNOWN_DIRECTIONS,
    UNKNOWN_POSITIONS,
    Contraction,
    Factor,
    Prepared,
)


class Rows(Factor):
    """Gradients of a table of which each example touches some rows: row ids_it gains values_it.

    Args:
        shape: of the table, (rows, n).
        ids: integers [B, T].
        values: [B, T, n].
    """

    def __init__(self, shape: Sequence[int], ids: tf.Tensor, values: tf.Tensor):
        self.shape = tuple(shape)
        self.tensors = (ids, values)

    def with_tensors(self, tensors: Sequence[tf.Tensor]) -> "Rows":
        return Rows(self.shape, *tensors)

    @property
    def gradient_bytes(self) -> float:
        return 8.0 * self.size

    @property
    def _positions(self) -> int:
        return self.tensors[0].shape[1] or UNKNOWN_POSITIONS

    def gradients(self) -> tf.Tensor:
        ids, values = self.tensors
        examples = tf.broadcast_to(tf.range(tf.shape(ids)[0])[:, tf.newaxis], tf.shape(ids))
        indices = tf.stack([examples, tf.cast(ids, tf.int32)], axis=-1)
        return of_shape(
            tf.scatter_nd(indices, values, [tf.shape(ids)[0], *self.shape]), [None, *self.shape]
        )

    def route(self, count: int, how: Contraction) -> str:
        del count, how
        return "rows"

    def prepare(self, directions: tf.Tensor, how: Contraction) -> Prepared:
        del how
        # Row by row, so that what one token needs of all directions lies together.
        return {"rows": tf.transpose(directions, [1, 0, 2])}

    def project(self, prepared: Prepared, how: Contraction) -> tf.Tensor:
        if "ids" in prepared:
            return self._project_factors(prepared["ids"], prepared["values"], how)
        table = prepared["rows"]
        count, width = table.shape[1], self.shape[1]
        each = 12.0 * self._positions * (count or UNKNOWN_DIRECTIONS) * width

        def one_block(ids: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
            rows = tf.gather(table, ids)  # [b, T, k, n]
            return tf.reduce_sum(tf.linalg.matvec(rows, values), axis=1)

        return over_examples(one_block, self.tensors, each, how.budget)

    def as_directions(self, how: Contraction) -> Prepared:
        ids, values = self.tensors
        # Beyond the budget, a table for each example is more than memory should hold.
        count = ids.shape[0]
        dense = count is not None and 4.0 * count * self.size <= how.budget
        if how.order == "factors" or not dense:
            return {"ids": ids, "values": values}
        return super().as_directions(how)

    def _project_factors(
        self, other_ids: tf.Tensor, other_values: tf.Tensor, how: Contraction
    ) -> tf.Tensor:
        count, width = other_ids.shape[0], self.shape[1]
        theirs = tf.transpose(tf.reshape(other_values, [-1, width]))
        positions = self._positions * (other_ids.shape[1] or UNKNOWN_POSITIONS)
        each = 12.0 * positions * (count or UNKNOWN_DIRECTIONS)

        def one_block(ids: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
            products = how.matmul(tf.reshape(values, [-1, width]), theirs)
            shape = tf.concat([tf.shape(ids), tf.shape(other_ids)], axis=0)
            same = ids[:, :, tf.newaxis, tf.newaxis] == other_ids
            products = tf.where(same, tf.reshape(products, shape), tf.zeros([], values.dtype))
            return of_shape(tf.reduce_sum(products, axis=[1, 3]), [None, count])

        return over_examples(one_block, self.tensors, each, how.budget)

    def squared_norms(self, how: Contraction) -> tf.Tensor:
        # A row's gradient is the sum over the positions that name it, so that its square has
        # all their products.
        def one_block(ids: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
            products = tf.matmul(values, values, transpose_b=True)
            same = ids[:, :, tf.newaxis] == ids[:, tf.newaxis, :]
            return tf.reduce_sum(tf.where(same, products, tf.zeros([], values.dtype)), axis=[1, 2])

        return over_examples(one_block, self.tensors, 12.0 * self._positions**2, how.budget)

    def merged(self, other: Factor) -> Factor | None:
        if not isinstance(other, Rows):
            return None
        ids, values = zip(self.tensors, other.tensors, strict=True)
        ids = tuple(tf.cast(each, tf.int32) for each in ids)
        return Rows(self.shape, tf.concat(ids, axis=1), tf.concat(values, axis=1))
