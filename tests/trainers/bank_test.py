import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_influence import data, storage
from keras_influence.trainers import (
    RetrainingBank,
    StoredBank,
    leave_fold_out,
    leave_group_out,
    leave_one_out,
    random_subsets,
)
from keras_influence.trainers.recipe import Measurements, Recipe, epoch_order
from tests.trainers import recipes

ROOT = pathlib.Path(__file__).parents[2]
FIT = {"epochs": 2, "batch_size": 4}


def small_bank(directory, **changes):
    arguments = {
        "make_model": recipes.mlp,
        "train": recipes.vectors(12),
        "subsets": random_subsets(12, 4),
        "queries": recipes.vectors(5, seed=1),
        "fit": FIT,
        "verbose": 0,
    }
    return RetrainingBank(directory, **{**arguments, **changes})


def test_each_split_leaves_every_example_out_once():
    masks = leave_fold_out(7, folds=3, repeats=2, seed=1)
    assert masks.dtype == bool and masks.shape == (6, 7)
    for split in (masks[:3], masks[3:]):
        np.testing.assert_array_equal((~split).sum(axis=0), np.ones(7))
        assert sorted((~split).sum(axis=1)) == [2, 2, 3]
    assert (masks[:3] != masks[3:]).any()
    np.testing.assert_array_equal(masks[:3], leave_fold_out(7, folds=3, seed=1))
    assert (masks[:3] != leave_fold_out(7, folds=3, seed=2)).any()


def test_random_subsets_are_a_prefix_of_more_and_have_one_size():
    masks = random_subsets(10, 6, alpha=0.3, seed=3)
    assert masks.shape == (6, 10)
    assert (masks.sum(axis=1) == 3).all()
    np.testing.assert_array_equal(masks[:4], random_subsets(10, 4, alpha=0.3, seed=3))
    assert (masks != random_subsets(10, 6, alpha=0.3, seed=4)).any()


def test_left_out_groups_come_after_the_controls():
    expected = [[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]]
    np.testing.assert_array_equal(leave_group_out(3, [0, [1, 2]], controls=2), expected)
    np.testing.assert_array_equal(leave_one_out(3, [2, 0]), [[1, 1, 1], [1, 1, 0], [0, 1, 1]])


def test_a_recipe_feeds_the_order_of_its_seed_untuned():
    fed = []

    class Fitted:
        def fit(self, dataset, **options):
            # Tuned, the end of a dataset can wait as long as its pass took.
            assert not dataset.options().autotune.enabled
            fed.extend(dataset.as_numpy_iterator())
            assert (options["epochs"], options["steps_per_epoch"]) == (2, 3)

    x, y = recipes.vectors(10)
    Recipe(FIT, None).train(Fitted(), data.read((x, y)), seed=5)
    orders = [epoch_order(np.arange(10), 5, epoch, shuffle=True) for epoch in range(2)]
    rows = [order[start : start + 4] for order in orders for start in (0, 4, 8)]
    for batch, chosen in zip(fed, rows, strict=True):
        np.testing.assert_array_equal(batch[0], x[chosen])
        np.testing.assert_array_equal(batch[1], y[chosen])


def test_as_many_are_measured_at_once_as_there_is_room_for(monkeypatch):
    model, examples = recipes.mlp(), data.read(recipes.vectors(50))
    sizes = []

    class Watched(keras.Model):
        def call(self, inputs):
            tf.py_function(lambda rows: sizes.append(int(rows)), [tf.shape(inputs)[0]], [])
            return model(inputs)

    watched = Watched()
    watched.compile(loss=model.loss)
    measure = Measurements(["loss", "correct"]).of(watched)
    whole = measure(examples)
    assert sizes == [50]
    # Once known, it is not asked for again.
    monkeypatch.setattr("keras_influence.trainers.recipe._MOST_BYTES", 1)
    np.testing.assert_array_equal(measure(examples), whole)
    assert sizes == [50, 50]
    sizes.clear()
    monkeypatch.setattr("keras_influence.trainers.recipe._MOST_BYTES", 8000)
    found = Measurements(["loss", "correct"]).of(watched)(examples)
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    assert sum(sizes) == 50 and 1 < max(sizes) < 50
    sizes.clear()
    few = data.read(recipes.vectors(20))
    Measurements(["loss"]).of(watched)(few)
    assert sizes == [20]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_subsets(10, 3, alpha=0.01), "which leaves 0"),
        (lambda: leave_one_out(3, [3]), "from 0 to 2. Received: 3"),
        (lambda: leave_fold_out(3, 4), "from 2 to 3 folds.* Received: folds=4"),
        (lambda: leave_fold_out(3, 2, repeats=0), "repeats=0"),
    ],
)
def test_subsets_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_least_squares_on_each_subset(tmp_path):
    random = np.random.default_rng(0)
    x = random.standard_normal((9, 2)).astype(np.float32)
    y = random.standard_normal(9).astype(np.float32)
    masks = random_subsets(9, 5, alpha=0.6)
    bank = RetrainingBank(
        tmp_path,
        recipes.line,
        (x, y),
        masks,
        queries=(x[:3] + 1, y[:3]),
        train_fn=recipes.least_squares,
        repeats=2,
        measurements=["loss"],
        verbose=0,
    ).run()
    # Written out: the solution of each subset's normal equations, and its squared errors.
    for subset, mask in enumerate(masks):
        a, b = x[mask].astype(np.float64), y[mask]
        w = np.linalg.solve(a.T @ a, a.T @ b)
        on_queries, on_train = ((x[:3] + 1) @ w - y[:3]) ** 2, (x @ w - y) ** 2
        for repeat in range(2):
            stored = bank.outputs("loss")[subset, repeat]
            np.testing.assert_allclose(stored, on_queries, rtol=1e-4, atol=1e-6)
            stored = bank.outputs("loss", on="train")[subset, repeat]
            np.testing.assert_allclose(stored, on_train, rtol=1e-4, atol=1e-6)


