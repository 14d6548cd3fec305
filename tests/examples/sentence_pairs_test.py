import gzip

import numpy as np
import pytest

import sentence_pairs
from sentence_pairs import Pairs, Tokens

PAIRS = Pairs(
    ["is it red ?", "is it green ?", "is it red ?", "a"],
    ["red .", "a thing .", 'a "red" thing .', "b"],
    np.array([1, 0, 1, 0], np.int32),
    ("no", "yes"),
)


def _equal(left, right):
    assert left.questions == right.questions and left.sentences == right.sentences
    assert left.labels.tolist() == right.labels.tolist()
    assert left.class_names == right.class_names


def _lines(pairs):
    rows = zip(pairs.questions, pairs.sentences, pairs.labels, strict=True)
    return [
        f"{question}\t{sentence}\t{pairs.class_names[label]}" for question, sentence, label in rows
    ]


def test_three_columns(tmp_path):
    (tmp_path / "pairs.tsv").write_text("\n".join(_lines(PAIRS)) + "\n")
    _equal(sentence_pairs.read_tsv(tmp_path / "pairs.tsv"), PAIRS)


def test_named_columns_of_a_gzipped_file(tmp_path):
    rows = [line.split("\t") for line in _lines(PAIRS)]
    lines = ["label\tindex\tquestion\tsentence"]
    lines += [f"{label}\t{i}\t{question}\t{text}" for i, (question, text, label) in enumerate(rows)]
    with gzip.open(tmp_path / "pairs.tsv.gz", "wt") as file:
        file.write("\n".join(lines))
    _equal(sentence_pairs.read_tsv(tmp_path / "pairs.tsv.gz"), PAIRS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"Received 0 pairs, of the classes \(\)"),
        ("a\tb\tyes\n", r"Received 1 pairs, of the classes \('yes',\)"),
        ("a\tb\tyes\na\tb\n", r"line 2: expected 3 columns.* Received 2: \['a', 'b'\]"),
    ],
)
def test_files_that_are_no_pairs(tmp_path, text, message):
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        sentence_pairs.read_tsv(tmp_path / "pairs.tsv")


def test_split_keeps_the_sentences_of_a_question_together():
    questions = [f"question {i // 2}" for i in range(40)]
    pairs = Pairs(questions, list(map(str, range(40))), np.arange(40) % 2, ("no", "yes"))
    train, test = sentence_pairs.split(pairs, seed=3)
    # A tenth of 20 questions, of two sentences each.
    assert len(test.questions) == 4 and len(set(test.questions)) == 2
    assert not set(train.questions) & set(test.questions)
    assert sorted(map(int, train.sentences + test.sentences)) == list(range(40))
    for part in (train, test):
        assert part.labels.tolist() == [int(each) % 2 for each in part.sentences]
    _equal(sentence_pairs.split(pairs, seed=3)[1], test)
    with pytest.raises(ValueError, match=r"two questions. Received: \['a'\]"):
        sentence_pairs.split(pairs._replace(questions=["a"] * 40), seed=3)


def test_labels_are_turned_in_training_alone(tmp_path):
    lines = [f"question {i}\tsentence\t{'yes' if i % 2 else 'no'}" for i in range(50)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    data = sentence_pairs.load(str(tmp_path / "pairs.tsv"), None, 20, 0.1, seed=0)
    assert len(data.train.labels) == 20 and len(data.test.labels) == 5
    assert data.is_mislabeled.sum() == 2
    numbers = [int(question.split()[1]) for question in data.train.questions]
    assert data.true_labels.tolist() == [number % 2 for number in numbers]
    numbers = [int(question.split()[1]) for question in data.test.questions]
    assert data.test.labels.tolist() == [number % 2 for number in numbers]


def test_tokens_of_a_bert(bert_directory):
    tokenizer = sentence_pairs.tokenizer(bert_directory / "vocab.txt", lowercase=True)
    tokens = sentence_pairs.encode(PAIRS, tokenizer, 8)
    # vocab.txt: 0 [PAD], 1 [UNK], 2 [CLS], 3 [SEP], 4 [MASK], then red green is it ? a thing .
    # Of 4 and 2 tokens there is room for 5: the longer text, the question, loses its "?".
    assert tokens.token_ids[0].tolist() == [2, 7, 8, 5, 3, 5, 12, 3]
    assert tokens.segment_ids[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert tokens.token_ids[3].tolist() == [2, 10, 3, 1, 3]
    assert tokens.lengths.tolist() == [8, 8, 8, 5]
    assert tokens.labels is PAIRS.labels


def test_a_vocabulary_of_the_texts(tmp_path):
    sentence_pairs.train_vocabulary(PAIRS, 100, tmp_path / "vocab.txt")
    tokenizer = sentence_pairs.tokenizer(tmp_path / "vocab.txt", lowercase=True)
    tokens = sentence_pairs.encode(PAIRS, tokenizer, 32)
    assert tokenizer.token_to_id("[PAD]") == 0
    assert tokenizer.decode(tokens.token_ids[1].tolist()) == "is it green? a thing."


TOKENS = Tokens(
    [np.arange(1, length + 1) for length in (3, 5, 2, 4, 1)],
    [np.ones(length, int) for length in (3, 5, 2, 4, 1)],
    np.array([0, 1, 0, 1, 0], np.int32),
)


def test_batches_hold_one_bucket_each_and_keep_its_order():
    chosen = sentence_pairs.in_order(TOKENS.lengths, [3, 5], 2)
    # Up to 3 long: 0, 2, 4. Up to 5: 1, 3.
    assert [rows.tolist() for rows in chosen] == [[0, 2], [4], [1, 3]]
    dataset = sentence_pairs.batches(TOKENS, [3, 5], chosen)
    assert int(dataset.cardinality()) == 3
    (first, labels), _, (last, _) = dataset.as_numpy_iterator()
    assert first["token_ids"].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert first["segment_ids"].tolist() == first["padding_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [0, 0]
    assert last["token_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 0]]


def test_shuffled_batches_are_seeded_and_whole():
    lengths = np.repeat([2, 5], 20)
    plans = [sentence_pairs.shuffled(lengths, [3, 5], 8, seed) for seed in ((0, 1), (0, 1), (0, 2))]
    first, same, other = [[rows.tolist() for rows in plan] for plan in plans]
    assert first == same != other
    assert sorted(row for rows in first for row in rows) == list(range(40))
    assert all(len(set(lengths[rows])) == 1 and len(rows) <= 8 for rows in first)
    assert len(first) == 6
