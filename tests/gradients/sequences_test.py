"""Models of sequences: what a sentence's loss is, and its derivatives against dense oracles."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence.gradients import LossMaps, select_variables
from keras_influence.gradients.measurements import measurement_loss
from keras_influence.gradients.second_order import twice_differentiable_moments
from tests import texts

SMOOTHING = 0.2


def smoothed(y_true, logits):
    """Labels in tokens, with the smoothing of Vaswani et al. (2017)."""
    one_hot = keras.ops.one_hot(keras.ops.cast(y_true, "int32"), texts.VOCABULARY)
    return keras.losses.categorical_crossentropy(
        keras.ops.cast(one_hot, logits.dtype), logits, from_logits=True, label_smoothing=SMOOTHING
    )


def token_losses(logits, labels, smoothing=0.0):
    """[N, T], written out in NumPy."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, labels[..., np.newaxis], -1)[..., 0]
    return -(1 - smoothing) * chosen - smoothing * log_p.mean(-1)


def problem(length=6):
    """Three pairs of sentences, with 4, 2 and 3 tokens to predict."""
    return texts.translations(texts.sentences([5, 2, 4]), texts.sentences([3, 1, 2], 1), length)


@pytest.mark.parametrize("kind", ["sample_weight", "label_smoothing", "ignore_class", "keras_mask"])
def test_a_sentence_is_the_mean_of_its_tokens(kind):
    (source, target), after, counts = problem()
    sizes = counts.sum(1)
    assert sizes.tolist() == [4, 2, 3]
    if kind in ("sample_weight", "label_smoothing"):
        model = texts.encoder_decoder(loss=smoothed if kind == "label_smoothing" else None)
        batch = (source, target), after, counts
    else:
        model = texts.causal(tied=kind == "ignore_class")
        batch = target, after
    smoothing = SMOOTHING if kind == "label_smoothing" else 0.0
    tokens = token_losses(model(batch[0]), after, smoothing) * counts
    np.testing.assert_allclose(LossMaps(model).losses(batch), tokens.sum(1) / sizes, rtol=1e-12)
    sums = LossMaps(model, sequence_reduction="sum").losses(batch)
    np.testing.assert_allclose(sums, tokens.sum(1), rtol=1e-12)
    # What `fit` descends: with masks, the mean over all tokens of the batch that count, and so of
    # the sentences weighted by their lengths; with sample weights Keras divides by all positions,
    # padding as well.
    trained = model.compute_loss(batch[0], after, model(batch[0]), *batch[2:])
    positions = sizes.sum() if len(batch) == 2 else counts.size
    np.testing.assert_allclose(float(trained), tokens.sum() / positions, rtol=1e-6)


def test_weights_of_tokens_multiply_and_zeros_do_not_count():
    model = texts.causal(tied=False)
    tokens, after = texts.writing(texts.sentences([3, 1]), 6)
    weights = np.float32([[2, 0, 1, 0.5, 7, 7], [1, 3, 7, 7, 7, 7]])
    # Behind the sentences, of 4 and 2 tokens, the mask is stronger than any weight.
    each = token_losses(model(tokens), after) * weights
    expected = [each[0, :4].sum() / 3, each[1, :2].sum() / 2]
    losses = LossMaps(model).losses((tokens, after, weights))
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


@pytest.mark.parametrize("ignored", [0, -1])
def test_measurements_leave_out_what_the_loss_ignores(ignored):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=ignored)
    model = texts.causal(loss=loss)
    tokens, after = texts.writing(texts.sentences([3, 1]), 6)
    labels = np.where(after == 0, ignored, after)
    maps = LossMaps(model, measurement_loss("logit", LossMaps(model).loss))
    chosen = np.take_along_axis(model(tokens).numpy(), after[..., np.newaxis], -1)[..., 0]
    expected = [chosen[0, :4].mean(), chosen[1, :2].mean()]
    np.testing.assert_allclose(maps.losses((tokens, labels)), expected, rtol=1e-12)


