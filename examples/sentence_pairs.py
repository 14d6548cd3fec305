"""Labelled pairs of sentences: read, split, made into tokens, batched by length."""

import csv
import gzip
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tokenizers
from absl import logging
from numpy.typing import NDArray

import image_data

COLUMNS = ("question", "sentence", "label")
_TEST_SHARE = 0.1


class Pairs(NamedTuple):
    """Questions, sentences that may answer them, and whether they do.

    Attributes:
        questions: N of them.
        sentences: N of them.
        labels: Positions in `class_names`, shape `[N]`.
        class_names: What the classes are called.
    """

    questions: list[str]
    sentences: list[str]
    labels: NDArray[np.int32]
    class_names: tuple[str, ...]

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Pairs":
        return self._replace(
            questions=[self.questions[row] for row in rows],
            sentences=[self.sentences[row] for row in rows],
            labels=self.labels[rows],
        )


class Data(NamedTuple):
    """What the BERT is trained and tested on.

    Attributes:
        train: With labels of which some are turned.
        test: As they were.
        true_labels: Of the training pairs, before any was turned.
    """

    train: Pairs
    test: Pairs
    true_labels: NDArray[np.int32]

    @property
    def is_mislabeled(self) -> NDArray[np.bool_]:
        return self.train.labels != self.true_labels


class Tokens(NamedTuple):
    """Pairs as a BERT reads them.

    Attributes:
        token_ids: Of each pair, `[length]`.
        segment_ids: Of each pair, 0 up to the first separator and 1 after it, `[length]`.
        labels: Shape `[N]`.
    """

    token_ids: list[NDArray[np.int32]]
    segment_ids: list[NDArray[np.int32]]
    labels: NDArray[np.int32]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(tokens) for tokens in self.token_ids])

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Tokens":
        return Tokens(
            [self.token_ids[row] for row in rows],
            [self.segment_ids[row] for row in rows],
            self.labels[rows],
        )


