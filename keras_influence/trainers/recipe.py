"""One training run: the model, the order of its examples, and what is measured afterwards."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence import checkpoints, data
from keras_influence.gradients import PerExampleLoss
from keras_influence.gradients.graphs import tensor_bytes

MakeModel = Callable[[], keras.Model]
TrainFunction = Callable[[keras.Model, data.Examples], Any]
Measurement = Callable[[Any, np.ndarray], np.ndarray]

# Examples measured at once: at most so many, and, of more than a few, as many as compute so many
# bytes in all, of which a small part is held at any time.
_MOST_ROWS, _FEW_ROWS, _MOST_BYTES = 1024, 32, 2**32


def derived_seed(*parts: int) -> int:
    """A seed for `keras.utils.set_random_seed`, which takes 32 bits."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def make(make_model: MakeModel, seed: int) -> keras.Model:
    """The model that `make_model` gives under `seed`, compiled and built."""
    keras.utils.set_random_seed(seed)
    model = make_model()
    if not isinstance(model, keras.Model) or not getattr(model, "compiled", False):
        raise ValueError(
            "`make_model` must return a compiled Keras model. Received: "
            f"{type(model).__name__}{' that is not compiled' * isinstance(model, keras.Model)}."
        )
    return model


def epoch_order(ids: np.ndarray, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The examples of one epoch in the order in which they are trained on."""
    if not shuffle:
        return ids
    return np.random.default_rng([seed, epoch]).permutation(ids)


class Recipe:
    """How a model is trained: the arguments of `fit`, or a function.

    Args:
        fit: arguments of `model.fit` but for the data, as JSON values: `epochs`, `batch_size`,
            `shuffle`, `class_weight`. `verbose` is 0.
        train_fn: trains `model` on `examples` in place of `fit`.
    """

    def __init__(self, fit: dict[str, Any] | None, train_fn: TrainFunction | None):
        if (fit is None) == (train_fn is None):
            raise ValueError("Pass either `fit`, arguments of `model.fit`, or `train_fn`.")
        try:
            self.fit = None if fit is None else json.loads(json.dumps(fit))
        except TypeError as error:
            raise ValueError(
                f"`fit` must hold JSON values, which the bank's record keeps ({error}). What needs "
                "objects, such as callbacks, belongs in a `train_fn`."
            ) from None
        self.train_fn = train_fn
        options = dict(self.fit or {})
        self.epochs = options.pop("epochs", 1)
        self.batch_size = options.pop("batch_size", 32)
        self.shuffle = options.pop("shuffle", True)
        unknown = options.keys() - {"class_weight"}
        if unknown:
            raise ValueError(
                f"`fit` takes epochs, batch_size, shuffle and class_weight. Received: "
                f"{sorted(unknown)}. What needs more belongs in a `train_fn`."
            )
        # JSON made its keys text.
        weights = options.get("class_weight")
        self.class_weight = weights and {int(label): weight for label, weight in weights.items()}

    def train(
        self,
        model: keras.Model,
        examples: data.Examples,
        seed: int,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> None:
        """Trains `model` on `examples`, whose order in each epoch `seed` decides."""
        if self.train_fn is not None:
            self.train_fn(model, examples)
            return
        rows = np.arange(len(examples.ids))
        order = np.stack(
            [epoch_order(rows, seed, epoch, self.shuffle) for epoch in range(self.epochs)]
        )
        arrays = tf.nest.map_structure(tf.constant, examples.arrays)
        dataset = tf.data.Dataset.from_tensor_slices(order).flat_map(
            lambda rows: tf.data.Dataset.from_tensor_slices(rows).batch(self.batch_size)
        )
        dataset = dataset.map(
            lambda rows: tf.nest.map_structure(lambda array: tf.gather(array, rows), arrays)
        )
        model.fit(
            data.untuned(dataset.prefetch(8)),
            epochs=self.epochs,
            steps_per_epoch=-(-len(rows) // self.batch_size),
            class_weight=self.class_weight,
            shuffle=False,  # The order is ours.
            callbacks=list(callbacks),
            verbose=0,
        )

    def describe(self) -> dict[str, Any]:
        return {"fit": self.fit, "train_fn": self.train_fn and described_function(self.train_fn)}


def described_function(function: Callable) -> dict[str, str]:
    """Name of a function, or content of a callable object, and a digest of its text."""
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        text = inspect.getsource(named)
    except (OSError, TypeError):
        text = ""
    # Without its module, which is `__main__` where the program itself is run.
    name = named.__qualname__
    return {
        "name": name if named is function else f"{name}: {function!r}",
        "source": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
    }


def described_model(model: keras.Model) -> dict[str, Any]:
    """What a compiled model is, the same for each that one function makes."""
    try:
        config = _unnumbered([model.get_config(), model.get_compile_config()])
    except (TypeError, ValueError, NotImplementedError):
        config = ""  # A subclassed model; its variables and their values have to do.
    optimizer = getattr(model, "optimizer", None)
    return {
        "class": type(model).__qualname__,
        "config": hashlib.blake2b(config.encode(), digest_size=16).hexdigest(),
        "architecture": checkpoints.architecture_fingerprint(model),
        "initial_weights": checkpoints.weights_fingerprint(model),
        "optimizer": optimizer and json.loads(_unnumbered(optimizer.get_config())),
    }


def _unnumbered(config: Any) -> str:
    """As JSON, without what Keras counts in names, and without addresses of functions."""
    text = json.dumps(config, sort_keys=True, default=str)
    return re.sub(r'_\d+"', '"', re.sub(r" at 0x[0-9a-f]+", "", text))


class Measurements:
    """What is recorded of a trained model on labelled examples, one number an example.

    Args:
        chosen: `"loss"` (the loss that the model was compiled with), `"margin"` (of a classifier:
            log p_y - log (1 - p_y)), `"correct"` (1 or 0), and functions (y, outputs) -> [n].
    """

    def __init__(self, chosen: Sequence[str | Measurement]):
        self.names = [
            measurement if isinstance(measurement, str) else measurement.__name__
            for measurement in chosen
        ]
        unknown = {name for name in chosen if isinstance(name, str)} - {"loss", "margin", "correct"}
        if unknown or not chosen or len(set(self.names)) < len(self.names):
            raise ValueError(
                '`measurements` are "loss", "margin", "correct" or functions (y, outputs) -> [n], '
                f"each under a name of its own. Received: {self.names}."
            )
        self._chosen = list(chosen)

    def describe(self) -> list[Any]:
        return [m if isinstance(m, str) else described_function(m) for m in self._chosen]

    def of(self, model: keras.Model) -> Callable[[data.Examples], np.ndarray]:
        """A function that measures `model` with the weights that it has when it is called.

        It takes examples and gives float32 [measurements, n]. It is traced once, which is what
        measuring a small model costs, and of many examples twice more, to see what each takes.
        """
        loss, chosen = PerExampleLoss(model), self._chosen
        from_logits = _from_logits(model)

        def evaluate(x: Any, y: Any, weights: list[Any]) -> tuple[Any, tf.Tensor]:
            outputs = model(x, training=False)
            return outputs, loss(y, outputs, *weights)

        traced = tf.function(evaluate, reduce_retracing=True)
        sizes: dict[str, int] = {}

        def measure(examples: data.Examples) -> np.ndarray:
            count = len(examples.ids)
            shapes = str([leaf.shape[1:] for leaf in tf.nest.flatten(examples.arrays)])
            if count > _FEW_ROWS and shapes not in sizes:
                sizes[shapes] = _rows_at_once(evaluate, examples)
            size = sizes.get(shapes, _FEW_ROWS)
            parts = []
            for start in range(0, count, size):
                tensors = _arguments(examples, np.arange(start, min(start + size, count)))
                y = tf.nest.map_structure(np.asarray, tensors[1])
                outputs, losses = tf.nest.map_structure(np.asarray, traced(*tensors))
                parts.append([self._measure(m, y, outputs, losses, from_logits) for m in chosen])
            return np.concatenate([np.stack(part) for part in parts], axis=1).astype(np.float32)

        return measure

    def _measure(
        self,
        measurement: str | Measurement,
        y: Any,
        outputs: Any,
        losses: np.ndarray,
        from_logits: bool,
    ) -> np.ndarray:
        if measurement == "loss":
            values = losses
        elif measurement == "margin":
            values = _margins(_labels(y), outputs.astype(np.float64), from_logits)
        elif measurement == "correct":
            values = _correct(_labels(y), outputs, from_logits)
        else:
            assert callable(measurement)
            values = np.asarray(measurement(y, outputs))
        expected = (len(tf.nest.flatten(y)[0]),)
        if values.shape != expected:
            raise ValueError(
                f"A measurement is one number an example, {expected}. Received: shape "
                f"{values.shape} of {measurement!r}."
            )
        return values


def _arguments(examples: data.Examples, rows: np.ndarray) -> tuple[Any, Any, list[Any]]:
    x, y, *weights = examples.take(rows)
    return tf.nest.map_structure(tf.constant, (x, y, weights))


def _rows_at_once(evaluate: Callable[..., Any], examples: data.Examples) -> int:
    """How many of many examples to measure at once, from the graphs of one and of two."""
    one, two = (
        tensor_bytes(tf.function(evaluate).get_concrete_function(*specs).graph)
        for specs in (_arguments(examples, np.arange(number)) for number in (1, 2))
    )
    # Weights that are read count in both.
    return max(1, min(_MOST_ROWS, _MOST_BYTES // max(two - one, 1)))


def _labels(y: Any) -> np.ndarray:
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels.argmax(axis=1)
    return labels.reshape(-1).astype(np.int64)


def _from_logits(model: keras.Model) -> bool:
    loss = getattr(model, "loss", None)
    config = loss.get_config() if isinstance(loss, keras.Loss) else {}
    return bool(config.get("from_logits", False))


def _class_scores(outputs: np.ndarray, from_logits: bool) -> np.ndarray:
    """Log-probabilities up to a constant, [n, classes]."""
    if outputs.ndim != 2:
        raise ValueError(
            "Margin and correctness are those of a classifier with outputs [n, classes]. Received: "
            f"shape {outputs.shape}. Pass a function (y, outputs) -> [n]."
        )
    if outputs.shape[1] == 1:
        outputs = np.concatenate(
            [-outputs / 2, outputs / 2] if from_logits else [1 - outputs, outputs], axis=1
        )
    if from_logits:
        return outputs
    return np.log(np.maximum(outputs, np.finfo(np.float32).tiny))


def _margins(labels: np.ndarray, outputs: np.ndarray, from_logits: bool) -> np.ndarray:
    scores = _class_scores(outputs, from_logits)
    rows = np.arange(len(labels))
    others = scores.copy()
    others[rows, labels] = -np.inf
    with np.errstate(invalid="ignore"):  # What is not finite is found out by who records it.
        return scores[rows, labels] - np.logaddexp.reduce(others, axis=1)


def _correct(labels: np.ndarray, outputs: np.ndarray, from_logits: bool) -> np.ndarray:
    return _class_scores(outputs, from_logits).argmax(axis=1) == labels
