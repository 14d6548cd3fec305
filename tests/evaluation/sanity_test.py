import numpy as np
import pytest

from keras_influence.evaluation import class_agreement, duplicate_query, randomized_weights

SCORES = np.array([[0.1, 0.5, 0.2, 0.4], [0.3, 0.3, 0.1, 0.2]])


def test_scores_that_random_weights_give_as_well():
    same = randomized_weights(SCORES, SCORES * 3 + 1)
    np.testing.assert_allclose(same.per_query, 1)
    # Query 0: ranks 1, 4, 2, 3 against 4, 1, 3, 2. Query 1 has none on the right.
    other = randomized_weights(SCORES, [[0.9, 0.1, 0.8, 0.2], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(other.per_query, [-1, np.nan])
    assert other.mean == -1


def test_where_the_copy_of_a_query_ranks():
    # 0.4 has one above it; 0.3 shares the first two places.
    found = duplicate_query(SCORES, [3, 0])
    np.testing.assert_allclose(found.ranks, [1, 0.5])
    assert found.first == 0.5


def test_the_class_of_the_top_examples():
    # Query 0: examples 1 and 3, of classes 1 and 0. Query 1: examples 0 and 1.
    found = class_agreement(SCORES, [1, 0], [0, 1, 2, 0], k=2)
    np.testing.assert_allclose(found.same_class, [0.5, 0.5])
    assert found.mean == 0.5
    # One of four examples is of class 1, two of class 0.
    np.testing.assert_allclose(found.chance, 3 / 8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: randomized_weights(SCORES, SCORES[:1]),
        lambda: duplicate_query(SCORES, [0]),
        lambda: class_agreement(SCORES, [0, 1], [0, 1, 2, 0], k=5),
    ],
)
def test_shapes_that_do_not_match(call):
    with pytest.raises(ValueError, match=r"\[queries, N\]"):
        call()
