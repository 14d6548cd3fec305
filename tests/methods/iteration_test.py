"""How `Arnoldi` finds its eigenpairs: tolerances, restarts, blocks, starts from queries."""

import numpy as np
import pytest
from absl import logging

import keras_influence as ki
from keras_influence import storage
from tests import cases

OPTIONS = {"tolerance": 1e-6, "max_vectors": 16, "block_size": 2}


def _arnoldi(model, rank=5, **kwargs):
    return ki.Arnoldi(model, rank, batch_size=16, verbose=0, complement=None, damping=0.1, **kwargs)


@pytest.fixture(scope="module")
def problem():
    """An mlp of 44 parameters in float64, its data, and its dense Hessian's spectrum."""
    import keras

    keras.utils.set_random_seed(0)
    model = cases.mlp((3, 7, 2))
    x, y = cases.vectors(32, 3, 2, dtype="float64")
    hessian = cases.dense_hessian(model, cases.cross_entropy, x, y)
    return model, (x, y), hessian


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": 1e-9},
        {"tolerance": 1e-9, "max_vectors": 14},
        {"tolerance": 1e-9, "block_size": 3},
        {"tolerance": 1e-9, "max_vectors": 14, "block_size": 3},
        {"num_iterations": 60, "max_vectors": 12},
    ],
)
def test_pairs_are_those_of_the_dense_hessian(problem, options, capsys):
    model, train, hessian = problem
    arnoldi = _arnoldi(model, **options).fit(train)
    values = np.linalg.eigvalsh(hessian)
    exact = values[np.argsort(-np.abs(values))][:5]
    np.testing.assert_allclose(arnoldi.eigenbasis.values, exact, rtol=1e-7)
    vectors = arnoldi.eigenbasis.vectors
    true = np.linalg.norm(hessian @ vectors.T - vectors.T * arnoldi.eigenbasis.values, axis=0)
    limit = options.get("tolerance", 1e-3) * abs(exact[0])
    assert true.max() <= limit + 1e-12
    arnoldi.summary()
    text = capsys.readouterr().out
    assert f" products from {options.get('block_size', 1)} random vectors" in text
    assert ("restarts of a basis of" in text) == ("max_vectors" in options)
    if "tolerance" in options:
        assert "of the largest lambda): 5 of 5" in text


def test_products_that_end_before_the_tolerance_is_met_are_told(problem, caplog, capsys):
    model, train, _ = problem
    logging.get_absl_logger().propagate = True
    arnoldi = _arnoldi(model, num_iterations=6, tolerance=1e-9).fit(train)
    assert "of 5 pairs have converged to the tolerance 1e-09 in 6 products" in caplog.text
    arnoldi.summary()
    assert "iteration: 6 products from 1 random vectors\n" in capsys.readouterr().out


class _Killed(BaseException):
    pass


def _count_products(method, fail_after=None):
    """Rows that were multiplied: once, for the batches are joined."""
    rows = []

    def counted(product):
        def call(batch, vectors, weights=None):
            if fail_after is not None and sum(rows) + 1 >= fail_after:
                raise _Killed
            rows.append(1 if len(vectors.shape) == 1 else len(vectors))
            return product(batch, vectors, weights)

        return call

    products = [counted(product) for product in method.maps.products("hessian")]
    method.maps.products = lambda kind: products
    return rows


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("with_queries", [False, True])
def test_a_fit_goes_on_to_the_same_bits(problem, tmp_path, place, with_queries):
    model, train, _ = problem
    queries = (train[0][:3] + 0.5, train[1][:3]) if with_queries else None

    def fit(name, fail_after=None):
        basis = {} if place == "host" else {"basis": tmp_path / name}
        method = _arnoldi(model, **OPTIONS, **basis)
        rows = _count_products(method, fail_after)
        method.fit(train, directory=tmp_path / name, queries=queries)
        return method, sum(rows)

    whole, products = fit("whole")
    assert 16 < products < 50
    done = 0
    for fail_after in (5, 7, 2):  # In the first basis, and in later ones.
        with pytest.raises(_Killed):
            fit("killed", fail_after)
        done += fail_after // 2 * 2  # Whole blocks of two.
    resumed, rest = fit("killed")
    assert rest == products - done
    for mine, other in zip(resumed.eigenbasis, whole.eigenbasis, strict=True):
        np.testing.assert_array_equal(mine[:], other[:])
    assert isinstance(resumed.eigenbasis.vectors, storage.StoredRows) == (place == "disk")
    lines = []
    again, rest = fit("killed")
    assert rest == 0
    again.summary(lines.append)
    started = "combinations of the queries' gradients" if with_queries else "random vectors"
    assert any(f"{products} products from 2 {started}, " in line for line in lines)
    # Nothing of the iteration is left there.
    assert not {"basis", "basis.1", "basis.2", "steps"} & {
        path.name for path in (tmp_path / "killed").iterdir()
    }


