import json

import numpy as np
import pytest
from absl import app
from matplotlib import image as matplotlib_image
from scipy import stats

import keras_influence as ki
import text_classification

SETTINGS = {
    "lengths": "8,12",
    "epochs": 8,
    "batch_size": 8,
    "learning_rate": 0.03,
    "rank": "3",
    "checkpoints": "1,3",
    "num_iterations": 4,
    "num_hessian_examples": 16,
    "score_batch_size": 16,
    "methods": "arnoldi,random_projection,tracin,gradient_dot",
    "num_queries": 2,
    "k": 3,
    "folds": 2,
}


@pytest.fixture
def run(run_program, bert_directory, tmp_path):
    """Runs the program on 44 questions, each answered by whether its sentence has the colour."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(44):
        asked, told = rng.choice(["red", "green"], 2)
        # Words that the vocabulary has not make the questions differ, and the lengths.
        lines.append(
            f"is it {asked} ? {'x' * number}\t{'it is ' * (number % 2)}{told}\t"
            f"{'yes' if told == 'red' else 'no'}"
        )
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))

    def run(**changes):
        settings = {
            **SETTINGS,
            "data": tmp_path / "pairs.tsv",
            "weights": bert_directory,
            "output_dir": tmp_path / "run",
            **changes,
        }
        run_program(text_classification, **{k: v for k, v in settings.items() if v is not None})
        return tmp_path / "run"

    return run


@pytest.mark.slow
def test_every_stage(run, capsys):
    directory = run()
    results = json.loads((directory / "results.json").read_text())
    rows = {(row["method"], row["rank"], row["checkpoints"]): row for row in results["rows"]}
    assert list(rows) == [
        ("arnoldi", 3, None),
        ("random_projection", 3, None),
        ("tracin", None, 1),
        ("tracin", None, 3),
        ("gradient_dot", None, None),
        ("loss", None, None),
        ("memorization", None, None),
        ("held_out_loss", None, None),
        ("mean_loss", None, None),
    ]
    settings = results["settings"]
    # 4 of the 44 questions are held out, and 4 of the other 40 labels turned.
    assert settings["num_train_examples"] == 40 and settings["num_mislabeled"] == 4
    assert settings["num_test_examples"] == 4 and settings["test_accuracy"] == 1
    assert settings["train_accuracy"] == pytest.approx(0.9)
    for key in [("loss", None, None), ("gradient_dot", None, None), ("tracin", None, 3)]:
        assert (rows[key]["auc"], rows[key]["average_precision"]) == (1, 1)
    for key, row in rows.items():
        if key[0] not in ("loss", "memorization", "held_out_loss", "mean_loss"):
            rates = row["throughput"]
            per_second = rates["examples_per_hour"] / 3600
            tokens = settings["num_tokens"] / 40
            assert rates["tokens_per_second"] == pytest.approx(per_second * tokens)
            assert 0 < rates["flops_per_example"] < 1e6
    three, one = (rows["tracin", None, n]["throughput"]["flops_per_example"] for n in (3, 1))
    assert three == 3 * one

    scores = np.load(directory / "scores.npz")
    wrong = np.flatnonzero(scores["given_labels"] != scores["true_labels"])
    np.testing.assert_array_equal(np.sort(np.argsort(-scores["gradient_dot"])[:4]), wrong)
    # Of the three checkpoints the last one is that of `tracin_1`.
    assert (scores["tracin_3"] > scores["tracin_1"]).all() and (scores["tracin_1"] > 0).all()

    bank = ki.trainers.StoredBank(directory / "folds-2")
    without, losses = ~bank.masks, bank.losses(on="train")
    np.testing.assert_array_equal(without.sum(axis=0), np.full(40, 2))
    np.testing.assert_allclose(
        scores["held_out_loss"], (losses * without).sum(axis=0) / 2, rtol=1e-5
    )
    np.testing.assert_allclose(scores["mean_loss"], losses.mean(axis=0), rtol=1e-5)
    errors = -np.expm1(-losses)  # A loss is -log p.
    np.testing.assert_allclose(
        scores["memorization"], (errors * (2 * without - 1.0)).sum(axis=0) / 2, atol=1e-5
    )
    assert rows["held_out_loss", None, None]["auc"] > 0.9
    for key in [("loss", None, None), ("tracin", None, 3)]:
        name = "loss" if key[0] == "loss" else "tracin_3"
        expected = stats.spearmanr(scores[name], scores["memorization"]).statistic
        assert rows[key]["memorization_correlation"] == pytest.approx(expected, abs=1e-6)

    output = capsys.readouterr().out
    assert "accuracy: 0.900 on the given training labels, 1.000 on 4 test pairs" in output
    assert output.count("examples an hour") == 5
    assert len(results["queries"]) == 2 and results["explained_by"] == "arnoldi"
    for query in results["queries"]:
        assert query["true_label"] == query["predicted_label"]
        values = [each["score"] for each in query["proponents"]]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert f"test pair #{query['test_id']}, predicted {query['predicted_label']}" in output
        for each in query["proponents"] + query["opponents"]:
            assert each["is_mislabeled"] == (each["id"] in wrong)
            assert each["question"].endswith("x" * each["question"].count("x"))
    picture = matplotlib_image.imread(directory / "retrieval_curve.png")
    assert min(picture.shape[:2]) > 300

    # Again: everything is there, and read.
    times = {path: path.stat().st_mtime_ns for path in directory.glob("scores/*.npz")}
    assert len(times) == 5
    run()
    again = json.loads((directory / "results.json").read_text())
    assert again["rows"] == results["rows"] and again["queries"] == results["queries"]
    assert again["settings"]["epochs_resumed"] == 8
    assert times == {path: path.stat().st_mtime_ns for path in directory.glob("scores/*.npz")}
    with pytest.raises(ValueError, match="a run with other settings: epochs"):
        run(epochs=3, checkpoints="1,2")


@pytest.mark.slow
def test_a_bert_from_nothing(run):
    directory = run(
        weights=None, epochs=1, checkpoints="1", methods="gradient_dot", num_pieces=100, folds=0
    )
    results = json.loads((directory / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["gradient_dot", "loss"]
    assert (directory / "vocab.txt").read_text().startswith("[PAD]\n")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": "ekfac"}, app.UsageError, r"Received: \['ekfac'\]"),
        ({"checkpoints": "8"}, app.UsageError, "--checkpoints=8 needs more --epochs"),
        ({"folds": 1}, app.UsageError, "--folds must be 0 or at least 2"),
        ({"corruption": 0}, app.UsageError, "turns 0 of 40 labels"),
        ({"lengths": "8,17"}, ValueError, "at most 16, the positions of the BERT. Received: 17"),
    ],
)
def test_settings_that_cannot_work(run, changes, error, message):
    with pytest.raises(error, match=message):
        run(**changes)


def test_arguments_are_refused():
    with pytest.raises(app.UsageError, match="qnli"):
        text_classification.main(["text_classification", "qnli"])
