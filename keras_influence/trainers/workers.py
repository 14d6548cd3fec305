"""Several processes for one piece of work, each with its share of the processors."""

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

_POLL_SECONDS = 0.2


def run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    processes: int,
    progress: Callable[[], None],
) -> None:
    """Calls `function(*arguments)` in each of some new processes, and waits for them.

    Args:
        function: a top-level function of a module.
        arguments: what can be pickled.
        processes: how many.
        progress: called from time to time.

    Raises:
        RuntimeError: when one has failed; the others are ended.
    """
    # TensorFlow does not survive a fork.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // processes)
    children = [
        context.Process(target=_with_threads, args=(threads, function, arguments))
        for _ in range(processes)
    ]
    try:
        for child in children:
            child.start()
        while any(child.is_alive() for child in children):
            if any(child.exitcode for child in children):
                break
            time.sleep(_POLL_SECONDS)
            progress()
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            if child.pid is not None:
                child.join()
    failed = [child.exitcode for child in children if child.exitcode]
    if failed:
        raise RuntimeError(
            f"A process of {processes} ended with code {failed[0]}; its error stands above. What "
            "was done by then is kept."
        )


def _with_threads(threads: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    function(*arguments)


def is_orphan() -> bool:
    """Whether this process was started by `run` in one that is gone."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()
