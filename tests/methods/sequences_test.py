"""Ragged sequences: buckets of static shapes, and padding that changes no score."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from tests import cases, texts

LENGTHS = np.random.default_rng(0).integers(1, 10, 14)
SENTENCES = texts.sentences(LENGTHS)
BUCKETS = {5: 4, 8: 3, 11: 2}  # Length: examples of a batch.

PROBLEMS = {
    "encoder_decoder": (
        texts.encoder_decoder,
        lambda length: texts.translations(SENTENCES, SENTENCES[::-1], length),
    ),
    "causal": (texts.causal, lambda length: texts.writing(SENTENCES, length)),
    "classifier": (texts.classifier, lambda length: texts.reading(SENTENCES, length)),
}


def masked_model():
    """Embedding and two layers, through which a mask goes to the loss."""
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(texts.VOCABULARY, 3, mask_zero=True),
            keras.layers.Dense(4, "tanh"),
            keras.layers.Dense(texts.VOCABULARY),
        ]
    )
    model.compile("sgd", cases.SPARSE)
    return model


def cut(arrays, rows, length):
    return tf.nest.map_structure(lambda a: a[rows] if a.ndim == 1 else a[rows][:, :length], arrays)


def bucketed(arrays, lengths, buckets=BUCKETS):
    """As `bucket_by_sequence_length` gives them; and the rows in the order in which it does."""
    pending, order = collections.defaultdict(list), []
    for row, length in enumerate(lengths):
        bucket = next(each for each in buckets if length <= each)
        pending[bucket].append(row)
        if len(pending[bucket]) == buckets[bucket]:
            order.append((bucket, pending.pop(bucket)))
    order += pending.items()
    elements = [cut(arrays, rows, length) for length, rows in order]
    signature = tf.nest.map_structure(lambda a: tf.TensorSpec([None] * a.ndim, a.dtype), arrays)
    dataset = tf.data.Dataset.from_generator(lambda: iter(elements), output_signature=signature)
    return dataset, np.concatenate([rows for _, rows in order])


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    "name",
    [
        "encoder_decoder",
        pytest.param("causal", marks=pytest.mark.slow),
        pytest.param("classifier", marks=pytest.mark.slow),
    ],
)
def test_padding_changes_no_score(name):
    build, arrays = PROBLEMS[name]
    model = build("float32")
    short, long = arrays(10), arrays(texts.LONGEST)
    method = ki.Arnoldi(model, 3, 6, complement=None, damping=0.1, batch_size=14).fit(short)
    close(method.encode(long), method.encode(short))
    close(method.self_influence(long), method.self_influence(short))
    queries = [cut(each, slice(4), None) for each in (short, long)]
    expected = method.scores(queries[0], short)
    close(method.scores(queries[1], short), expected)
    # A longer bucket for one example alone: all others stay where they were.
    rows = np.arange(14) != 3
    alone = np.insert(
        method.encode(cut(short, rows, None)), 3, method.encode(cut(long, [3], None)), axis=0
    )
    close(alone, method.encode(short))


def test_one_trace_for_each_length_and_ids_are_positions():
    model = masked_model()
    arrays = texts.writing(SENTENCES, texts.LONGEST)
    dataset, order = bucketed(arrays, LENGTHS + 1)
    method = ki.RandomProjection(model, 3).fit(dataset)
    assert method.num_train == 14
    encoded = method.encode(dataset)
    assert method.maps.project.experimental_get_tracing_count() == len(BUCKETS)
    whole = ki.RandomProjection(model, 3, batch_size=14).fit(arrays)
    close(encoded, whole.encode(arrays)[order])
    scorer = ki.InfluenceScorer(method, k=2).index(dataset)
    assert method.maps.project.experimental_get_tracing_count() == len(BUCKETS)
    query = cut(arrays, slice(1), None)
    found = np.asarray(scorer(query).proponents.ids)
    scores = method.scores(query, dataset)[0]
    assert found[0].tolist() == np.argsort(-scores)[:2].tolist()
    close(scores, whole.scores(query, arrays)[0][order])


METHODS = {
    "arnoldi": lambda model: ki.Arnoldi(model, 4, 8, damping=0.1, sketch_size=2),
    "gradient_dot": ki.GradientDot,
    "lissa": lambda model: ki.LiSSA(model, 3, 1.0, 20.0, hessian_batch_size=6),
    "conjugate_gradient": lambda model: ki.ConjugateGradient(model, damping=3.0),
    "exact": lambda model: ki.ExactInfluence(model, damping=0.1),
    "ekfac": ki.EKFAC,
    "kfac": ki.KFAC,
    "diagonal": ki.DiagonalFisher,
}
FAST = ("arnoldi", "gradient_dot", "ekfac")


@pytest.mark.parametrize(
    "name",
    [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in METHODS],
)
def test_buckets_change_no_score(name):
    model = masked_model()
    arrays = texts.writing(SENTENCES, texts.LONGEST)
    buckets, order = bucketed(arrays, LENGTHS + 1)
    arrays = cut(arrays, order, None)
    queries = cut(arrays, slice(5), None)
    # Interleaved: two lengths in turn.
    elements = [cut(queries, [row], 11 if row % 2 else 12) for row in range(5)]
    some = tf.data.Dataset.from_generator(
        lambda: iter(elements), output_signature=(tf.TensorSpec([None, None], tf.int32),) * 2
    )
    expected = METHODS[name](model).fit(arrays)
    method = METHODS[name](model).fit(buckets)
    assert method.num_train == 14
    close(method.self_influence(buckets), expected.self_influence(arrays), 1e-4)
    close(method.scores(some, buckets), expected.scores(queries, arrays), 1e-4)


def test_parameters_without_a_gradient_count_for_nothing():
    # The same number added to all logits: a gradient of zero but for rounding, of which the mean
    # square alone would be a damping as small.
    class Shift(keras.layers.Layer):
        def build(self, shape):
            self.shift = self.add_weight(shape=(1,), initializer="zeros")

        def call(self, x):
            return x + self.shift

    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(3), Shift()]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile("sgd", cases.SPARSE)
    train = cases.vectors(classes=3)
    both = [
        ki.DiagonalFisher(model, variables=variables).fit(train).self_influence(train)
        for variables in (None, layers[:2])
    ]
    close(*both, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_buckets_of_transformers_change_no_score(name):
    build, arrays = PROBLEMS[name]
    model = build("float32")
    arrays = arrays(texts.LONGEST)
    lengths = 1 + np.maximum(LENGTHS, LENGTHS[::-1]) if name == "encoder_decoder" else 1 + LENGTHS
    buckets, order = bucketed(arrays, lengths)
    arrays = cut(arrays, order, None)
    for make in (
        lambda: ki.Arnoldi(model, 4, 8, damping=0.1, sketch_size=2),
        lambda: ki.EKFAC(model),
    ):
        expected, method = make().fit(arrays), make().fit(buckets)
        close(method.self_influence(buckets), expected.self_influence(arrays), 1e-4)
        close(method.scores(buckets, buckets), expected.scores(arrays, arrays), 1e-4)
