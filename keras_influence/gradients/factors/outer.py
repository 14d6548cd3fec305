"""Gradients of weights that multiply."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_influence.gradients.blocks import of_shape, over_examples, some_of
from keras_influence.gradients.factors.base import (
    FLOPS_PER_BYTE,
    UNKNOWN_DIRECTIONS,
    UNKNOWN_POSITIONS,
    Contraction,
    Factor,
    Prepared,
    entries,
    product,
    sum_squares,
)


class Layout(NamedTuple):
    """How a variable's axes fall into groups, rows and columns: its entries as [G, m, n].

    Attributes:
        shape: the variable's.
        split: the shape into which the variable's is cut first.
        order: the axes of `split`, groups first, then rows, then columns.
        sizes: (G, m, n).
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, int, int]

    @classmethod
    def matrix(cls, shape: Sequence[int]) -> "Layout":
        """Of a variable [m, n]."""
        m, n = shape
        return cls((m, n), (m, n), (0, 1), (1, m, n))

    def to_matrices(self, tensor: tf.Tensor) -> tf.Tensor:
        """[k, *shape] -> [k, G, m, n]."""
        if self.order != tuple(range(len(self.order))):
            tensor = tf.reshape(tensor, [-1, *self.split])
            tensor = tf.transpose(tensor, [0, *(axis + 1 for axis in self.order)])
        return tf.reshape(tensor, [-1, *self.sizes])

    def from_matrices(self, tensor: tf.Tensor) -> tf.Tensor:
        """[k, G, m, n] -> [k, *shape]."""
        if self.order != tuple(range(len(self.order))):
            tensor = tf.reshape(tensor, [-1, *(self.split[axis] for axis in self.order)])
            inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
            tensor = tf.transpose(tensor, [0, *(axis + 1 for axis in inverse)])
        return tf.reshape(tensor, [-1, *self.shape])


Expand = Callable[..., tuple[tf.Tensor, tf.Tensor]]
Form = Callable[..., tf.Tensor]


