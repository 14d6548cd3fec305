"""Predicted against actual: a ridge regression, retrained to convergence without one example."""

import numpy as np

import keras_influence as ki
from tests import cases

L2 = 0.1


def _ridge(x, y):
    """argmin (1/n) sum (x'w - y)^2 + (l2/2) |w|^2, in closed form."""
    return np.linalg.solve(2 * x.T @ x / len(y) + L2 * np.eye(x.shape[1]), 2 * x.T @ y / len(y))


def test_removing_the_top_proponent_raises_the_loss_as_predicted():
    random = np.random.default_rng(0)
    x = random.standard_normal((2000, 6))
    y = x @ random.standard_normal(6) + random.standard_normal(2000)
    queries = (random.standard_normal((8, 6)), random.standard_normal(8))
    model = cases.linear_regression(6)
    weights = _ridge(x, y)
    cases.set_weights(model, weights)
    arnoldi = ki.Arnoldi(model, rank=6, num_iterations=6, damping=0.0, l2=L2).fit((x, y))
    scores = arnoldi.scores(queries, (x, y))
    top = ki.InfluenceScorer(arnoldi, k=1).index((x, y))(queries)
    for q in range(8):
        for kind, sign in ((top.proponents, 1), (top.opponents, -1)):
            i, predicted = int(kind.ids[q, 0]), float(kind.scores[q, 0])
            np.testing.assert_allclose(predicted, sign * (sign * scores[q]).max(), rtol=1e-5)
            kept = np.arange(2000) != i
            # The first-order prediction keeps the mean over n in the objective: removing one of n
            # examples, it is exact up to the example's leverage, under 2% for each of these.
            assert (x[i] @ np.linalg.solve(x.T @ x, x[i])) < 0.02
            without = np.linalg.solve(
                2 * x[kept].T @ x[kept] / 2000 + L2 * np.eye(6), 2 * x[kept].T @ y[kept] / 2000
            )
            losses = [(queries[0][q] @ w - queries[1][q]) ** 2 for w in (without, weights)]
            actual = losses[0] - losses[1]
            assert sign * actual > 0
            np.testing.assert_allclose(predicted, actual, rtol=0.05)


def test_a_duplicate_of_the_query_and_its_contradiction():
    random = np.random.default_rng(1)
    x = random.standard_normal((50, 6))
    y = x @ random.standard_normal(6) + 0.1 * random.standard_normal(50)
    query = (random.standard_normal((1, 6)), np.array([3.0]))
    # Row 0 agrees with the query; row 1 says the opposite about the same input.
    x[:2], y[0], y[1] = query[0], 3.0, -3.0
    model = cases.linear_regression(6)
    weights = _ridge(x, y)
    cases.set_weights(model, weights)
    arnoldi = ki.Arnoldi(model, rank=6, num_iterations=6, damping=0.0, l2=L2).fit((x, y))
    top = ki.InfluenceScorer(arnoldi, k=1).index((x, y))(query)
    assert int(top.proponents.ids[0, 0]) == 0
    assert int(top.opponents.ids[0, 0]) == 1
