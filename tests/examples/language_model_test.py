import itertools
import json

import numpy as np
import pytest
from absl import app

import gpt
import language_model

SETTINGS = {
    "num_pieces": 400,
    "length": 16,
    "num_layers": 1,
    "width": 32,
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 0.01,
    "checkpoints": "2",
    "score_batch_size": 16,
    "num_iterations": 4,
    "num_hessian_examples": 16,
    "rank": "3",
    "k": 2,
}


@pytest.fixture
def run(run_program, tmp_path):
    """Runs the program on 60 lines of 20 random words, of which the twelfth comes twice."""
    rng = np.random.default_rng(1)
    words = ["".join(letters) for letters in itertools.product("abcde", "vwxyz")]
    lines = [" ".join(rng.choice(words, 20)) for _ in range(60)]
    (tmp_path / "text.txt").write_text("\n".join([*lines, lines[12]]))
    planted, done = lines[12].split(), set()

    def run(**changes):
        settings = {
            **SETTINGS,
            "data": tmp_path / "text.txt",
            "query": f"{' '.join(planted[:8])} => {' '.join(planted[8:14])}",
            "output_dir": tmp_path / "run",
            **changes,
        }
        run_program(language_model, **{k: v for k, v in settings.items() if v is not None})
        (found,) = set((tmp_path / "run").glob("*/results.json")) - done
        done.add(found)
        return json.loads(found.read_text())

    run.planted = planted
    return run


@pytest.mark.slow
def test_every_stage(run, capsys):
    results = run(method="tracin")
    settings = results["settings"]
    # Of 61 passages round(.05 x 61) = 3 are held out. 20 words are one stretch of 16 tokens.
    assert settings["num_train_passages"] == 58 and settings["num_train_tokens"] == 58 * 16
    # Of 25 words, drawn alike: there is nothing to learn but the words.
    assert 20 < settings["train_perplexity"] < settings["test_perplexity"] < 30
    (query,) = results["queries"]
    assert query["prompt"].split() == run.planted[:8]
    assert query["continuation"].split() == run.planted[8:14]
    for best in query["proponents"]:
        # The line that the query is from, and its copy.
        assert best["text"].split() == run.planted[:16] and best["score"] > 0
    assert query["opponents"][0]["score"] < query["opponents"][1]["score"]
    assert query["opponents"][1]["score"] < query["proponents"][1]["score"]
    assert results["from_own_source"] is None
    rates = results["throughput"]
    per_second = rates["examples_per_hour"] / 3600
    assert rates["tokens_per_second"] == pytest.approx(16 * per_second)
    assert rates["flops_per_example"] > 0
    output = capsys.readouterr().out
    assert "examples an hour" in output and " ".join(run.planted[:16]) in output

    # Others are asked of the same model.
    again = run(method="arnoldi", query=None, num_queries=2)
    assert again["settings"]["epochs_resumed"] == 4
    assert again["settings"]["test_perplexity"] == settings["test_perplexity"]
    for query in again["queries"]:
        assert len(query["prompt"].split()) == len(query["continuation"].split()) == 8
        assert query["log_likelihood"] < 0 and len(query["opponents"]) == 2
    # One file is the source of everything.
    assert again["from_own_source"] == {"proponents": 1, "chance": 1}
    with pytest.raises(ValueError, match="a run with other settings: length"):
        run(length=12)


def test_log_likelihood_by_hand():
    # Of logits (0, log 3) the probabilities are 1/4 and 3/4.
    found = language_model.log_likelihood(np.array([[0, 1]]), np.log([[[1.0, 3.0], [1.0, 3.0]]]))
    np.testing.assert_allclose(found, np.log([[0.25, 0.75]]), rtol=1e-6)


def test_a_gpt_is_causal_and_ties_its_embeddings():
    model = gpt.build(gpt.Size(layers=2, width=8, heads=2), 11, 5, 0.1)
    tokens = np.array([[1, 2, 3, 4, 5]])
    changed = np.array([[1, 2, 3, 9, 9]])
    first, second = model(tokens).numpy(), model(changed).numpy()
    np.testing.assert_allclose(first[:, :3], second[:, :3], atol=1e-6)
    assert np.abs(first[:, 3:] - second[:, 3:]).max() > 1e-3
    # Tokens and positions; of a layer 4 x (8 x 8 + 8), 8 x 32 + 32 + 32 x 8 + 8 and two norms; one
    # more norm. Nothing for the outputs.
    assert model.count_params() == 11 * 8 + 5 * 8 + 2 * (288 + 552 + 32) + 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "--data is needed"),
        ({"width": 40}, "a multiple of 32. Received: 40"),
        ({"method": "tracin", "checkpoints": "5"}, "--checkpoints=5 needs at least as many"),
    ],
)
def test_settings_that_cannot_work(run, changes, message):
    with pytest.raises(app.UsageError, match=message):
        run(**changes)


def test_arguments_are_refused():
    with pytest.raises(app.UsageError, match="wiki"):
        language_model.main(["language_model", "wiki"])