def test_a_bank_goes_on_where_it_was_left_and_is_read_without_a_model(tmp_path):
    options = {"subsets": random_subsets(12, 2), "stack": 1, "repeats": 2}
    bank = small_bank(tmp_path / "a", **options)
    assert [(run.subset, run.repeat) for run in bank.runs] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    bank.run(0, 3)
    assert bank.num_done == 3
    with pytest.raises(ValueError, match="1 of the 4 runs"):
        bank.outputs("loss")
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").rglob("manifest.json")}
    bank = small_bank(tmp_path / "a", **options).run()
    assert all(file.stat().st_mtime_ns == when for file, when in written.items())
    whole = small_bank(tmp_path / "b", **options).run()
    stored = StoredBank(tmp_path / "a")
    np.testing.assert_array_equal(stored.masks, options["subsets"])
    assert stored.names == ["loss", "margin", "correct"]
    for name in stored.names:
        assert stored.outputs(name).shape == (2, 2, 5)
        assert stored.outputs(name, on="train").shape == (2, 2, 12)
        np.testing.assert_array_equal(stored.outputs(name), whole.outputs(name))
    np.testing.assert_allclose(stored.losses("margin"), -stored.outputs("margin").mean(axis=1))
    np.testing.assert_allclose(stored.losses("correct"), 1 - stored.outputs("correct").mean(axis=1))
    # A margin is log p - log(1 - p) of the label, of which the loss is -log p.
    p = np.exp(-stored.outputs("loss").astype(np.float64))
    np.testing.assert_allclose(stored.outputs("margin"), np.log(p / (1 - p)), rtol=1e-3)
    assert (stored.outputs("correct")[stored.outputs("margin") > 0] == 1).all()
    assert stored.seconds() > 0


def test_seeds_of_runs(tmp_path):
    own = small_bank(tmp_path / "own", repeats=2)
    shared = small_bank(tmp_path / "shared", repeats=2, seeds="shared")
    seeds = [[bank.seed_of(run) for run in bank.runs] for bank in (own, shared)]
    assert len(set(seeds[0])) == 8
    assert len(set(seeds[1])) == 2
    assert len(set(seeds[1][:4])) == 1


def test_every_part_is_done_by_exactly_one_of_the_ranges(tmp_path):
    bank = small_bank(tmp_path, stack=3)  # Parts begin at runs 0 and 3.
    bank.run(0, 2)
    assert bank.num_done == 3
    bank.run(2, 4)
    assert bank.num_done == 4


@pytest.mark.slow
def test_processes_share_the_work(tmp_path):
    one = small_bank(tmp_path / "one", stack=1).run()
    two = small_bank(tmp_path / "two", stack=1).run(processes=2)
    np.testing.assert_allclose(two.outputs("loss"), one.outputs("loss"), rtol=1e-5)


