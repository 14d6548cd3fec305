"""What all factors of per-example gradients share, and the ones that are held as they are."""

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import tensorflow as tf

from keras_influence.gradients.blocks import over_examples

CONTRACTIONS = ("auto", "gradient", "left", "right", "factors")

# Flops that a processor makes in the time that it takes to move one byte: what makes the bytes of
# an intermediate result comparable with flops. About 20 for CPUs, 100 to 200 for accelerators; the
# choice is between costs that usually differ by more than that.
FLOPS_PER_BYTE = 20.0
# Positions assumed where a sequence's length is known only at run time.
UNKNOWN_POSITIONS = 64
# Directions assumed where their number is.
UNKNOWN_DIRECTIONS = 64

Prepared = dict[str, tf.Tensor]


class Contraction(NamedTuple):
    """How per-example gradients are multiplied with directions.

    Attributes:
        budget: bytes of intermediate results to hold at once.
        order: `"auto"` chooses for each layer by flops and bytes. `"gradient"` forms each example's
            gradient first; `"left"` and `"right"` pass through the directions from the side of what
            entered the layer, or of what came back to it; `"factors"` never forms a gradient where
            the directions are gradients themselves.
        dtype: of the matrix products: None for the model's own, or `tf.bfloat16`, which rounds
            factors, directions and products to 8 bits.
    """

    budget: float = 32 * 2**20
    order: str = "auto"
    dtype: tf.DType | None = None

    def matmul(self, a: tf.Tensor, b: tf.Tensor, transpose_a: bool = False) -> tf.Tensor:
        """a b, in the dtype of a; b may be in that of the products already."""
        product = tf.matmul(self.lowered(a), self.lowered(b), transpose_a=transpose_a)
        return tf.cast(product, a.dtype)

    def get_config(self) -> dict[str, Any]:
        dtype = None if self.dtype is None else self.dtype.name
        return {"budget": self.budget, "order": self.order, "dtype": dtype}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Contraction":
        dtype = None if config["dtype"] is None else tf.as_dtype(config["dtype"])
        return cls(config["budget"], config["order"], dtype)

    def lowered(self, tensor: tf.Tensor) -> tf.Tensor:
        """In the dtype of the matrix products."""
        return tensor if self.dtype is None else tf.cast(tensor, self.dtype)


class Factor(abc.ABC):
    """Per-example gradients of one variable.

    Attributes:
        shape: the variable's.
        tensors: what stands for the gradients, each [B, ...].
    """

    shape: tuple[int, ...]
    tensors: tuple[tf.Tensor, ...]

    @property
    def dtype(self) -> tf.DType:
        return self.tensors[-1].dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @abc.abstractmethod
    def with_tensors(self, tensors: Sequence[tf.Tensor]) -> Self:
        """The same, of other examples."""

    @abc.abstractmethod
    def gradients(self) -> tf.Tensor:
        """[B, *shape]."""

    @property
    @abc.abstractmethod
    def gradient_bytes(self) -> float:
        """Bytes that `gradients` takes for one example, with what it needs on the way."""

    @abc.abstractmethod
    def route(self, count: int, how: Contraction) -> str:
        """The cheapest way to multiply with `count` directions."""

    @abc.abstractmethod
    def prepare(self, directions: tf.Tensor, how: Contraction) -> Prepared:
        """Directions [k, *shape], laid out for `project`."""

    @abc.abstractmethod
    def project(self, prepared: Prepared, how: Contraction) -> tf.Tensor:
        """[B, k]."""

    def as_directions(self, how: Contraction) -> Prepared:
        """These gradients as directions for others of their kind."""
        return self.prepare(self.all_gradients(how), how)

    def all_gradients(self, how: Contraction) -> tf.Tensor:
        """[B, *shape], computed within the budget."""
        return over_examples(
            lambda *tensors: self.with_tensors(tensors).gradients(),
            self.tensors,
            self.gradient_bytes,
            how.budget,
        )

    def squared_norms(self, how: Contraction) -> tf.Tensor:
        """[B]."""
        return over_examples(
            lambda *tensors: sum_squares(self.with_tensors(tensors).gradients()),
            self.tensors,
            self.gradient_bytes,
            how.budget,
        )

    def merged(self, other: "Factor") -> "Factor | None":
        """The sum of both as one factor, where there is one."""
        del other
        return None


class Explicit(Factor):
    """Gradients that are held as they are.

    Args:
        values: [B, *shape].
    """

    def __init__(self, values: tf.Tensor):
        self.tensors = (values,)
        self.shape = tuple(values.shape[1:])

    def with_tensors(self, tensors: Sequence[tf.Tensor]) -> "Explicit":
        return Explicit(*tensors)

    def gradients(self) -> tf.Tensor:
        return self.tensors[0]

    @property
    def gradient_bytes(self) -> float:
        return 4.0 * self.size

    def route(self, count: int, how: Contraction) -> str:
        del count, how
        return "gradient"

    def prepare(self, directions: tf.Tensor, how: Contraction) -> Prepared:
        return {"gradient": how.lowered(tf.transpose(tf.reshape(directions, [-1, self.size])))}

    def project(self, prepared: Prepared, how: Contraction) -> tf.Tensor:
        values = tf.reshape(self.tensors[0], [-1, self.size])
        return how.matmul(values, prepared["gradient"])

    def squared_norms(self, how: Contraction) -> tf.Tensor:
        del how
        return sum_squares(self.tensors[0])

    def merged(self, other: Factor) -> Factor | None:
        if isinstance(other, Explicit):
            return Explicit(self.tensors[0] + other.tensors[0])
        return None


def sum_squares(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(values * values, axis=list(range(1, values.shape.rank)))


def product(sizes: Sequence[int | None]) -> int | None:
    return None if None in sizes else math.prod(sizes)  # type: ignore[arg-type]


def entries(tensor: tf.Tensor) -> int | tf.Tensor:
    """Entries of one example."""
    known = product(tensor.shape[1:])
    return tf.reduce_prod(tf.shape(tensor)[1:]) if known is None else known
