import json

import numpy as np
import pytest
from absl import app, flags

import translation
import translation_flags
from translation_data import Corpus

# What a sentence is about, its translation is about too.
TOPICS = [
    ("rot grün blau gelb", "red green blue yellow"),
    ("hund katze maus kuh", "dog cat mouse cow"),
    ("eins zwei drei vier", "one two three four"),
    ("berg see wald fluss", "hill lake wood river"),
]
SETTINGS = {
    "size": "tiny",
    "num_pairs": 160,
    "num_held_out": 16,
    "num_pieces": 100,
    "buckets": "16",
    "train_batch": 16,
    "updates": 240,
    "num_checkpoints": 2,
    "peak_rate": 0.03,
    "score_batch": 16,
    "ranks": "2,4",
    "hessian_pairs": 64,
    "num_scored": 0,
    "scored": "all",
    "score_by": "arnoldi-all,random_projection-last,tracin,loss",
    "noise_share": 0.1,
    "select_by": "arnoldi-all-4",
    "select_updates": 20,
    "kept": "0.5",
    "forward_mode_pairs": 16,
}
ALL = ",".join(translation_flags.STAGES)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file of 200 pairs about four topics."""
    random = np.random.default_rng(0)
    lines = {}
    while len(lines) < 200:
        words = [side.split() for side in TOPICS[random.integers(4)]]
        order = random.integers(0, 4, random.integers(3, 9))
        lines["\t".join(" ".join(side[place] for place in order) for side in words)] = None
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    path.write_text("".join(f"{line}\ttoy\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def run(run_program, pairs, tmp_path):
    def run(stage, **changes):
        settings = SETTINGS | {"data": pairs, "output_dir": tmp_path / "run"} | changes
        run_program(translation, stage=stage, **settings)
        return tmp_path / "run"

    return run


@pytest.mark.slow
def test_every_stage(run, capsys):
    directory = run(ALL)
    results = json.loads((directory / "results.json").read_text())
    assert results["num_pairs"] == 160 and results["num_noisy"] == 16
    retrieval = {row["score"]: row for row in results["retrieval"]}
    assert set(retrieval) == {
        "arnoldi-all-2",
        "arnoldi-all-4",
        "random_projection-last-2",
        "random_projection-last-4",
        "tracin",
        *(
            f"{name}-tokens"
            for name in (
                "arnoldi-all-2",
                "arnoldi-all-4",
                "random_projection-last-2",
                "random_projection-last-4",
                "tracin",
            )
        ),
        "loss",
        "loss_per_token",
    }
    # Three of four permuted references are about another topic, and the model knows topics.
    for name in ("arnoldi-all-4", "tracin", "loss_per_token"):
        assert retrieval[name]["auc"] > 0.75 and retrieval[name]["average_precision"] > 0.3
    for row in retrieval.values():
        low, high = row["auc_interval"]
        assert low <= row["auc"] <= high

    assert set(results["costs"]) == {"arnoldi-all", "random_projection-last", "tracin", "loss"}
    for cost in results["costs"].values():
        assert cost["num_scored"] == 200 and cost["flops_per_pair"] > 0
        assert cost["pairs_per_hour"] > 0 and cost["peak_bytes"] > 1e6
    chosen = {(row["method"], row["share"]): row for row in results["selection"]}
    assert set(chosen) == {("none", 1.0), ("arnoldi-all-4", 0.5)}
    assert chosen["none", 1.0]["noisy_share"] == 0.1
    assert chosen["arnoldi-all-4", 0.5]["noisy_share"] < 0.05
    assert results["bleu"]["bleu"] > 2 and "tok:13a" in results["bleu"]["signature"]
    assert results["forward_mode"]["ratio"] > 0 and results["forward_mode"]["rank"] == 4
    assert results["training"]["updates"] == 240
    settings = results["settings"]
    # 904 of one decoder layer; see the test of the model.
    assert settings["num_parameters"]["last"] == 904 and settings["matmul_gflops"] > 0
    assert settings["seed"] == 0 and settings["data"] == "pairs.tsv"
    assert settings["num_iterations"] == 8 and "output_dir" not in settings
    output = capsys.readouterr().out
    assert "16 wrong references of 160 pairs" in output and "BLEU of the model" in output

    # Nothing is done twice; only the last stage writes its results anew.
    files = [path for path in directory.rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in files if path.name != "results.json"}
    run(ALL)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert len([path for path in directory.rglob("*") if path.is_file()]) == len(files)


@pytest.mark.parametrize(
    ("done", "changes", "message"),
    [
        ("prepare", {"seed": 1}, "`prepare` with other settings: seed 0 and not 1"),
        ("prepare", {"noise": "mixed"}, "noise permuted and not mixed"),
    ],
)
def test_other_settings_are_refused(run, done, changes, message):
    run(done)
    with pytest.raises(app.UsageError, match=message):
        run(done, **changes)


def test_a_stage_needs_those_before_it(run):
    with pytest.raises(app.UsageError, match="Run --stage=prepare first"):
        run("train")
    directory = run("prepare")
    # Checkpoints of a run that is not finished are not what the others are about.
    (directory / "run" / "checkpoint-00000120").mkdir(parents=True)
    for stage in ("score", "evaluate"):
        with pytest.raises(app.UsageError, match="Run --stage=train first"):
            run(stage)


def test_the_sizes_of_both_tables(run_program, monkeypatch):
    found = {}
    monkeypatch.setattr(translation, "load", lambda directory: None)
    monkeypatch.setattr(translation, "prepare", lambda directory: None)
    monkeypatch.setattr(translation, "claim", lambda *_: None)
    for stage in translation_flags.STAGES[1:]:
        monkeypatch.setattr(translation, stage, lambda *_: None)
    for noise in ("permuted", "mixed"):

        def note(directory, name=noise):
            found[name] = translation_flags.stages(), translation_flags.settings()

        monkeypatch.setattr(translation, "load", note)
        run_program(translation, noise=noise)
    stages, settings = found["permuted"]
    assert "select" not in stages and settings["prepare"]["noise_share"] == 0.06
    assert settings["train"]["size"] == "small" and settings["prepare"]["num_pairs"] == 50_000
    assert settings["score"]["num_scored"] == 16_000 and settings["score"]["num_iterations"] == 40
    stages, settings = found["mixed"]
    assert stages == list(translation_flags.STAGES) and settings["prepare"]["noise_share"] == 0.3
    assert settings["select"]["size"] == "mini" and settings["score"]["num_scored"] == 0


def test_the_pairs_to_score():
    splits = {"held_out": np.arange(3), "train": np.arange(3, 10), "rest": np.arange(10, 12)}
    corpus = Corpus(np.zeros((12, 1)), np.zeros((12, 1)), np.zeros(12, bool), splits)
    assert translation.draw_scored(corpus, "train", 0, seed=0).tolist() == list(range(3, 10))
    assert translation.draw_scored(corpus, "all", 12, seed=0).tolist() == list(range(12))
    some = translation.draw_scored(corpus, "train", 4, seed=0)
    assert len(set(some.tolist())) == 4 and set(some.tolist()) < set(range(3, 10))


@pytest.mark.parametrize(
    "changes", [{"stage": "guess"}, {"score_by": "guess"}, {"ranks": "ten"}, {"buckets": "8,8"}]
)
def test_flags_of_another_kind(run, changes):
    with pytest.raises(flags.IllegalFlagValueError):
        run(**({"stage": "prepare"} | changes))
