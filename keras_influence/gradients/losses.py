"""The loss of each example, from the loss that a model was compiled with."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

# The one private name of Keras that the package uses. CompileLoss matches losses, loss weights,
# targets and outputs of every structure that `compile` and `fit` accept; no public name does.
from keras.src.trainers.compile_utils import CompileLoss

SEQUENCE_REDUCTIONS = ("mean", "sum")


# (loss, labels, a model's output, the output in the loss's dtype) -> labels to use in their place.
Visitor = Callable[[keras.Loss, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]

_visiting = threading.local()


@contextlib.contextmanager
def visited(visitor: Visitor) -> Iterator[None]:
    """Shows `visitor` each output's loss that this thread computes, and what it is given."""
    previous = getattr(_visiting, "visitor", None)
    _visiting.visitor = visitor
    try:
        yield
    finally:
        _visiting.visitor = previous


class _OutputLoss(NamedTuple):
    """One output's Keras loss, reduced over everything but the examples."""

    loss: keras.Loss
    sequence_reduction: str

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        masks = [getattr(y_pred, "_keras_mask", None)]
        dtype = tf.float64 if y_pred.dtype == tf.float64 else tf.float32
        output, y_pred = y_pred, tf.cast(y_pred, dtype)
        y_true, validity = self._checked_labels(tf.convert_to_tensor(y_true), y_pred)
        y_true = tf.cast(y_true, dtype)
        visitor = getattr(_visiting, "visitor", None)
        if visitor is not None:
            y_true = visitor(self.loss, y_true, output, y_pred)
        values = self.loss.call(y_true, y_pred)
        if values.shape.rank == 0:
            raise ValueError(
                f"The loss {self.loss.name!r} returns one number for the whole batch, of which no "
                "example's share can be told. It must return a loss for each example: shape "
                "[batch] or [batch, ...]."
            )
        masks.append(getattr(values, "_keras_mask", None))  # From `ignore_class`.
        values *= validity
        weights = tf.ones_like(values)
        for mask in masks:
            if mask is not None and mask.shape.rank <= values.shape.rank:
                weights *= _broadcast(tf.cast(mask, dtype), values)
        if sample_weight is not None:
            weights *= _broadcast(tf.cast(sample_weight, dtype), values)
        inner = list(range(1, values.shape.rank))
        total = tf.reduce_sum(values * weights, axis=inner)
        if self.sequence_reduction == "sum" or not inner:
            return total
        counted = tf.reduce_sum(tf.cast(weights != 0, dtype), axis=inner)
        return tf.math.divide_no_nan(total, counted)

    def _checked_labels(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Class labels with those of no class replaced by 0, and NaN for their losses.

        TensorFlow's own answer depends on the device: an error without the example on a CPU, a NaN
        on a GPU. A NaN is seen, and its example named, by whoever reads the result.
        """
        one = tf.ones([], y_pred.dtype)
        name = getattr(getattr(self.loss, "fn", None), "__name__", "")
        if name != "sparse_categorical_crossentropy":
            return y_true, one
        labels = tf.cast(y_true, tf.int64)
        valid = (labels >= 0) & (labels < y_pred.shape[-1])
        ignored = getattr(self.loss, "ignore_class", None)
        if ignored is not None:
            valid |= labels == ignored
        validity = tf.where(valid, one, float("nan"))
        if labels.shape.rank == y_pred.shape.rank:
            validity = tf.squeeze(validity, -1)
        return tf.where(valid, labels, 0), validity


def _broadcast(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Weights per example or per token, with as many axes as `values`."""
    while weights.shape.rank > values.shape.rank and weights.shape[-1] == 1:
        weights = tf.squeeze(weights, -1)
    while weights.shape.rank < values.shape.rank:
        weights = tf.expand_dims(weights, -1)
    return weights


class PerExampleLoss(CompileLoss):
    """Per-example losses l_i of a model, [batch], of which the training loss is the mean.

    The loss of a sequence is the mean of the losses of its tokens whose mask and weight are not
    zero. Sample weights multiply. Losses that layers add (`model.losses`, such as a kernel
    regulariser's) are of no example, and are left out.

    Args:
        model: the model; `loss` defaults to what it was compiled with.
        loss: a Keras loss, its name, a function `(y_true, y_pred) -> [batch, ...]`, or a structure
            of them as in `model.compile`. The loss's own reduction is ignored.
        sequence_reduction: `"mean"`, or `"sum"` for log-likelihoods of whole sequences.

    Raises:
        ValueError: when no loss is known: a model that was not compiled, or one that computes its
            loss in a `compute_loss` of its own.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: Any = None,
        sequence_reduction: str = "mean",
    ):
        if sequence_reduction not in SEQUENCE_REDUCTIONS:
            raise ValueError(
                f"`sequence_reduction` must be one of {SEQUENCE_REDUCTIONS}. "
                f"Received: {sequence_reduction!r}."
            )
        weights = None
        if loss is None:
            compiled = getattr(model, "_compile_loss", None)
            if type(model).compute_loss is not keras.Model.compute_loss:
                raise ValueError(
                    f"{type(model).__name__} overrides `compute_loss`, so the loss of one example "
                    "is not known from `compile`. Pass `loss=`."
                )
            if compiled is None:
                raise ValueError(
                    f"The model {model.name!r} has no loss: compile it with one, or pass `loss=`."
                )
            loss, weights = compiled._user_loss, compiled._user_loss_weights
        super().__init__(loss, weights, output_names=getattr(model, "output_names", None))
        self.sequence_reduction = sequence_reduction

    _flat_losses: list[Any]

    @property
    def metrics(self) -> list[None]:
        """No metric to update, for each of the losses."""
        return [None] * len(self._flat_losses or [None])

    def build(self, y_true: Any, y_pred: Any) -> None:
        super().build(y_true, y_pred)
        # The dtype to which Keras casts each output's loss: not below the outputs' own.
        double = any(output.dtype == "float64" for output in keras.tree.flatten(y_pred))
        self._dtype = "float64" if double else "float32"
        self._flat_losses = [
            entry._replace(loss=_OutputLoss(entry.loss, self.sequence_reduction))
            for entry in self._flat_losses
        ]
