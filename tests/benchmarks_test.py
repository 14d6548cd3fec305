"""The README's tables are those of the results."""

import json
import pathlib
import re

import pytest

from benchmarks import tables

ROOT = pathlib.Path(__file__).parents[1]


def test_the_readme_holds_the_tables_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- table: ([\w-]+) -->", text)
    assert sorted(found) == sorted(tables.TABLES)
    assert tables.render(text) == text


def test_a_table_shows_means_and_ranges_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for seed, auc in ((0, 0.90), (1, 0.94)):
        row = {
            "method": "arnoldi",
            "rank": 10,
            "checkpoints": None,
            "fit_seconds": 2.0 + seed,
            "seconds_per_example": 0.004,
            "num_scored": 50,
            "auc": auc,
            "auc_interval": [0.8, 0.95],
            "average_precision": 0.5,
            "average_precision_interval": [0.4, 0.6],
        }
        settings = {
            "dataset": "digits",
            "model": "mlp",
            "num_parameters": 1234,
            "num_train_examples": 100,
            "num_mislabeled": 10,
            "epochs": 3,
            "test_accuracy": 0.9,
            "seed": seed,
            "matmul_gflops": 100.0,
        }
        (tmp_path / f"mislabeled-digits-mlp-{seed}.json").write_text(
            json.dumps({"settings": settings, "rows": [row]})
        )
    lines = tables.mislabeled("digits-mlp").splitlines()
    assert lines[0].startswith("digits, mlp (1,234 parameters), 100 training images, 10 labels")
    assert "seeds 0, 1" in lines[0]
    assert lines[-1] == (
        "| `Arnoldi`, rank 10, on 50 images drawn at random | 2.5 | 4.00 | 92.0 (90.0 to 94.0) "
        "| 50.0 |"
    )

    (tmp_path / "mislabeled-digits-mlp-1.json").unlink()
    assert tables.mislabeled("digits-mlp").splitlines()[-1] == (
        "| `Arnoldi`, rank 10, on 50 images drawn at random | 2.0 | 4.00 | 90.0 (80.0 to 95.0) "
        "| 50.0 (40.0 to 60.0) |"
    )


def test_a_table_without_results_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no result mislabeled-mnist-large_cnn"):
        tables.render("<!-- table: mnist-large_cnn -->\nold\n<!-- end of table -->\n")
