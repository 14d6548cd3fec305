import numpy as np
import pytest
from scipy import stats

from keras_influence.evaluation import linear_datamodeling_score, predicted_outputs

SCORES = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]])
MASKS = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], bool)
OUTPUTS = np.array([[0.3, 0.3], [0.4, 0.4], [0.5, 0.3]])


def test_by_hand():
    # Plain sums of query 0: .3, .4, .5, in the order of the outputs. Of query 1: .3, .5, .4 with
    # ranks 1, 3, 2; its outputs .3, .4, .3 have ranks 1.5, 3, 1.5. Around their mean 2: (-1, 1, 0)
    # and (-.5, 1, -.5), so 1.5 / sqrt(2 * 1.5) = .8660254.
    found = linear_datamodeling_score(SCORES, MASKS, OUTPUTS, attribution="additive")
    np.testing.assert_allclose(found.per_query, [1, 0.8660254], rtol=1e-7)
    np.testing.assert_allclose(found.mean, 0.9330127, rtol=1e-7)
    assert found.num_subsets == 3


def test_an_influence_predicts_the_loss_by_minus_its_sum():
    np.testing.assert_allclose(
        predicted_outputs(SCORES, MASKS), [[-0.3, -0.3], [-0.4, -0.5], [-0.5, -0.4]]
    )
    found = linear_datamodeling_score(SCORES, MASKS, -OUTPUTS)
    np.testing.assert_allclose(found.per_query, [1, 0.8660254], rtol=1e-7)


def test_it_is_scipys_spearman_for_every_query():
    random = np.random.default_rng(0)
    scores, masks = random.standard_normal((6, 30)), random.random((50, 30)) < 0.5
    outputs = np.round(-(masks @ scores.T) + random.standard_normal((50, 6)), 1)  # With ties.
    found = linear_datamodeling_score(scores, masks, outputs)
    predictions = -(masks @ scores.T)
    expected = [stats.spearmanr(predictions[:, q], outputs[:, q]).statistic for q in range(6)]
    np.testing.assert_allclose(found.per_query, expected, rtol=1e-9)
    for low, high in (found.query_interval, found.subset_interval):
        assert low < found.mean < high


def test_constant_columns_have_no_correlation_and_are_counted():
    # Every subset holds examples 0 and 1, in sums that rounding may order; query 2 never changes.
    masks = np.array([[1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    scores = np.array([[0.1, 0.2, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4], [0.3, 0.1, 0.3, 0.4]])
    outputs = np.array([[0.1, -0.4, 1.0], [0.2, -0.3, 1.0], [0.3, -0.7, 1.0]])
    found = linear_datamodeling_score(scores, masks, outputs)
    assert (found.constant_predictions, found.constant_outputs) == (1, 1)
    np.testing.assert_array_equal(np.isnan(found.per_query), [True, False, True])
    np.testing.assert_allclose(found.mean, found.per_query[1])
    with pytest.raises(ValueError, match="no order to compare"):
        linear_datamodeling_score(scores, masks, np.ones((3, 3)))


def test_losses_of_any_size_have_the_same_score():
    random = np.random.default_rng(0)
    scores, masks = random.standard_normal((2, 9)), random.random((20, 9)) < 0.5
    outputs = -(masks @ scores.T) + random.standard_normal((20, 2))
    expected = linear_datamodeling_score(scores, masks, outputs).per_query
    for scale in (1e-200, 1e200):
        found = linear_datamodeling_score(scores * scale, masks, outputs * scale).per_query
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": SCORES[:, :3]}, "3 and 4 examples"),
        ({"scores": SCORES[:1]}, "Shapes must be"),
        ({"scores": SCORES * np.nan}, r"`scores` must be finite. Received: nan at \[0, 0\]"),
        ({"outputs": OUTPUTS * np.inf}, "`outputs` must be finite"),
        ({"masks": MASKS * 2}, "boolean, or 0 and 1"),
        ({"masks": MASKS[:1], "outputs": OUTPUTS[:1]}, "1 subsets"),
        ({"attribution": "loss"}, "'loss'"),
        ({"level": 1.0}, "`level`"),
    ],
)
def test_what_has_no_score(change, message):
    with pytest.raises(ValueError, match=message):
        linear_datamodeling_score(
            **{"scores": SCORES, "masks": MASKS, "outputs": OUTPUTS, **change}
        )
