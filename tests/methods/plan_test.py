"""Plans, and what is done in the end."""

import numpy as np
import pytest
import tensorflow as tf

import keras_influence as ki
from keras_influence.methods import plan as plans
from keras_influence.methods import planning, resident, work
from tests import cases


def stage(**changes):
    values = {
        "phase": "fit",
        "name": "products",
        "repetitions": 10,
        "seconds_each": 0.5,
        "flops_each": 1e9,
        "hessian_products": 5,
        "calls": {"curvature": 10},
        "device_bytes": 0.0,
        "host_bytes": 3e6,
        "disk_bytes": 0.0,
        "disk_vectors": 0,
    }
    return plans.Stage(**{**values, **changes})


def test_a_plan_adds_up_time_and_takes_the_peak_of_memory():
    second = stage(
        phase="scores", repetitions=4, seconds_each=0.25, host_bytes=7e6, disk_bytes=2e6,
        calls={"project": 4}, hessian_products=0, disk_vectors=3,
    )  # fmt: skip
    plan = plans.Plan("Arnoldi", 100, 3, 10, 8, (stage(), second, stage()), 1.5, 1e6, 0.0)
    assert plan.seconds == 5 + 1 + 5
    assert plan.flops == 10e9 + 4e9 + 10e9
    assert plan.hessian_products == 10
    assert plan.calls == {"curvature": 20, "project": 4}
    assert plan.host_bytes == 7e6 and plan.disk_bytes == 2e6 and plan.disk_vectors == 3
    lines = str(plan).splitlines()
    assert lines[0] == (
        "Arnoldi on 100 training examples, 3 queries: batches of 10, 8 directions at a time"
    )
    cells = [" ".join(line.split()) for line in lines]
    assert cells[1] == "phase stage times each total GFLOP host, MB"
    assert cells[2] == "fit products 10 500 ms 5.0 s 10.0 3"
    assert lines[-1] == (
        "In all 11.0 s, and 1.5 s for tracing; 10 Hessian products, 24 GFLOP; at most 7 MB "
        "resident (1 MB now), 2 MB on the disk."
    )
    printed = []
    plan.summary(printed.append)
    assert printed == lines


def test_an_accelerator_has_a_column():
    plan = plans.Plan("TracIn", 9, 0, 3, 0, (stage(device_bytes=5e6),), 0.0, 0.0, 1e6)
    assert "device, MB" in str(plan) and "of the device 5 MB" in str(plan)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-5, "0.02 ms"), (1.25, "1.2 s"), (119, "119.0 s"), (600, "10.0 min"), (1e4, "2.8 h")],
)
def test_durations(seconds, text):
    assert plans.duration(seconds) == text


def test_memory_that_is_taken_is_seen():
    with resident.MemoryWatch() as watch:
        # Two hundred million bytes for a moment, and a hundred that stay.
        np.ones(25_000_000)
        kept = np.ones(12_500_000)
    assert 195e6 < watch.peak - watch.before < 330e6
    assert 95e6 < watch.after - watch.before < 130e6
    assert len(kept)


def test_memory_is_seen_where_the_system_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(resident, "_CLEAR", tmp_path / "absent" / "clear_refs")
    with resident.MemoryWatch() as watch:
        for _ in range(5):
            np.ones(25_000_000)
    assert 150e6 < watch.peak - watch.before < 260e6


def test_memory_of_an_accelerator(monkeypatch):
    held = iter([{"current": 100, "peak": 900}, {"current": 150, "peak": 400}])
    config = tf.config.experimental
    monkeypatch.setattr(config, "reset_memory_stats", lambda device: None)
    monkeypatch.setattr(config, "get_memory_info", lambda device: next(held))
    with resident.MemoryWatch("GPU:0") as watch:
        pass
    assert (watch.device_before, watch.device_peak) == (100, 400)
    assert resident.accelerator(cases.image_model()) is None


def test_a_dataset_is_known_by_its_first_batches():
    x, y = cases.images(24)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
    load = work.Load.of(dataset, None)
    # Four batches, of which the last is short: taken to be full.
    assert (load.num_examples, load.batch_size, load.num_batches) == (28, 7, 4)
    assert load.example_bytes == 6 * 6 * 4 + 8
    assert len(load.sample) == 3 and not load.in_memory
    unknown = dataset.filter(lambda x, y: True)
    assert work.Load.of(unknown, None).num_examples == 24
    arrays = work.Load.of((x, y), 10)
    assert (arrays.num_examples, arrays.num_batches, arrays.in_memory) == (24, 3, True)


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(10, 4, (3, 4)), (10, 100, (1, 10)), (5, 0.5, (5, 1))]
)
def test_blocks(count, most, expected):
    assert work.blocks(count, most) == expected


def test_a_method_that_does_not_say_what_it_does_is_refused():
    class Louder(ki.GradientDot):
        def scores(self, queries, train):
            return 2 * super().scores(queries, train)

    with pytest.raises(NotImplementedError, match=r"Louder.scores is its own, but no `_scores_w"):
        Louder(cases.image_model()).plan(cases.images())


def test_a_bad_label_shows_in_the_plan():
    x, y = cases.images()
    with pytest.raises(FloatingPointError, match=r"example 6 is not finite"):
        ki.GradientDot(cases.image_model()).plan((x, np.where(np.arange(24) == 6, 3, y)))


def test_memory_of_an_iteration_is_that_of_its_basis(monkeypatch):
    monkeypatch.setattr(planning, "TIMED", planning.ONCE)
    monkeypatch.setattr(work, "_BASIS_BYTES", 2**23)
    # 50,000 inputs: 150,003 parameters, 600 kB a vector; 100 of them 60 MB.
    model = cases.mlp((50_000, 3), dtype="float32")
    x, y = cases.vectors(4, 50_000, dtype="float32")
    plan = ki.Arnoldi(model, 10, 100, complement=None, verbose=0).plan((x, y))
    vector = 4 * 150_003
    held = {each.name: each.host_bytes - plan.host_before for each in plan.stages}
    assert held["Hessian products, a batch"] >= 100 * vector
    assert held["projections on 10 directions"] < 100 * vector
    # The basis, and twice the eigenvectors.
    assert 120 * vector <= held["10 eigenvectors"] < 120 * vector + 50e6
    assert plan.flops > 0 and plan.tracing_seconds > 0
