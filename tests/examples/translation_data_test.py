import collections
import gzip
import sys
import types

import numpy as np
import pytest

import translation_data
from translation_data import Batches, Corpus

LENGTHS = np.array([3, 8, 5, 2, 7, 4, 8, 6])


@pytest.fixture
def corpus():
    """Eight pairs whose sides have `LENGTHS` tokens; the id of a pair is in all of them."""
    tokens = np.zeros((8, 8), np.int32)
    for row, (length, number) in zip(tokens, zip(LENGTHS, range(8), strict=True), strict=True):
        row[:length] = 10 + number
    return Corpus(tokens, tokens, np.zeros(8, bool), {})


def test_reading(tmp_path):
    text = "German\tEnglish\tsource\nja\tyes\ttoy\nnein\tno\n"
    (tmp_path / "pairs.tsv").write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "pairs.tsv.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    for name in ("pairs.tsv", "pairs.tsv.gz"):
        assert translation_data.read_tsv(str(tmp_path / name)) == [("ja", "yes"), ("nein", "no")]


@pytest.mark.parametrize("line", ["ja", "ja\t", "\tyes", ""])
def test_lines_that_are_no_pair_are_named(tmp_path, line):
    (tmp_path / "pairs.tsv").write_text(f"ja\tyes\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"pairs\.tsv:2 must have a German and an English"):
        translation_data.read_tsv(str(tmp_path / "pairs.tsv"))


def test_pairs_of_wmt(monkeypatch):
    rows = [{"de": "über".encode(), "en": b"over"}]
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        return rows

    fake = types.SimpleNamespace(load=load, as_numpy=lambda dataset: dataset)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    assert translation_data.read_wmt("somewhere", 7) == [("über", "over")]
    assert asked == {
        "name": "wmt17_translate/de-en",
        "split": "train[:7]",
        "data_dir": "somewhere",
    }


def test_training_and_held_out_pairs_share_no_sentence():
    # Each German sentence occurs twice.
    pairs = [(f"de {number // 2}", f"en {number}") for number in range(40)]
    splits = translation_data.split(pairs, num_held_out=6, num_train=20, seed=0)
    assert {name: len(ids) for name, ids in splits.items()} == {
        "held_out": 6,
        "train": 20,
        "rest": 14,
    }
    np.testing.assert_array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(40))
    german = {name: {pairs[i][0] for i in ids} for name, ids in splits.items()}
    assert not german["held_out"] & german["train"]
    again = translation_data.split(pairs, num_held_out=6, num_train=20, seed=0)
    np.testing.assert_array_equal(again["train"], splits["train"])
    with pytest.raises(ValueError, match="40 training and 6 held-out pairs"):
        translation_data.split(pairs, num_held_out=6, num_train=40, seed=0)


def test_short_pairs_are_short_on_both_sides():
    pairs = [("ein Hund", "a dog"), ("Hunde", "dogs of all sizes"), ("ein paar Hunde", "dogs")]
    assert translation_data.short(pairs, 2) == pairs[:1]
    assert translation_data.short(pairs, 0) == pairs


def test_permuted_references_are_others():
    references = [f"reference {number}" for number in range(50)]
    found, is_noisy = translation_data.add_noise(references, "permuted", 0.2, seed=0)
    # round(.2 x 50) = 10 of them, each another's.
    assert is_noisy.sum() == 10
    assert [a != b for a, b in zip(found, references, strict=True)] == is_noisy.tolist()
    assert sorted(found) == sorted(references)


def test_half_of_mixed_noise_is_cut_at_the_wrong_place():
    references = [" ".join(f"{number}.{word}" for word in range(6)) for number in range(80)]
    found, is_noisy = translation_data.add_noise(references, "mixed", 0.3, seed=0)
    # Of 24 wrong ones 12 are permuted whole, and 12 are six pairs with a boundary that is two
    # words or more off.
    assert is_noisy.sum() == 24
    assert [a != b for a, b in zip(found, references, strict=True)] == is_noisy.tolist()
    whole = [text for text in np.array(found)[is_noisy] if text in references]
    assert len(whole) == 12
    lengths = collections.Counter(len(text.split()) for text in found)
    assert lengths[6] == 80 - 12 and sum(n * count for n, count in lengths.items()) == 480
    assert not any(lengths[length] for length in (5, 7))


