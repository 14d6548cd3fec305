"""Models of keras.applications and KerasHub: right projections, and rules for nearly all."""

import keras
import pytest

from benchmarks import library_models
from keras_influence.gradients.coverage import LAYER_FALLBACK

# At toy sizes, some layers without a rule weigh more than they do: T5's tables of relative
# positions, which are 128 of 3,000 parameters here, and 768 of T5-base's 223 million.
SHARES = {"T5": 0.05, "ViT": 0.004}
# In any dtype, KerasHub's Llama normalises in float32.
TOLERANCES = {"Llama": 1e-5}

FAST_HUB = ("BERT",)
# Hundreds of layers, and minutes each: benchmarks/coverage.py alone holds them to the same bar.
LONG = ("InceptionResNet", "NASNet")
HUB = [each.family for each in library_models.MODELS if each.library == "keras_hub"]
REST = [each.family for each in library_models.MODELS if each.family not in (*HUB, *LONG)]


def check(family):
    (chosen,) = (each for each in library_models.MODELS if each.family == family)
    model, batch = library_models.problem(chosen)
    result = library_models.compare(model, batch)
    assert result.error < TOLERANCES.get(family, 1e-8)
    assert result.coverage.reason is None
    assert not result.coverage.network
    assert result.coverage.shares().get(LAYER_FALLBACK, 0) <= SHARES.get(family, 0)


@pytest.mark.parametrize("family", FAST_HUB)
def test_keras_hub(family):
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [each for each in HUB if each not in FAST_HUB])
def test_the_rest_of_keras_hub(family):
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", REST)
def test_nearly_every_family_of_keras_applications(family):
    check(family)


def test_every_family_of_keras_applications_is_listed():
    # A name that begins otherwise is a family that the list lacks.
    families = tuple(
        each.family for each in library_models.MODELS if each.library == "keras.applications"
    )
    for name in dir(keras.applications):
        assert not name[0].isupper() or name.startswith(families), name
