"""The pages' tables are those of the results."""

import json
import re

import numpy as np
import pytest

from benchmarks import (
    attribution_tables,
    projection,
    scaling_tables,
    speed_tables,
    tables,
    text_tables,
)

RATES = {
    "examples_per_hour": 12345.6,
    "tokens_per_second": 178.4,
    "flops_per_example": 2.26e9,
    "peak_megabytes": 2100.0,
}


def test_the_pages_hold_the_tables_of_the_results():
    texts = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    found = re.findall(r"<!-- table: ([\w-]+) -->", "".join(texts))
    assert sorted(found) == sorted(tables.TABLES)
    assert [tables.render(text) for text in texts] == texts


def test_a_table_shows_means_and_ranges_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
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
    lines = attribution_tables.mislabeled("digits-mlp").splitlines()
    assert lines[0].startswith("digits, mlp (1,234 parameters), 100 training images, 10 labels")
    assert "seeds 0, 1" in lines[0]
    assert lines[-1] == (
        "| `Arnoldi`, rank 10, on 50 images drawn at random | 2.5 | 4.00 | 92.0 (90.0 to 94.0) "
        "| 50.0 |"
    )

    (tmp_path / "mislabeled-digits-mlp-1.json").unlink()
    assert attribution_tables.mislabeled("digits-mlp").splitlines()[-1] == (
        "| `Arnoldi`, rank 10, on 50 images drawn at random | 2.0 | 4.00 | 90.0 (80.0 to 95.0) "
        "| 50.0 (40.0 to 60.0) |"
    )


def test_a_table_without_results_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no result mislabeled-mnist-large_cnn"):
        tables.render("<!-- table: mnist-large_cnn -->\nold\n<!-- end of table -->\n")


def projection_row(**changes):
    route = {"extra_memory_mb": 120.4}
    return {
        "model": "mlp",
        "num_parameters": 567434,
        "rank": 10,
        "batch_size": 500,
        "routes": {
            "engine": {**route, "examples_per_second": [1400.0, 1500.0, 1600.0]},
            "forward": {**route, "examples_per_second": [140.0, 150.0, 160.0]},
            "vectorised": {**route, "examples_per_second": [7.0, 7.5, 8.0]},
        },
        "ratio_to_forward": [9.0, 10.0, 11.0],
        "share_of_matmul_rate": [0.4, 0.5, 0.6],
        "matmul_gflops": [190.0, 200.0, 210.0],
        **changes,
    }


