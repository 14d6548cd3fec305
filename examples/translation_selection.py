"""Which pairs of the translation example to train on: the best by a score, and by rivals to it."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import translation_scoring
from translation_data import Corpus


class Choice(NamedTuple):
    """Some training pairs.

    Attributes:
        method: What chose them.
        share: Of the training pairs.
        ids: Positions in the corpus.
    """

    method: str
    share: float
    ids: NDArray[np.int64]

    @property
    def name(self) -> str:
        return self.method if self.share == 1 else f"{self.method}-{self.share:g}"

    def record(self, corpus: Corpus) -> dict[str, Any]:
        """For the results: what was chosen, and how much of it is wrong."""
        return {
            "method": self.method,
            "share": self.share,
            "num_pairs": len(self.ids),
            "noisy_share": float(corpus.is_noisy[self.ids].mean()),
        }


def choices(
    corpus: Corpus,
    scores: pathlib.Path,
    ranks: tuple[int, ...],
    methods: Sequence[str],
    shares: Sequence[float],
    seed: int,
) -> Iterator[Choice]:
    """All training pairs, and then the best of them by each method.

    Args:
        corpus: The pairs.
        scores: Directory of the scores of the training pairs.
        ranks: That were scored by.
        methods: Names of scores; "random"; "length_ratio", the rule of thumb that drops pairs whose
            lengths match least.
        shares: To keep.
        seed: Of the random choice.

    Raises:
        ValueError: A method that there is no score of, or not of all pairs.
    """
    train = corpus.splits["train"]
    found = translation_scoring.scores(scores, ranks, corpus.num_target_tokens)
    suspicion = {name: values[np.isin(ids, train)] for name, (ids, values) in found.items()}
    ordered = {name: ids[np.isin(ids, train)] for name, (ids, _) in found.items()}
    random = np.random.default_rng(seed)
    suspicion["random"], ordered["random"] = random.permutation(len(train)), train
    suspicion["length_ratio"], ordered["length_ratio"] = length_mismatch(corpus, train), train
    yield Choice("none", 1.0, train)
    for method in methods:
        if method not in suspicion:
            raise ValueError(f"There is no score {method!r} to choose by, but {sorted(suspicion)}.")
        if len(ordered[method]) < len(train):
            raise ValueError(
                f"{method!r} has scores of {len(ordered[method])} of {len(train)} training pairs; "
                "to choose by it takes all of them. Score with --num_scored=0."
            )
        best = ordered[method][np.argsort(suspicion[method], kind="stable")]
        for share in shares:
            count = max(round(share * len(train)), 1)
            yield Choice(method, share, np.sort(best[:count]))


def length_mismatch(corpus: Corpus, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far the ratio of a pair's lengths is from the usual one, in logarithms."""
    ratio = np.log(corpus.num_target_tokens[ids] / corpus.num_source_tokens[ids])
    return np.abs(ratio - np.median(ratio))
