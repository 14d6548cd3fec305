"""What is asked of a prediction, where it is not its loss: a margin, a logit, a probability."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_influence.gradients.losses import PerExampleLoss

MEASUREMENTS = ("loss", "logit", "margin", "probability")

# (label, outputs) -> [batch] or [batch, tokens].
Measurement = str | Callable[[Any, Any], Any]


def check_measurement(measurement: Any) -> None:
    if not callable(measurement) and measurement not in MEASUREMENTS:
        raise ValueError(
            f"`measurement` must be one of {MEASUREMENTS}, or a function (labels, outputs) -> "
            f"[batch]. Received: {measurement!r}."
        )


def measurement_loss(measurement: Measurement, loss: PerExampleLoss) -> Any:
    """A measurement as a function to use in place of a loss.

    With z the logits and y the label of a classifier's example: `"logit"` is z_y; `"probability"`
    p_y; `"margin"` log(p_y / (1 - p_y)), the log-odds of Park et al. (2023, section 3.1). For a
    loss that takes probabilities instead of logits, z_y is log p_y. Of a sequence it is the mean
    over the tokens that count for the loss.

    Args:
        measurement: a name, or a function (labels, outputs) -> [batch] or [batch, tokens].
        loss: the model's, built or not.

    Raises:
        ValueError: a name, for a loss that is no crossentropy of one output.
    """
    if callable(measurement):
        return measurement
    user_loss = keras.losses.get(loss._user_loss) if _single(loss._user_loss) else loss._user_loss
    name = getattr(getattr(user_loss, "fn", user_loss), "__name__", "")
    log_odds = _LOG_ODDS.get(name)
    if log_odds is None:
        raise ValueError(
            f"The measurement {measurement!r} is that of a classifier with one output and a "
            f"crossentropy. The loss is {loss._user_loss!r}: pass a function (labels, outputs) -> "
            "[batch] instead."
        )
    options = getattr(user_loss, "_fn_kwargs", {})
    from_logits, ignored = bool(options.get("from_logits", False)), options.get("ignore_class")

    def measured(y_true: Any, y_pred: Any) -> Any:
        if ignored is None:
            return of_labels(y_true, y_pred)
        labels = tf.cast(y_true, tf.int32)
        if labels.shape.rank == y_pred.shape.rank:
            labels = tf.squeeze(labels, -1)
        valid = labels != ignored
        found = of_labels(tf.where(valid, labels, 0), y_pred)
        # As the loss itself says which positions do not count.
        found._keras_mask = valid
        return found

    def of_labels(y_true: Any, y_pred: Any) -> Any:
        logit, others = log_odds(y_true, y_pred, from_logits)
        if measurement == "logit":
            return logit
        margin = logit - others
        return tf.sigmoid(margin) if measurement == "probability" else margin

    return measured


def _single(loss: Any) -> bool:
    return isinstance(loss, (str, keras.Loss)) or callable(loss)


def _categorical(
    y_true: tf.Tensor, y_pred: tf.Tensor, from_logits: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """z_y, and the logarithm of the sum of the other classes' exponentials."""
    logits = y_pred if from_logits else tf.math.log(tf.maximum(y_pred, keras.config.epsilon()))
    chosen = y_true > 0.5
    logit = tf.reduce_sum(tf.where(chosen, logits, tf.zeros_like(logits)), axis=-1)
    # A label of no class has no logit.
    one = tf.reduce_sum(tf.cast(chosen, tf.int32), axis=-1) == 1
    logit = tf.where(one, logit, tf.constant(float("nan"), logits.dtype))
    lowest = tf.fill(tf.shape(logits), logits.dtype.min)
    return logit, tf.reduce_logsumexp(tf.where(chosen, lowest, logits), axis=-1)


def _sparse(y_true: tf.Tensor, y_pred: tf.Tensor, from_logits: bool) -> tuple[tf.Tensor, tf.Tensor]:
    labels = tf.cast(y_true, tf.int32)
    if labels.shape.rank == y_pred.shape.rank:
        labels = tf.squeeze(labels, -1)
    one_hot = tf.one_hot(labels, y_pred.shape[-1], dtype=y_pred.dtype)
    return _categorical(one_hot, y_pred, from_logits)


def _binary(y_true: tf.Tensor, y_pred: tf.Tensor, from_logits: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """The log-odds of the label; summed over the outputs of a classifier that has several."""
    y_true = tf.reshape(y_true, tf.shape(y_pred))
    if from_logits:
        odds = y_pred
    else:
        epsilon = keras.config.epsilon()
        p = tf.clip_by_value(y_pred, epsilon, 1 - epsilon)
        odds = tf.math.log(p) - tf.math.log1p(-p)
    signed = tf.reduce_sum(tf.where(y_true > 0.5, odds, -odds), axis=-1)
    return signed, tf.zeros_like(signed)


_LOG_ODDS = {
    "categorical_crossentropy": _categorical,
    "sparse_categorical_crossentropy": _sparse,
    "binary_crossentropy": _binary,
}
