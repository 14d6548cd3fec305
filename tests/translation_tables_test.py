import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import translation_tables


def result(seed, **changes):
    settings = {
        "size": "small",
        "num_parameters": {"all": 1000, "last": 200},
        "train_batch": 64,
        "seed": seed,
        "matmul_gflops": 250.0,
        "select_updates": 400,
        "updates": 3000,
    }
    return {
        "settings": settings,
        "num_pairs": 5000,
        "num_noisy": 300,
        "num_held_out": 2000,
        "bleu": {"bleu": 12.0 + seed},
        **changes,
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr("result_files.RESULTS", tmp_path)
    monkeypatch.setattr(translation_tables, "published", lambda: "Published.")

    def write(name, *results):
        for seed, content in enumerate(results):
            path = tmp_path / f"translation-{name}-{seed}.json"
            path.write_text(json.dumps(content), encoding="utf-8")

    return write


COST = {
    "fit_seconds": 300.0,
    "score_seconds": 400.0,
    "num_scored": 5000,
    "pairs_per_hour": 45000.0,
    "tokens_per_second": 430.0,
    "peak_bytes": 2e9,
    "flops_per_pair": 1.25e9,
}


def test_retrieval_and_its_cost(write):
    rows = [
        {
            "score": "arnoldi-all-20",
            "auc": auc,
            "average_precision": 0.5,
            "auc_interval": [0.9, 0.96],
            "average_precision_interval": [0.4, 0.6],
        }
        for auc in (0.93, 0.95)
    ]
    found = [
        result(seed, retrieval=[row], costs={"arnoldi-all": COST}) for seed, row in enumerate(rows)
    ]
    write("permuted", found[0])
    lines = translation_tables.TABLES["permuted"]().splitlines()
    assert lines[0] == (
        "small (1,000 parameters; 200 of them, 20%, in the last decoder layer), 5,000 training "
        "pairs, 300 references wrong, 3,000 updates of 64 pairs; BLEU 12.0; seed 0; 250 GFLOP/s in "
        "matrix products; 5,000 pairs scored:"
    )
    assert lines[4] == (
        "| `Arnoldi`, all layers, rank 20 | 93.0 (90.0 to 96.0) | 50.0 (40.0 to 60.0) |"
    )
    # 45,000 pairs an hour of 1.25 GFLOP are 15.6 GFLOP/s.
    assert lines[-3] == "| `Arnoldi`, all layers | 300 | 45,000 | 430 | 1.25 | 16 | 2,000 |"
    assert lines[-1] == "Published."
    write("permuted", *found)
    lines = translation_tables.retrieval().splitlines()
    assert "BLEU 12.5 (12.0 to 13.0); seeds 0, 1;" in lines[0]
    assert lines[-1] == "| `Arnoldi`, all layers, rank 20 | 94.0 (93.0 to 95.0) | 50.0 |"


def test_selection(write):
    rows = [
        {"method": "none", "share": 1.0, "bleu": 5.0, "noisy_share": 0.3},
        {"method": "arnoldi-all-20", "share": 0.1, "bleu": 6.25, "noisy_share": 0.04},
    ]
    write("mixed", result(0, selection=rows, costs={"arnoldi-all": COST}))
    lines = translation_tables.TABLES["mixed"]().splitlines()
    assert lines[0].endswith(
        "400 updates on what is kept, BLEU on 2,000 held-out pairs, and the share of wrong pairs "
        "in what is kept:"
    )
    assert lines[2:6] == [
        "| chosen by | 10% kept | 100% kept |",
        "| --- | --- | --- |",
        "| no filter (baseline) |  | 5.0, 30% wrong |",
        "| `Arnoldi`, all layers, rank 20 | 6.2, 4% wrong |  |",
    ]


def test_the_rate_on_all_pairs(write):
    forward = {
        "num_pairs": 128,
        "rank": 20,
        "pairs_per_second": 120.0,
        "forward_mode_pairs_per_second": 10.0,
        "ratio": 12.0,
    }
    write("all", result(0, costs={"arnoldi-all": COST}, forward_mode=forward))
    found = translation_tables.TABLES["all"]()
    assert "5,000 pairs scored at rank 20 in 400 s, 45,000 an hour, after 300 s" in found
    assert "12.0 times as fast" in found and "(120.0 and 10.0 pairs a second)" in found
    assert "| `Arnoldi`, all layers | 300 | 45,000 | 430 | 1.25 | 16 | 2,000 |" in found


def test_a_table_without_results_is_an_error(write):
    with pytest.raises(FileNotFoundError, match="no result translation-mixed"):
        translation_tables.TABLES["mixed"]()


# In the place of the example: its results are what `content` says, and where it ran.
EXAMPLE = """
import json, os, pathlib, sys, time
given = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
content = json.loads(pathlib.Path(given["data"]).read_text())
content["settings"]["seed"] = int(given["seed"])
content["arguments"] = [given["noise"], sorted(os.sched_getaffinity(0))]
directory = pathlib.Path(given["output_dir"])
directory.mkdir(parents=True)
(directory / "begun").touch()
other = directory.parent / f"mixed-{1 - int(given['seed'])}" / "begun"
while content["at_once"] == 2 and not other.exists():
    time.sleep(0.05)
(directory / "results.json").write_text(json.dumps(content))
"""

BENCHMARK = """
import pathlib, sys
sys.path.insert(0, sys.argv.pop(1))
import result_files, translation, translation_tables
from absl import app
translation.EXAMPLE = pathlib.Path("example.py")
translation.RESULTS = result_files.RESULTS = pathlib.Path("results")
translation_tables.published = lambda: "Published."
app.run(translation.main)
"""


def test_runs_at_a_time_share_the_processors_and_are_kept(tmp_path):
    selection = [{"method": "none", "share": 1.0, "bleu": 5.0, "noisy_share": 0.3}]
    at_once = min(2, len(os.sched_getaffinity(0)))
    content = result(0, selection=selection, costs={}, at_once=at_once)
    (tmp_path / "data").write_text(json.dumps(content), encoding="utf-8")
    example = tmp_path / "example.py"
    example.write_text(EXAMPLE, encoding="utf-8")
    folder = pathlib.Path(translation_tables.__file__).parent
    flags = ["--data=data", "--work_dir=work", "--runs=mixed", f"--at_once={at_once}"]
    command = [sys.executable, "-c", BENCHMARK, str(folder), *flags]
    for _ in range(2):
        found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        assert "| no filter (baseline) | 5.0, 30% wrong |" in found.stdout.decode().splitlines()
        example.unlink(missing_ok=True)  # Nothing is run again.
    kept = [
        json.loads((tmp_path / "results" / f"translation-mixed-{seed}.json").read_text())
        for seed in (0, 1)
    ]
    assert [each["settings"]["seed"] for each in kept] == [0, 1]
    (noise, first), (_, second) = [each["arguments"] for each in kept]
    assert noise == "mixed" and first and second
    both = [*first, *second] if at_once == 2 else first
    assert sorted(both) == sorted(os.sched_getaffinity(0))
