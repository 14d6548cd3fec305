"""Retraining stands for a table of values here: each query's loss is minus what it has left."""

import numpy as np
import pytest

from keras_influence.evaluation import (
    brittleness,
    counterfactual,
    leave_one_out,
    removal_curve,
    tail_patch,
)

# Query 0 lives on examples 1 and 3, query 1 on 0.
WORTH = np.array([[0.0, 2.0, 1.0, 4.0, -1.0], [3.0, 0.0, 0.5, 0.0, 0.0]])


def retrain(masks):
    return -(masks @ WORTH.T)


def test_a_counterfactual_that_comes_true():
    found = counterfactual(WORTH, 2, retrain)
    np.testing.assert_array_equal(found.removed, [[3, 1], [0, 2]])
    np.testing.assert_allclose(found.predicted, [6, 3.5])
    np.testing.assert_allclose(found.actual, [6, 3.5])
    np.testing.assert_allclose([found.pearson, found.spearman], 1)
    wrong = counterfactual(-WORTH, 1, retrain)
    np.testing.assert_allclose(wrong.predicted, [1, 0])
    np.testing.assert_allclose(wrong.actual, [-1, 0])
    assert np.isnan(counterfactual(WORTH[:1], 1, lambda masks: retrain(masks)[:, :1]).pearson)


def test_brittleness_counts_what_must_go():
    calls = []

    def margins(masks):
        calls.append(len(masks))
        return masks @ WORTH.T - np.array([1.5, 3.2])

    # Query 0 has 6 of 1.5, loses 4 (2 left), then 2 (0 left): wrong at 2. Query 1 has 3.5 of 3.2,
    # and is wrong at 1.
    found = brittleness(WORTH, [3, 2, 1], margins)
    np.testing.assert_array_equal(found.smallest, [2, 1])
    np.testing.assert_allclose(found.flipped, [0.5, 1, 1])
    assert found.counts == (1, 2, 3)
    assert calls == [1, 2, 1]  # Nothing removed; both queries; the one that is left.
    never = brittleness(WORTH, [1], lambda masks: np.ones((len(masks), 2)))
    np.testing.assert_array_equal(never.smallest, [-1, -1])
    with pytest.raises(ValueError, match="1 queries are wrong with nothing removed, such as 1"):
        brittleness(WORTH, [1], lambda masks: masks @ WORTH.T - np.array([1, 9]))


def test_a_removal_curve_rises_where_the_scores_are_right():
    found = removal_curve(WORTH, [0.2, 0.4], retrain, num_random=2)
    # Means over the two queries, by falling mean score: 3, then 1 (1.5 and 2 before halving).
    np.testing.assert_allclose(found.fractions, [0, 0.2, 0.4])
    np.testing.assert_allclose(found.by_score, np.array([-9.5, -5.5, -2.5]) / 2)
    assert found.at_random[0] == found.by_score[0]
    random = np.random.default_rng(0)
    orders = [random.permutation(5) for _ in range(2)]
    losses = [-(WORTH.sum() - WORTH[:, order[:1]].sum()) / 2 for order in orders]
    np.testing.assert_allclose(found.at_random[1], np.mean(losses))
    # The area of the piecewise line between the two, over the removed share .4.
    gaps = found.by_score - found.at_random
    np.testing.assert_allclose(found.area, (0.1 * (gaps[0] + 2 * gaps[1] + gaps[2])) / 0.4)


def test_leave_one_out_against_the_mean_of_the_controls():
    # Two controls around (1, 2). Query 0 is predicted to change by half of what it does, query 1
    # not at all.
    actual = np.array([[0.2, 0.1], [0.4, -0.1], [-0.2, 0.3]])
    outputs = np.concatenate([[[0.9, 2.0], [1.1, 2.0]], np.array([1.0, 2.0]) + actual])
    found = leave_one_out([[0.1, 0.2, -0.1], [0.0, 0.0, 0.0]], outputs, controls=2)
    np.testing.assert_allclose(found.actual, actual)
    np.testing.assert_allclose(found.pearson, [1, np.nan])
    np.testing.assert_allclose(found.spearman, [1, np.nan])
    np.testing.assert_allclose(found.slope, [2, np.nan])
    np.testing.assert_allclose(found.noise, [0.1 * 2**0.5, 0], atol=1e-12)
    np.testing.assert_allclose(found.signal_to_noise[0], actual[:, 0].std() / (0.1 * 2**0.5))
    assert found.signal_to_noise[1] == np.inf
    assert np.isnan(leave_one_out([[0.1]], [[1.0], [2.0]]).noise[0])


def test_a_tail_patch_against_examples_at_random():
    losses = np.array([7.0, 5.0])
    found = tail_patch(WORTH, 2, lambda ids: losses - WORTH[:, ids].sum(axis=1))
    np.testing.assert_allclose(found.by_score, [6, 3.5])
    random = np.random.default_rng(0)
    drawn = [WORTH[query, random.choice(5, 2, replace=False)].sum() for query in range(2)]
    np.testing.assert_allclose(found.at_random, drawn)
    np.testing.assert_allclose(found.gain, 4.75 - np.mean(drawn))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: counterfactual(WORTH, 5, retrain), "from 1 to 4. Received: \\[5\\]"),
        (lambda: counterfactual(WORTH * np.nan, 1, retrain), "must be finite"),
        (lambda: counterfactual(WORTH, 1, lambda masks: masks), "must give \\[subsets, queries\\]"),
        (lambda: counterfactual(WORTH, 1, lambda m: retrain(m) * np.nan), "finite outputs"),
        (lambda: removal_curve(WORTH, [0.01], retrain), "from 1 to 4"),
        (lambda: leave_one_out(WORTH, np.ones((5, 2))), "one control at least"),
        (lambda: leave_one_out([[np.nan]], np.ones((2, 1))), "finite"),
        (lambda: tail_patch(WORTH, 0, retrain), "k=0"),
    ],
)
def test_what_cannot_be_measured(call, message):
    with pytest.raises(ValueError, match=message):
        call()
