"""Sentence pairs for the translation example: reading, noise, vocabulary, batches of few shapes."""

import gzip
import io
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece
import tensorflow as tf
from numpy.typing import NDArray

import translation_model

NOISES = ("none", "permuted", "mixed")
_HEADER = ["german", "english"]


class Corpus(NamedTuple):
    """Pairs as token ids.

    Attributes:
        sources: int32 [N, max_tokens], padded.
        targets: int32 [N, max_tokens], padded, each with its end; what is longer is cut.
        is_noisy: Whether a pair's reference was made wrong on purpose. Shape [N].
        splits: "held_out", "train" and "rest" -> positions in the other arrays.
    """

    sources: NDArray[np.int32]
    targets: NDArray[np.int32]
    is_noisy: NDArray[np.bool_]
    splits: dict[str, NDArray[np.int64]]

    @property
    def num_source_tokens(self) -> NDArray[np.int64]:
        return np.count_nonzero(self.sources, axis=1)

    @property
    def num_target_tokens(self) -> NDArray[np.int64]:
        return np.count_nonzero(self.targets, axis=1)


def read_tsv(path: str) -> list[tuple[str, str]]:
    """Pairs (German, English) of a TSV, plain or compressed by gzip, in its order.

    Its columns are German, English and, for whoever wants to know, a source. A first line that says
    so is no pair.

    Raises:
        ValueError: A line with fewer columns, or with an empty one.
    """
    pairs = []
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            columns = line.rstrip("\r\n").split("\t")
            if number == 1 and [column.lower() for column in columns[:2]] == _HEADER:
                continue
            if len(columns) < 2 or not all(map(str.strip, columns[:2])):
                raise ValueError(
                    f"{path}:{number} must have a German and an English sentence, separated by a "
                    f"tab. Received: {line!r}."
                )
            pairs.append((columns[0], columns[1]))
    return pairs


def read_wmt(data_dir: str | None, num_pairs: int) -> list[tuple[str, str]]:
    """The first pairs of wmt17_translate/de-en, through tensorflow_datasets."""
    import tensorflow_datasets as tfds

    dataset = tfds.load("wmt17_translate/de-en", split=f"train[:{num_pairs}]", data_dir=data_dir)
    rows = tfds.as_numpy(dataset)
    return [(row["de"].decode("utf-8"), row["en"].decode("utf-8")) for row in rows]


def short(pairs: Sequence[tuple[str, str]], max_words: int) -> list[tuple[str, str]]:
    """Pairs without a sentence of more words; 0 for all pairs."""
    return [
        pair
        for pair in pairs
        if not max_words or max(len(sentence.split()) for sentence in pair) <= max_words
    ]


