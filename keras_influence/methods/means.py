"""Sums over batches of examples and draws of labels, that a killed process can go on with."""

import functools
import operator
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
import tensorflow as tf

from keras_influence import data, distribution, storage
from keras_influence.workers import Workers

# Batches whose sums are added up on the devices before they come to the host.
_BATCHES = 8
# Between two writes.
_SECONDS = 60.0


# See `Sums.means`.
Function = Callable[..., Any]


class _Durable(NamedTuple):
    """A directory of the chief for sums, and what is called between their parts."""

    directory: pathlib.Path
    check: Callable[[], None]
    workers: Workers


class Sums:
    """Means over the examples of what a function gives for a batch.

    Args:
        model: whose strategy it runs under.
        frozen: the examples.
        draws: of labels for each example.
        added: whether the draws are terms of a sum, and not samples to take the mean of.
        durable: by `durable`, for a fit in a directory.
        progress: told the number of batches that are done.
        steps_per_execution: see `steps`.
    """

    def __init__(
        self,
        model: keras.Model,
        frozen: Sequence[data.Batch],
        draws: int,
        added: bool,
        durable: _Durable | None,
        progress: Callable[[int], None],
        steps_per_execution: int = 1,
    ):
        self._model = model
        self._frozen = frozen
        self._draws = draws
        self._durable = durable
        self._progress = progress
        self._steps_per_execution = steps_per_execution
        self._num_examples = sum(batch.num_examples for batch in frozen)
        self._over_draws = 1 if added else draws
        self._written = 0.0  # When, last.

    @classmethod
    def durable(
        cls: type[Self], directory: pathlib.Path, check: Callable[[], None], workers: Workers
    ) -> _Durable:
        return _Durable(directory, check, workers)

    def means(
        self,
        name: str,
        like: Any,
        function: Function,
        *operands: Any,
        first: Function | None = None,
    ) -> Any:
        """Means over the examples of what is summed over batches and draws, as NumPy arrays.

        Args:
            name: of the sums, among those of one fit.
            like: the nest that they make up: that of `first`, where there is one.
            function: ((examples, ids), *operands, draw, weights) -> a nest of sums.
            first: in its place at the first draw: a pair, of which the second is what `function`
                gives, and the first depends on no draw.

        Raises:
            FloatingPointError: a sum is not finite.
        """
        total, done = self._read(name, like)
        self._written = time.monotonic()
        for start in range(done, len(self._frozen), _BATCHES):
            part = self._frozen[start : start + _BATCHES]
            placed = distribution.place(map(with_ids, part), self._model, self._steps_per_execution)
            sums = None
            for draw in range(self._draws):
                found = distribution.total(
                    first if first is not None and draw == 0 else function,
                    placed,
                    self._model,
                    *operands,
                    tf.constant(draw),
                )
                if sums is None:
                    sums = found
                elif first is None:
                    sums = _sum(sums, found)
                else:
                    sums = (sums[0], _sum(sums[1], found))
            sums = tf.nest.map_structure(np.asarray, sums)
            if not all(np.isfinite(leaf).all() for leaf in tf.nest.flatten(sums)):
                raise FloatingPointError(f"The sum of the {name} is not finite.")
            total = sums if total is None else _sum(total, sums)
            self._progress(len(part))
            done = start + len(part)
            self._keep(name, total, done)
        if first is None:
            return _divided(total, self._num_examples * self._over_draws)
        once, each = total
        return (
            _divided(once, self._num_examples),
            _divided(each, self._num_examples * self._over_draws),
        )

    def _read(self, name: str, like: Any) -> tuple[Any, int]:
        """What was summed, and of how many batches."""
        if self._durable is None:
            return None, 0
        workers = self._durable.workers
        stored: list[np.ndarray] = []

        def read() -> tuple[int, int]:
            done, path = max(self._stored(name), default=(0, None))
            if path is not None:
                _, arrays = storage.load_store(path)
                stored.extend(arrays[f"sum_{number}"] for number in range(len(arrays)))
            return done, len(stored)

        done, count = workers.told(read)
        if not done:
            return None, 0
        leaves = [
            workers.given(functools.partial(stored.__getitem__, number)) for number in range(count)
        ]
        self._progress(done)
        return tf.nest.pack_sequence_as(like, leaves), done

    def _keep(self, name: str, total: Any, done: int) -> None:
        """Writes what was summed where it is time to, and ends where that was asked for."""
        if self._durable is None:
            return

        def when_due() -> None:
            if done == len(self._frozen) or time.monotonic() - self._written > _SECONDS:
                self._write(name, total, done)
                self._written = time.monotonic()

        self._durable.workers.told(when_due)
        try:
            self._durable.check()
        except SystemExit:
            if self._durable.workers.chief:
                self._write(name, total, done)
            raise

    def _write(self, name: str, total: Any, done: int) -> None:
        assert self._durable is not None
        before = list(self._stored(name))
        if any(number == done for number, _ in before):
            return
        self._durable.directory.mkdir(exist_ok=True)
        leaves = enumerate(tf.nest.flatten(total))
        arrays = {f"sum_{number}": np.asarray(leaf) for number, leaf in leaves}
        storage.save_store(self._durable.directory / f"{name}-{done:08d}", {}, arrays)
        for _, older in before:
            shutil.rmtree(older)

    def _stored(self, name: str) -> Iterator[tuple[int, pathlib.Path]]:
        if self._durable is None:
            return
        for path in self._durable.directory.glob(f"{name}-*"):
            yield int(path.name.rsplit("-", 1)[1]), path


def with_ids(batch: data.Batch) -> data.Batch:
    """With (examples, ids [B]) for examples."""
    ids = np.zeros(len(batch.weights), np.int64)
    ids[: batch.num_examples] = batch.ids
    return batch._replace(examples=(batch.examples, ids))


def _sum(a: Any, b: Any) -> Any:
    return tf.nest.map_structure(operator.add, a, b)


def _divided(sums: Any, count: int) -> Any:
    return tf.nest.map_structure(lambda each: each / each.dtype.type(count), sums)
