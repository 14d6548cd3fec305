"""Jobs that fit the memory that they may take."""

import numpy as np
import pytest

import keras_influence as ki
from keras_influence.methods import planning, settling
from tests import cases

VECTOR = 163 * 4


@pytest.fixture
def costs(monkeypatch):
    """A job that takes 1,000 bytes for each example of a batch, and six for each of directions."""
    tried = []

    def needed(method, dataset, batch_size, direction_bytes):
        place = getattr(method, "basis", "")
        tried.append((batch_size, direction_bytes, place))
        basis = {"host": 100_000, "device": 200_000}.get(place, 0)
        method.batch_size, method.direction_bytes = batch_size, direction_bytes
        return basis + 1000.0 * batch_size + 6 * direction_bytes, "fit, products"

    monkeypatch.setattr(settling, "_needed", needed)
    return tried


def settled(budget, places=(), batch_size=24):
    method = ki.Arnoldi(cases.image_model(), 2, 4, batch_size=batch_size, memory_budget=budget)
    settling.settle(method, cases.images(24), places)
    return method


def test_what_fits_is_left_as_it_is(costs):
    method = settled(1e12)
    assert (method.batch_size, method.direction_bytes) == (24, 512 * 2**20)


def test_batches_are_the_largest_that_were_seen_to_fit(costs):
    # The least is 100 kB for the basis, 1 kB, and 6 x 652 bytes; 12 kB are left.
    budget = 100_000 + 1_000 + 6 * VECTOR + 12_000
    method = settled(budget, ("host",))
    assert method.direction_bytes == 12_000 / 6
    # 6 x 2,000 bytes of directions, and 1, 4 (3.9 kB of the least were for a direction), 16.
    assert method.batch_size == 4
    assert [size for size, *_ in costs] == [1, 4]
    assert 100_000 + 1000 * method.batch_size + 6 * method.direction_bytes <= budget


def test_a_basis_goes_where_there_is_room(costs, tmp_path):
    budget = 150_000
    places = ("device", "host", str(tmp_path))
    assert settled(budget, places).basis == "host"
    assert settled(50_000, places).basis == str(tmp_path)


def test_what_does_not_fit_is_told(costs):
    method = ki.Arnoldi(cases.image_model(), 2, 4, memory_budget=50_000)
    with pytest.raises(
        ValueError, match=r"at least, one example and one direction.*: fit, prod"
    ) as e:
        method.fit(cases.images(24))
    assert "pass a directory to `fit`" in str(e.value)
    # Nothing of the method has changed.
    assert method.batch_size is None and method.basis == "host"


def test_a_fit_that_goes_on_keeps_what_it_was_begun_with(tmp_path, monkeypatch):
    model, train = cases.image_model(), cases.images(24)
    kwargs = {"batch_size": 8, "verbose": 0}
    first = ki.Arnoldi(model, 2, 4, **kwargs).fit(train, tmp_path / "fit")
    monkeypatch.setattr(settling, "_needed", None)
    again = ki.Arnoldi(model, 2, 4, memory_budget=1e12, **{**kwargs, "batch_size": 24})
    again.fit(train, tmp_path / "fit")
    assert again.batch_size == 8
    np.testing.assert_array_equal(again.eigenbasis.values, first.eigenbasis.values)


@pytest.mark.parametrize("name", ["arnoldi", "gradient_dot"])
def test_a_job_with_room_gives_the_same_scores(name, monkeypatch):
    # By trials of the work itself.
    monkeypatch.setattr(planning, "TIMED", planning.ONCE)
    make = {
        "arnoldi": lambda **k: ki.Arnoldi(cases.image_model(), 2, 4, complement=None, **k),
        "gradient_dot": lambda **k: ki.GradientDot(cases.image_model(), **k),
    }[name]
    train, queries = cases.images(24), cases.images(3, seed=5)
    method = make(batch_size=8, memory_budget=8e9)
    method.fit(train)
    assert method.batch_size == 8 and method.get_config()["memory_budget"] == 8e9
    plain = type(method).from_config({**method.get_config(), "memory_budget": None}, method.model)
    expected = plain.fit(train).scores(queries, train)
    np.testing.assert_allclose(method.scores(queries, train), expected, rtol=1e-5, atol=1e-7)
