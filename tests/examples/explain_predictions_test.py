import json

import numpy as np
import pytest
from absl import app, flags
from matplotlib import image as matplotlib_image

import explain_predictions
import keras_influence as ki

SETTINGS = {
    "model": "mlp",
    "epochs": 2,
    "batch_size": 8,
    "rank": "3",
    "num_iterations": 4,
    "checkpoints": "2",
    "lissa_depth": 2,
    "lissa_scale": 20,
    "k": 3,
}


@pytest.fixture
def run(small_program, run_program, tmp_path):
    def run(**changes):
        settings = SETTINGS | {"output_dir": tmp_path / "run"} | changes
        run_program(explain_predictions, **settings)
        return tmp_path / "run"

    return run


# One of each kind: through encodings, over checkpoints, by a system for each query.
@pytest.mark.parametrize(
    ("method", "strategy"), [("arnoldi", "mirrored"), ("tracin", "none"), ("lissa", "none")]
)
def test_every_kind_of_method(run, two_halves, method, strategy):
    directory = run(method=method, strategy=strategy, test_ids="3,8", corruption=0.1)
    results = json.loads((directory / "influences.json").read_text())
    assert results["settings"]["method"] == method
    assert results["settings"]["test_accuracy"] == 1
    first, second = results["queries"]
    assert (first["test_id"], second["test_id"]) == (3, 8)
    names = two_halves.class_names
    assert first["true_label"] == names[two_halves.test_labels[3]]
    assert first["true_label"] == first["predicted_label"] == first["explained_label"]
    for query in (first, second):
        proponents, opponents = query["proponents"], query["opponents"]
        assert len(proponents) == len(opponents) == 3
        scores = [example["score"] for example in proponents]
        assert scores == sorted(scores, reverse=True)
        scores = [example["score"] for example in opponents]
        assert scores == sorted(scores)
        assert all(0 <= example["id"] < 40 for example in proponents + opponents)
    if method == "tracin":
        # A wrong label in a half that the query shares is what argues most against it.
        worst = first["opponents"][0]
        assert worst["is_mislabeled"] and worst["label"] != first["true_label"]
        assert worst["score"] < 0 < first["proponents"][0]["score"]
    picture = matplotlib_image.imread(directory / "influences.png")
    assert picture.shape[1] > 600 and picture[..., :3].std() > 0.05


def test_wrong_prediction_is_explained_by_its_own_label(run, two_halves, monkeypatch):
    predicted = two_halves.test_labels.copy()
    predicted[[5, 7]] = 1 - predicted[[5, 7]]
    monkeypatch.setattr(explain_predictions.training, "predict_labels", lambda *_: predicted)
    directory = run(method="gradient_dot", num_queries=4)
    queries = json.loads((directory / "influences.json").read_text())["queries"]
    assert [query["test_id"] for query in queries] == [5, 7, 0, 1]
    wrong, right = queries[0], queries[2]
    assert wrong["explained_label"] == wrong["predicted_label"] != wrong["true_label"]
    assert right["explained_label"] == right["predicted_label"] == right["true_label"]
    # All training labels are right, so what looks like the query argues against a wrong label, and
    # for a right one.
    assert wrong["opponents"][0]["label"] == wrong["true_label"]
    assert wrong["opponents"][0]["score"] < 0
    assert right["proponents"][0]["label"] == right["true_label"]
    assert right["proponents"][0]["score"] > 0


@pytest.mark.parametrize("explain", ["predicted", "true"])
def test_label_to_explain(run, two_halves, monkeypatch, explain):
    def no_influences(name, trained, data, queries, *_):
        asked.append(queries)
        top = ki.TopExamples(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))
        return ki.Influences(top, top)

    asked = []
    predicted = 1 - two_halves.test_labels
    monkeypatch.setattr(explain_predictions.training, "predict_labels", lambda *_: predicted)
    monkeypatch.setattr(explain_predictions, "find_influences", no_influences)
    run(test_ids="4", explain=explain, epochs=1)
    ((images, labels),) = asked
    np.testing.assert_array_equal(images, two_halves.test_images[4:5])
    expected = two_halves.test_labels if explain == "true" else predicted
    assert labels.tolist() == [expected[4]]


def test_ids_beyond_the_test_set(run):
    with pytest.raises(app.UsageError, match=r"below 12.* Received: 12"):
        run(test_ids="3,12")


def test_ids_that_are_none(run):
    with pytest.raises(flags.IllegalFlagValueError):
        run(test_ids="first")


def test_arguments_are_refused():
    with pytest.raises(app.UsageError, match="digits"):
        explain_predictions.main(["explain_predictions", "digits"])
