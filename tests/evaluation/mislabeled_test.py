import numpy as np
import pytest
from sklearn import metrics

from keras_influence.evaluation import (
    mislabel_retrieval,
    mislabel_retrieval_interval,
    mislabeled,
)


def test_values_by_hand():
    # Checked in the order + - + - -: of the 2 x 3 pairs (mislabeled, correct), the first mislabeled
    # example beats 3 and the second beats 2, so AUC = 5/6. Precision is 1/1 at the first and 2/3 at
    # the second, so AP = (1 + 2/3) / 2 = 5/6.
    result = mislabel_retrieval([5.0, 4.0, 3.0, 2.0, 1.0], [1, 0, 1, 0, 0], fractions=(0.2, 0.6, 1))
    assert result.auc == pytest.approx(5 / 6)
    assert result.average_precision == pytest.approx(5 / 6)
    assert result.recall == {0.2: 0.5, 0.6: 1.0, 1.0: 1.0}
    np.testing.assert_allclose(result.checked, [0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(result.found, [0, 0.5, 0.5, 1, 1, 1])
    assert (result.num_examples, result.num_mislabeled) == (5, 2)


def test_order_of_the_examples_does_not_matter():
    scores = np.array([1.0, 5.0, 2.0, 4.0, 3.0])
    result = mislabel_retrieval(scores, np.array([False, True, False, False, True]))
    assert result.auc == pytest.approx(5 / 6)
    assert result.found[1] == 0.5


def test_fraction_between_two_examples_is_interpolated():
    # A tenth of 5 examples is half an example: the first, mislabeled, is found with weight 1/2.
    result = mislabel_retrieval([5.0, 4.0, 3.0, 2.0, 1.0], [1, 0, 1, 0, 0], fractions=(0.1,))
    assert result.recall[0.1] == pytest.approx(0.25)


@pytest.mark.parametrize("labels", [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]])
def test_ties_are_chance_wherever_the_mislabeled_example_stands(labels):
    # One score for all: AUC 1/2, AP the share 1/4, and after k of 4 checks 1 of 1 is found with
    # probability k/4.
    result = mislabel_retrieval(np.zeros(4), labels, fractions=(0.5,))
    assert result.auc == 0.5
    assert result.average_precision == 0.25
    np.testing.assert_allclose(result.found, [0, 0.25, 0.5, 0.75, 1])
    assert result.recall[0.5] == 0.5


@pytest.mark.parametrize("labels", [[1, 1, 0, 0, 0], [1, 0, 0, 1, 0]])
def test_ties_within_a_block(labels):
    # The first example is found for certain; the block of the next three holds one mislabeled
    # example, found after 1, 2, 3 of its checks with probability 1/3, 2/3, 1.
    # AUC: (3 + (1 + 1/2 + 1/2)) / 6 = 5/6. AP: 1/2 x 1/1 + 1/2 x 2/4 = 3/4.
    result = mislabel_retrieval([9.0, 7.0, 7.0, 7.0, 1.0], labels)
    np.testing.assert_allclose(result.found, [0, 1 / 2, 2 / 3, 5 / 6, 1, 1])
    assert result.auc == pytest.approx(5 / 6)
    assert result.average_precision == pytest.approx(3 / 4)


def test_curve_is_the_mean_over_random_tie_orders():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 4, 40), rng.random(40) < 0.3
    orders = [np.lexsort((rng.random(40), -scores)) for _ in range(4000)]
    mean = np.mean([np.cumsum(labels[order]) for order in orders], axis=0) / labels.sum()
    # 4,000 orders: the standard error of each mean is below .5 / sqrt(4000) = .008.
    np.testing.assert_allclose(mislabel_retrieval(scores, labels).found[1:], mean, atol=0.03)


def test_scores_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match=r"2 that are not, at positions \[1, 3\]"):
        mislabel_retrieval([0.0, np.nan, 1.0, np.inf], [0, 1, 0, 1])


def test_many_scores_that_are_not_finite_are_shortened():
    with pytest.raises(ValueError, match=r"12 that are not, .* 9\] \.\.\."):
        mislabel_retrieval(np.full(12, np.nan), np.arange(12) % 2)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 0, 0], r"shapes \(2,\) and \(3,\)"),
        (np.zeros((2, 2)), np.zeros((2, 2)), r"shape \[N\]"),
        ([1.0, 2.0, 3.0], [0, 1, 2], r"boolean, or 0 and 1. Received: values \[0, 1, 2\]"),
        ([1.0, 2.0], [0, 0], "0 mislabeled of 2"),
        ([1.0, 2.0], [True, True], "2 mislabeled of 2"),
    ],
)
def test_bad_input(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        mislabel_retrieval(scores, labels)


def test_fraction_out_of_range():
    with pytest.raises(ValueError, match=r"between 0 and 1. Received: \[5\]"):
        mislabel_retrieval([1.0, 2.0], [1, 0], fractions=(0.1, 5))


def test_metrics_of_counts_equal_those_of_scikit_learn():
    # Distinct scores 3 > 2 > 1 with (mislabeled, correct) counts (2, 1), (0, 3), (1, 4).
    scores = np.repeat([3, 3, 2, 1, 1], [2, 1, 3, 1, 4])
    labels = np.repeat([1, 0, 0, 1, 0], [2, 1, 3, 1, 4])
    auc, precision = mislabeled._metrics_of_counts(np.array([2, 0, 1]), np.array([1, 3, 4]))
    assert auc == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert precision == pytest.approx(metrics.average_precision_score(labels, scores))


def test_interval_by_hand():
    # Two mislabeled scores, 0 and 2, around one correct score, 1, which every resample keeps: the
    # resampled AUC is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4, so its 60% interval, between the
    # quantiles .2 and .8, is [0, 1], and its 40% interval, between .3 and .7, is [1/2, 1/2].
    scores, labels = [0.0, 2.0, 1.0], [1, 1, 0]
    wide = mislabel_retrieval_interval(scores, labels, num_resamples=4000, level=0.6)
    narrow = mislabel_retrieval_interval(scores, labels, num_resamples=4000, level=0.4)
    assert wide.auc == (0.0, 1.0)
    assert narrow.auc == (0.5, 0.5)
    # AP by the order of the draw: (2, 2) 1; (2, 0) 1/2 x 1 + 1/2 x 2/3 = 5/6; (0, 0) 2/3.
    assert wide.average_precision == pytest.approx((2 / 3, 1.0))
    assert narrow.average_precision == pytest.approx((5 / 6, 5 / 6))


def test_interval_is_seeded_and_holds_the_value():
    rng = np.random.default_rng(1)
    labels = np.arange(200) < 40
    scores = rng.normal(size=200) + labels
    first = mislabel_retrieval_interval(scores, labels, num_resamples=200, seed=3)
    assert first == mislabel_retrieval_interval(scores, labels, num_resamples=200, seed=3)
    assert first != mislabel_retrieval_interval(scores, labels, num_resamples=200, seed=4)
    value = mislabel_retrieval(scores, labels)
    assert first.auc[0] < value.auc < first.auc[1]
    assert first.average_precision[0] < value.average_precision < first.average_precision[1]
    assert (first.level, first.num_resamples) == (0.95, 200)


@pytest.mark.parametrize("setting", [{"num_resamples": 0}, {"level": 1.0}, {"level": 95}])
def test_interval_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` must"):
        mislabel_retrieval_interval([1.0, 2.0], [1, 0], **setting)
