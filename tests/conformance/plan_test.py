"""Every method does what its plan says: as many products, projections and vectors on the disk."""

import collections

import pytest

import keras_influence as ki
from keras_influence import storage
from keras_influence.methods import InfluenceMethod, curvature, planning
from tests import cases
from tests.conformance.methods_test import GOLDENS

MAPS = (
    "curvature",
    "gradient",
    "project",
    "project_with_norms",
    "squared_norms",
    "example_gradients",
    "gradient_directions",
)
PLANNED = {
    **GOLDENS,
    "on_disk": lambda model, path, **k: ki.Arnoldi(model, 4, 12, basis=path / "basis", **k),
    "drawn": lambda model, _, **k: ki.Arnoldi(model, 4, 12, num_examples=10, **k),
    # Of fifteen parameters, for which there are not many products.
    "exact_influence": lambda model, _, **k: ki.ExactInfluence(
        model, damping=0.1, variables=model.layers[-1].trainable_variables, **k
    ),
    "auto": lambda model, _, **k: ki.ExactInfluence(
        model, num_examples=10, variables=model.layers[-1].trainable_variables, **k
    ),
    # Steps that none of the solutions does without.
    "conjugate_gradient": lambda model, _, **k: ki.ConjugateGradient(
        model, 1e-30, 3, damping=50.0, **k
    ),
    "kfac": lambda model, _, **k: ki.KFAC(model, **k),
    "diagonal_fisher": lambda model, _, **k: ki.DiagonalFisher(model, labels="expected", **k),
    "cosine": lambda model, _, **k: ki.GradientDot(model, "cosine", **k),
}


def test_every_public_method_is_planned():
    public = {
        value
        for value in vars(ki).values()
        if isinstance(value, type) and issubclass(value, InfluenceMethod)
    }
    planned = {InfluenceMethod._registry[cls.__name__] for cls in public}
    assert planned == public
    names = {name.replace("_", "") for name in PLANNED}
    assert {cls.__name__.lower() for cls in public} <= names


@pytest.mark.parametrize("name", PLANNED)
def test_what_is_planned_is_done(name, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "TIMED", planning.ONCE)
    # Small batches, each by itself.
    monkeypatch.setattr(curvature, "_JOINED_BYTES", 0)
    train, queries = cases.images(24), cases.images(5, seed=5)
    # 163 parameters of 4 bytes: two directions at a time, and so three passes for five queries.
    method = PLANNED[name](cases.image_model(), tmp_path, batch_size=7, direction_bytes=2 * 163 * 4)
    plans = method.plan(train, queries), method.plan(train)
    done = collections.Counter()
    for each in MAPS:
        monkeypatch.setattr(method.maps, each, counting(done, each, getattr(method.maps, each)))
    products = method.maps.products

    def counted(kind):
        pair = zip(("curvature", "curvatures"), products(kind), strict=True)
        return tuple(counting(done, name, function) for name, function in pair)

    monkeypatch.setattr(method.maps, "products", counted)
    for each in ("append", "write"):
        rows = counting_rows(done, getattr(storage.StoredRows, each))
        monkeypatch.setattr(storage.StoredRows, each, rows)
    method.fit(train)
    fitted = done.copy()
    method.scores(queries, train)
    # 24 examples in batches of 7, or 10 of them; LiSSA draws a batch for each product, but for a
    # dozen over the whole set.
    batches = {"lissa": 1, "drawn": 2, "auto": 2}.get(name, 4)
    if name == "lissa":
        done["more"] = fitted["more"] = 12 * (4 - 1)
    assert_done(plans[0], done, batches)
    done.clear()
    done.update(fitted)
    method.self_influence(train)
    assert_done(plans[1], done, batches)


def assert_done(plan, done, batches):
    assert plan.calls == {name: count for name, count in done.items() if name in MAPS}
    assert plan.disk_vectors == done["vectors"]
    assert plan.hessian_products * batches == done["curvature"] - done["more"]


def counting(done, name, function):
    def call(*args):
        if name == "curvatures":
            done["curvature"] += len(args[1])
        else:
            done[name] += 1
        return function(*args)

    return call


def counting_rows(done, function):
    def call(rows, *args):
        before = rows.shape[0]
        result = function(rows, *args)
        done["vectors"] += max(rows.shape[0] - before, 0)
        return result

    return call
