"""The problems that methods are held against retraining on."""

import numpy as np
import pytest

import cases
import problems


@pytest.mark.parametrize("solver", [problems.SoftmaxRegression, problems.NewtonSoftmaxRegression])
def test_softmax_regression_is_trained_to_its_optimum(solver):
    problem = problems.digits(l2=0.05)._replace(train_fn=solver(0.05))
    x, y = (array[:50] for array in problem.train)
    model = problem._replace(train=(x, y)).trained()
    gradient = cases.dense_gradients(model, cases.cross_entropy, x, y).mean(axis=0)
    weights = np.concatenate([np.reshape(w, -1) for w in model.get_weights()])
    # At the optimum of the mean loss + l2/2 |w|^2 the mean gradient is -l2 w, here in float32.
    np.testing.assert_allclose(gradient, -0.05 * weights, atol=1e-6)
    assert np.abs(weights).max() > 0.1


def test_the_digits_are_those_that_the_figures_name():
    problem = problems.digits(l2=0.05, num_subsets=3)
    assert problem.train[0].shape == (600, 64)
    assert problem.queries[0].shape == (40, 64)
    assert problem.masks.sum(axis=1).tolist() == [300] * 3
    assert problem.make_model().count_params() == 650