class Outer(Factor):
    """Sums over positions of outer products: the gradient of any weight that multiplies.

    gradient_i = sum_t left_it right_it', in G independent groups.

    Args:
        layout: of the variable.
        tensors: each [B, ...], from which `expand` makes the two sides.
        expand: tensors -> left [B, G, m, T], right [B, G, T, n]. Called for some examples at a
            time, so that windows, say, need never exist for all.
        positions: T, where it is known.
        form: (contraction, *tensors) -> the sums [B, G, m, n], where there is a way that is cheaper
            than from the two sides.
    """

    def __init__(
        self,
        layout: Layout,
        tensors: Sequence[tf.Tensor],
        expand: Expand,
        positions: int | None,
        form: Form | None = None,
    ):
        self.layout = layout
        self.shape = layout.shape
        self.tensors = tuple(tensors)
        self.expand = expand
        self.positions = positions
        self.form = form

    @classmethod
    def dense(cls, left: tf.Tensor, right: tf.Tensor, layout: Layout | None = None) -> "Outer":
        """From left [B, ..., m] and right [B, ..., n], summed over the axes between."""
        m, n = left.shape[-1], right.shape[-1]
        positions = product(right.shape[1:-1])
        layout = layout or Layout.matrix((m, n))

        def expand(left: tf.Tensor, right: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            if positions == 1:
                return tf.reshape(left, [-1, 1, m, 1]), tf.reshape(right, [-1, 1, 1, n])
            count = entries(right) // n
            left = tf.transpose(tf.reshape(left, [-1, count, m]), [0, 2, 1])
            return left[:, tf.newaxis], tf.reshape(right, [-1, 1, count, n])

        return cls(layout, (left, right), expand, positions)

    def with_tensors(self, tensors: Sequence[tf.Tensor]) -> "Outer":
        return Outer(self.layout, tensors, self.expand, self.positions, self.form)

    def sides(self) -> tuple[tf.Tensor, tf.Tensor]:
        """left [B, G, m, T], right [B, G, T, n]."""
        return self.expand(*self.tensors)

    @property
    def _costs(self) -> tuple[int, int, int, int]:
        positions = UNKNOWN_POSITIONS if self.positions is None else self.positions
        return (*self.layout.sizes, positions)

    @property
    def gradient_bytes(self) -> float:
        groups, m, n, positions = self._costs
        if self.form is not None:
            held = sum(product(tensor.shape[1:]) or 0 for tensor in self.tensors)
            return 4.0 * (2 * groups * m * n + 2 * held)
        return 4.0 * groups * (m * n + positions * (2 * m + n))

    def _matrices(self, how: Contraction) -> tf.Tensor:
        if self.form is not None:
            return self.form(how, *self.tensors)
        return how.matmul(*self.sides())

    def matrices(self) -> tf.Tensor:
        """`gradients` as the layout has them: [B, G, m, n], or [B, ..., m, n] to be reshaped so."""
        return self._matrices(Contraction())

    def gradients(self) -> tf.Tensor:
        return self.layout.from_matrices(self.matrices())

    def _projection_costs(self, count: int) -> dict[str, tuple[float, float]]:
        """Flops and bytes of each order, for one example."""
        groups, m, n, positions = self._costs
        through = 2.0 * groups * positions * count * m * n
        return {
            "gradient": (
                2.0 * groups * m * n * (positions + count),
                4.0 * groups * (2 * m * n + 2 * positions * m),
            ),
            "left": (through, 4.0 * groups * positions * (2 * count * n + m)),
            "right": (through, 4.0 * groups * positions * (2 * count * m + n)),
        }

    def route(self, count: int, how: Contraction) -> str:
        if how.order in ("gradient", "left", "right"):
            return how.order
        costs = self._projection_costs(count)
        return min(costs, key=lambda order: costs[order][0] + FLOPS_PER_BYTE * costs[order][1])

    def flops(self, count: int, how: Contraction) -> float:
        """Of `project` for one example."""
        return self._projection_costs(count)[self.route(count, how)][0]

    def flops_with_gradients(self, count: int, how: Contraction) -> float:
        """The same, on what `as_directions` gives of `count` examples."""
        if not self._keeps_factors(how):
            return self.flops(count, how)
        groups, m, n, positions = self._costs
        return 2.0 * groups * count * positions**2 * (m + n)

    def prepare(self, directions: tf.Tensor, how: Contraction) -> Prepared:
        count = directions.shape[0]
        groups, m, n = self.layout.sizes
        matrices = self.layout.to_matrices(directions)
        order = self.route(count or UNKNOWN_DIRECTIONS, how)
        if order == "gradient":
            # Columns: a product with rows of a huge length runs at a third of the speed.
            laid_out = tf.transpose(tf.reshape(matrices, [-1, groups * m * n]))
        elif order == "left":
            laid_out = tf.reshape(tf.transpose(matrices, [1, 2, 0, 3]), [groups, m, -1])
        else:
            laid_out = tf.reshape(tf.transpose(matrices, [1, 3, 0, 2]), [groups, n, -1])
        return {order: how.lowered(laid_out)}

    def project(self, prepared: Prepared, how: Contraction) -> tf.Tensor:
        if "factor_left" in prepared:
            return self._project_factors(prepared["factor_left"], prepared["factor_right"], how)
        ((order, directions),) = prepared.items()
        if order == "gradient":
            return self._project_gradients(directions, how)
        return self._project_through(order, directions, how)

    def _project_gradients(self, directions: tf.Tensor, how: Contraction) -> tf.Tensor:
        """Each gradient formed, and multiplied with all directions [G m n, k] at once."""
        size = self.tensors[0].shape[0]
        groups, m, n, positions = self._costs
        if size is not None and groups == 1:
            room = how.budget / self.dtype.size
            # Of the two sides the right one is there already; the left one may have to be made.
            if 2 * size * positions * m <= room < 2 * size * m * n:
                return self._project_by_rows(directions, max(1, int(room / (2 * size * n))), how)

        def formed(*tensors: tf.Tensor) -> tf.Tensor:
            return tf.reshape(self.with_tensors(tensors)._matrices(how), [-1, self.size])

        def one_block(*tensors: tf.Tensor) -> tf.Tensor:
            # Formed some at a time, for windows are many times larger than gradients; multiplied
            # together, for a product with few rows runs at a fifth of the rate.
            gradients = over_examples(formed, tensors, self.gradient_bytes, how.budget)
            return how.matmul(gradients, directions)

        each = 2.0 * self.dtype.size * self.size
        return over_examples(one_block, self.tensors, each, how.budget)

    def _project_by_rows(self, directions: tf.Tensor, rows: int, how: Contraction) -> tf.Tensor:
        """The same, some rows of all gradients at a time.

        Where gradients are so large that few fit at once, blocks of examples would read all
        directions for each few; blocks of rows read them once.
        """
        left, right = self.sides()
        _, m, n = self.layout.sizes
        num_blocks, rest = divmod(m, rows)

        def product(start: tf.Tensor | int, count: int) -> tf.Tensor:
            formed = how.matmul(some_of(left, start, count, axis=2)[:, 0], right[:, 0])
            formed = tf.reshape(formed, [-1, count * n])  # [B, count n]
            return how.matmul(formed, some_of(directions, start * n, count * n))

        start = tf.zeros([tf.shape(left)[0], tf.shape(directions)[1]], self.dtype)
        start = of_shape(start, [left.shape[0], directions.shape[1]])
        _, total = tf.while_loop(
            lambda index, _: index < num_blocks,
            lambda index, total: (index + 1, total + product(index * rows, rows)),
            (tf.constant(0), start),
            parallel_iterations=1,
        )
        if rest:
            with tf.control_dependencies([total]):
                total += product(m - rest, rest)
        return total

    def _project_through(self, order: str, directions: tf.Tensor, how: Contraction) -> tf.Tensor:
        """One side multiplied with all directions [G, m, k n] or [G, n, k m], then the other."""
        groups, m, n, positions = self._costs
        width = n if order == "left" else m
        count = directions.shape[-1] // width if directions.shape[-1] else None
        each = 4.0 * groups * positions * ((count or UNKNOWN_DIRECTIONS) * width * 2 + m + n)

        def one_block(*tensors: tf.Tensor) -> tf.Tensor:
            left, right = self.with_tensors(tensors).sides()
            rows = tf.transpose(left, [1, 0, 3, 2])  # [G, b, T, m]
            columns = tf.transpose(right, [1, 0, 2, 3])  # [G, b, T, n]
            if order == "right":
                rows, columns = columns, rows
            inner = rows.shape[-1]
            if groups == 1:  # A batched product of one runs at nine tenths of the rate.
                through = how.matmul(tf.reshape(rows, [-1, inner]), directions[0])
            else:
                through = how.matmul(tf.reshape(rows, [groups, -1, inner]), directions)
            shape = tf.concat([tf.shape(rows)[:3], [-1, width]], axis=0)
            through = tf.reshape(through, shape)  # [G, b, T, k, width]
            products = through * columns[:, :, :, tf.newaxis, :]
            return of_shape(tf.reduce_sum(products, axis=[0, 2, 4]), [None, count])

        return over_examples(one_block, self.tensors, each, how.budget)

    def as_directions(self, how: Contraction) -> Prepared:
        if self._keeps_factors(how):
            left, right = self.sides()
            return {"factor_left": left, "factor_right": right}
        return super().as_directions(how)

    def _keeps_factors(self, how: Contraction) -> bool:
        _, m, n, positions = self._costs
        # For a pair of examples: all products of positions, or the gradients' entries.
        pairs = positions * positions * (m + n)
        return how.order == "factors" or (how.order == "auto" and pairs < m * n)

    def _project_factors(
        self, other_left: tf.Tensor, other_right: tf.Tensor, how: Contraction
    ) -> tf.Tensor:
        groups, m, n, positions = self._costs
        count = other_left.shape[0]
        each = (
            12.0
            * groups
            * positions
            * (count or UNKNOWN_DIRECTIONS)
            * (other_left.shape[-1] or positions)
        )

        def one_block(*tensors: tf.Tensor) -> tf.Tensor:
            left, right = self.with_tensors(tensors).sides()
            # [G, b T, m] x [G, m, Q T'], and the same with n.
            ours = [tf.transpose(left, [1, 0, 3, 2]), tf.transpose(right, [1, 0, 2, 3])]
            theirs = [
                tf.transpose(other_left, [1, 2, 0, 3]),
                tf.transpose(other_right, [1, 3, 0, 2]),
            ]
            products = [
                how.matmul(
                    tf.reshape(our, [groups, -1, width]), tf.reshape(their, [groups, width, -1])
                )
                for our, their, width in zip(ours, theirs, (m, n), strict=True)
            ]
            shape = tf.concat([tf.shape(ours[0])[:3], tf.shape(theirs[0])[2:]], axis=0)
            product = tf.reshape(products[0] * products[1], shape)
            return of_shape(tf.reduce_sum(product, axis=[0, 2, 4]), [None, count])

        return over_examples(one_block, self.tensors, each, how.budget)

    def norm_route(self, how: Contraction) -> str:
        """The cheapest way to the norms."""
        _, m, n, positions = self._costs
        if how.order in ("gradient", "factors"):
            return how.order
        products = 2.0 * positions**2 * (m + n) + 3 * positions**2 * 4 * FLOPS_PER_BYTE
        formed = 2.0 * positions * m * n + 2 * m * n * 4 * FLOPS_PER_BYTE
        return "factors" if products < formed else "gradient"

    def squared_norms(self, how: Contraction) -> tf.Tensor:
        if self.norm_route(how) == "gradient":
            # The order of the entries does not matter: no way back to the variable's shape.
            return over_examples(
                lambda *tensors: sum_squares(self.with_tensors(tensors)._matrices(Contraction())),
                self.tensors,
                self.gradient_bytes,
                how.budget,
            )
        groups, m, n, positions = self._costs
        if positions == 1:
            left, right = self.sides()
            squares = tf.reduce_sum(left * left, [2, 3]) * tf.reduce_sum(right * right, [2, 3])
            return tf.reduce_sum(squares, axis=1)

        def one_block(*tensors: tf.Tensor) -> tf.Tensor:
            left, right = self.with_tensors(tensors).sides()
            products = tf.matmul(left, left, transpose_a=True)
            products *= tf.matmul(right, right, transpose_b=True)
            return tf.reduce_sum(products, axis=[1, 2, 3])

        each = 4.0 * groups * positions * (3 * positions + 2 * m + n)
        return over_examples(one_block, self.tensors, each, how.budget)

    def merged(self, other: Factor) -> Factor | None:
        if not isinstance(other, Outer) or other.layout != self.layout:
            return None
        split = len(self.tensors)

        def expand(*tensors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            ours, theirs = self.expand(*tensors[:split]), other.expand(*tensors[split:])
            return tf.concat([ours[0], theirs[0]], axis=3), tf.concat([ours[1], theirs[1]], axis=2)

        known = self.positions is not None and other.positions is not None
        positions = self.positions + other.positions if known else None  # type: ignore[operator]
        return Outer(self.layout, self.tensors + other.tensors, expand, positions)
