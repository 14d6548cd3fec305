import keras
import pytest

import attribution
import keras_influence as ki

SETTINGS = attribution.MethodSettings(
    batch_size=5,
    seed=3,
    num_iterations=6,
    num_hessian_examples=7,
    lissa_depth=8,
    lissa_damping=0.5,
    lissa_scale=20.0,
    lissa_batch_size=4,
    complement="trace",
)


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(loss="mse")
    return model


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        (
            "arnoldi",
            ki.Arnoldi,
            {"rank": 2, "num_iterations": 6, "num_examples": 7, "seed": 3, "complement": "trace"},
        ),
        ("random_projection", ki.RandomProjection, {"rank": 2, "seed": 3}),
        ("ekfac", ki.EKFAC, {"num_examples": 7, "seed": 3, "labels": "sampled"}),
        ("gradient_dot", ki.GradientDot, {"similarity": "dot"}),
        (
            "lissa",
            ki.LiSSA,
            {
                "depth": 8,
                "damping": 0.5,
                "scale_factor": 20.0,
                "hessian_batch_size": 4,
                "seed": 3,
            },
        ),
    ],
)
def test_settings_reach_the_method(model, name, kind, expected):
    method = attribution.build(
        name, model, SETTINGS, rank=2 if name in attribution.WITH_RANK else None
    )
    assert type(method) is kind
    assert {**method.get_config(), **expected, "batch_size": 5} == method.get_config()


@pytest.mark.parametrize(("name", "rank"), [("arnoldi", None), ("gradient_dot", 10)])
def test_rank_belongs_to_the_methods_that_have_one(model, name, rank):
    with pytest.raises(ValueError, match=f"method '{name}', rank {rank}"):
        attribution.build(name, model, SETTINGS, rank)


def test_unknown_method(model):
    with pytest.raises(ValueError, match="'guess'"):
        attribution.build("guess", model, SETTINGS)
