import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from keras_influence import storage
from keras_influence.storage.zarr import key_value_store

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([1, 2], np.int64)}


def _saved(tmp_path):
    storage.save_store(tmp_path / "store", {"kind": "test"}, ARRAYS)
    return tmp_path / "store"


def test_round_trip(tmp_path):
    manifest, arrays = storage.load_store(_saved(tmp_path))
    assert manifest["kind"] == "test"
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
    assert os.listdir(tmp_path) == ["store"]


def test_an_existing_path_is_left_as_it_is(tmp_path):
    path = _saved(tmp_path)
    with pytest.raises(FileExistsError, match=r"is not overwritten"):
        storage.save_store(path, {"kind": "other"}, {})
    assert storage.read_manifest(path)["kind"] == "test"


def test_kinds_and_shapes_of_arrays(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "zeros": np.zeros((5, 2)),
        "flags": np.array([True, False]),
        "long": random.standard_normal((5000, 300)).astype(np.float32),  # Several chunks.
    }
    storage.save_store(tmp_path / "store", {}, arrays)
    assert len(list((tmp_path / "store" / "long" / "c").iterdir())) > 1
    _, found = storage.load_store(tmp_path / "store")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_a_full_disk_leaves_nothing(tmp_path):
    # A limit on the size of files is met as a full disk is: in the midst of a write.
    program = """
        import errno, pathlib, resource, signal, sys
        import numpy as np
        from keras_influence import storage

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        root = pathlib.Path(sys.argv[1])
        try:
            storage.save_store(root / "store", {}, {"a": np.zeros(10), "b": np.zeros((300, 300))})
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            assert "store" in str(error), error
        else:
            raise SystemExit("no error")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert os.listdir(tmp_path) == []


def test_torn_stores(tmp_path):
    path = _saved(tmp_path)
    chunk = (path / "a/c/0/0").read_bytes()
    manifest = (path / "manifest.json").read_text()
    description = (path / "a/zarr.json").read_text()
    for file, damage, message in (
        ("a/c/0/0", chunk[:-1], r"a/ is missing, damaged or not ours: .*a/c/0/0"),
        ("a/c/0/0", chunk[:-1] + b"!", r"a/ is missing, damaged or not ours: .*a/c/0/0"),
        ("a/c/0/0", None, r"a/ has 0 of its 1 chunks"),
        ("a/zarr.json", None, r"a/ is missing, damaged or not ours"),
        ("a/zarr.json", description.replace("[2,3]", "[3,2]").encode(), r"a/ is missing, damaged"),
        ("manifest.json", manifest[:-10].encode(), r"is damaged"),
        ("manifest.json", manifest.replace("test", "Test").encode(), r"not match its checksum"),
        ("manifest.json", None, r"has no manifest.json"),
        ("manifest.json", b"{}", r"names no format_version"),
    ):
        intact = (path / file).read_bytes()
        (path / file).unlink() if damage is None else (path / file).write_bytes(damage)
        with pytest.raises(storage.TornStoreError, match=message):
            storage.load_store(path)
        (path / file).write_bytes(intact)
    storage.load_store(path)


def test_two_hundred_flipped_bytes_are_found_or_harmless(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"a": random.standard_normal((40, 30)), "b": np.arange(7)}
    storage.save_store(tmp_path / "store", {"kind": "test", "note": [1, {"x": "y"}]}, arrays)
    manifest = storage.read_manifest(tmp_path / "store")
    files = sorted(file for file in (tmp_path / "store").rglob("*") if file.is_file())
    found = 0
    for _ in range(200):
        file = files[random.integers(len(files))]
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[random.integers(len(intact))] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        try:
            other, read = storage.load_store(tmp_path / "store")
        except (storage.TornStoreError, ValueError):
            found += 1
        else:
            assert other == manifest
            for name, array in arrays.items():
                np.testing.assert_array_equal(read[name], array)
        file.write_bytes(intact)
    # Harmless: white space, and what says in other words what the manifest says too.
    assert found > 120


def test_no_store_and_a_newer_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory at"):
        storage.load_store(tmp_path / "nothing")
    path = _saved(tmp_path)
    for version, message in ((99, r"format version 99.*Upgrade"), (1, r"version 1;.*Save it")):
        other = storage.read_manifest(path) | {"format_version": version}
        (tmp_path / str(version)).mkdir()
        (tmp_path / str(version) / "manifest.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=message):
            storage.load_store(tmp_path / str(version))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        storage.save_store(tmp_path / "file" / "store", {}, ARRAYS)
    assert (tmp_path / "file").read_text() == ""


def test_a_bucket():
    """What is done where nothing can be renamed, on objects in memory."""
    place = "memory://bucket/store"
    storage.save_store(place, {"kind": "test"}, ARRAYS)
    manifest, arrays = storage.load_store(place)
    assert manifest["kind"] == "test"
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)
    with pytest.raises(FileExistsError, match=r"is not empty and is not overwritten"):
        storage.save_store(place, {"kind": "other"}, {})
    objects = key_value_store(place + "/")
    assert sorted(objects.list().result()) == [
        b"a/c/0/0",
        b"a/zarr.json",
        b"b/c/0",
        b"b/zarr.json",
        b"manifest.json",
    ]
    chunk = objects.read("a/c/0/0").result().value
    objects.write("a/c/0/0", chunk[:-1] + b"!").result()
    with pytest.raises(storage.TornStoreError, match=r"a/ is missing, damaged or not ours"):
        storage.load_store(place)
    objects.write("manifest.json", None).result()
    with pytest.raises(storage.TornStoreError, match=r"has no manifest.json"):
        storage.load_store(place)


def test_two_processes_do_not_write_in_one_directory(tmp_path):
    program = f"""
        import pathlib
        from keras_influence import storage
        with storage.writing(pathlib.Path({str(tmp_path)!r})):
            print("ready", flush=True)
            input()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        with (
            pytest.raises(storage.StoreInUseError, match=r"Another process is writing in"),
            storage.writing(tmp_path),
        ):
            pass
        other.kill()
    with storage.writing(tmp_path):  # A killed process lets go.
        pass


def test_write_json_keeps_the_old_content_when_it_fails(tmp_path):
    file = tmp_path / "x.json"
    storage.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        storage.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_fingerprints_tell_values_shapes_dtypes_and_order():
    a, b = np.zeros(4, np.float32), np.ones(4, np.float32)
    prints = {
        storage.arrays_fingerprint(arrays)
        for arrays in ([a, b], [b, a], [a], [a.reshape(2, 2)], [a.astype(np.int32)], [a, b, b])
    }
    assert len(prints) == 6
    assert storage.arrays_fingerprint([a.copy(), b]) == storage.arrays_fingerprint([a, b])
    strided = np.arange(8.0)[::2]
    assert storage.arrays_fingerprint([strided]) == storage.arrays_fingerprint([strided.copy()])
