import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session(free_memory=False)
