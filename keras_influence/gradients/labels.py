"""Per-example losses by labels of the model's own: their gradients' mean square is a Fisher matrix.

With z_i what example i's loss is convex in and L_i the loss's second derivatives by it, averaged
over labels drawn from the model (see `convexity`), the gradient of <u_i, z_i> has the mean square
J_i' L_i J_i, where u_i is drawn with the mean square L_i. For a softmax that is the derivative of
the cross-entropy by a class that is drawn; for losses that are sums over outputs, a random sign
times the root of each output's curvature. In this way the mean over tokens, masks, and weights of
examples and losses enter as they enter the Hessian: once, and not squared.

Random numbers are a function of seed, draw, example and entry: how examples are batched changes
nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_influence.gradients.convexity import Point
from keras_influence.gradients.gauss_newton import curvature_product, points_of

LABELS = ("sampled", "expected", "empirical")


def pairing_losses(
    model: Callable[[Any], Any],
    losses: Callable[[Any, Any, Any], tf.Tensor],
    batch: Any,
    draw: tf.Tensor,
    seed: int,
    expected: bool,
) -> tf.Tensor:
    """<u_i, z_i>, [B], by which to differentiate: u_i counts as a constant.

    Args:
        model: x -> outputs.
        losses: (y, outputs, sample_weight) -> l_i [B].
        batch: (examples, ids, weights): as `model.fit` takes them, integers [B], and [B].
        draw: number of the draw.
        seed: of all of them.
        expected: whether the draws 0, 1, ... are the terms of a sum, of as many as the points are
            wide together, which is L_i itself. Only the signs of several positions are random.
    """
    examples, ids, weights = batch
    x, y, sample_weight = (*examples, None)[:3]
    outputs = model(x)
    points = points_of(losses, y, outputs, sample_weight)
    units: list[tf.Tensor] = []
    first = 0
    for number, point in enumerate(points):
        draws = _Draws(seed, draw, ids, number, point.moved(point.tensor))
        if expected:
            units.append(_expected_unit(point, draw - first, draws))
            first += point.width
        else:
            units.append(_sampled_unit(point, draws))
    curved = curvature_product(losses, points, units, y, outputs, sample_weight, None, fisher=True)
    total = tf.zeros_like(weights)
    for point, unit, product in zip(points, units, curved, strict=True):
        cotangent = _rooted(point, unit, product)
        terms = tf.reshape(tf.stop_gradient(cotangent) * point.tensor, [tf.shape(ids)[0], -1])
        total += tf.cast(tf.reduce_sum(terms, axis=1), weights.dtype)
    return total * weights


class Terms(NamedTuple):
    """The terms of the expectation over labels.

    Attributes:
        size: draws that it takes.
        exact: whether they add up to it with no random signs: each output has one position.
        free_of_labels: see `Point`.
    """

    size: int
    exact: bool
    free_of_labels: bool


def label_terms(
    model: Callable[[Any], Any], losses: Callable[[Any, Any, Any], tf.Tensor], batch: Any
) -> Terms:
    """Of a batch; nothing is run.

    Args:
        model: x -> outputs.
        losses: (y, outputs, sample_weight) -> l_i [B].
        batch: as `model.fit` takes it.
    """
    found: list[Terms] = []

    def trace(examples: Any) -> tf.Tensor:
        x, y, sample_weight = (*examples, None)[:3]
        points = points_of(losses, y, model(x), sample_weight)
        # A size that is not known is not that of one position.
        exact = all(point.tensor.shape[1:].num_elements() == point.width for point in points)
        count = sum(point.width for point in points)
        free = all(point.free_of_labels for point in points)
        found.append(Terms(count, exact, free))
        return tf.zeros([])

    leaves = tf.nest.map_structure(tf.convert_to_tensor, batch)
    tf.function(trace, autograph=False).get_concrete_function(leaves)
    return found[-1]


def _sampled_unit(point: Point, draws: "_Draws") -> tf.Tensor:
    """Of the mean square L / a, with a the weight of the position."""
    if not point.softmax:
        return draws.signs(point.tensor.dtype)
    p = _probabilities(point)
    uniform = draws.uniform_of_positions(p.dtype)
    below = tf.cast(tf.cumsum(p, axis=-1) < uniform[..., tf.newaxis], tf.int32)
    chosen = tf.minimum(tf.reduce_sum(below, axis=-1), p.shape[-1] - 1)
    return _moved_back(point, p - tf.one_hot(chosen, p.shape[-1], dtype=p.dtype))


def _expected_unit(point: Point, term: tf.Tensor, draws: "_Draws") -> tf.Tensor:
    one = tf.one_hot(term, point.width, dtype=point.tensor.dtype)
    if not point.softmax:
        return one * draws.signs_of_positions(point.tensor.dtype)[..., tf.newaxis]
    p = _probabilities(point)
    scale = tf.sqrt(tf.reduce_sum(p * one, axis=-1)) * draws.signs_of_positions(p.dtype)
    within = tf.reduce_sum(one)  # 0 where the term is of another output.
    return _moved_back(point, (p - one) * (scale * within)[..., tf.newaxis])


def _rooted(point: Point, unit: tf.Tensor, product: tf.Tensor) -> tf.Tensor:
    """The unit times the root of the position's weight; `product` is L times the unit."""
    zero = tf.zeros([], unit.dtype)
    if not point.softmax:
        # L is diagonal, and the unit's entries are 1, -1 or 0.
        return unit * tf.sqrt(tf.maximum(product * unit, zero))
    p, unit = _probabilities(point), point.moved(unit)
    plain = p * (unit - tf.reduce_sum(p * unit, axis=-1, keepdims=True))
    form = tf.reduce_sum(plain * unit, axis=-1, keepdims=True)
    weight = tf.math.divide_no_nan(
        tf.reduce_sum(point.moved(product) * unit, axis=-1, keepdims=True), form
    )
    return _moved_back(point, unit * tf.sqrt(tf.maximum(weight, zero)))


