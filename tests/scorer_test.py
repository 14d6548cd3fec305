import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from tests import cases


def _scorer(k=3, **kwargs):
    model = cases.image_model()
    train = cases.images(24)
    arnoldi = ki.Arnoldi(model, rank=4, num_iterations=12, complement=None, **kwargs).fit(train)
    return model, train, arnoldi, ki.InfluenceScorer(arnoldi, k=k).index(train)


def test_a_call_returns_the_extremes_of_the_score_matrix():
    _, train, arnoldi, scorer = _scorer()
    queries = cases.images(5, seed=9)
    scores = arnoldi.scores(queries, train)
    top = scorer(queries)
    order = np.argsort(-scores, axis=1)
    np.testing.assert_array_equal(top.proponents.ids, order[:, :3])
    np.testing.assert_array_equal(top.opponents.ids, order[:, :-4:-1])
    for found, ids in ((top.proponents, order[:, :3]), (top.opponents, order[:, :-4:-1])):
        np.testing.assert_allclose(
            found.scores, np.take_along_axis(scores, ids, axis=1), rtol=1e-5, atol=1e-8
        )
        assert found.ids.dtype == tf.int64


def test_it_works_inside_a_function_and_on_any_number_of_queries():
    _, _, _, scorer = _scorer()

    @tf.function
    def call(x, y):
        return scorer((x, y))

    x, y = cases.images(6, seed=9)
    for rows in (1, 5, 6):
        inside, outside = call(x[:rows], y[:rows]), scorer((x[:rows], y[:rows]))
        np.testing.assert_array_equal(inside.proponents.ids, outside.proponents.ids)
        np.testing.assert_allclose(inside.opponents.scores, outside.opponents.scores, rtol=1e-5)
    np.testing.assert_array_equal(scorer((x, y, None)).opponents.ids, outside.opponents.ids)


def test_ties_go_to_the_smaller_id():
    scores = np.float32([[1, 2, 2, -1, -1, 0]])
    top = ki.top_influences(scores, 3)
    np.testing.assert_array_equal(top.proponents.ids, [[1, 2, 0]])
    np.testing.assert_array_equal(top.opponents.ids, [[3, 4, 5]])
    np.testing.assert_array_equal(top.opponents.scores, [[-1, -1, 0]])
    with pytest.raises(ValueError, match=r"between 1 and the number of training examples, 6"):
        ki.top_influences(scores, 7)


def test_self_influence_of_the_index_and_of_other_data():
    _, train, arnoldi, scorer = _scorer()
    np.testing.assert_allclose(scorer.self_influence(), arnoldi.self_influence(train), rtol=1e-6)
    other = cases.images(4, seed=9)
    np.testing.assert_array_equal(scorer.self_influence(other), arnoldi.self_influence(other))


def test_before_index():
    model = cases.image_model()
    arnoldi = ki.Arnoldi(model, 2, 4).fit(cases.images())
    scorer = ki.InfluenceScorer(arnoldi)
    for call in (lambda: scorer(cases.images()), scorer.self_influence):
        with pytest.raises(ValueError, match=r"no index yet: call `scorer.index\(train\)` first"):
            call()
    with pytest.raises(ValueError, match=r"no index to save"):
        scorer.save("nowhere")
    lines = []
    scorer.summary(lines.append)
    assert lines[0] == "InfluenceScorer, k=10: not indexed"


def test_arguments():
    model = cases.image_model()
    with pytest.raises(TypeError, match=r"Received: GradientDot; for it, use top_influences"):
        ki.InfluenceScorer(ki.GradientDot(model))
    arnoldi = ki.Arnoldi(model, 2, 4).fit(cases.images())
    with pytest.raises(ValueError, match=r"`k` must be at least 1. Received: 0"):
        ki.InfluenceScorer(arnoldi, k=0)
    with pytest.raises(ValueError, match=r"k=25 examples cannot be retrieved out of the 24"):
        ki.InfluenceScorer(arnoldi, k=25).index(cases.images(24))


def test_summary():
    *_, scorer = _scorer()
    lines = []
    scorer.summary(lines.append)
    assert lines[0] == "InfluenceScorer, k=3: 24 examples in 4 numbers each, 0.0 MiB"
    assert lines[1] == "Arnoldi of model 'sequential'"


def test_save_and_load(tmp_path):
    model, _, _, scorer = _scorer()
    scorer.save(tmp_path / "scorer")
    loaded = ki.load(tmp_path / "scorer", model)
    queries = cases.images(5, seed=9)
    for name in ("proponents", "opponents"):
        for a, b in zip(
            getattr(scorer(queries), name), getattr(loaded(queries), name), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert loaded.k == 3
    with pytest.raises(FileExistsError, match=r"is not overwritten"):
        scorer.save(tmp_path / "scorer")


def test_changed_weights_are_refused(tmp_path):
    model, train, _, scorer = _scorer()
    scorer.save(tmp_path / "scorer")
    before = scorer(train)
    kept = model.get_weights()
    inside = tf.function(lambda x, y: scorer((x, y)))
    inside(*map(tf.constant, train))
    model.fit(*train, verbose=0)
    with pytest.raises(ValueError, match=r"are not those of the index"):
        scorer(train)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"are not those of the index"):
        inside(*map(tf.constant, train))
    with pytest.raises(ValueError, match=r"are not those"):
        scorer.save(tmp_path / "again")
    with pytest.raises(ValueError, match=r"trained or loaded since"):
        ki.load(tmp_path / "scorer", model)
    model.set_weights(kept)
    np.testing.assert_array_equal(scorer(train).proponents.ids, before.proponents.ids)


def test_an_index_of_another_model_is_refused(tmp_path):
    *_, scorer = _scorer()
    scorer.save(tmp_path / "scorer")
    with pytest.raises(ValueError, match=r"another architecture than"):
        ki.load(tmp_path / "scorer", cases.mlp())


def test_an_index_of_random_projections_knows_its_weights(tmp_path):
    model = cases.image_model()
    train = cases.images(24)
    method = ki.RandomProjection(model, 4, seed=2).fit(train)
    ki.InfluenceScorer(method, k=2).index(train).save(tmp_path / "scorer")
    model.fit(*train, verbose=0)
    with pytest.raises(ValueError, match=r"made with other weights than"):
        ki.load(tmp_path / "scorer", model)


def test_weights_outside_of_the_attributed_ones_count_too():
    model = cases.image_model()
    train = cases.images(24)
    method = ki.Arnoldi(model, 2, 4, variables=model.layers[-1].trainable_variables).fit(train)
    scorer = ki.InfluenceScorer(method, k=2).index(train)
    scorer(train)
    first = model.trainable_variables[0]
    first.assign(first + 0.1)
    with pytest.raises(ValueError, match=r"are not those of the index"):
        scorer(train)


def test_a_query_without_a_finite_loss_is_named():
    _, train, _, scorer = _scorer()
    x, y = train
    with pytest.raises(FloatingPointError, match=r"score of example 4 is not finite.* its label 3"):
        scorer((x, np.where(np.arange(24) == 4, 3, y)))
