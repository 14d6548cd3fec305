"""Several processes, of which the first alone reads and writes files, and tells the others.

All run the same program: each calls the functions here in the same order.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_influence import distribution, storage


class ChiefError(RuntimeError):
    """What the first worker was to do for all of them failed there."""


class Workers:
    """The processes that a model's strategy runs in, or this one alone.

    Args:
        model: whose strategy.

    Attributes:
        several: whether there are others.
        chief: whether this one holds the files.
        name: that tells this process from the others.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self.several = distribution.has_several_workers(model)
        self.chief = not self.several or distribution.is_chief(model)
        self.name = f"worker{distribution.worker_number(model) if self.several else 0}"

    def told(self, make: Callable[[], Any]) -> Any:
        """What `make()`, done by the chief alone, gives: a JSON value, in every process.

        Raises:
            ChiefError: in the others, where `make` raised in the chief.
        """
        if not self.several:
            return make()
        value, error = None, None
        if self.chief:
            try:
                value = make()
            except Exception as raised:
                error = raised
        told = {"value": value, "error": error and f"{type(error).__name__}: {error}"}
        text = self._sent(json.dumps(told).encode())
        if error is not None:
            raise error
        answer = json.loads(text)
        if answer["error"] is not None:
            raise ChiefError(f"The first worker could not go on: {answer['error']}")
        return answer["value"]

    def given(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array that `make()`, done by the chief alone, gives: the same bits everywhere."""
        if not self.several:
            return make()
        arrays: list[np.ndarray] = []

        def described() -> tuple[list[int], str]:
            arrays.append(np.asarray(make()))
            return list(arrays[0].shape), arrays[0].dtype.str

        shape, dtype = self.told(described)
        content = self._sent(arrays[0].tobytes() if self.chief else b"")
        return np.frombuffer(content, dtype)[: int(np.prod(shape))].reshape(shape).copy()

    def each(self, do: Callable[[], None]) -> None:
        """Does it in every process, in the chief first: where that fails, it fails in all."""
        self.told(do)
        if not self.chief:
            do()

    def agree(self, what: str, value: Any) -> None:
        """Compares a JSON value with the chief's.

        Raises:
            ValueError: they differ.
        """
        theirs = self.told(lambda: value)
        if theirs != json.loads(json.dumps(value)):
            raise ValueError(
                f"This worker's {what} is not that of the first one: {value!r} here, {theirs!r} "
                "there. Run the same program, with the same model and data, in every worker."
            )

    @contextlib.contextmanager
    def writing(self, directory: pathlib.Path) -> Iterator[None]:
        """`storage.writing` of the chief."""
        with contextlib.ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(storage.writing(directory))

            self.told(enter)
            yield

    def _sent(self, content: bytes) -> bytes:
        """The chief's bytes, and zeros after them."""
        # As integers, whose sum with the others' zeros changes no bit.
        length = np.array([len(content) if self.chief else 0], np.int64)
        (length,) = distribution.sum_over_workers(self._model, length)
        numbers = np.zeros(-(-int(length) // 8), np.int64)
        if self.chief:
            numbers.view(np.uint8)[: len(content)] = np.frombuffer(content, np.uint8)
        if not len(numbers):
            return b""
        return distribution.sum_over_workers(self._model, numbers).tobytes()[: int(length)]