def test_no_noise():
    found, is_noisy = translation_data.add_noise(["a", "b"], "none", 0.5, seed=0)
    assert found == ["a", "b"] and not is_noisy.any()


def test_vocabulary_round_trip(tmp_path):
    sentences = ["der hund sieht die katze", "the dog sees the cat"] * 20
    path = tmp_path / "vocabulary.model"
    translation_data.train_vocabulary(iter(sentences), 60, path)
    vocabulary = translation_data.load_vocabulary(path)
    tokens = translation_data.encode(vocabulary, sentences[:2], max_tokens=40)
    assert tokens.shape == (2, 40) and (tokens[tokens.argmin(1) > 0].max(axis=1) > 3).all()
    for row in tokens:
        (end,) = np.flatnonzero(row == 3)
        assert not row[end + 1 :].any()
    assert translation_data.decode(vocabulary, tokens) == sentences[:2]
    short = translation_data.encode(vocabulary, sentences[:2], max_tokens=3)
    np.testing.assert_array_equal(short, tokens[:, :3])


def test_batches_hold_each_pair_once_in_its_bucket(corpus):
    batches = Batches(corpus, np.arange(8), [4, 6, 8], batch_size=2)
    # Up to 4 tokens: pairs 0, 3, 5; up to 6: 2, 7; up to 8: 1, 4, 6.
    assert batches.ids.tolist() == [0, 3, 5, 2, 7, 1, 4, 6]
    assert batches.num_tokens == 2 * LENGTHS.sum()
    shapes, seen = [], []
    for x, y, weights in batches.in_order().as_numpy_iterator():
        shapes.append(y.shape)
        seen += (y[:, 0] - 10).tolist()
        # A target begins with 2 and lacks its last token; what does not count is padding.
        assert (x["target"][:, 0] == 2).all()
        np.testing.assert_array_equal(x["target"][:, 1:], y[:, :-1] * (y[:, 1:] != 0))
        np.testing.assert_array_equal(weights, y != 0)
    assert seen == batches.ids.tolist()
    assert shapes == [(2, 4), (1, 4), (2, 6), (2, 8), (1, 8)]
    part = [y[:, 0] - 10 for _, y, _ in batches.in_order(2, 6).as_numpy_iterator()]
    assert np.concatenate(part).tolist() == [5, 2, 7, 1]
    # Three pairs of four positions, two of six, three of eight.
    assert batches.mean(lambda batch: batch[1].size / 2) == (3 * 4 + 2 * 6 + 3 * 8) / 8
    with pytest.raises(ValueError, match="no pair"):
        Batches(corpus, np.arange(0), [8], batch_size=2)


def test_the_stream_goes_on_where_it_was_left(corpus):
    batches = Batches(corpus, np.arange(8), [4, 8], batch_size=2)
    whole = list(batches.stream(seed=1).take(11).as_numpy_iterator())
    rest = list(batches.stream(seed=1, skipped=6).take(5).as_numpy_iterator())
    for found, expected in zip(rest, whole[6:], strict=True):
        np.testing.assert_array_equal(found[1], expected[1])
    # Five batches are one pass; the next one has another order.
    first, second = ([y[0, 0] for _, y, _ in part] for part in (whole[:5], whole[5:10]))
    assert first != second
    for part in (whole[:5], whole[5:10]):
        seen = np.concatenate([y[:, 0] for _, y, _ in part])
        np.testing.assert_array_equal(np.sort(seen), np.arange(10, 18))
    # Keras's mean over all positions is the mean over pairs of the mean over their tokens.
    _, y, weights = whole[0]
    values = np.random.default_rng(0).uniform(size=y.shape)
    each = [row[: np.count_nonzero(labels)].mean() for row, labels in zip(values, y, strict=True)]
    assert (values * weights).mean() == pytest.approx(np.mean(each), rel=1e-6)
