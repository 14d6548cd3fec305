"""Directories and records of the examples' runs."""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

import keras_influence as ki

SETTINGS_FILE = "settings.json"


def new_directory(path: str | os.PathLike | None, program: str, name: str) -> pathlib.Path:
    """Makes the directory of a run's results; never one in which there is something already.

    Args:
        path: The directory; None for one named after the run and the time, under `runs/program`.
        program: Name of the program.
        name: What tells the run from others of the program.

    Raises:
        FileExistsError: If `path` exists and is not empty.
    """
    if path is None:
        path = first = pathlib.Path("runs", program, f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        number = 1
        while path.exists():
            number += 1
            path = first.with_name(f"{first.name}-{number}")
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists and is not an empty directory; nothing in it is overwritten. Pass "
            "another --output_dir, or none."
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def resumable_directory(
    path: str | os.PathLike | None, program: str, name: str, settings: dict[str, Any]
) -> pathlib.Path:
    """The directory of a run's results, new, or of an earlier run with the same settings.

    Args:
        path: The directory; None for a new one, as `new_directory` makes it.
        program: Name of the program.
        name: What tells the run from others of the program.
        settings: All that the results depend on, as JSON values.

    Raises:
        FileExistsError: If `path` holds something else.
        ValueError: If it holds a run with other settings.
    """
    if path is not None and (kept := pathlib.Path(path, SETTINGS_FILE)).is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        names = sorted(set(before) | set(now))
        changed = [name for name in names if before.get(name) != now.get(name)]
        if changed:
            raise ValueError(
                f"{path} holds a run with other settings: {', '.join(changed)}. Pass another "
                "--output_dir, or the settings of the run to go on with it."
            )
        return pathlib.Path(path)
    directory = new_directory(path, program, name)
    write_json(directory / SETTINGS_FILE, settings)
    return directory


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes all of a JSON file or nothing, so that its presence means a finished run."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def digest(content: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def computed(
    path: pathlib.Path, compute: Callable[[], dict[str, ArrayLike]]
) -> dict[str, NDArray[Any]]:
    """What `compute` returns, by name: computed once, and read from the .npz file `path` later."""
    if not path.exists():
        unfinished = path.with_name(f"{path.stem}.unfinished.npz")
        np.savez(unfinished, **compute())
        os.replace(unfinished, path)
    with np.load(path) as kept:
        return dict(kept)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """Versions of what the numbers come from."""
    return {
        "keras": keras.__version__,
        "keras_influence": ki.__version__,
        "tensorflow": tf.__version__,
    }


def matmul_gflops(size: int = 2048, repeats: int = 5) -> float:
    """Best measured rate of a product of two square float32 matrices, in GFLOP/s."""
    matrix = tf.random.stateless_normal((size, size), seed=(0, 0))
    tf.matmul(matrix, matrix).numpy()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        tf.matmul(matrix, matrix).numpy()
        seconds.append(time.perf_counter() - start)
    return 2e-9 * size**3 / min(seconds)
