"""Per-example losses against what Keras trains on, and against sums written out."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence.gradients import LossMaps, PerExampleLoss, select_variables
from tests import cases


def _identity(shape=(4,), **compile_arguments):
    """A model whose outputs are its inputs."""
    x = keras.Input(shape)
    model = keras.Model(x, keras.layers.Dense(shape[-1], kernel_initializer="identity")(x))
    model.compile("sgd", **compile_arguments)
    return model


def _losses(model, *batch, **kwargs):
    return LossMaps(model, **kwargs).losses(tuple(map(tf.convert_to_tensor, batch))).numpy()


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        ("mse", "real"),
        ("mae", "real"),
        (keras.losses.Huber(delta=0.5, reduction="sum"), "real"),
        ("sparse_categorical_crossentropy", "class"),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), "class"),
        ("categorical_crossentropy", "one_hot"),
        (keras.losses.CategoricalCrossentropy(label_smoothing=0.1), "one_hot"),
        (keras.losses.BinaryCrossentropy(from_logits=True, reduction=None), "one_hot"),
        ("kl_divergence", "one_hot"),
        ("poisson", "real"),
        ("crossentropy", "class"),
    ],
)
def test_losses_are_those_of_training_one_by_one(loss, labels):
    random = np.random.default_rng(0)
    x = random.dirichlet(np.ones(4), 6).astype("float32")
    classes = random.integers(0, 4, 6)
    y = {"real": random.uniform(size=(6, 4)), "class": classes, "one_hot": np.eye(4)[classes]}
    y = np.asarray(y[labels], "int64" if labels == "class" else "float32")
    model = _identity(loss=loss)
    one_by_one = [
        np.sum(model.compute_loss(x[i : i + 1], y[i : i + 1], model(x[i : i + 1])))
        for i in range(6)
    ]
    np.testing.assert_allclose(_losses(model, x, y), one_by_one, rtol=1e-6)


def test_sample_weights_multiply():
    x = np.float32([[1, 0], [0, 2], [3, 3]])
    model = _identity((2,), loss="mse")
    # Means over two outputs of the squared distance from zero: 1/2, 2 and 9.
    losses = _losses(model, x, 0 * x, np.float32([2, 0, 0.5]))
    np.testing.assert_allclose(losses, [1, 0, 4.5])


def _tokens(mask_zero=False):
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(3, 1, mask_zero=mask_zero),
        ]
    )
    model.compile("sgd", "mse")
    cases.set_weights(model, [[5.0], [1.0], [3.0]])
    return model


# Token 1 costs 1, token 2 costs 9, token 0 costs 25, against targets of zero.
TOKENS = np.int32([[1, 2, 0, 0], [2, 2, 2, 0]])
TARGETS = np.zeros((2, 4, 1), "float32")


def test_a_sequence_is_the_mean_of_its_tokens_or_their_sum():
    np.testing.assert_allclose(_losses(_tokens(), TOKENS, TARGETS), [60 / 4, 52 / 4])
    sums = _losses(_tokens(), TOKENS, TARGETS, sequence_reduction="sum")
    np.testing.assert_allclose(sums, [60, 52])


def test_masked_tokens_do_not_count():
    masked = _tokens(mask_zero=True)
    np.testing.assert_allclose(_losses(masked, TOKENS, TARGETS), [10 / 2, 27 / 3])
    weights = np.float32(TOKENS != 0)
    np.testing.assert_allclose(_losses(_tokens(), TOKENS, TARGETS, weights), [10 / 2, 27 / 3])
    # Padding that is added changes nothing.
    longer = np.pad(TOKENS, ((0, 0), (0, 3)))
    model = _tokens(mask_zero=True)
    np.testing.assert_allclose(_losses(model, TOKENS, TARGETS), [5, 9])
    padded = keras.Sequential([keras.Input((7,), dtype="int32"), model.layers[0]])
    padded.compile("sgd", "mse")
    np.testing.assert_allclose(_losses(padded, longer, np.zeros((2, 7, 1), "float32")), [5, 9])
    # A weight for the whole sequence multiplies its mean; an empty sequence costs nothing.
    np.testing.assert_allclose(_losses(model, TOKENS, TARGETS, np.float32([2, 0])), [10, 0])
    np.testing.assert_allclose(_losses(model, 0 * TOKENS, TARGETS), [0, 0])


def test_ignored_classes_do_not_count():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model = _identity((3, 2), loss=loss)
    x = np.zeros((2, 3, 2), "float32")
    y = np.int64([[0, 1, -1], [-1, 1, -1]])
    # Two equal logits: log 2 for each token that counts.
    np.testing.assert_allclose(_losses(model, x, y), np.log([2, 2]), rtol=1e-6)
    sums = _losses(model, x, y, sequence_reduction="sum")
    np.testing.assert_allclose(sums, np.log([4, 2]), rtol=1e-6)


def test_labels_of_no_class_are_nan_and_the_others_are_not():
    model = _identity((2,), loss=cases.SPARSE)
    losses = _losses(model, np.zeros((4, 2), "float32"), np.int64([0, 2, 1, -1]))
    np.testing.assert_allclose(losses, [np.log(2), np.nan, np.log(2), np.nan], rtol=1e-6)


def test_regularisers_are_no_part_of_an_example():
    x = keras.Input((2,))
    outputs = keras.layers.Dense(2, kernel_initializer="identity", kernel_regularizer="l2")(x)
    model = keras.Model(x, outputs)
    model.compile("sgd", "mse")
    np.testing.assert_allclose(_losses(model, np.ones((1, 2), "f"), np.zeros((1, 2), "f")), [1])


def test_a_loss_of_the_whole_batch_is_refused():
    model = _identity((2,), loss=lambda y, p: keras.ops.mean((y - p) ** 2))
    with pytest.raises(ValueError, match=r"one number for the whole batch"):
        _losses(model, np.zeros((3, 2), "f"), np.zeros((3, 2), "f"))


def test_a_compute_loss_of_its_own_is_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(y_pred)

    model = Own()
    model(np.zeros((1, 2), "f"))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"Own overrides `compute_loss`.*Pass `loss=`"):
        PerExampleLoss(model)
    np.testing.assert_allclose(
        _losses(model, np.zeros((1, 2), "f"), np.ones((1, 1), "f"), loss="mse"), [1.0]
    )


def test_bad_choices():
    model = _identity((2,), loss="mse")
    with pytest.raises(ValueError, match=r"`sequence_reduction` must be one of.*'max'"):
        LossMaps(model, sequence_reduction="max")
    with pytest.raises(ValueError, match=r"element of type str: 'dense'"):
        select_variables(model, ["dense"])
    with pytest.raises(ValueError, match=r"is not a variable of the model"):
        select_variables(model, _identity((2,), loss="mse").trainable_variables)
    with pytest.raises(ValueError, match=r"chooses none of the variables"):
        select_variables(model, lambda v: False)
    dropout = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5), model])
    seeds = [v for v in dropout.variables if "seed" in v.path]
    with pytest.raises(ValueError, match=r"only floating-point variables have"):
        select_variables(dropout, seeds)
