"""Fits that are interrupted, and go on."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import keras_influence as ki
from keras_influence import storage
from tests import cases

STEPS = 12


def _problem(seed=0):
    import keras

    keras.utils.set_random_seed(seed)
    return cases.image_model(), cases.images(24)


def _method(model, **kwargs):
    kwargs = {"complement": None, "damping": 0.0, **kwargs}
    return ki.Arnoldi(model, rank=4, num_iterations=STEPS, batch_size=8, verbose=0, **kwargs)


def _same(a, b):
    np.testing.assert_array_equal(a.eigenbasis.values, b.eigenbasis.values)
    np.testing.assert_array_equal(a.eigenbasis.vectors[:], b.eigenbasis.vectors[:])
    np.testing.assert_array_equal(a.eigenbasis.residuals, b.eigenbasis.residuals)
    assert (a.asymmetry, a.orthogonality) == (b.asymmetry, b.orthogonality)


class _Killed(BaseException):
    pass


def _count_products(method, fail_after=None):
    """Products with the Hessian of each fit, whose three batches are joined to one."""
    calls = []
    curvature, curvatures = method.maps.products("hessian")

    def counted(*args):
        if fail_after is not None and len(calls) >= fail_after:
            raise _Killed
        calls.append(1)
        return curvature(*args)

    method.maps.products = lambda kind: (counted, curvatures)
    return calls


@pytest.mark.parametrize(
    ("place", "done", "dtype"),
    [
        *((place, done, None) for place in ("host", "disk") for done in (0, 1, 7, STEPS - 1)),
        ("device", 7, None),
        *((place, 7, "bfloat16") for place in ("host", "device", "disk")),
    ],
)
def test_a_fit_goes_on_to_the_same_bits(tmp_path, place, done, dtype):
    model, train = _problem()
    kwargs = [
        {"basis": str(tmp_path / str(i)) if place == "disk" else place, "basis_dtype": dtype}
        for i in range(2)
    ]
    whole = _method(model, **kwargs[0]).fit(train, directory=tmp_path / "0")
    interrupted = _method(model, **kwargs[1])
    _count_products(interrupted, done)
    with pytest.raises(_Killed):
        interrupted.fit(train, directory=tmp_path / "1")
    resumed = _method(model, **kwargs[1])
    calls = _count_products(resumed)
    resumed.fit(train, directory=tmp_path / "1")
    assert len(calls) == STEPS - done
    _same(resumed, whole)
    assert isinstance(resumed.eigenbasis.vectors, storage.StoredRows) == (place == "disk")
    # When all is done, it is read; and the directory is a saved method.
    again = _method(model, **kwargs[1])
    calls = _count_products(again)
    again.fit(train, directory=tmp_path / "1")
    assert not calls
    _same(again, whole)
    loaded = ki.load(tmp_path / "1", model)
    _same_scores = loaded.scores(train, train)
    np.testing.assert_array_equal(_same_scores, whole.scores(train, train))
    names = sorted(os.listdir(tmp_path / "1"))
    assert names == [
        ".lock",
        "fit.json",
        "manifest.json",
        "residuals",
        "used_damping",
        "values",
        "vectors",
    ]


def test_the_disk_agrees_with_memory(tmp_path):
    model, train = _problem()
    memory = _method(model).fit(train)
    disk = _method(model, basis=tmp_path / "fit").fit(train)
    np.testing.assert_allclose(disk.eigenbasis.values, memory.eigenbasis.values, rtol=1e-5)
    np.testing.assert_allclose(disk.scores(train, train), memory.scores(train, train), rtol=1e-3)
    # A copy, and an index with it, whose vectors are copied by rows.
    disk.save(tmp_path / "copy")
    np.testing.assert_array_equal(
        ki.load(tmp_path / "copy", model).eigenbasis.vectors[:], disk.eigenbasis.vectors[:]
    )
    ki.InfluenceScorer(disk, k=2).index(train).save(tmp_path / "scorer")
    scorer = ki.load(tmp_path / "scorer", model)
    np.testing.assert_array_equal(scorer.method.eigenbasis.vectors[:], disk.eigenbasis.vectors[:])


def test_the_device_agrees_with_memory():
    model, train = _problem()
    memory = _method(model).fit(train)
    device = _method(model, basis="device").fit(train)
    np.testing.assert_allclose(device.eigenbasis.values, memory.eigenbasis.values, rtol=1e-5)
    np.testing.assert_allclose(device.scores(train, train), memory.scores(train, train), rtol=1e-3)
    assert device.orthogonality < 1e-6


@pytest.mark.parametrize("place", ["host", "device", "disk"])
def test_the_summary_says_what_storing_costs(tmp_path, place):
    model, train = _problem()
    where = tmp_path / "fit" if place == "disk" else place
    method = _method(model, basis=where, basis_dtype="bfloat16").fit(train)
    lines = []
    method.summary(lines.append)
    (line,) = [line for line in lines if "basis:" in line]
    assert f"basis: bfloat16, on the {place}; |Q'Q - I| " in line
    # 2^-8 / sqrt(p) of each product, in size.
    assert 1e-6 < method.orthogonality < 5 * 2**-8 / method.maps.parameters.size**0.5
    exact = _method(model).fit(train).eigenbasis
    np.testing.assert_allclose(method.eigenbasis.values, exact.values, rtol=1e-3)
    assert method.eigenbasis.vectors[:].dtype == np.float32


def test_a_dtype_that_no_vector_is_stored_in():
    model, _ = _problem()
    with pytest.raises(ValueError, match=r"None, or 'bfloat16' .* 'float16' for parameters of fl"):
        _method(model, basis_dtype="float16")


def test_a_directory_of_another_fit_is_refused(tmp_path):
    model, train = _problem()
    method = _method(model)
    _count_products(method, 2)
    with pytest.raises(_Killed):
        method.fit(train, directory=tmp_path / "fit")
    with pytest.raises(ValueError, match=r"a fit of something else \(l2: 0.0 there, 0.5 now\)"):
        _method(model, l2=0.5).fit(train, directory=tmp_path / "fit")
    x, y = train
    with pytest.raises(ValueError, match=r"something else \(data: .*; num_train: 24 there, 23"):
        _method(model).fit((x[:-1], y[:-1]), directory=tmp_path / "fit")
    with pytest.raises(ValueError, match=r"something else \(data: "):
        _method(model).fit((x[::-1], y[::-1]), directory=tmp_path / "fit")
    other, _ = _problem(1)
    with pytest.raises(ValueError, match=r"something else \(weights: "):
        _method(other).fit(train, directory=tmp_path / "fit")
    # Nothing was lost by it.
    resumed = _method(model)
    calls = _count_products(resumed)
    resumed.fit(train, directory=tmp_path / "fit")
    assert len(calls) == STEPS - 2


def test_directories_that_are_no_fits(tmp_path):
    model, train = _problem()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no fit, but \['notes.txt'\]"):
        _method(model).fit(train, directory=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"The basis lies in 'a', .* another directory: 'b'"):
        _method(model, basis="a").fit(train, directory="b")
    with pytest.raises(ValueError, match=r"must be on a local disk.*gs://"):
        _method(model, basis="gs://bucket/basis")
    with storage.writing(tmp_path / "busy"):
        program = f"""
            import keras_influence as ki
            from tests.methods import resumption_test as test
            model, train = test._problem()
            try:
                test._method(model).fit(train, directory={str(tmp_path / "busy")!r})
            except ki.storage.StoreInUseError as error:
                raise SystemExit("busy: " + str(error))
        """
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
        )
        assert ended.returncode == 1
        assert "busy: Another process is writing in" in ended.stderr


def test_a_damaged_record_is_named(tmp_path):
    model, train = _problem()
    method = _method(model)
    _count_products(method, 3)
    with pytest.raises(_Killed):
        method.fit(train, directory=tmp_path / "fit")
    file = tmp_path / "fit/steps/00000001.json"
    file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.raises(storage.TornStoreError, match=r"00000001.json does not match its checksum"):
        _method(model).fit(train, directory=tmp_path / "fit")


def test_a_full_disk_costs_no_step(tmp_path, monkeypatch):
    model, train = _problem()
    whole = _method(model).fit(train, directory=tmp_path / "whole")
    appended = []
    append = storage.StoredRows.append

    def full(self, vector):
        if len(appended) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
        appended.append(append(self, vector))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left"):
        patch.setattr(storage.StoredRows, "append", full)
        _method(model).fit(train, directory=tmp_path / "fit")
    resumed = _method(model)
    calls = _count_products(resumed)
    resumed.fit(train, directory=tmp_path / "fit")
    assert len(calls) == STEPS - 4  # Of five vectors the fifth belongs to the step to come.
    _same(resumed, whole)


def test_sigterm_finishes_the_step(tmp_path):
    program = f"""
        import os, signal
        from tests.methods import resumption_test as test
        model, train = test._problem()
        method = test._method(model)
        curvature, curvatures = method.maps.products("hessian")
        calls = []
        def product(*args):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return curvature(*args)
        method.maps.products = lambda kind: (product, curvatures)
        try:
            method.fit(train, directory={str(tmp_path / "fit")!r})
        finally:
            print(len(calls), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert ended.stdout == "3 True\n"
    assert len(os.listdir(tmp_path / "fit/steps")) == 3