def dense(model, batch, second):
    """Losses' gradients [N, p], or their mean's Hessian [p, p], by tapes alone."""
    inputs, after, counts = (tf.nest.map_structure(tf.constant, each) for each in batch)
    weights = tf.cast(counts, "float64")
    values = [v.value for v in model.trainable_variables]

    def flat(parts, lead):
        return tf.concat([tf.reshape(tf.convert_to_tensor(p), [*lead, -1]) for p in parts], -1)

    @tf.function(autograph=False)
    def compute():
        with twice_differentiable_moments(), tf.GradientTape() as outer:
            with tf.GradientTape(persistent=True) as inner:
                logits = model(inputs, training=False)
                tokens = tf.nn.sparse_softmax_cross_entropy_with_logits(after, logits)
                losses = tf.reduce_sum(tokens * weights, 1) / tf.reduce_sum(weights, 1)
                mean = tf.reduce_mean(losses)
            if second:
                gradient = flat(inner.gradient(mean, values), [])
        if not second:
            return flat(inner.jacobian(losses, values), [losses.shape[0]])
        rows = outer.jacobian(gradient, values, experimental_use_pfor=False)
        return flat(rows, [gradient.shape[0]])

    return compute().numpy()


@pytest.fixture(scope="module")
def translator():
    """A 1 + 1 layer encoder-decoder of width 8 in float64, and its dense gradients."""
    model = texts.encoder_decoder()
    return model, problem(), dense(model, problem(), second=False)


def test_a_transformer_against_dense_oracles(translator):
    model, batch, gradients = translator
    maps = LossMaps(model)
    coverage = maps.coverage(batch)
    assert coverage.reason is None and not coverage.network
    assert not any(unit.implicit for unit in coverage.units.values())
    directions = np.random.default_rng(0).standard_normal((3, maps.parameters.size))
    np.testing.assert_allclose(maps.project(batch, directions), gradients @ directions.T, 1e-9)
    norms = np.square(gradients).sum(1)
    np.testing.assert_allclose(maps.squared_norms(batch), norms, 1e-9)
    # The curvature by differences of gradients.
    parameters = maps.parameters
    before = [value.numpy() for value in parameters.values]
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moves = parameters.unflatten(tf.constant(sign * step * directions[0]))
        for value, start, move in zip(parameters.values, before, moves, strict=True):
            value.assign(start + move)
        ends.append(maps.gradient(batch).numpy())
    for value, start in zip(parameters.values, before, strict=True):
        value.assign(start)
    slope = (ends[0] - ends[1]) / (2 * step)
    product = maps.curvature(batch, directions[0]).numpy()
    np.testing.assert_allclose(product, slope, rtol=0, atol=1e-6 * np.abs(slope).max())


@pytest.mark.slow
def test_its_curvature_against_a_dense_hessian(translator):
    model, batch, _ = translator
    maps = LossMaps(model)
    hessian = 3 * dense(model, batch, second=True)
    np.testing.assert_allclose(hessian, hessian.T, rtol=0, atol=1e-12 * np.abs(hessian).max())
    vectors = np.random.default_rng(0).standard_normal((3, maps.parameters.size))
    for vector in vectors:
        expected = hessian @ vector
        product = maps.curvature(batch, vector)
        np.testing.assert_allclose(product, expected, 0, 1e-10 * np.abs(expected).max())


def test_parameters_are_chosen_by_layers(translator):
    model, batch, gradients = translator
    decoder, last = model.get_layer("decoder"), model.get_layer("last")
    chosen = select_variables(model, [decoder, *last.trainable_variables])
    assert chosen == [*decoder.trainable_variables, *last.trainable_variables]
    assert select_variables(model, decoder) == decoder.trainable_variables
    by_predicate = select_variables(model, lambda variable: variable.path.startswith("decoder/"))
    assert by_predicate == decoder.trainable_variables
    maps = LossMaps(model, variables=decoder)
    # Self and cross attention, 4 (8 * 8 + 8) each; 8 * 12 + 12 + 12 * 8 + 8; 3 scales and biases.
    assert maps.parameters.size == 2 * 288 + 212 + 48
    start = sum(v.value.shape.num_elements() for v in model.trainable_variables[: _first(model)])
    own = gradients[:, start : start + maps.parameters.size]
    np.testing.assert_allclose(maps.squared_norms(batch), np.square(own).sum(1), 1e-9)
    with pytest.raises(ValueError, match=r"is not a variable of the model"):
        select_variables(model, texts.causal().get_layer("decoder"))


def _first(model):
    """The number of the decoder's first variable."""
    first = model.get_layer("decoder").trainable_variables[0]
    return next(i for i, v in enumerate(model.trainable_variables) if v is first)