def test_what_another_process_is_training_is_left_to_it(tmp_path):
    bank = small_bank(tmp_path, stack=2)
    with bank.claim(bank.parts[0]):
        bank.run()
    assert [bank.is_done(part) for part in bank.parts] == [False, True]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fit": {"epochs": 3, "batch_size": 4}}, "fit: "),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"train": recipes.vectors(12, seed=5)}, "train: "),
        ({"queries": recipes.vectors(5, seed=5)}, "queries: "),
        ({"subsets": random_subsets(12, 4, seed=5)}, "subsets: "),
        ({"make_model": recipes.wider_mlp}, "make_model: "),
        ({"fit": None, "train_fn": recipes.counted}, "train_fn: "),
    ],
)
def test_another_bank_is_refused(tmp_path, changes, named):
    small_bank(tmp_path, stack=1)
    small_bank(tmp_path, stack=1)
    with pytest.raises(ValueError, match=named):
        small_bank(tmp_path, **{"stack": 1, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": np.ones((4, 11), bool)}, r"\[subsets, 12\]. Received: bool \[4, 11\]"),
        ({"subsets": np.ones((4, 12))}, "Received: float64"),
        ({"subsets": np.zeros((4, 12), bool)}, "no example in subset 0"),
        ({"seeds": "same"}, "seeds='same'"),
        ({"fit": None}, "either `fit`"),
        ({"fit": {"callbacks": [keras.callbacks.Callback()]}}, "JSON"),
        ({"fit": {"validation_split": 0.1}}, "validation_split"),
        ({"measurements": ["accuracy"]}, "accuracy"),
        ({"make_model": lambda: keras.Sequential()}, "Sequential that is not compiled"),
        ({"stack": 0}, "`stack`"),
    ],
)
def test_what_is_no_bank(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_bank(tmp_path, **changes)


def test_a_model_that_differs_under_one_seed_is_refused(tmp_path):
    def whimsical():
        model = recipes.mlp()
        model.weights[0].assign(np.frombuffer(os.urandom(20), np.uint8).reshape(5, 4) / 255)
        return model

    with pytest.raises(ValueError, match="called again under the same seed"):
        small_bank(tmp_path, make_model=whimsical)


def test_another_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"no bank, but \['thesis.txt'\]"):
        small_bank(tmp_path)
    with pytest.raises(FileNotFoundError, match="no bank at"):
        StoredBank(tmp_path)


def test_functions_that_no_process_can_import_are_refused(tmp_path):
    bank = small_bank(tmp_path, make_model=lambda: recipes.mlp(), stack=1)
    with pytest.raises(ValueError, match="top level"):
        bank.run(processes=2)


def test_a_run_that_diverges_is_named(tmp_path):
    x, y = recipes.vectors(12)
    bank = small_bank(tmp_path, train=(np.full_like(x, np.nan), y))
    with pytest.raises(FloatingPointError, match=r"Run 0 \(subset 0, repeat 0, seed \d+\).*loss"):
        bank.run()
    assert bank.num_done == 0


def test_an_altered_record_is_found_out(tmp_path):
    small_bank(tmp_path)
    record = tmp_path / "bank.json"
    record.write_text(record.read_text().replace('"repeats": 1', '"repeats": 2'))
    with pytest.raises(storage.TornStoreError):
        StoredBank(tmp_path)


def test_a_measurement_of_ones_own(tmp_path):
    bank = small_bank(tmp_path, measurements=["margin", recipes.second_output]).run()
    assert bank.names == ["margin", "second_output"]
    assert np.ptp(bank.outputs("second_output")) > 0


@pytest.mark.slow
def test_twenty_kills_train_nothing_twice(tmp_path, monkeypatch):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    log = tmp_path / "log"
    program = f"from tests.trainers import recipes; recipes.main({str(killed)!r})"
    environment = {**os.environ, "COUNTED": str(log), "PYTHONPATH": str(ROOT)}
    kills, written = 0, {}
    random = np.random.default_rng(0)
    while not (killed / "finished").exists():
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=ROOT)
        if kills < 20:
            # From the imports to well into the runs.
            seen = len(log.read_text().splitlines()) if log.exists() else 0
            while process.poll() is None and random.random() < 0.5:
                time.sleep(0.3)
            while process.poll() is None and kills % 4 and kills < 16:
                if log.exists() and len(log.read_text().splitlines()) > seen:
                    break
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        for file, when in written.items():
            assert file.stat().st_mtime_ns == when
        written = {f: f.stat().st_mtime_ns for f in (killed / "runs").glob("0*/manifest.json")}
    assert kills == 20
    assert not list((killed / "runs").glob(".*.partial"))
    trained = log.read_text().splitlines()
    # A kill loses at most the run that it falls into.
    assert 12 <= len(trained) <= 12 + kills
    monkeypatch.setenv("COUNTED", str(tmp_path / "other"))
    bank = recipes.counted_bank(whole).run()
    stored = StoredBank(killed)
    np.testing.assert_array_equal(stored.masks, bank.masks)
    np.testing.assert_array_equal(
        stored.outputs("loss", on="train"), bank.outputs("loss", on="train")
    )
