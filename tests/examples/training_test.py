import types

import keras
import numpy as np
import pytest

import training


@pytest.fixture(scope="module")
def trained(two_halves, tmp_path_factory):
    return training.train(
        two_halves,
        "mlp",
        tmp_path_factory.mktemp("run"),
        epochs=4,
        batch_size=8,
        learning_rate=0.02,
        seed=1,
    )


def test_training_learns_and_records_every_epoch(trained):
    assert trained.train_accuracy == 1 and trained.test_accuracy == 1
    # 40 examples in batches of 8 make 5 steps an epoch.
    assert [checkpoint.step for checkpoint in trained.checkpoints] == [5, 10, 15, 20]
    rates = [checkpoint.learning_rate for checkpoint in trained.checkpoints]
    assert rates == pytest.approx([0.02] * 4)
    assert trained.checkpoint_report.count == 4
    assert trained.train_seconds > 0


def test_training_is_seeded(two_halves, tmp_path):
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": 0.02}
    weights = [
        training.train(
            two_halves, "mlp", tmp_path / name, seed=seed, **settings
        ).model.get_weights()
        for name, seed in [("first", 1), ("same", 1), ("other", 2)]
    ]
    for first, same in zip(weights[0], weights[1], strict=True):
        np.testing.assert_array_equal(first, same)
    assert (weights[0][0] != weights[2][0]).any()


def test_example_losses_by_hand():
    # One weight turns the pixel 1 into the logits (2, 0): the losses of the classes are
    # log(1 + e^-2) = .126928 and log(1 + e^2) = 2.126928.
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, use_bias=False)])
    model.set_weights([np.array([[2.0, 0.0]])])
    losses = training.example_losses(model, np.ones((2, 1), np.float32), np.array([0, 1]))
    np.testing.assert_allclose(losses, [0.126928, 2.126928], atol=1e-5)


def test_predicted_labels(trained, two_halves):

    predicted = training.predict_labels(trained.model, two_halves.test_images)
    np.testing.assert_array_equal(predicted, two_halves.test_labels)


@pytest.mark.parametrize(
    ("number", "expected"),
    # Wrong are 2, 3 and 5. At most half of the number, rounded up, come from these.
    [(1, [2]), (2, [2, 0]), (4, [2, 3, 0, 1]), (6, [2, 3, 5, 0, 1, 4]), (99, [2, 3, 5, 0, 1, 4])],
)
def test_choice_of_queries(number, expected):
    labels = np.array([0, 1, 0, 1, 0, 1])
    predicted = np.array([0, 1, 1, 0, 0, 0])
    chosen = training.choose_queries(predicted, labels, number)
    assert chosen.tolist() == expected


@pytest.mark.parametrize(
    ("count", "epochs"),
    # Of ten: the last; every fifth; every 10/3, rounded; all.
    [(1, [10]), (2, [5, 10]), (3, [3, 7, 10]), (10, list(range(1, 11)))],
)
def test_evenly_spaced(count, epochs):
    checkpoints = [types.SimpleNamespace(epoch=epoch) for epoch in range(1, 11)]
    chosen = training.evenly_spaced(checkpoints, count)
    assert [checkpoint.epoch for checkpoint in chosen] == epochs


@pytest.mark.parametrize("count", [0, 3])
def test_evenly_spaced_needs_as_many(count):
    with pytest.raises(ValueError, match=f"between 1 and 2.* Received: {count}"):
        training.evenly_spaced([None, None], count)
