import json

import pytest

import runs


def test_default_directory_is_named_after_run_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = runs.new_directory(None, "find_mislabeled", "digits-mlp-0")
    assert path.is_dir() and path.parent.as_posix() == "runs/find_mislabeled"
    assert path.name.startswith("digits-mlp-0-2")


def test_two_default_directories_of_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20260102-030405")
    paths = [runs.new_directory(None, "program", "run") for _ in range(3)]
    assert [path.name for path in paths] == [
        "run-20260102-030405",
        "run-20260102-030405-2",
        "run-20260102-030405-3",
    ]


def test_existing_results_are_not_overwritten(tmp_path):
    assert runs.new_directory(tmp_path, "program", "run") == tmp_path
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match="another --output_dir"):
        runs.new_directory(tmp_path, "program", "run")
    with pytest.raises(FileExistsError, match=r"results\.json exists"):
        runs.new_directory(tmp_path / "results.json", "program", "run")


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(path, {"auc": float("nan")})
    assert not path.exists()
    runs.write_json(path, {"auc": 0.5})
    assert json.loads(path.read_text()) == {"auc": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_rate_of_matrix_products(monkeypatch):
    # A clock that ticks once a call makes each product take 1 s: 2 x 8^3 = 1,024 operations.
    ticks = iter(range(100))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(ticks))
    assert runs.matmul_gflops(size=8, repeats=2) == pytest.approx(1024e-9)


def test_a_run_goes_on_under_its_settings_only(tmp_path):
    settings = {"rank": [10], "seed": 0}
    path = runs.resumable_directory(tmp_path / "run", "program", "name", settings)
    assert runs.resumable_directory(path, "program", "name", settings) == path
    with pytest.raises(ValueError, match="holds a run with other settings: rank, size"):
        runs.resumable_directory(path, "program", "name", {"rank": (20,), "seed": 0, "size": 1})
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="another --output_dir"):
        runs.resumable_directory(tmp_path, "program", "name", settings)


def test_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"scores": [1.5, 2], "seconds": 3.0}

    for _ in range(2):
        found = runs.computed(tmp_path / "scores.npz", compute)
        assert found["scores"].tolist() == [1.5, 2] and float(found["seconds"]) == 3
    assert calls == [1]
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.npz"]
    assert runs.digest({"a": [1]}) == runs.digest({"a": (1,)}) != runs.digest({"a": [2]})
