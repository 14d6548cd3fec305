"""Orthogonalisation of a vector against a basis that lives on an accelerator."""

from typing import NamedTuple

import tensorflow as tf


class Orthogonalized(NamedTuple):
    """A vector, taken apart by a basis.

    Attributes:
        coefficients: [m], of the vector's part in the span of the basis.
        vector: [p], the rest of it.
    """

    coefficients: tf.Tensor
    vector: tf.Tensor


@tf.function(autograph=False, jit_compile=True)
def orthogonalize(basis: tf.Tensor, vector: tf.Tensor) -> Orthogonalized:
    """Subtracts from a vector its part in the span of a basis: classical Gram-Schmidt, twice.

    What `arnoldi` does to each product, as one program of fixed shapes for a basis that never
    leaves its device: rows that are still to come are zero, and change nothing. Once is not
    enough; see `krylov`. Four products of the basis and a vector, 8 m p flops, which read the basis
    four times.

    The products are sums of elementwise ones: these are bound by memory, not by arithmetic, and a
    TPU's matrix unit would round both factors to bfloat16.

    Args:
        basis: [m, p], orthonormal rows, and zeros in place of those that are still to come.
        vector: [p], of the same dtype.

    Raises:
        ValueError: shapes that are not [m, p] and [p].
    """
    if basis.shape.rank != 2 or vector.shape.rank != 1 or basis.shape[1] != vector.shape[0]:
        raise ValueError(
            "`basis` must have the shape [m, p], and `vector` the shape [p]. Received: "
            f"{tuple(basis.shape)} and {tuple(vector.shape)}."
        )
    total = tf.zeros([basis.shape[0]], basis.dtype)
    for _ in range(2):
        coefficients = tf.reduce_sum(basis * vector, axis=1)
        vector -= tf.reduce_sum(coefficients[:, tf.newaxis] * basis, axis=0)
        total += coefficients
    return Orthogonalized(total, vector)