def test_other_settings_and_other_queries_are_another_fit(problem, tmp_path):
    model, (x, y), _ = problem
    _arnoldi(model).fit((x, y), directory=tmp_path / "fit", queries=(x[:4], y[:4]))
    for options, queries, message in (
        ({"block_size": 2}, (x[:4], y[:4]), "block_size: 1 there, 2 now"),
        ({"tolerance": 1e-3}, (x[:4], y[:4]), "tolerance: None there, 0.001 now"),
        ({"max_vectors": 9}, (x[:4], y[:4]), "max_vectors: None there, 9 now"),
        ({}, (x[:4], 1 - y[:4]), "queries: "),
        ({}, None, "queries: .* there, None now"),
    ):
        with pytest.raises(ValueError, match=message):
            _arnoldi(model, **options).fit((x, y), directory=tmp_path / "fit", queries=queries)


def test_a_basis_from_queries_serves_them_better_than_a_random_one(problem):
    model, train, hessian = problem
    random = np.random.default_rng(5)
    queries = random.standard_normal((6, 3)), random.integers(0, 2, 6)
    # g' (H + damping)^-1 g of each query, for a damping above the negative eigenvalues.
    damping = 0.1 - min(np.linalg.eigvalsh(hessian).min(), 0)
    gradients = ki.ExactInfluence(model, damping=damping).fit(train).maps.example_gradients(queries)
    inverse = np.linalg.inv(hessian + damping * np.eye(44))
    exact = np.einsum("qp,pr,qr->q", gradients, inverse, gradients)

    def error(queries_of_fit, **options):
        arnoldi = ki.Arnoldi(
            model,
            12,
            complement=None,
            damping=damping,
            negative_eigenvalues="keep",
            scale="raw",
            verbose=0,
            **options,
        ).fit(train, queries=queries_of_fit)
        return np.abs(arnoldi.self_influence(queries) / exact - 1).max()

    # A block of the queries' own number spans their gradients: two steps of conjugate gradients
    # for all of them. Random ones need all of the space.
    driven = error(queries, block_size=6)
    assert driven < 0.05
    assert driven < 0.3 * error(None, block_size=6)
    assert driven < 0.3 * error(None)
    # Fewer combinations than queries.
    assert error(queries, block_size=3) < 0.5 * error(None)


def test_bad_settings(problem):
    model, train, _ = problem
    for options, message in (
        ({"block_size": 0}, r"`block_size` must be at least 1. Received: 0"),
        ({"block_size": 4, "num_iterations": 7}, r"`num_iterations`=7, in whole blocks of 4: "),
        ({"max_vectors": 6}, r"two blocks: at least 7. Received: 6"),
        ({"tolerance": -1.0}, r"`tolerance` must be above zero. Received: -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            _arnoldi(model, **options)
    x, y = train
    with pytest.raises(FloatingPointError, match=r"loss of example 1 is not finite"):
        bad = np.concatenate([x[:1], np.full((1, 3), np.nan)])
        _arnoldi(model).fit(train, queries=(bad, y[:2]))
    silent = ki.Arnoldi(cases.linear_regression(3), 2, verbose=0)
    x = np.ones((4, 3))
    fitted = silent.model.predict(x, verbose=0)[:, 0]
    with pytest.raises(ValueError, match=r"gradients of the 4 queries are all zero"):
        silent.fit((x, fitted + 1), queries=(x, fitted))


def test_settings_are_saved(problem, tmp_path):
    model, train, _ = problem
    arnoldi = _arnoldi(model, **OPTIONS).fit(train)
    arnoldi.save(tmp_path / "saved")
    loaded = ki.load(tmp_path / "saved", model)
    config = loaded.get_config()
    assert {name: config[name] for name in OPTIONS} == OPTIONS
    assert config["num_iterations"] is None
    assert loaded.num_iterations == arnoldi.num_iterations == 100
    np.testing.assert_array_equal(loaded.scores(train, train), arnoldi.scores(train, train))


@pytest.mark.parametrize("direction_bytes", [512 * 2**20, 1])
def test_blocks_on_the_devices(problem, direction_bytes):
    model, train, _ = problem
    kwargs = {**OPTIONS, "direction_bytes": direction_bytes}
    host = _arnoldi(model, **kwargs).fit(train).eigenbasis
    device = _arnoldi(model, basis="device", **kwargs).fit(train).eigenbasis
    np.testing.assert_allclose(device.values, host.values, rtol=1e-9)
    np.testing.assert_allclose(np.abs(device.vectors[:]), np.abs(host.vectors), atol=1e-5)
