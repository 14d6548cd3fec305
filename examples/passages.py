"""Plain text as passages of a few tokens, and questions about them."""

import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from sentence_pairs import open_text

PADDING, START = "<pad>", "<s>"
SEPARATOR = " => "
# Of WikiText: the line that begins an article, and those that begin its parts.
_TITLE = re.compile(r"= ([^=].*) =")
_HEADING = re.compile(r"= .* =")
_FEWEST = 16
_HELD_OUT_SHARE = 0.05


class Paragraph(NamedTuple):
    """A line of text, and the article (or the file) that it is from."""

    text: str
    source: str


class Passages(NamedTuple):
    """Stretches of text, as a causal language model reads them.

    Attributes:
        inputs: Token ids, a start token first: `[N, length]`, padded at the end.
        labels: The tokens that come next, `[N, length]`.
        weights: 1 for each label that counts, 0 for the others, `[N, length]`.
        sources: Where each is from.
    """

    inputs: NDArray[np.int32]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32]
    sources: list[str]

    @property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """As `model.fit` and the methods take them."""
        return self.inputs, self.labels, self.weights

    @property
    def num_tokens(self) -> int:
        return int(self.weights.sum())

    def take(self, rows: NDArray[np.int64]) -> "Passages":
        arrays = (array[rows] for array in self.arrays)
        return Passages(*arrays, [self.sources[row] for row in rows])


def read(paths: Sequence[str]) -> list[Paragraph]:
    """The lines of some text files that are not blank, without WikiText's headings.

    Raises:
        ValueError: There is none.
    """
    found = []
    for path in paths:
        source = pathlib.Path(path).name
        for line in open_text(path):
            line = line.strip()
            if title := _TITLE.fullmatch(line):
                source = title[1]
            elif line and not _HEADING.fullmatch(line):
                found.append(Paragraph(line, source))
    if not found:
        raise ValueError(f"Expected lines of text in {', '.join(paths)}. Received none.")
    return found


def vocabulary(
    paragraphs: Sequence[Paragraph], num_pieces: int, path: pathlib.Path
) -> tokenizers.Tokenizer:
    """The byte-pair vocabulary at `path`, learnt from the paragraphs if it is not there yet."""
    if not path.exists():
        learnt = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
        learnt.train_from_iterator(
            [paragraph.text for paragraph in paragraphs],
            vocab_size=num_pieces,
            show_progress=False,
            special_tokens=[PADDING, START],
        )
        unfinished = path.with_name(path.name + ".unfinished")
        learnt.save(os.fspath(unfinished))
        os.replace(unfinished, path)
    return tokenizers.Tokenizer.from_file(os.fspath(path))


def cut(paragraphs: Sequence[Paragraph], tokenizer: tokenizers.Tokenizer, length: int) -> Passages:
    """Each paragraph in stretches of `length` tokens; what is left of it under 16 is dropped.

    Raises:
        ValueError: Nothing is left.
    """
    encoded = tokenizer.encode_batch([paragraph.text for paragraph in paragraphs])
    rows, sources = [], []
    for paragraph, each in zip(paragraphs, encoded, strict=True):
        for stretch in _stretches(each.ids, length):
            rows.append(([], stretch))
            sources.append(paragraph.source)
    if not rows:
        raise ValueError(
            f"Expected a line of {min(_FEWEST, length)} tokens or more. Received {len(paragraphs)} "
            "lines, all shorter."
        )
    return _laid_out(rows, sources, tokenizer, length)


def _stretches(ids: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), length):
        stretch = ids[start : start + length]
        if len(stretch) >= min(_FEWEST, length):
            yield stretch


def split(passages: Passages, num_train: int, seed: int) -> tuple[Passages, Passages]:
    """Holds out a twentieth: (the first `num_train` of the others, or 0 for all; those held out).

    Raises:
        ValueError: There are fewer than two passages.
    """
    count = len(passages.sources)
    if count < 2:
        raise ValueError(f"One passage is held out, so that two are needed. Received: {count}.")
    order = np.random.default_rng(seed).permutation(count)
    held_out, kept = np.split(order, [max(round(_HELD_OUT_SHARE * count), 1)])
    return passages.take(np.sort(kept)[: num_train or None]), passages.take(held_out)


def questions(texts: Sequence[str], tokenizer: tokenizers.Tokenizer, length: int) -> Passages:
    """`prompt => continuation`, each: of its tokens those of the continuation count.

    Raises:
        ValueError: There is no ` => ` between two texts, or the whole is too long.
    """
    rows = []
    for text in texts:
        prompt, separator, continuation = text.partition(SEPARATOR)
        parts = [tokenizer.encode(part).ids for part in (prompt, f" {continuation}")]
        if not separator or not prompt or not continuation:
            raise ValueError(
                f"A query is a prompt, {SEPARATOR!r} and a continuation. Received: {text!r}."
            )
        if sum(map(len, parts)) > length:
            raise ValueError(
                f"A query may have {length} tokens, as many as a passage. Received "
                f"{sum(map(len, parts))} of {text!r}."
            )
        rows.append((parts[0], parts[1]))
    return _laid_out(rows, ["a query"] * len(rows), tokenizer, length)


def halves(passages: Passages) -> Passages:
    """Passages as questions: their first halves prompt, and the other tokens count."""
    counted = np.cumsum(passages.weights, axis=1)
    second = counted > counted[:, -1:] / 2
    return passages._replace(weights=passages.weights * second)


def _laid_out(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    sources: list[str],
    tokenizer: tokenizers.Tokenizer,
    length: int,
) -> Passages:
    """Of (tokens that do not count, tokens that do)."""
    padding, start = tokenizer.token_to_id(PADDING), tokenizer.token_to_id(START)
    inputs = np.full((len(rows), length), padding, np.int32)
    labels, weights = inputs.copy(), np.zeros(inputs.shape, np.float32)
    for row, (before, counted) in enumerate(rows):
        ids = [*before, *counted]
        inputs[row, : len(ids)] = [start, *ids[:-1]]
        labels[row, : len(ids)] = ids
        weights[row, len(before) : len(ids)] = 1
    return Passages(inputs, labels, weights, sources)


def text(passages: Passages, row: int, tokenizer: tokenizers.Tokenizer) -> tuple[str, str]:
    """What does not count of a passage, and what does."""
    padding = tokenizer.token_to_id(PADDING)
    there, counts = passages.labels[row] != padding, passages.weights[row] > 0
    labels = passages.labels[row]
    before, counted = (
        tokenizer.decode(labels[which].tolist()) for which in (there & ~counts, counts)
    )
    return before, counted
