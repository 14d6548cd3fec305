import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence import data


def _rows(num=10):
    return np.arange(num, dtype=np.float32)[:, np.newaxis] * [1, 10], np.arange(num)


def _read_back(batches):
    x = np.concatenate([b.examples[0][: b.num_examples] for b in batches])
    return x, np.concatenate([b.ids for b in batches])


class _Sequence(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return self.x[rows], self.y[rows]


def _unknown_cardinality(x, y):
    signature = (tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int64))
    parts = [slice(0, 3), slice(3, 3), slice(3, 8), slice(8, 10)]
    dataset = tf.data.Dataset.from_generator(
        lambda: ((x[rows], y[rows]) for rows in parts), output_signature=signature
    )
    assert dataset.cardinality() == tf.data.UNKNOWN_CARDINALITY
    return dataset


FORMS = {
    "arrays": lambda x, y: (x, y),
    "arrays_and_no_weight": lambda x, y: (x, y, None),
    "tensors": lambda x, y: (tf.constant(x), tf.constant(y)),
    "dataset": lambda x, y: tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
    "arrays_with_ids": lambda x, y: data.with_ids((x, y)),
    "dataset_with_ids": lambda x, y: data.with_ids(FORMS["dataset"](x, y)),
    "unknown_cardinality": _unknown_cardinality,
    "py_dataset": _Sequence,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [None, 1, 3, 4, 10, 64])
def test_every_example_once_in_order_and_one_shape(form, batch_size):
    x, y = _rows()
    batches = list(data.batches(FORMS[form](x, y), batch_size))
    read, ids = _read_back(batches)
    np.testing.assert_array_equal(read, x)
    np.testing.assert_array_equal(ids, np.arange(10))
    assert len({b.examples[0].shape for b in batches}) == 1
    assert len({len(b.weights) for b in batches}) == 1
    assert sum(b.weights.sum() for b in batches) == 10
    assert data.count(FORMS[form](x, y)) == 10


def test_padding_repeats_an_example_with_weight_zero():
    *_, last = data.batches(_rows(), 4)
    np.testing.assert_array_equal(last.examples[0], [[8, 80], [9, 90], [8, 80], [8, 80]])
    np.testing.assert_array_equal(last.weights, [1, 1, 0, 0])
    np.testing.assert_array_equal(last.ids, [8, 9])


def test_nests_and_sample_weights():
    x, y = _rows()
    element = ({"a": x, "b": x[:, 0]}, {"c": y}, y / 2)
    *_, last = data.batches(tf.data.Dataset.from_tensor_slices(element).batch(4))
    inputs, targets, weights = last.examples
    np.testing.assert_array_equal(inputs["b"], [8, 9, 8, 8])
    np.testing.assert_array_equal(targets["c"], [8, 9, 8, 8])
    np.testing.assert_array_equal(weights, [4, 4.5, 4, 4])


def test_buckets_of_another_length_make_batches_of_their_own():
    def generate():
        for rows, length in ((2, 3), (2, 5), (1, 5), (1, 3)):
            yield np.ones((rows, length), "float32"), np.zeros(rows, "int64")

    signature = (tf.TensorSpec([None, None]), tf.TensorSpec([None], tf.int64))
    batches = list(
        data.batches(tf.data.Dataset.from_generator(generate, output_signature=signature))
    )
    assert [b.examples[0].shape for b in batches] == [(2, 3), (2, 5), (2, 5), (2, 3)]
    np.testing.assert_array_equal(np.concatenate([b.ids for b in batches]), np.arange(6))


def _lengths(*elements):
    """A dataset of elements (rows, length), each row of which is its position."""
    starts = np.cumsum([0, *(rows for rows, _ in elements)])

    def generate():
        for (rows, length), start in zip(elements, starts, strict=False):
            ids = np.arange(start, start + rows)
            yield np.repeat(ids[:, np.newaxis], length, axis=1), ids

    signature = (tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None], tf.int64))
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


def _cut(batches):
    """(size, length, ids) of each batch; rows hold what their ids say, and padding comes last."""
    found = []
    for batch in batches:
        x, y = batch.examples
        real = len(batch.ids)
        np.testing.assert_array_equal(y[:real], batch.ids)
        np.testing.assert_array_equal(x[:real, -1], batch.ids)
        np.testing.assert_array_equal(batch.weights, np.arange(len(y)) < real)
        found.append((*x.shape, batch.ids.tolist()))
    return found


def test_each_length_has_the_size_of_its_own_batches():
    # Buckets of 4 short rows and 2 long ones, as they fill; what is left of them at the end.
    dataset = _lengths((4, 3), (2, 6), (4, 3), (2, 6), (1, 3), (1, 6))
    assert _cut(data.batches(dataset)) == [
        (4, 3, [0, 1, 2, 3]),
        (2, 6, [4, 5]),
        (4, 3, [6, 7, 8, 9]),
        (2, 6, [10, 11]),
        (4, 3, [12]),
        (2, 6, [13]),
    ]