def open_text(path: str | os.PathLike) -> Iterator[str]:
    """The lines of a text file, which is gzipped where its name ends in .gz."""
    opened = gzip.open if os.fspath(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        yield from file


def read_tsv(path: str | os.PathLike) -> Pairs:
    """Reads pairs from a file with the columns question, sentence and label, tabs between them.

    A first line that names these columns says where they are; without one, a file has the three in
    this order. Quotation marks are part of the text.

    Raises:
        ValueError: A line with another number of columns; no pair; a single class.
    """
    rows = []
    reader = csv.reader(open_text(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    places, width = (0, 1, 2), 3
    for number, line in enumerate(reader, 1):
        if number == 1 and set(COLUMNS) <= set(line):
            places, width = tuple(line.index(name) for name in COLUMNS), len(line)
            continue
        if len(line) != width:
            raise ValueError(
                f"{path}, line {number}: expected {width} columns, with tabs between them. "
                f"Received {len(line)}: {line[:width]}."
            )
        rows.append([line[place] for place in places])
    names = tuple(sorted({label for _, _, label in rows}))
    if len(names) < 2:
        raise ValueError(
            f"Expected pairs of two classes or more in {path}. Received "
            f"{len(rows)} pairs, of the classes {names}."
        )
    labels = np.array([names.index(label) for _, _, label in rows], np.int32)
    return Pairs([row[0] for row in rows], [row[1] for row in rows], labels, names)


def load_qnli(data_dir: str | None) -> tuple[Pairs, Pairs]:
    """The training and the validation part of QNLI, through `tensorflow_datasets`."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "QNLI needs tensorflow_datasets, which could not be imported. Install this package "
            "with its extra `examples`: pip install 'keras_influence[examples]'; or pass --data."
        ) from error
    builder = tfds.builder("glue/qnli", data_dir=data_dir)
    if not builder.is_prepared():
        logging.info("glue/qnli is not in %s: downloading it.", builder.data_path)
        builder.download_and_prepare()
    names = tuple(builder.info.features["label"].names)
    parts = []
    for split in ("train", "validation"):
        whole = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
        questions, sentences = (
            [text.decode("utf-8") for text in whole[column]] for column in COLUMNS[:2]
        )
        parts.append(Pairs(questions, sentences, whole["label"].astype(np.int32), names))
    return parts[0], parts[1]


def split(pairs: Pairs, seed: int) -> tuple[Pairs, Pairs]:
    """Holds out a tenth of the questions, with all of their sentences: (train, test).

    Raises:
        ValueError: There are fewer than two questions.
    """
    questions, which = np.unique(np.array(pairs.questions), return_inverse=True)
    if questions.size < 2:
        raise ValueError(f"A split needs two questions. Received: {questions.tolist()}.")
    held_out = np.zeros(questions.size, bool)
    order = np.random.default_rng(seed).permutation(questions.size)
    held_out[order[: max(round(_TEST_SHARE * questions.size), 1)]] = True
    is_test = held_out[which]
    return pairs.take(np.flatnonzero(~is_test)), pairs.take(np.flatnonzero(is_test))


def load(
    path: str | None, data_dir: str | None, num_train: int, corruption: float, seed: int
) -> Data:
    """Reads the pairs, holds some out where the data does not, and turns training labels."""
    if path is not None:
        train, test = split(read_tsv(path), seed)
    else:
        train, test = load_qnli(data_dir)
    if num_train:
        train = train.take(range(min(num_train, len(train.labels))))
    labels, _ = image_data.corrupt_labels(train.labels, corruption, len(train.class_names), seed)
    return Data(train._replace(labels=labels), test, train.labels)


def train_vocabulary(pairs: Pairs, size: int, path: pathlib.Path) -> None:
    """Writes a WordPiece vocabulary of the pairs' texts, one piece a line."""
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(
        [*pairs.questions, *pairs.sentences], vocab_size=size, show_progress=False
    )
    ids = tokenizer.get_vocab()
    path.write_text("".join(f"{piece}\n" for piece in sorted(ids, key=ids.get)), encoding="utf-8")


def tokenizer(vocabulary: str | os.PathLike, lowercase: bool) -> tokenizers.BertWordPieceTokenizer:
    """The WordPiece tokenizer of a `vocab.txt`."""
    return tokenizers.BertWordPieceTokenizer(os.fspath(vocabulary), lowercase=lowercase)


def encode(pairs: Pairs, tokenizer: tokenizers.BertWordPieceTokenizer, max_length: int) -> Tokens:
    """[CLS] question [SEP] sentence [SEP]; the longer of the two is cut to fit `max_length`."""
    tokenizer.enable_truncation(max_length)
    encoded = tokenizer.encode_batch(list(zip(pairs.questions, pairs.sentences, strict=True)))
    return Tokens(
        [np.array(each.ids, np.int32) for each in encoded],
        [np.array(each.type_ids, np.int32) for each in encoded],
        pairs.labels,
    )


def in_order(
    lengths: NDArray[np.int64], buckets: Sequence[int], batch_size: int
) -> list[NDArray[np.int64]]:
    """The positions of each batch's pairs, bucket by bucket and in order within each.

    Args:
        lengths: Of the pairs.
        buckets: Lengths to pad to, rising, of which the last is that of the longest pair or more.
        batch_size: Pairs of a batch; a bucket's last may be smaller.
    """
    which = np.searchsorted(buckets, lengths)
    chosen = []
    for bucket in range(len(buckets)):
        rows = np.flatnonzero(which == bucket)
        chosen += np.split(rows, range(batch_size, rows.size, batch_size)) if rows.size else []
    return chosen


def shuffled(
    lengths: NDArray[np.int64], buckets: Sequence[int], batch_size: int, seed: Sequence[int]
) -> list[NDArray[np.int64]]:
    """As `in_order`, with the pairs of each bucket, and then the batches, in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(lengths.size)
    chosen = [order[rows] for rows in in_order(lengths[order], buckets, batch_size)]
    return [chosen[position] for position in rng.permutation(len(chosen))]


def batches(
    tokens: Tokens, buckets: Sequence[int], chosen: Sequence[NDArray[np.int64]]
) -> tf.data.Dataset:
    """Batches of a BERT's inputs and labels, each padded to the bucket of its longest pair.

    Args:
        tokens: The pairs.
        buckets: Lengths to pad to, rising.
        chosen: The positions of each batch's pairs.
    """
    lengths = tokens.lengths

    def generate() -> Iterator[tuple[dict[str, NDArray[np.int32]], NDArray[np.int32]]]:
        for rows in chosen:
            length = buckets[np.searchsorted(buckets, lengths[rows].max())]
            shape = (len(rows), length)
            token_ids, segment_ids = np.zeros((2, *shape), np.int32)
            for at, row in enumerate(rows):
                token_ids[at, : lengths[row]] = tokens.token_ids[row]
                segment_ids[at, : lengths[row]] = tokens.segment_ids[row]
            mask = (np.arange(length) < lengths[rows, np.newaxis]).astype(np.int32)
            inputs = {"token_ids": token_ids, "segment_ids": segment_ids, "padding_mask": mask}
            yield inputs, tokens.labels[rows]

    whole = tf.TensorSpec((None, None), tf.int32)
    signature = (
        dict.fromkeys(("token_ids", "segment_ids", "padding_mask"), whole),
        tf.TensorSpec((None,), tf.int32),
    )
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(chosen))).prefetch(2)
