import os
import subprocess
import sys

import keras_influence as ki


def _import(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_keras_backend_is_refused_at_once():
    # A stand-in for Keras on an installed backend: no test can count on JAX or PyTorch.
    run = _import(
        "import sys, types\n"
        "keras = types.ModuleType('keras')\n"
        "keras.backend = types.SimpleNamespace(backend=lambda: 'jax')\n"
        "sys.modules['keras'] = keras\n"
        "import keras_influence\n"
    )
    assert run.returncode == 1
    assert "KERAS_BACKEND=tensorflow" in run.stderr
    assert "The Keras backend is 'jax'." in run.stderr


def test_a_backend_whose_package_may_be_missing():
    run = _import("import keras_influence", KERAS_BACKEND="numpy")
    assert run.returncode == 1
    assert "KERAS_BACKEND=tensorflow" in run.stderr


def test_every_public_name_is_there():
    assert {name for name in ki.__all__ if not hasattr(ki, name)} == set()