def test_few_sizes_whatever_the_order_of_lengths():
    # Batches of 8 are wanted of runs of 1, 2, ... rows of either length.
    elements = [(1 + i // 2 % 7, 3 + i % 2) for i in range(56)]
    found = _cut(data.batches(_lengths(*elements), 8))
    ids = np.concatenate([ids for *_, ids in found])
    np.testing.assert_array_equal(ids, np.arange(sum(n for n, _ in elements)))
    assert {(size, length) for size, length, _ in found} == {
        (size, length) for size in (1, 2, 4, 8) for length in (3, 4)
    }
    assert all(size < 2 * max(len(ids), 1) for size, _, ids in found)


def test_a_few_of_a_length_are_padded_to_a_power_of_two():
    assert _cut(data.batches(_lengths((3, 3), (8, 5), (5, 5), (5, 6)), 8)) == [
        (4, 3, [0, 1, 2]),
        (8, 5, list(range(3, 11))),
        (8, 5, list(range(11, 16))),
        (8, 6, list(range(16, 21))),
    ]


def test_out_of_order_batches_are_full():
    elements = [(1, 3), (2, 5), (3, 3), (1, 5), (1, 3)]
    batches = list(data.batches(_lengths(*elements), 4, ordered=False))
    assert _cut(batches) == [(4, 3, [0, 3, 4, 5]), (4, 3, [7]), (3, 5, [1, 2, 6])]
    rows = [batch.examples[1][: batch.num_examples] for batch in batches]
    ids = [batch.ids for batch in batches]
    np.testing.assert_array_equal(data.in_order(rows, ids), np.arange(8))
    frozen, total = data.freeze(_lengths(*elements), 4)
    assert total == 8 and _cut(frozen) == _cut(batches)
    subset, total = data.freeze(_lengths(*elements), 4, num_examples=5, seed=1)
    kept = np.sort(np.random.default_rng(1).permutation(8)[:5])
    found = np.concatenate([ids for *_, ids in _cut(subset)])
    assert total == 8
    np.testing.assert_array_equal(np.sort(found), kept)


def test_freeze_keeps_a_seeded_subset_in_full_batches():
    x, y = _rows(23)
    batches, total = data.freeze((x, y), batch_size=4, num_examples=10, seed=5)
    assert total == 23
    assert [b.num_examples for b in batches] == [4, 4, 2]
    chosen = np.sort(np.random.default_rng(5).permutation(23)[:10])
    read, ids = _read_back(batches)
    np.testing.assert_array_equal(ids, chosen)
    np.testing.assert_array_equal(read, x[chosen])


def test_freeze_a_shuffled_dataset_keeps_each_example():
    x, y = _rows()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(10, seed=1).batch(3)
    batches, total = data.freeze(dataset)
    assert total == 10
    np.testing.assert_array_equal(np.sort(_read_back(batches)[0], axis=0), x)


def test_read_takes_rows():
    x, y = _rows()
    examples = data.read(tf.data.Dataset.from_tensor_slices((x, y)).batch(3))
    taken = examples.take(np.array([7, 2]))
    np.testing.assert_array_equal(taken[0], x[[7, 2]])
    np.testing.assert_array_equal(taken[1], [7, 2])


def test_an_order_that_changes_is_refused():
    x, y = _rows(100)
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    data.check_order(dataset.batch(10))
    data.check_order(dataset.shuffle(100, seed=1, reshuffle_each_iteration=False).batch(10))
    data.check_order((x, y))
    with pytest.raises(ValueError, match=r"gives other examples each time"):
        data.check_order(dataset.shuffle(100, seed=1).batch(10))


def test_nan_inputs_do_not_look_like_another_order():
    x, y = _rows()
    x[0] = np.nan
    data.check_order(tf.data.Dataset.from_tensor_slices((x, y)).batch(10))


def test_bad_datasets():
    x, y = _rows()
    slices = tf.data.Dataset.from_tensor_slices((x, y))
    ragged = tf.data.Dataset.from_tensors((tf.ragged.constant([[1], [1, 2]]), [0, 1]))
    for dataset, error, message in (
        ((x[:0], y[:0]), ValueError, "is empty"),
        (slices.take(0).batch(4), ValueError, "is empty"),
        (slices, ValueError, "no batch axis: call `.batch"),
        (slices.map(lambda x, y: x).batch(4), ValueError, "influence needs the labels"),
        ((x, y[:-1]), ValueError, "same number of rows"),
        (ragged, ValueError, "Received: RaggedTensor"),
        ((b for b in [(x, y)]), TypeError, "Received: generator"),
        (x, TypeError, "Received: ndarray"),
    ):
        with pytest.raises(error, match=message):
            list(data.batches(dataset))
    with pytest.raises(ValueError, match=r"`batch_size` must be at least 1. Received: 0"):
        list(data.batches((x, y), 0))
    with pytest.raises(ValueError, match=r"is empty"):
        data.count((x[:0], y[:0]))


def test_examples_of_several_shapes_cannot_be_drawn():
    def generate():
        for length in (3, 5):
            yield np.ones((2, length), "float32"), np.zeros(2, "int64")

    signature = (tf.TensorSpec([None, None]), tf.TensorSpec([None], tf.int64))
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    with pytest.raises(ValueError, match=r"must all have one shape"):
        data.read(dataset)


def test_no_tuner_keeps_the_end_of_a_pass_waiting(monkeypatch):
    dataset, read = FORMS["dataset"](*_rows()), []
    iterate = tf.data.Dataset.__iter__

    def watched(self):
        read.append(self.options().autotune.enabled)
        return iterate(self)

    monkeypatch.setattr(tf.data.Dataset, "__iter__", watched)
    assert sum(batch.num_examples for batch in data.batches(dataset)) == 10
    assert read == [False]
    assert data.untuned(dataset).cardinality() == dataset.cardinality() == 3
    assert dataset.options().autotune.enabled is None


def test_what_is_read_ahead():
    made = []

    def items():
        for number in range(5):
            made.append(number)
            yield number
        raise OSError("gone")

    reader = data.prefetched(items())
    assert [next(reader) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="gone"):
        next(reader)
    # Left early, it makes no more than was ahead: one that waits, and one in hand.
    made.clear()
    reader = data.prefetched(items())
    assert next(reader) == 0
    reader.close()
    assert len(made) <= 3
    assert list(data.prefetched(iter([]))) == []
