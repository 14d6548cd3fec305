import numpy as np

import keras_influence as ki
import pair_memorization
from sentence_pairs import Tokens


def test_pairs_come_out_of_their_padding():
    tokens = Tokens(
        [np.array(ids, np.int32) for ids in ([2, 5, 3, 6, 3], [2, 0, 3, 7, 8, 3], [2, 3, 3])],
        [np.array(ids, np.int32) for ids in ([0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1])],
        np.array([1, 0, 1], np.int32),
    )
    inputs, labels = pair_memorization.padded(tokens, 8)
    assert inputs["token_ids"].shape == (3, 8)
    back = pair_memorization.unpadded(ki.data.read((inputs, labels)))
    for before, after in zip(tokens[:2], back[:2], strict=True):
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(back.labels, [1, 0, 1])


def test_steps_are_those_of_the_buckets_batches():
    recipe = pair_memorization.Recipe(None, 20, 2, 1e-3, (4, 8), 2, 3)
    # Three of the short bucket are two batches, one of the long one is one.
    assert recipe.num_steps(np.array([3, 4, 8, 1])) == 9
