"""A basis that lives where the operator computes, and orthogonalisation against it there.

Nothing of the length of a vector passes through the host: an iteration's step gets from it a number
for each row, and two norms.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf


class Orthogonalized(NamedTuple):
    """A vector, taken apart by a basis.

    Attributes:
        coefficients: [m], of the vector's part in the span of the basis.
        vector: [p], the rest of it.
    """

    coefficients: tf.Tensor
    vector: tf.Tensor


def _products(basis: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
    # A sum of elementwise products: it is bound by memory, not by arithmetic, and a TPU's matrix
    # unit would round both factors to bfloat16.
    return tf.reduce_sum(tf.cast(basis, vector.dtype) * vector, axis=1)


def _combined(basis: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(coefficients[:, tf.newaxis] * tf.cast(basis, coefficients.dtype), axis=0)


def gram_schmidt(
    basis: tf.Tensor,
    vector: tf.Tensor,
    summed: Callable[[tf.Tensor], tf.Tensor],
    products: Callable[..., tf.Tensor] = _products,
    combined: Callable[..., tf.Tensor] = _combined,
) -> Orthogonalized:
    """`orthogonalize`, where a device holds some of the columns: for a program of all devices.

    Args:
        basis: [m, p / devices].
        vector: [p / devices].
        summed: the sum over the devices of what each gives, on each.
        products, combined: how a basis is multiplied with a vector, and with coefficients.
    """
    total = tf.zeros([basis.shape[0]], vector.dtype)
    for _ in range(2):
        coefficients = summed(products(basis, vector))
        vector -= combined(basis, coefficients)
        total += coefficients
    return Orthogonalized(total, vector)


@tf.function(autograph=False, jit_compile=True)
def orthogonalize(basis: tf.Tensor, vector: tf.Tensor) -> Orthogonalized:
    """Subtracts from a vector its part in the span of a basis: classical Gram-Schmidt, twice.

    What `arnoldi` does to each product, as one program of fixed shapes for a basis that never
    leaves its device: rows that are still to come are zero, and change nothing. Once is not
    enough; see `krylov`. Four products of the basis and a vector, 8 m p flops, which read the basis
    four times.

    Args:
        basis: [m, p], orthonormal rows, and zeros in place of those that are still to come.
        vector: [p], of the same dtype, or of float32 where the basis is stored in bfloat16.

    Raises:
        ValueError: shapes that are not [m, p] and [p].
    """
    if basis.shape.rank != 2 or vector.shape.rank != 1 or basis.shape[1] != vector.shape[0]:
        raise ValueError(
            "`basis` must have the shape [m, p], and `vector` the shape [p]. Received: "
            f"{tuple(basis.shape)} and {tuple(vector.shape)}."
        )
    return gram_schmidt(basis, vector, lambda coefficients: coefficients)


class Replicas(Protocol):
    """Devices that hold a part of a vector each; see `distribution.replicas`.

    Attributes:
        count: of the parts.
        fused: whether programs there are compiled whole, so that elementwise products need no room.
    """

    count: int
    fused: bool

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` on every device, as a program that is traced once for each shape."""

    def number(self) -> Any:
        """In a program: which of the parts this device has."""

    def summed(self, value: tf.Tensor) -> tf.Tensor:
        """In a program: the sum of all devices' values."""

    def whole(self, part: tf.Tensor) -> tf.Tensor:
        """In a program: the parts of all devices, one after another."""

    def zeros(self, shape: tuple[int, ...], dtype: tf.DType) -> Any:
        """A variable of this shape on each device."""

    def everywhere(self, value: Any) -> Any:
        """What each device has a copy of."""

    def parts(self, value: Any) -> list[np.ndarray]:
        """A program's result, of each device."""


class OneDevice:
    """The replicas where there is one.

    Args:
        device: its name.
    """

    count = 1

    def __init__(self, device: str = ""):
        self._device = device
        self.fused = tf.DeviceSpec.from_string(device).device_type not in (None, "CPU")

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return tf.function(function, autograph=False, jit_compile=self.fused or None)

    def number(self) -> int:
        return 0

    def summed(self, value: tf.Tensor) -> tf.Tensor:
        return value

    def whole(self, part: tf.Tensor) -> tf.Tensor:
        return part

    def zeros(self, shape: tuple[int, ...], dtype: tf.DType) -> tf.Variable:
        with tf.device(self._device):
            return tf.Variable(tf.zeros(shape, dtype), trainable=False)

    def everywhere(self, value: Any) -> tf.Tensor:
        with tf.device(self._device):
            return tf.convert_to_tensor(value)

    def parts(self, value: Any) -> list[np.ndarray]:
        return [np.asarray(value)]


