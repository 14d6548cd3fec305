"""Methods that learn from retrainings: outputs are written down here, nothing is trained."""

import itertools

import numpy as np
import pytest

import keras_influence as ki

EVERY_SUBSET = np.array(list(itertools.product([False, True], repeat=3)))


def test_a_datamodel_of_every_subset_is_a_soft_threshold():
    # Centred, the columns of all 8 subsets of 3 are orthogonal with entries +-1/2, so that
    # x'x / 8 = 1/4, and the minimum of |y - xw|^2 / 16 + penalty |w|_1 is true w, 4 penalty nearer
    # to zero.
    true = np.array([[0.5, -0.3, 0.02], [0.0, 0.1, 0.0]])
    outputs = EVERY_SUBSET @ true.T + [1.0, -2.0]
    found = ki.Datamodels(penalty=0.01, jobs=1).fit(
        np.tile(EVERY_SUBSET, (2, 1)), np.tile(outputs, (2, 1))
    )
    np.testing.assert_allclose(found.weights, [[0.46, -0.26, 0], [0, 0.06, 0]], atol=1e-6)
    # Removing an example takes its part of the loss away.
    np.testing.assert_allclose(found.scores(), -found.weights, rtol=1e-6)
    assert found.scores().dtype == np.float32
    # The mean output is predicted exactly.
    np.testing.assert_allclose(found.predict(EVERY_SUBSET).mean(0), outputs.mean(0), rtol=1e-6)


def linear_outputs(num_subsets, noise, seed=0):
    random = np.random.default_rng(seed)
    masks = ki.trainers.random_subsets(40, num_subsets, seed=seed)
    weights = np.zeros((3, 40))
    weights[:, :5] = random.standard_normal((3, 5))
    return masks, masks @ weights.T + noise * random.standard_normal((num_subsets, 3)), weights


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
def test_cross_validation_finds_the_few_that_matter(l1_ratio):
    masks, outputs, weights = linear_outputs(300, noise=0.3)
    found = ki.Datamodels(l1_ratio=l1_ratio).fit(masks[:200], outputs[:200])
    assert np.corrcoef(found.weights.ravel(), weights.ravel())[0, 1] > 0.97
    assert (found.chosen > 0).all()
    predictions = found.predict(masks[200:])
    held_out = ki.evaluation.linear_datamodeling_score(found.scores(), masks[200:], outputs[200:])
    assert held_out.mean > 0.9
    # Sums of scores order the subsets as predictions do.
    assert np.corrcoef(predictions[:, 0], outputs[200:, 0])[0, 1] > 0.8


def test_a_fit_does_not_depend_on_threads_and_constant_outputs_have_no_weights():
    masks, outputs, _ = linear_outputs(60, noise=0.3)
    outputs[:, 1] = 2.0
    one = ki.Datamodels(jobs=1).fit(masks, outputs)
    two = ki.Datamodels(jobs=2).fit(masks, outputs)
    np.testing.assert_array_equal(one.weights, two.weights)
    assert not one.weights[1].any()
    np.testing.assert_allclose(one.predict(masks)[:, 1], 2.0)


def test_memorization_is_a_difference_of_means_with_its_error():
    random = np.random.default_rng(0)
    masks = random.random((30, 6)) < 0.5
    outputs = random.standard_normal((30, 6)) + 5
    outputs[:, 2] -= 3 * masks[:, 2]
    found = ki.Memorization().fit(masks, outputs)
    own = ki.Memorization.of_training(masks, outputs)
    for measured, train in itertools.product(range(6), range(6)):
        without = outputs[~masks[:, train], measured]
        held = outputs[masks[:, train], measured]
        value = without.mean() - held.mean()
        error = np.sqrt(without.var(ddof=1) / len(without) + held.var(ddof=1) / len(held))
        np.testing.assert_allclose(found.scores()[measured, train], value, rtol=1e-5)
        np.testing.assert_allclose(found.standard_errors[measured, train], error, rtol=1e-9)
        if measured == train:
            np.testing.assert_allclose(own.values[train], value, rtol=1e-9)
            np.testing.assert_allclose(own.standard_errors[train], error, rtol=1e-9)
            np.testing.assert_allclose(own.without[train], without.mean(), rtol=1e-9)
    assert own.values.argmax() == 2


def test_a_memorized_example_is_a_proponent_of_itself():
    # Without it the model errs, with it never: every other example makes no difference.
    masks = np.array(list(itertools.product([False, True], repeat=4)))
    errors = (~masks[:, [1]]).astype(float)
    found = ki.Memorization().fit(masks, errors)
    np.testing.assert_allclose(found.scores(), [[0, 1, 0, 0]], atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ki.Datamodels().scores(), "not fitted"),
        (lambda: ki.Memorization().scores(), "not fitted"),
        (lambda: ki.Datamodels(folds=1), "`folds` 2"),
        (lambda: ki.Datamodels(l1_ratio=0), "`l1_ratio`"),
        (lambda: ki.Datamodels().fit(EVERY_SUBSET, np.ones((8, 1))), "10 subsets at least"),
        (lambda: ki.Datamodels().fit(EVERY_SUBSET, np.ones(8)), "must be boolean"),
        (lambda: ki.Datamodels().fit(EVERY_SUBSET, np.ones((7, 1))), "7 and 8"),
        (lambda: ki.Memorization().fit(EVERY_SUBSET, np.full((8, 1), np.nan)), "finite"),
        (lambda: ki.Memorization().fit(EVERY_SUBSET[4:], np.ones((4, 1))), "such as 0, in 4 of 4"),
        (lambda: ki.Memorization.of_training(EVERY_SUBSET, np.ones((8, 2))), "on=.train"),
    ],
)
def test_what_cannot_be_learned(call, message):
    with pytest.raises(ValueError, match=message):
        call()