def test_a_table_of_projections(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    result = {
        "settings": {"seed": 0, "repeats": 7},
        "rows": [projection_row(), projection_row(rank=100)],
        "norms": {"model": "mlp", "norms_over_gradient": [1.0, 1.5, 2.0]},
        "bfloat16": {"model": "mlp", "rank": 100, "gain": [1.1, 1.25, 1.3], "difference": 3e-3},
    }
    (tmp_path / "projection-mlp.json").write_text(json.dumps(result))
    lines = speed_tables.projection().splitlines()
    assert lines[0] == (
        "Batches: mlp 500; medians of 7 turns, a ratio with its quartiles; seed 0; 200 GFLOP/s in "
        "matrix products:"
    )
    assert lines[4] == (
        "| mlp (567,434) | 10 | 1,500 | 150 | 7.5 | 10.0 (9.0 to 11.0) | 50 | 120, 120, 120 |"
    )
    assert lines[-1] == (
        "All squared norms of a batch, in times of its one gradient: mlp 1.5. Contracting in "
        "bfloat16 (mlp, 100 directions): 1.25 times the rate, and errors of up to 3.0e-03 of the "
        "largest entry."
    )


def test_a_table_of_curvature_products(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    row = {
        "model": "mlp",
        "num_parameters": 567434,
        "batch_size": 500,
        "seconds": {"gradient": [0.010, 0.0125, 0.020]},
        "over_gradient": {
            "forward over reverse": [2.0, 2.1, 2.2],
            "reverse over reverse": [1.8, 1.9, 2.0],
            "Gauss-Newton": [1.5, 1.7, 1.8],
        },
        "difference": 6e-7,
        "matmul_gflops": [190.0, 200.0, 210.0],
    }
    result = {"settings": {"seed": 0, "repeats": 7}, "rows": [row]}
    (tmp_path / "curvature.json").write_text(json.dumps(result))
    assert speed_tables.curvature().splitlines()[-1] == (
        "| mlp (567,434), 500 | 12.5 | 2.10 (2.00 to 2.20) | 1.90 (1.80 to 2.00) "
        "| 1.70 (1.50 to 1.80) | 6.0e-07 |"
    )


def test_the_line_of_ekfac(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    result = {
        "model": "large_cnn",
        "num_parameters": 793894,
        "num_images": 10000,
        "dataset": "mnist",
        "max_rank": 1024,
        "fit_seconds": [70.0, 50.4],
        "score_seconds": [12.0, 11.6],
        "peak_megabytes": 4100.2,
        "matmul_gflops": 300.4,
        "check": {"max_rank": 2048, "correlation": 0.99951},
    }
    (tmp_path / "ekfac.json").write_text(json.dumps(result))
    assert speed_tables.ekfac() == (
        "10,000 images of mnist, large_cnn (793,894 parameters): 50 s for factors and eigenvalues, "
        "12 s for self-influence, 4,100 MB at most (300 GFLOP/s in matrix products). With 2048 "
        "eigenvectors of the widest factor instead of 1024, self-influence correlates by 0.9995."
    )


def tpu_result(**rows):
    report = {
        "temp_bytes": 2e8,
        "argument_bytes": 1e9,
        "output_bytes": 1e6,
        "compile_seconds": 12.34,
        "device": "TPU v5 lite",
        "versions": {"jax": "0", "libtpu": "1"},
    }
    passes = {"forward_pass": 1e9, "backward_pass": 1e9}
    return {
        "settings": {"topology": "v5e:2x2"},
        "model": "translation",
        "num_parameters": 250_000_000,
        "num_tokens": 64,
        "required_flops": {
            "10": {**passes, "contractions": 2e9},
            "100": {**passes, "contractions": 11e9},
        },
        "rows": [{"step": step, **row, **report} for step, row in rows.items()],
    }


def write_tpu_result(directory):
    """What the line of the published rate is made from."""
    (directory / "tpu-compile-translation.json").write_text(json.dumps(tpu_result()))


def test_tables_of_a_tpu(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    result = tpu_result(
        curvature={"rank": None, "batch_size": 10, "flops": 9e11, "bytes_accessed": 1e9},
        project={"rank": 2, "batch_size": 4, "flops": 1e10, "bytes_accessed": 8e9},
    )
    (tmp_path / "tpu-compile-translation.json").write_text(json.dumps(result))
    assert scaling_tables.tpu_compile().splitlines()[4:] == [
        "| translation (250,000,000) | `curvature` | 10 | 900.0 | 1.00 "
        "| 1,000.0, 1.0, 200.0 | 12.3 |",
        "| translation (250,000,000) | `project`, 2 directions | 4 | 10.0 | 8.00 "
        "| 1,000.0, 1.0, 200.0 | 12.3 |",
    ]
    lines = scaling_tables.scaling().splitlines()
    # A product is 9e10 flops an example: 9e10 / (0.4 x 22.5e12) = 10 ms, and 9e10 / (0.4 x 197e12)
    # = 1.14 ms; 1e8 bytes: 0.33 and 0.12 ms.
    assert lines[4].endswith("| max(10.00, 0.33) = 10.00 ms | max(1.14, 0.12) = 1.14 ms |")
    # 100,000 x 10 ms / 32 = 31.25 s.
    assert "| 31.2 s |" in lines[5]
    # A direction is 1e8 flops, and what does not depend on them 2e9 + 1e9; the bytes are (8e9 - 2 x
    # 1e9) / 4 = 1.5e9. A v2 core holds (8 - 1 - 0.2) / 1, thus 6 directions: two parts, 3e9 bytes
    # at 300e9, 10 ms, are more than 7e9 flops at 9e12; 3,600 x 32 / 10 ms = 11.52 million.
    assert "6 directions fit, s = 2; t = 10.0 ms; 11.52 million an hour" in lines[8]
    # 4e9 flops an example at rank 10, 2.2e6 times an hour, are 2,444e9 a second.
    assert scaling_tables.published().endswith(
        "Were they at rank 10 and of 64 tokens, then by the same count, with a model of "
        "250,000,000 parameters, 4.0 GFLOP an example: 2,444 GFLOP/s, 76 a core."
    )


@pytest.mark.parametrize("route", list(projection.ROUTES))
def test_the_routes_give_the_same_projections(route):
    given = projection.problem("small_cnn", batch_size=2)
    directions = projection.random_directions(given.maps, 2)
    timed = projection.ROUTES[route](given, directions)
    assert timed[1:] == (2, 2)
    gradients = given.maps.example_gradients(given.batch)
    expected = gradients @ np.transpose(directions)
    assert projection.difference(timed.call(), expected) < 1e-5


def test_a_table_of_growth(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    row = {"fit_seconds": 1.26, "score_seconds": 0.5, "added_mb": 40.4, "matmul_gflops": 100.0}
    exponents = {"fit_seconds": 1.001, "score_seconds": 0.9, "added_mb": 0.0}
    axis = {"sizes": [1000, 2000], "rows": [row, row], "exponents": exponents}
    (tmp_path / "scaling.json").write_text(json.dumps({"axes": {"N": axis}}))
    assert scaling_tables.growth().splitlines()[2] == (
        "| N | 1,000, 2,000 | 1.3, 1.3 | 0.50, 0.50 | 40, 40 | 1.00, 0.90, 0.00 |"
    )


def test_a_table_of_turned_labels(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    measured = {
        "fit_seconds": 61.4,
        "auc": 0.912,
        "auc_interval": [0.9, 0.92],
        "average_precision": 0.5,
        "average_precision_interval": [0.45, 0.55],
    }
    rows = [
        {"method": "tracin", "rank": None, "checkpoints": 3, **measured, "throughput": RATES},
        {"method": "loss", "rank": None, "checkpoints": None, **measured},
        {"method": "memorization", "rank": None, "checkpoints": None, **measured},
    ]
    rows[0]["memorization_correlation"] = 0.256
    rows[1]["fit_seconds"] = 0
    settings = {
        "num_train_examples": 100,
        "num_tokens": 5120,
        "num_mislabeled": 10,
        "num_parameters": 1234,
        "num_attributed": 234,
        "num_last_layers": 2,
        "num_retrainings": 10,
        "epochs": 3,
        "test_accuracy": 0.8,
        "num_test_examples": 50,
        "train_accuracy": 0.9,
        "seed": 0,
        "matmul_gflops": 100.0,
    }
    write_tpu_result(tmp_path)
    (tmp_path / "text-qnli-0.json").write_text(json.dumps({"settings": settings, "rows": rows}))
    lines = text_tables.qnli().splitlines()
    assert lines[0].startswith("QNLI, 100 training pairs of 51 tokens, 10 labels turned; a MiniLM")
    assert "80.0% on 50 pairs held out, 90.0% on the given training labels" in lines[0]
    assert lines[4:7] == [
        "| `TracIn`, checkpoints: 3 | 61 | 91.2 (90.0 to 92.0) | 50.0 (45.0 to 55.0) | 0.26 "
        "| 12,346 | 178 | 2.26 | 8 | 2,100 |",
        "| training loss (baseline) |  | 91.2 (90.0 to 92.0) | 50.0 (45.0 to 55.0) |  |  |  |  "
        "|  |  |",
        "| `Memorization`, 10 trainings | 61 | 91.2 (90.0 to 92.0) | 50.0 (45.0 to 55.0) |  |  |  "
        "|  |  |  |",
    ]


def test_a_table_of_passages(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    settings = {
        "num_train_passages": 100,
        "num_train_tokens": 5120,
        "num_layers": 2,
        "width": 128,
        "num_parameters": 1234,
        "epochs": 3,
        "train_perplexity": 31.2,
        "test_perplexity": 99.6,
        "k": 5,
        "rank": ["10"],
        "checkpoints": ["5"],
        "fit_seconds": 2.4,
        "seed": 0,
        "matmul_gflops": 100.0,
    }
    found = [
        {
            "settings": {**settings, "method": method, "complement": complement},
            "throughput": RATES,
            "from_own_source": {"proponents": 0.123, "chance": 0.021},
            # Half of the proponents are the query's own in three of six queries, else none.
            "queries": [
                {"source": source, "proponents": [{"source": "a"}, {"source": "c"}]}
                for source in "ababab"
            ],
        }
        for method, complement in (
            ("tracin", "rayleigh"),
            ("arnoldi", "rayleigh"),
            ("arnoldi", "none"),
        )
    ]
    write_tpu_result(tmp_path)
    (tmp_path / "text-wikitext2-0.json").write_text(json.dumps({"methods": found}))
    lines = text_tables.wikitext2().splitlines()
    assert "100 passages of 51 tokens; a GPT of 2 layers, 128 wide (1,234 parameters)" in lines[0]
    assert "3 epochs; perplexity 31 on these, 100 on what was held out" in lines[0]
    assert (
        "; 6 queries, the 5 first passages of each (± the standard error over queries)" in lines[0]
    )
    # The deviation from 25% is 25, over 5 degrees of freedom: sqrt(6 x 625 / 5 / 6) = 11.2.
    assert lines[4:7] == [
        "| `TracIn`, checkpoints: 5 | 25.0 ± 11.2 | 2.1 | 2 | 12,346 | 178 | 2.26 | 8 | 2,100 |",
        "| `Arnoldi`, rank 10 | 25.0 ± 11.2 | 2.1 | 2 | 12,346 | 178 | 2.26 | 8 | 2,100 |",
        "| `Arnoldi`, rank 10, `complement=None` (as published) | 25.0 ± 11.2 | 2.1 | 2 | 12,346 "
        "| 178 | 2.26 | 8 | 2,100 |",
    ]


def test_a_table_of_stacked_training(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    row = {
        "epochs": 1,
        "runs": 14,
        "num_train": 3072,
        "alone_seconds": 31.04,
        "stacked_seconds": 10.0,
        "ratio": [3.0, 3.1, 3.3],
        "equal_runs": 11,
        "median_difference": 2.4e-6,
        "largest_difference_float64": 0.0,
    }
    settings = {"seed": 0, "batch_size": 64, "turns": 3, "matmul_gflops": 101.0}
    (tmp_path / "stacking.json").write_text(json.dumps({"rows": [row], "settings": settings}))
    lines = attribution_tables.stacking().splitlines()
    assert lines[2] == "| 1 | 14 | 31.0 | 10.0 | 3.1 (3.0 to 3.3) | 11 | 2e-06 | 0e+00 |"
    assert lines[-1].startswith("mlp, 3,072 images a run, batches of 64; medians of 3 turns")


def test_a_table_of_recorded_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    rows = [
        {
            "model": "mlp",
            "num_parameters": 1234,
            "record": record,
            "step_milliseconds": [1.0, milliseconds, 3.0],
            "ratio": [low, 1.1, 1.2],
        }
        for record, milliseconds, low in (("ids and rates", 2.0, 0.98), ("and losses", 2.2, 1.05))
    ]
    settings = {"seed": 0, "batch_size": 64, "turns": 11, "steps": 100, "matmul_gflops": 99.0}
    (tmp_path / "recording.json").write_text(json.dumps({"rows": rows, "settings": settings}))
    lines = attribution_tables.recording().splitlines()
    assert lines[0] == "| model (parameters) | a step, ms | ids and rates | and losses |"
    assert lines[2] == "| mlp (1,234) | 2.1 | +10% (-2 to +20) | +10% (+5 to +20) |"
