"""A Keras layer that answers: which training examples speak for this prediction, which against?"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import keras
import numpy as np
import tensorflow as tf

from keras_influence import checkpoints, data, storage
from keras_influence.methods import EncodingMethod, InfluenceMethod

# Weights of each variable that a call compares with those of the index: optimizer steps change
# nearly all, so a few tell; `index` and `load` compare every bit.
_SPOT_CHECK = 64

_CHANGED = "The weights of the model are not those of the index."


class TopExamples(NamedTuple):
    """The training examples of greatest influence of one sign.

    Attributes:
        ids: int64 [Q, k], positions in the training set, the greatest influence first.
        scores: float32 [Q, k].
    """

    ids: Any
    scores: Any


class Influences(NamedTuple):
    """Who speaks for each of Q predictions, and who against it.

    Attributes:
        proponents: `TopExamples` of the largest scores: without them the query's loss would rise.
        opponents: `TopExamples` of the smallest scores: without them it would fall.
    """

    proponents: TopExamples
    opponents: TopExamples


def top_influences(scores: Any, k: int) -> Influences:
    """The k largest and the k smallest scores of each query; ties go to the smaller id.

    Args:
        scores: [Q, N], as a method's `scores` returns it.
        k: examples of each kind, at most N.
    """
    scores = tf.convert_to_tensor(scores)
    if scores.shape[1] is not None and not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"`k` must be between 1 and the number of training examples, {scores.shape[1]}. "
            f"Received: k={k}."
        )
    # tf.math.top_k puts the lower index first where values are equal.
    best, best_ids = tf.math.top_k(scores, k)
    worst, worst_ids = tf.math.top_k(-scores, k)
    return Influences(
        TopExamples(tf.cast(best_ids, tf.int64), best),
        TopExamples(tf.cast(worst_ids, tf.int64), -worst),
    )


class InfluenceScorer(keras.layers.Layer):
    """Retrieves the proponents and opponents of predictions from an index of encoded examples.

    `index(train)` encodes the training set once; a call encodes its queries, and compares. The
    scores are those of `method.scores`.

    Args:
        method: a fitted method with encodings: `Arnoldi` or `RandomProjection`. (For the others
            there is `top_influences(method.scores(queries, train), k)`.)
        k: proponents, and opponents, to return for each query.

    Call arguments:
        inputs: (x, y) or (x, y, sample_weight), the labelled queries. Labels matter: an influence
            is on the loss.

    Call returns: `Influences`, tensors in a `tf.function` as outside it.

    Raises:
        ValueError: a call before `index`; weights changed since `index` (an
            `InvalidArgumentError` inside a `tf.function`).
        FloatingPointError: a query whose loss is not finite, such as one with a label of no class
            (inside a `tf.function` its scores are NaN).

    Example:

    >>> scorer = ki.InfluenceScorer(arnoldi, k=10).index(train)
    >>> top = scorer((images, labels))
    >>> top.proponents.ids, top.opponents.scores
    """

    def __init__(self, method: EncodingMethod, k: int = 10, **kwargs: Any):
        # Inputs go to the model as they are: uint8 images, float64 features.
        super().__init__(trainable=False, autocast=False, **kwargs)
        if not isinstance(method, EncodingMethod):
            raise TypeError(
                "An index holds encodings, which Arnoldi and RandomProjection have. Received: "
                f"{type(method).__name__}; for it, use "
                "top_influences(method.scores(queries, train), k)."
            )
        if k < 1:
            raise ValueError(f"`k` must be at least 1. Received: {k}.")
        # Not tracked: the model is the user's, and its weights are not the layer's.
        object.__setattr__(self, "method", method)
        self.k = k
        self.encodings: np.ndarray | None = None

    def index(self, train: Any) -> Self:
        """Encodes the training set, whose examples' positions become the ids.

        Args:
            train: the training data; see `data.batches`.
        """
        self._set_index(self.method.encode(train))
        return self

    def _set_index(self, encodings: np.ndarray) -> None:
        if self.k > len(encodings):
            raise ValueError(
                f"k={self.k} examples cannot be retrieved out of the {len(encodings)} indexed."
            )
        method = self.method
        weighted = encodings * (method.metric * method._per_train())
        self.encodings = encodings
        self._weighted = tf.constant(weighted.astype(np.float32))
        self._projectors = list(method._query_projectors())
        self._weights_fingerprint = checkpoints.weights_fingerprint(method.model)
        # All of the model's weights, not only those that are attributed through: scores depend on
        # them all. The states of random generators are integers, and change by themselves.
        self._values = [
            variable.value
            for variable in method.model.variables
            if tf.as_dtype(variable.dtype).is_floating
        ]
        sizes = [int(np.prod(value.shape)) for value in self._values]
        self._spots = [
            tf.constant(np.linspace(0, size - 1, min(size, _SPOT_CHECK)).astype(np.int64))
            for size in sizes
        ]
        self._spot_values = self._read_spots()
        self._call = tf.function(self._top, autograph=False)
        self.built = True

    def call(self, inputs: tuple[Any, ...]) -> Influences:
        if self.encodings is None:
            raise ValueError("The scorer has no index yet: call `scorer.index(train)` first.")
        examples = tuple(element for element in inputs if element is not None)
        if not tf.executing_eagerly():
            return self._top(examples)
        count = len(tf.nest.flatten(examples)[0])
        try:
            top = self._call(_padded(examples, count))
        except tf.errors.InvalidArgumentError as error:
            if _CHANGED in str(error):
                raise ValueError(self._changed()) from None
            raise
        top = tf.nest.map_structure(lambda tensor: tensor[:count], top)
        rows = np.arange(count)
        queries = data.Batch(examples, np.ones(len(rows), np.float32), rows)
        self.method._check_finite(top.proponents.scores, queries, "score")
        return top

    def _top(self, examples: tuple[Any, ...]) -> Influences:
        unchanged = tf.reduce_all(
            [
                tf.reduce_all(a == b)
                for a, b in zip(self._read_spots(), self._spot_values, strict=True)
            ]
        )
        with tf.control_dependencies([tf.debugging.Assert(unchanged, [_CHANGED])]):
            encoded = tf.concat([project(examples) for project in self._projectors], axis=1)
        scores = tf.matmul(tf.cast(encoded, tf.float32), self._weighted, transpose_b=True)
        return top_influences(scores, self.k)

    def _read_spots(self) -> list[tf.Tensor]:
        return [
            tf.gather(tf.reshape(value, [-1]), spots)
            for value, spots in zip(self._values, self._spots, strict=True)
        ]

    def _changed(self) -> str:
        return (
            f"The weights of {self.method.model.name!r} are not those of the index: the model was "
            "trained or loaded since. Fit the method and index again, or put the weights back."
        )

    def self_influence(self, dataset: Any = None) -> np.ndarray:
        """Self-influence of the examples of `dataset`, or of the indexed ones: float32 [N]."""
        if dataset is not None:
            return self.method.self_influence(dataset)
        if self.encodings is None:
            raise ValueError("The scorer has no index yet: call `scorer.index(train)` first.")
        return self.method.self_influence_of(self.encodings)

    def summary(self, print_fn: Callable[[str], None] | None = None) -> None:
        """Prints the size of the index, and the method's own summary."""
        emit = print_fn or (lambda line: print(line))
        if self.encodings is None:
            emit(f"InfluenceScorer, k={self.k}: not indexed")
        else:
            rows, rank = self.encodings.shape
            emit(
                f"InfluenceScorer, k={self.k}: {rows:,} examples in {rank} numbers each, "
                f"{self.encodings.nbytes / 2**20:.1f} MiB"
            )
        self.method.summary(emit)

    def save(self, path: str) -> None:
        """Writes method and index into the new directory `path`; `load` brings them back.

        Raises:
            FileExistsError: when `path` exists.
            ValueError: before `index`, or when the weights have changed since.
        """
        if self.encodings is None:
            raise ValueError("The scorer has no index to save: call `scorer.index(train)` first.")
        if checkpoints.weights_fingerprint(self.method.model) != self._weights_fingerprint:
            raise ValueError(self._changed())
        manifest, arrays = self.method._to_store()
        storage.save_store(
            path,
            {
                "kind": type(self).__name__,
                "k": self.k,
                "method": manifest,
                "weights": self._weights_fingerprint,
            },
            {
                **{f"method-{name}": array for name, array in arrays.items()},
                "index": self.encodings,
            },
        )


