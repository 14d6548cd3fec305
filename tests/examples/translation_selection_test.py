import numpy as np
import pytest

import translation_scoring
import translation_selection
from translation_data import Corpus


@pytest.fixture
def corpus():
    """20 training pairs and two others; pair i has i + 1 target tokens to four of the source."""
    tokens = np.ones((22, 22), np.int32)
    targets = np.tril(tokens)
    sources = tokens * (np.arange(22) < 4)
    is_noisy = np.arange(22) < 2
    return Corpus(sources, targets, is_noisy, {"train": np.arange(20), "rest": np.arange(20, 22)})


def test_the_best_are_kept(corpus, tmp_path, monkeypatch):
    ids = np.arange(21, -1, -1)
    monkeypatch.setattr(
        translation_scoring, "scores", lambda *_: {"found-20": (ids, 100.0 - np.arange(22))}
    )
    methods = ["found-20", "random", "length_ratio"]
    choices = list(
        translation_selection.choices(corpus, tmp_path, (20,), methods, [0.01, 0.25], seed=0)
    )
    named = {choice.name: choice for choice in choices}
    assert list(named)[:3] == ["none", "found-20-0.01", "found-20-0.25"]
    assert named["none"].ids.tolist() == list(range(20))
    assert named["none"].record(corpus)["noisy_share"] == 0.1
    # Pair 0 has the lowest score, then 1; the two that are not of training count as none.
    assert named["found-20-0.01"].ids.tolist() == [0]
    assert named["found-20-0.25"].ids.tolist() == [0, 1, 2, 3, 4]
    assert named["found-20-0.25"].record(corpus)["noisy_share"] == 0.4
    assert len(set(named["random-0.25"].ids.tolist())) == 5
    # The median of (i + 1)/4 is 10.5/4: those of 9 to 12 tokens, and of 13 before those of 8.
    assert named["length_ratio-0.25"].ids.tolist() == [8, 9, 10, 11, 12]


def test_a_score_that_is_not_there(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(translation_scoring, "scores", lambda *_: {})
    with pytest.raises(ValueError, match="no score 'tracin' to choose by"):
        list(translation_selection.choices(corpus, tmp_path, (20,), ["tracin"], [0.5], seed=0))


def test_a_score_of_some_pairs(corpus, tmp_path, monkeypatch):
    some = {"tracin": (np.arange(5), np.arange(5.0))}
    monkeypatch.setattr(translation_scoring, "scores", lambda *_: some)
    with pytest.raises(ValueError, match="scores of 5 of 20 training pairs"):
        list(translation_selection.choices(corpus, tmp_path, (20,), ["tracin"], [0.5], seed=0))
