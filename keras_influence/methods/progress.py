"""A progress bar for long work."""

import keras


class Progress:
    """A Keras progress bar, or nothing."""

    def __init__(self, what: str, target: int | None, show: bool):
        self._bar = keras.utils.Progbar(target, unit_name=what) if show else None

    def add(self, count: int) -> None:
        if self._bar is not None:
            self._bar.add(count)

    def close(self) -> None:
        if self._bar is not None and self._bar.target is None:
            self._bar.target = self._bar._seen_so_far
            self._bar.update(self._bar.target, finalize=True)
