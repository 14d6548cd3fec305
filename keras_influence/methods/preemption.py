"""SIGTERM, as a machine that is taken away sends it: the step in hand is finished first."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging


@contextlib.contextmanager
def between_steps(what: str) -> Iterator[Callable[[], None]]:
    """Holds SIGTERM back until the function that it gives is called, between two steps.

    That one raises `SystemExit` (143, as a shell reports a process that SIGTERM ended). Outside of
    the main thread, where Python handles no signals, it does nothing.

    Args:
        what: is being done; for the log.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        del frame
        logging.warning("SIGTERM: %s stops when its step is done.", what)
        received.append(number)

    def check() -> None:
        if received:
            received.clear()
            raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGTERM, previous)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)