def _padded(examples: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """As many rows as the next power of two: few graphs serve any number of queries."""
    if count == 0:
        return examples
    rows = np.minimum(np.arange(1 << (count - 1).bit_length()), count - 1)
    return tf.nest.map_structure(lambda array: tf.gather(array, rows), examples)


def load(path: str, model: keras.Model) -> InfluenceMethod | InfluenceScorer:
    """The method or scorer that `save` wrote into `path`, on the model that it was fitted on.

    Args:
        path: the directory.
        model: a model of the same architecture; where the saved numbers belong to one set of
            weights (`Arnoldi`, every scorer), with those weights.

    Raises:
        FileNotFoundError: nothing at `path`.
        storage.TornStoreError: an incomplete or altered store.
        ValueError: another architecture, other weights, or a newer format.
    """
    manifest, arrays = storage.load_store(path)
    if manifest.get("kind") != InfluenceScorer.__name__:
        return InfluenceMethod._from_store(manifest, arrays, model)
    encodings = arrays.pop("index")
    method = InfluenceMethod._from_store(
        manifest["method"],
        {name.removeprefix("method-"): array for name, array in arrays.items()},
        model,
    )
    if manifest["weights"] != checkpoints.weights_fingerprint(model):
        raise ValueError(
            f"The index at {path} was made with other weights than {model.name!r} has now. Load "
            "those weights, or index again."
        )
    assert isinstance(method, EncodingMethod)
    scorer = InfluenceScorer(method, manifest["k"])
    scorer._set_index(encodings)
    return scorer