def _probabilities(point: Point) -> tf.Tensor:
    return tf.nn.softmax(tf.stop_gradient(point.moved(point.tensor)))


def _moved_back(point: Point, tensor: tf.Tensor) -> tf.Tensor:
    return point.moved(tensor, back=True)


class _Draws:
    """Random numbers for one output of the examples of a batch."""

    def __init__(self, seed: int, draw: tf.Tensor, ids: tf.Tensor, number: int, like: tf.Tensor):
        state = _mixed(tf.constant(seed % 2**32, tf.uint32))
        state = _mixed(state ^ tf.cast(draw, tf.uint32))
        state = _mixed(state ^ tf.constant(number, tf.uint32))
        self._states = _mixed(state ^ tf.cast(ids, tf.uint32))
        self._shape = tf.shape(like)

    def _bits(self, shape: tf.Tensor) -> tf.Tensor:
        count = tf.reduce_prod(shape[1:])
        bits = _mixed(self._states[:, tf.newaxis] ^ tf.cast(tf.range(count), tf.uint32))
        return tf.reshape(bits, shape)

    def signs(self, dtype: tf.DType) -> tf.Tensor:
        """1 or -1, for each entry."""
        return self._signs(self._shape, dtype)

    def signs_of_positions(self, dtype: tf.DType) -> tf.Tensor:
        return self._signs(self._shape[:-1], dtype)

    def _signs(self, shape: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        high = tf.bitwise.right_shift(self._bits(shape), tf.constant(31, tf.uint32))
        return 1 - 2 * tf.cast(high, dtype)

    def uniform_of_positions(self, dtype: tf.DType) -> tf.Tensor:
        """In (0, 1), for each entry but for those along the last axis."""
        high = tf.bitwise.right_shift(self._bits(self._shape[:-1]), tf.constant(8, tf.uint32))
        return (tf.cast(high, dtype) + 0.5) / 2**24


def _mixed(bits: tf.Tensor) -> tf.Tensor:
    """A permutation of the 32-bit integers of which each bit hangs on all (Wellons's lowbias32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits ^= tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint32))
        bits *= tf.constant(factor, tf.uint32)
    return bits
