"""In what a loss is convex: where its Gauss-Newton matrix is taken, and what its Fisher one is.

With z_i what an example's loss is convex in (the outputs, or the logits before a softmax or
sigmoid), J_i the derivatives of z_i by the parameters and L_i the loss's Hessian by z_i,

    Gauss-Newton   sum_i J_i' L_i J_i
    Fisher         the same, with the mean of L_i over labels drawn from the model in place of L_i

Both are positive semi-definite. They are one matrix where L_i does not depend on the labels: for
exponential families in their natural parameters (cross-entropies of logits, squared errors).
Martens, "New Insights and Perspectives on the Natural Gradient Method", 2020, sections 8 and 9.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

CURVATURES = ("hessian", "gauss_newton", "fisher")

_functions = keras.losses

ExpectedLabels = Callable[[tf.Tensor], tf.Tensor]


class _Convex(NamedTuple):
    """A loss that is convex in the outputs, or in the logits before them.

    Attributes:
        activation: the operation that makes outputs of logits, where the loss is convex in logits.
        expected_labels: outputs -> the mean of the labels that the model expects, in which L is
            affine; None where L does not depend on labels.
        likelihood: whether the loss is the negative logarithm of a likelihood, up to constants.
    """

    activation: str | None = None
    expected_labels: ExpectedLabels | None = None
    likelihood: bool = True


# By the function of a loss, or the class of one without a function.
_convex: dict[Any, _Convex] = {
    _functions.categorical_crossentropy: _Convex("Softmax"),
    _functions.sparse_categorical_crossentropy: _Convex("Softmax"),
    _functions.binary_crossentropy: _Convex("Sigmoid"),
    _functions.mean_squared_error: _Convex(),
    _functions.poisson: _Convex(expected_labels=tf.identity),
    _functions.kl_divergence: _Convex(expected_labels=tf.identity),
    _functions.huber: _Convex(likelihood=False),
    _functions.log_cosh: _Convex(likelihood=False),
    _functions.squared_hinge: _Convex(likelihood=False),
}
_FLAT = (
    _functions.mean_absolute_error,
    _functions.mean_absolute_percentage_error,
    _functions.hinge,
    _functions.categorical_hinge,
)


def check_curvature(kind: str) -> None:
    if kind not in CURVATURES:
        raise ValueError(f"`curvature` must be one of {CURVATURES}. Received: {kind!r}.")


def declare_convex(
    loss: Any, *, likelihood: bool = False, expected_labels: ExpectedLabels | None = None
) -> None:
    """Declares a loss of your own to be convex in the model's outputs.

    It may then be used with `curvature="gauss_newton"`. Nothing checks it: a loss that is not
    convex gives a matrix with negative eigenvalues.

    Args:
        loss: a function `(y_true, y_pred)`, or a class of `keras.losses.Loss`.
        likelihood: whether it is the negative logarithm of a likelihood, up to constants, and a sum
            over the outputs' entries, so that `curvature="fisher"` has a meaning.
        expected_labels: for a likelihood, outputs -> the labels that the model expects; needed if
            the loss's second derivatives by the outputs depend on the labels, in which they must be
            affine.

    Example:

    >>> def pinball(y_true, y_pred):
    ...     error = y_true - y_pred
    ...     return tf.reduce_mean(tf.where(error > 0, 2.0, 1.0) * tf.square(error), axis=-1)
    >>> ki.gradients.declare_convex(pinball)
    """
    _convex[loss] = _Convex(None, expected_labels, likelihood)


class Point(NamedTuple):
    """What one output's loss is convex in.

    Attributes:
        output: the model's output.
        tensor: the output itself, or the logits that it was made of.
        softmax: whether the loss is a cross-entropy of the softmax of `tensor`; else it is a sum
            over the entries of `tensor`, as are all others that are known here.
        axis: of the classes.
        free_of_labels: whether the loss's second derivatives by `tensor` are the same for all
            labels, so that the Fisher matrix is the Gauss-Newton one.
    """

    output: tf.Tensor
    tensor: tf.Tensor
    softmax: bool
    axis: int
    free_of_labels: bool

    @property
    def width(self) -> int:
        """Classes, or numbers of one position."""
        return self.tensor.shape[self.axis]

    def moved(self, tensor: tf.Tensor, back: bool = False) -> tf.Tensor:
        """`tensor` with the axis of the classes last, or back where it was."""
        rank = tensor.shape.rank
        if self.axis in (-1, rank - 1):
            return tensor
        order = [axis for axis in range(rank) if axis != self.axis % rank] + [self.axis % rank]
        if back:
            order = [order.index(axis) for axis in range(rank)]
        return tf.transpose(tensor, order)

    def rebuilt(self, value: tf.Tensor) -> tf.Tensor:
        """The output as the loss sees it, had `tensor` this value."""
        if self.tensor is self.output:
            output = tf.identity(value)
        else:
            # Keras computes a cross-entropy from this attribute, and leaves the output alone.
            output = tf.identity(self.output)
            output._keras_logits = value
        mask = getattr(self.output, "_keras_mask", None)
        if mask is not None:
            output._keras_mask = mask
        return output


def point(loss: keras.Loss, output: tf.Tensor, seen: tf.Tensor) -> Point:
    """Where the curvature of `loss` is taken.

    Args:
        output: of the model.
        seen: the same in the dtype of the loss.

    Raises:
        ValueError: the loss is not convex, or has no curvature, or is convex in logits that cannot
            be found.
    """
    convex = _find(loss)
    softmax = convex.activation == "Softmax"
    axis = getattr(loss, "axis", -1) if softmax else -1
    free_of_labels = convex.likelihood and convex.expected_labels is None
    if convex.activation is None:
        return Point(output, output, softmax, axis, free_of_labels)
    logits = getattr(seen, "_keras_logits", None)
    operation = None if tf.executing_eagerly() else seen.op
    if logits is None and operation is not None and operation.type == convex.activation:
        logits = operation.inputs[0]
    if logits is not None:
        return Point(output, logits, softmax, axis, free_of_labels)
    if getattr(loss, "from_logits", False):
        return Point(output, output, softmax, axis, free_of_labels)
    raise ValueError(
        f"The loss {loss.name!r} is convex in logits, and these cannot be told from the model's "
        f"probabilities: its last operation is no {convex.activation.lower()}, or their dtype is "
        f"not the loss's. Received: {output!r}. Let the model give logits and the loss take them "
        "(`from_logits=True`), end it with the activation in float32, or use "
        '`curvature="hessian"`.'
    )


def labels_for_fisher(
    loss: keras.Loss, labels: tf.Tensor, output: tf.Tensor, seen: tf.Tensor
) -> tf.Tensor:
    """Labels at which the loss's second derivatives are those that the model expects.

    Raises:
        ValueError: the loss is no likelihood of which that is known.
    """
    del output
    convex = _find(loss)
    if not convex.likelihood:
        raise ValueError(
            f"The loss {loss.name!r} is not known as the likelihood of a distribution of labels, "
            'over which the Fisher matrix would be a mean. Use `curvature="gauss_newton"`, or '
            '`labels="empirical"`; for a loss of your own, see `gradients.declare_convex`.'
        )
    if convex.expected_labels is None:
        return labels
    return tf.stop_gradient(convex.expected_labels(seen))


def _find(loss: keras.Loss) -> _Convex:
    function = getattr(loss, "fn", None)
    for key in (function, *type(loss).__mro__):
        if key is not None and key in _convex:
            return _convex[key]
    if function in _FLAT:
        raise ValueError(
            f"The loss {loss.name!r} is piecewise linear: its second derivatives are zero, and so "
            "are its Gauss-Newton and Fisher matrices. Use a smooth loss (squared_hinge for hinge, "
            'huber for absolute errors), or `curvature="hessian"`, which has the curvature of the '
            "network."
        )
    raise ValueError(
        f"The loss {loss.name!r} is not known to be convex in the model's outputs, and only then "
        "is its Gauss-Newton matrix positive. If it is, declare it: `gradients.declare_convex`. "
        'Else use `curvature="hessian"`.'
    )
