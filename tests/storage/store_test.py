import errno
import json
import os

import numpy as np
import pytest

from keras_influence import storage

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


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def save(file, array, **kwargs):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        file.write_bytes(b"part")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match=r"No space left"):
        _saved(tmp_path)
    assert os.listdir(tmp_path) == []


def test_torn_stores(tmp_path):
    path = _saved(tmp_path)
    array = (path / "a.npy").read_bytes()
    manifest = (path / "manifest.json").read_text()
    for file, damage, message in (
        ("a.npy", array[:-1], r"a.npy does not match the manifest"),
        ("a.npy", array[:-1] + b"!", r"a.npy does not match the manifest"),
        ("a.npy", None, r"a.npy is missing"),
        ("manifest.json", manifest[:-10].encode(), r"is damaged"),
        ("manifest.json", None, r"has no manifest.json"),
        ("manifest.json", b"{}", r"names no format_version"),
    ):
        intact = (path / file).read_bytes()
        (path / file).unlink() if damage is None else (path / file).write_bytes(damage)
        with pytest.raises(storage.TornStoreError, match=message):
            storage.load_store(path)
        (path / file).write_bytes(intact)
    storage.load_store(path)


def test_no_store_and_a_newer_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory at"):
        storage.load_store(tmp_path / "nothing")
    path = _saved(tmp_path)
    newer = storage.read_manifest(path) | {"format_version": 99}
    (path / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=r"format version 99.*Upgrade"):
        storage.load_store(path)


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