def split(
    pairs: Sequence[tuple[str, str]], num_held_out: int, num_train: int, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Draws the held-out and the training pairs; what is left is the rest.

    No sentence of a held-out pair, on either side, is one of a training pair.

    Raises:
        ValueError: Too few pairs.
    """
    order = np.random.default_rng(seed).permutation(len(pairs))
    held_out, others = order[:num_held_out], order[num_held_out:]
    seen = [{pairs[position][side] for position in held_out} for side in (0, 1)]
    apart = np.array(
        [all(pairs[position][side] not in seen[side] for side in (0, 1)) for position in others],
        dtype=bool,
    )
    usable = others[apart]
    num_train = num_train or len(usable)
    if len(usable) < num_train or not num_train or len(held_out) < num_held_out:
        raise ValueError(
            f"{num_train} training and {num_held_out} held-out pairs that share no sentence cannot "
            f"be drawn out of {len(pairs)}: {len(usable)} are left for training."
        )
    rest = np.sort(np.concatenate([usable[num_train:], others[~apart]]))
    return {"held_out": np.sort(held_out), "train": np.sort(usable[:num_train]), "rest": rest}


def add_noise(
    references: Sequence[str], kind: str, share: float, seed: int
) -> tuple[list[str], NDArray[np.bool_]]:
    """Makes the references of a share of the pairs wrong.

    Args:
        references: English sentences.
        kind: "permuted": each gets another one's reference (Table 2 of Schioppa et al., 2022).
            "mixed": half of them so; the other half are neighbours that were cut at the wrong
            place, so that words from the end of one reference begin the next, or the other way.
        share: Of the pairs.
        seed: Of the choice.

    Returns:
        The references, and which of them are wrong.
    """
    random = np.random.default_rng(seed)
    given, references = references, list(references)
    chosen = random.permutation(len(references))[: round(share * len(references))]
    if kind == "none" or len(chosen) < 2:
        return references, np.zeros(len(references), bool)
    half = len(chosen) if kind == "permuted" else 2 * (len(chosen) // 4)
    permuted, shifted = chosen[:half], chosen[half:]
    # In a random order each takes the next one's: nobody keeps their own.
    moved = [references[position] for position in np.roll(permuted, -1)]
    for position, reference in zip(permuted, moved, strict=True):
        references[position] = reference
    # In pairs: the last of an odd number stays as it is.
    for first, second in shifted[: len(shifted) // 2 * 2].reshape(-1, 2):
        words = [*references[first].split(), *references[second].split()]
        boundary = len(references[first].split())
        places = [cut for cut in range(1, len(words)) if abs(cut - boundary) >= 2]
        if places:
            cut = random.choice(places)
            references[first], references[second] = " ".join(words[:cut]), " ".join(words[cut:])
        else:
            references[first], references[second] = references[second], references[first]
    # Sentences that occur twice may have been exchanged for themselves.
    is_noisy = [before != after for before, after in zip(given, references, strict=True)]
    return references, np.array(is_noisy, bool)


def train_vocabulary(sentences: Iterator[str], size: int, path: pathlib.Path) -> None:
    """Learns a sentencepiece model of both languages, with the special tokens of the model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        pad_id=translation_model.PAD,
        unk_id=translation_model.UNKNOWN,
        bos_id=translation_model.BEGIN,
        eos_id=translation_model.END,
        # One thread: with more of them the pieces may differ from run to run.
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def load_vocabulary(path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def encode(
    vocabulary: sentencepiece.SentencePieceProcessor, sentences: Sequence[str], max_tokens: int
) -> NDArray[np.int32]:
    """Token ids [N, max_tokens], each sentence with its end, cut and padded."""
    tokens = np.full((len(sentences), max_tokens), translation_model.PAD, np.int32)
    for row, pieces in zip(tokens, vocabulary.encode(list(sentences)), strict=True):
        pieces = [*pieces, translation_model.END][:max_tokens]
        row[: len(pieces)] = pieces
    return tokens


def decode(
    vocabulary: sentencepiece.SentencePieceProcessor, tokens: NDArray[np.int32]
) -> list[str]:
    """Sentences of token ids [N, T], each up to its end."""
    special = {translation_model.PAD, translation_model.BEGIN, translation_model.END}
    return [
        vocabulary.decode([int(token) for token in row if token not in special]) for row in tokens
    ]


class Batches:
    """Some pairs of a corpus, by length: few shapes, and so few compiled programs.

    A pair stands in the shortest bucket that holds both of its sides.

    Args:
        corpus: The pairs.
        ids: Those of its pairs to take.
        buckets: Lengths, rising; the last one is that of the corpus.
        batch_size: Pairs of a batch.

    Attributes:
        ids: The pairs in the order in which `in_order` gives them.
        num_tokens: Theirs, padding left out, of both sides.

    Raises:
        ValueError: No pair.
    """

    def __init__(
        self, corpus: Corpus, ids: NDArray[np.int64], buckets: Sequence[int], batch_size: int
    ):
        if not len(ids):
            raise ValueError("`ids` is empty: there is no pair to make batches of.")
        self._corpus = corpus
        self.batch_size = batch_size
        lengths = np.maximum(corpus.num_source_tokens, corpus.num_target_tokens)[ids]
        self.buckets = np.asarray(buckets)
        bucket = np.searchsorted(self.buckets, lengths)
        self._members = [ids[bucket == number] for number in range(len(buckets))]
        self.ids = np.concatenate(self._members)
        counts = corpus.num_source_tokens[ids] + corpus.num_target_tokens[ids]
        self.num_tokens = int(counts.sum())

    def in_order(self, start: int = 0, stop: int | None = None) -> tf.data.Dataset:
        """Batches of pairs start to stop of `ids`, for scoring: every token weighs 1."""
        first, chosen = 0, []
        for number, members in enumerate(self._members):
            inside = members[max(start - first, 0) : None if stop is None else max(stop - first, 0)]
            first += len(members)
            chosen += [(number, part) for part in self._cut(inside)]
        return _dataset(lambda: (self._batch(*each) for each in chosen))

    def stream(self, seed: int, skipped: int = 0) -> tf.data.Dataset:
        """Endless batches for training, in an order that `seed` decides; `skipped` come no more.

        A token of a pair with n of them weighs T/n at T positions, so that Keras's mean over
        positions is the mean over pairs of the mean over their tokens: the sum whose parts are the
        per-example losses.
        """

        def generate() -> Iterator[tuple]:
            left, epoch = skipped, 0
            while True:
                random = np.random.default_rng((seed, epoch))
                cuts = [
                    (number, part)
                    for number, members in enumerate(self._members)
                    for part in self._cut(random.permutation(members))
                ]
                for place in random.permutation(len(cuts))[left:]:
                    x, y, weights = self._batch(*cuts[place])
                    yield x, y, weights * (weights.shape[1] / weights.sum(1, keepdims=True))
                left = max(left - len(cuts), 0)
                epoch += 1

        return _dataset(generate).prefetch(2)

    def mean(self, of_batch: Callable[[tuple], float]) -> float:
        """The mean over all pairs of what depends on the bucket alone, from a batch of each."""
        total = 0.0
        for number, members in enumerate(self._members):
            if len(members):
                batch = self._batch(number, np.resize(members, self.batch_size))
                total += len(members) * of_batch(batch)
        return total / len(self.ids)

    def _cut(self, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        size = self.batch_size
        return [members[start : start + size] for start in range(0, len(members), size)]

    def _batch(self, number: int, ids: NDArray[np.int64]) -> tuple:
        length = self.buckets[number]
        source, target = self._corpus.sources[ids, :length], self._corpus.targets[ids, :length]
        given = np.concatenate(
            [np.full((len(ids), 1), translation_model.BEGIN, np.int32), target[:, :-1]], axis=1
        )
        weights = (target != translation_model.PAD).astype(np.float32)
        # What follows the last token is read by none that counts.
        given *= weights.astype(np.int32)
        return {"source": source, "target": given}, target, weights


def _dataset(generate) -> tf.data.Dataset:
    tokens, weights = tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None], tf.float32)
    signature = ({"source": tokens, "target": tokens}, tokens, weights)
    return tf.data.Dataset.from_generator(generate, output_signature=signature)
