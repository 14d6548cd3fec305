import numpy as np
import pytest

import translation_scoring
from translation_data import Batches, Corpus
from translation_scoring import Task


@pytest.fixture
def batches():
    """Ten pairs of two to three tokens, whose id is their first token less ten."""
    tokens = np.tile(np.arange(10, 20, dtype=np.int32)[:, None], (1, 3))
    tokens[::2, 2] = 0
    return Batches(Corpus(tokens, tokens, np.zeros(10, bool), {}), np.arange(10), [2, 3], 2)


def test_a_pass_goes_on_where_it_was_stopped(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(translation_scoring, "_PART", 4)
    seen = []

    def compute(dataset):
        if len(seen) == 1 and not task_is_second:
            raise KeyboardInterrupt
        seen.append(np.concatenate([y[:, 0] - 10 for _, y, _ in dataset.as_numpy_iterator()]))
        return np.stack([seen[-1], 2 * seen[-1]], axis=1)

    task = Task("found", lambda: (compute, np.array([1.0, 0.5])), lambda batch: batch[1].shape[1])
    task_is_second = False
    with pytest.raises(KeyboardInterrupt):
        translation_scoring.run(task, batches, tmp_path)
    task_is_second = True
    translation_scoring.run(task, batches, tmp_path)
    # The even pairs are the shorter ones. The part that was done is not done again.
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert [part.tolist() for part in seen] == [order[:4], order[4:8], order[8:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.npz"]
    translation_scoring.run(task, batches, tmp_path)
    assert len(seen) == 3

    num_tokens = np.arange(10) + 1
    scores = translation_scoring.scores(tmp_path, (1, 2), num_tokens)
    ids, values = scores["found-2"]
    assert ids.tolist() == order
    # i^2 + .5 (2 i)^2, and the first number's square alone.
    np.testing.assert_allclose(values, 3.0 * np.square(order))
    np.testing.assert_allclose(scores["found-1"][1], np.square(order))
    np.testing.assert_allclose(scores["found-1-tokens"][1], np.square(order) * (np.add(order, 1)))
    cost = translation_scoring.runs.read_json(tmp_path / "found.json")
    # Half of the pairs have two tokens a side, half three.
    assert cost["flops_per_pair"] == 2.5 and cost["num_scored"] == 10
    ratio = cost["tokens_per_second"] / cost["pairs_per_hour"]
    assert ratio == pytest.approx(2 * 25 / 10 / 3600)
    assert cost["peak_bytes"] > 1e6