class DeviceBasis:
    """Rows on the devices of the operator, each device with its share of the columns.

    A `Space`: a vector of it is one part on each device. Vectors of the operator are whole, a copy
    on each device.

    Args:
        num_rows: rows that there is room for; all of it is taken at once.
        size: p.
        dtype: of the arithmetic.
        stored_dtype: of the rows; `dtype` by default.
        replicas: the devices; one by default.
    """

    def __init__(
        self,
        num_rows: int,
        size: int,
        dtype: Any,
        stored_dtype: Any = None,
        replicas: Replicas | None = None,
    ):
        self.dtype = np.dtype(dtype)
        self.stored_dtype = np.dtype(stored_dtype or dtype)
        self.replicas = replicas = replicas or OneDevice()
        self._size = size
        self._width = -(-size // replicas.count)
        self._count = 0
        self._rows = replicas.zeros((num_rows, self._width), tf.dtypes.as_dtype(self.stored_dtype))
        program = replicas.program
        # Partials, because TensorFlow counts traces by code object, and would blame one basis for
        # those of another.
        self._part_of = program(functools.partial(self._take_part))
        self._whole_row = program(functools.partial(self._gather_row))
        self._row = program(functools.partial(self._read_row))
        self._norm = program(functools.partial(_part_norm))
        self._whole_rows = program(functools.partial(self._gather_rows))
        self._parts_of = program(functools.partial(self._take_parts))
        self._divided = program(functools.partial(lambda vector, divisor: vector / divisor))
        self._off_rows = program(functools.partial(self._take_off_rows))
        self._off = program(functools.partial(self._take_off))
        self._exchange = program(functools.partial(self._combine_all))
        self._set = program(functools.partial(self._set_row))
        self._products = program(functools.partial(self._row_products))
        self._combine = program(functools.partial(self._combine_rows))

    @property
    def basis(self) -> "DeviceBasis":
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self._count, self._size

    def truncate(self, count: int) -> None:
        for number in range(count, self._count):
            self._set(self._number(number), self.adopt(np.zeros(self._size, self.dtype)))
        self._count = min(self._count, count)

    def combine(self, combination: np.ndarray) -> None:
        padded = np.zeros([self._rows.shape[0]] * 2, self.dtype)
        padded[: combination.shape[0], : combination.shape[1]] = combination
        self._exchange(self.replicas.everywhere(padded))
        self._count = len(combination)

    def adopt(self, vector: np.ndarray) -> Any:
        return self._part_of(self.replicas.everywhere(vector))

    def operand(self, rows: slice, flat: bool) -> Any:
        numbers = range(*rows.indices(self._count))
        if flat:
            return self._whole_row(self._number(numbers[0]))
        return self._whole_rows(*map(self._number, numbers))

    def images(self, found: Any, count: int, flat: bool) -> list[Any]:
        if isinstance(found, (np.ndarray, tf.Tensor)):
            found = self.replicas.everywhere(found)
        return [self._part_of(found)] if flat else list(self._parts_of(found, count))

    def norm(self, vector: Any) -> float:
        parts = self.replicas.parts(self._norm(vector))
        return float(np.linalg.norm(np.array(parts, np.float64)))

    def divided(self, vector: Any, divisor: float) -> Any:
        return self._divided(vector, self.replicas.everywhere(self.dtype.type(divisor)))

    def orthogonalize(self, vectors: Sequence[Any]) -> tuple[np.ndarray, list[Any]]:
        found = np.zeros((self._count, len(vectors)))
        rest = []
        for column, vector in zip(found.T, vectors, strict=True):
            coefficients, left = self._off_rows(vector)
            column[:] = self.replicas.parts(coefficients)[0][: self._count]
            rest.append(left)
        return found, rest

    def apart(self, directions: Sequence[Any], vector: Any) -> tuple[np.ndarray, Any]:
        coefficients, rest = self._off(vector, *directions)
        return self.replicas.parts(coefficients)[0].astype(np.float64), rest

    def append(self, vector: Any) -> None:
        self._set(self._number(self._count), vector)
        self._count += 1

    def append_row(self, row: np.ndarray) -> None:
        """Adds a row [p] of the host as it is."""
        DeviceBasis.append(self, self.adopt(np.asarray(row, self.dtype)))

    def __getitem__(self, rows: slice) -> np.ndarray:
        """[rows, p], on the host."""
        numbers = range(*rows.indices(self._count))
        found = np.empty((len(numbers), self._size), self.dtype)
        for row, number in zip(found, numbers, strict=True):
            row[:] = self._on_host(self._row(self._number(number)))
        return found

    def combinations(self, combination: np.ndarray) -> np.ndarray:
        """Combinations [k, rows so far] of the rows, made on the devices: [k, p] on the host."""
        found = np.empty((len(combination), self._size), self.dtype)
        for row, coefficients in zip(found, combination, strict=True):
            padded = np.zeros(self._rows.shape[0], self.dtype)
            padded[: len(coefficients)] = coefficients
            row[:] = self._on_host(self._combine(self.replicas.everywhere(padded)))
        return found

    def gram(self) -> np.ndarray:
        """Products of the rows with each other, float64 [rows so far, rows so far]."""
        products = [
            self.replicas.parts(self._products(self._number(number)))[0][: self._count]
            for number in range(self._count)
        ]
        return np.array(products, np.float64)

    def _number(self, number: int) -> Any:
        return self.replicas.everywhere(np.int32(number))

    def _on_host(self, value: Any) -> np.ndarray:
        return np.concatenate(self.replicas.parts(value))[: self._size]

    # What follows is traced, and runs on each device.

    def _take_part(self, vector: tf.Tensor) -> tf.Tensor:
        if vector.shape != (self._size,):
            raise ValueError(
                f"`matvec` must return shape ({self._size},). It returned {tuple(vector.shape)}."
            )
        padded = tf.pad(
            tf.cast(vector, self.dtype), [[0, self._width * self.replicas.count - self._size]]
        )
        return tf.slice(padded, [self.replicas.number() * self._width], [self._width])

    def _read_row(self, number: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.gather(self._rows.read_value(), number), self.dtype)

    def _gather_row(self, number: tf.Tensor) -> tf.Tensor:
        return self.replicas.whole(self._read_row(number))[: self._size]

    def _gather_rows(self, *numbers: tf.Tensor) -> tf.Tensor:
        return tf.stack([self._gather_row(number) for number in numbers])

    def _take_parts(self, found: tf.Tensor, count: int) -> list[tf.Tensor]:
        if found.shape != (count, self._size):
            raise ValueError(
                f"`matvec` must return shape ({count}, {self._size}). It returned "
                f"{tuple(found.shape)}."
            )
        return [self._take_part(vector) for vector in tf.unstack(found)]

    def _take_off_rows(self, vector: tf.Tensor) -> Orthogonalized:
        return self._gram_schmidt(self._rows.read_value(), vector)

    def _take_off(self, vector: tf.Tensor, *directions: tf.Tensor) -> Orthogonalized:
        return self._gram_schmidt(tf.stack(directions), vector)

    def _gram_schmidt(self, rows: tf.Tensor, vector: tf.Tensor) -> Orthogonalized:
        summed = self.replicas.summed
        return gram_schmidt(rows, vector, summed, self._products_with, self._combined_by)

    def _combine_all(self, combination: tf.Tensor) -> tf.Tensor:
        rows = self._rows.read_value()
        new = tf.map_fn(
            lambda row: tf.cast(self._combined_by(rows, row), self._rows.dtype),
            combination,
            fn_output_signature=tf.TensorSpec([self._width], self._rows.dtype),
        )
        self._rows.assign(new)
        return combination

    def _set_row(self, number: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
        row = tf.cast(vector, self._rows.dtype)
        rows = self._rows.read_value()
        rows = tf.tensor_scatter_nd_update(rows, [[number]], row[tf.newaxis])
        self._rows.assign(rows)
        return number

    def _row_products(self, number: tf.Tensor) -> tf.Tensor:
        products = self._products_with(self._rows.read_value(), self._read_row(number))
        return self.replicas.summed(products)

    def _combine_rows(self, coefficients: tf.Tensor) -> tf.Tensor:
        return self._combined_by(self._rows.read_value(), coefficients)

    def _products_with(self, rows: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
        if self.replicas.fused:
            return _fused_products(rows, vector)
        return tf.linalg.matvec(tf.cast(rows, vector.dtype), vector)

    def _combined_by(self, rows: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
        if self.replicas.fused:
            return _fused_combined(rows, coefficients)
        return tf.linalg.matvec(tf.cast(rows, coefficients.dtype), coefficients, transpose_a=True)


# Compiled by themselves, so that a program that is not holds no product of the basis's size.
_fused_products = tf.function(functools.partial(_products), autograph=False, jit_compile=True)
_fused_combined = tf.function(functools.partial(_combined), autograph=False, jit_compile=True)


def _part_norm(vector: tf.Tensor) -> tf.Tensor:
    # In units of the largest: the square of a float32 below 1e-19 is zero.
    largest = tf.reduce_max(tf.abs(vector))
    unit = tf.where(largest > 0, largest, tf.ones_like(largest))
    return unit * tf.sqrt(tf.reduce_sum(tf.square(vector / unit)))
