import json

import numpy as np
import pytest
from absl import app, flags
from matplotlib import image as matplotlib_image

import find_mislabeled

# Some settings under which the dense layer learns the two halves, but not the four wrong labels.
SETTINGS = {
    "model": "mlp",
    "epochs": 4,
    "batch_size": 8,
    "rank": "2,3",
    "checkpoints": "1,2",
    "num_iterations": 5,
    "num_hessian_examples": 24,
    "score_batch_size": 16,
}


@pytest.fixture
def run(small_program, run_program, tmp_path):
    def run(**changes):
        settings = SETTINGS | {"output_dir": tmp_path / "run"} | changes
        run_program(find_mislabeled, **settings)
        return tmp_path / "run"

    return run


def test_every_stage(run, capsys):
    directory = run(
        methods="arnoldi,random_projection,tracin,gradient_dot,lissa",
        lissa_examples=25,
        lissa_depth=3,
        lissa_scale=20,
    )
    results = json.loads((directory / "results.json").read_text())
    assert set(results) == {"settings", "rows"}
    rows = {(row["method"], row["rank"], row["checkpoints"]): row for row in results["rows"]}
    assert list(rows) == [
        ("arnoldi", 2, None),
        ("arnoldi", 3, None),
        ("random_projection", 2, None),
        ("random_projection", 3, None),
        ("tracin", None, 1),
        ("tracin", None, 2),
        ("gradient_dot", None, None),
        ("lissa", None, None),
        ("loss", None, None),
        ("chance", None, None),
    ]
    for row in rows.values():
        assert 0 <= row["auc"] <= 1 and 0 <= row["average_precision"] <= 1
        assert row["auc_interval"][0] <= row["auc"] <= row["auc_interval"][1]
        assert row["fit_seconds"] >= 0 and row["score_seconds"] >= 0
        assert set(row["recall"]) == {"0.05", "0.1", "0.2", "0.3", "0.5"}
        assert row["num_scored"] == (25 if row["method"] == "lissa" else 40)
        assert set(row["on_lissa_sample"]) == {"auc", "average_precision"}
    lissa = rows["lissa", None, None]
    assert lissa["on_lissa_sample"]["auc"] == lissa["auc"]
    assert lissa["seconds_per_example"] == pytest.approx(lissa["score_seconds"] / 25)

    # Of 40 labels round(.1 x 40) = 4 are replaced: with all scores alike AP is their share, and a
    # tenth of the checks finds a tenth of them.
    chance = rows["chance", None, None]
    assert (chance["auc"], chance["average_precision"]) == (0.5, 0.1)
    assert chance["recall"]["0.1"] == pytest.approx(0.1)
    # The two halves are told apart with certainty, so whoever looks at gradients sees all four.
    for key in [("loss", None, None), ("gradient_dot", None, None), ("tracin", None, 2)]:
        assert (rows[key]["auc"], rows[key]["average_precision"]) == (1, 1)
        assert rows[key]["recall"]["0.1"] == 1

    settings = results["settings"]
    assert settings["num_train_examples"] == 40 and settings["num_mislabeled"] == 4
    assert settings["train_accuracy"] == pytest.approx(0.9) and settings["test_accuracy"] == 1
    assert settings["checkpoint_report"]["count"] == 4
    assert settings["rank"] == [2, 3] and settings["num_hessian_examples"] == 24
    assert settings["seed"] == 0 and settings["corruption"] == 0.1
    assert set(settings["versions"]) == {"keras", "keras_influence", "tensorflow"}
    assert settings["matmul_gflops"] > 0 and settings["failures"] == {}

    output = capsys.readouterr().out
    assert "accuracy: 0.900 on the given training labels, 1.000 on the test set" in output
    for name in ("retrieval_curve.png", "suspicious.png", "scores.npz", "results.json"):
        assert str(directory / name) in output
    for name in ("retrieval_curve.png", "suspicious.png"):
        picture = matplotlib_image.imread(directory / name)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05

    scores = np.load(directory / "scores.npz")
    assert np.isfinite(scores["lissa"]).sum() == 25
    wrong = np.flatnonzero(scores["given_labels"] != scores["true_labels"])
    np.testing.assert_array_equal(np.sort(np.argsort(-scores["gradient_dot"])[:4]), wrong)
    # One checkpoint, the last, holds the final weights: TracIn is the gradient product there.
    ratio = scores["tracin_1"] / scores["gradient_dot"]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_a_method_that_cannot_go_on_is_left_out(run):
    # A thousandth is below the largest eigenvalue, which LiSSA refuses.
    directory = run(methods="lissa", lissa_scale=1e-3, lissa_examples=20, sheet_by="loss", epochs=1)
    results = json.loads((directory / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["loss", "chance"]
    assert "above the largest eigenvalue" in results["settings"]["failures"]["lissa"]
    assert (directory / "suspicious.png").exists()


@pytest.mark.slow
def test_a_mirrored_model_gives_the_same_scores(run, tmp_path):
    # Of one replica here, on the CPU; the tests of the strategies have more.
    found = []
    for strategy in ("none", "mirrored"):
        directory = tmp_path / strategy
        run(strategy=strategy, output_dir=directory, methods="arnoldi,tracin", rank="2", epochs=2)
        results = json.loads((directory / "results.json").read_text())
        assert results["settings"]["strategy"] == strategy
        found.append(np.load(directory / "scores.npz"))
    for name in ("arnoldi_2", "tracin_1", "tracin_2"):
        scale = np.abs(found[0][name]).max()
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("changes", [{"strategy": "tpu"}, {"tpu": "mine"}])
def test_a_tpu_needs_a_name_and_a_name_a_tpu(run, changes):
    with pytest.raises(flags.IllegalFlagValueError, match="--strategy=tpu and --tpu=NAME"):
        run(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoints": "1,5"}, "--checkpoints=5 needs at least as many --epochs"),
        ({"methods": "arnoldi", "sheet_by": "tracin"}, "Received: tracin"),
        ({"corruption": 0}, "replaces 0 of 40 labels"),
        ({"corruption": 1}, "replaces 40 of 40 labels"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(run, changes, message):
    with pytest.raises(app.UsageError, match=message):
        run(**changes)


def test_the_default_checkpoints_are_no_more_than_the_epochs(small_program, run_program, tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name != "checkpoints"}
    settings |= {"epochs": 2, "methods": "tracin", "output_dir": tmp_path / "run"}
    run_program(find_mislabeled, **settings)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["settings"]["checkpoints"] == [1, 2]
    assert [row["checkpoints"] for row in results["rows"]] == [1, 2, None, None]


def test_arguments_are_refused():
    with pytest.raises(app.UsageError, match="digits"):
        find_mislabeled.main(["find_mislabeled", "digits"])


@pytest.mark.parametrize(
    "changes", [{"methods": "guess"}, {"methods": ""}, {"rank": "ten"}, {"checkpoints": "1,1"}]
)
def test_flags_of_another_kind(run, changes):
    with pytest.raises(flags.IllegalFlagValueError):
        run(**changes)


def test_results_are_not_overwritten(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("mine")
    with pytest.raises(FileExistsError, match="another --output_dir"):
        run()
    assert (tmp_path / "run" / "results.json").read_text() == "mine"


def test_sample_is_seeded_and_holds_both_kinds():
    is_mislabeled = np.arange(100) < 10
    ids = find_mislabeled.draw_sample(is_mislabeled, 40, seed=0)
    assert len(set(ids.tolist())) == 40 and np.all(np.diff(ids) > 0)
    np.testing.assert_array_equal(ids, find_mislabeled.draw_sample(is_mislabeled, 40, seed=0))
    np.testing.assert_array_equal(
        find_mislabeled.draw_sample(is_mislabeled, 1000, seed=0), np.arange(100)
    )
    with pytest.raises(ValueError, match="larger --lissa_examples"):
        find_mislabeled.draw_sample(is_mislabeled, 1, seed=0)
