"""How much memory a piece of work takes, by what the system and the device count."""

import ctypes
import pathlib
import resource
import threading
from typing import Any, Self

import keras
import tensorflow as tf

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")
_SAMPLING_SECONDS = 0.002


def resident_bytes(peak: bool = False) -> int:
    """Of this process, now; or the most since the count was last set back.

    Where there is no /proc, always the most that there ever was.
    """
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    field = "VmHWM:" if peak else "VmRSS:"
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def accelerator(model: keras.Model) -> str | None:
    """The device of a model's weights, as TensorFlow's memory counts name it; None for a CPU."""
    spec = tf.DeviceSpec.from_string(model.variables[0].value.device)
    if spec.device_type in (None, "CPU"):
        return None
    return f"{spec.device_type}:{spec.device_index or 0}"


class MemoryWatch:
    """What is resident while it lasts, in bytes, and what an accelerator holds.

    Linux's own count of the peak is set back to what is resident now. Where the system does not
    allow that, a thread looks every two milliseconds.

    Args:
        device: of `accelerator`.

    Attributes:
        before, peak, after: of the host's memory.
        device_before, device_peak: of the accelerator's; zero without one.
    """

    def __init__(self, device: str | None = None):
        self.before = self.peak = self.after = 0
        self.device_before = self.device_peak = 0
        self._device = device
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        _give_back()
        self.before = self.peak = resident_bytes()
        if self._device is not None:
            tf.config.experimental.reset_memory_stats(self._device)
            self.device_before = _device_memory(self._device)["current"]
        try:
            _CLEAR.write_text("5", encoding="ascii")
        except OSError:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self._thread is None:
            self.peak = resident_bytes(peak=True)
        else:
            self._ended.set()
            self._thread.join()
        if self._device is not None:
            self.device_peak = _device_memory(self._device)["peak"]
        _give_back()
        self.after = resident_bytes()
        self.peak = max(self.peak, self.before, self.after)

    def _look(self) -> None:
        while not self._ended.wait(_SAMPLING_SECONDS):
            self.peak = max(self.peak, resident_bytes())


def _device_memory(device: str) -> dict[str, Any]:
    return tf.config.experimental.get_memory_info(device)


def _give_back() -> None:
    """Gives what was freed to the system, where the C library can: it would hide growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
