"""A Keras layer that answers: which training examples speak for this prediction, which against?"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_influence import checkpoints, data, distribution, indexing, storage
from keras_influence.methods import EncodingMethod, InfluenceMethod
from keras_influence.methods.loading import large_arrays, method_from_store
from keras_influence.retrieval import (
    BLOCK_ROWS,
    ExactSearch,
    HostIndex,
    Influences,
    Search,
    TopExamples,
    recall,
    search_from,
    top_influences,
)
from keras_influence.workers import Workers

# Weights of each variable that a call compares with those of the index: optimizer steps change
# nearly all, so a few tell; `index` and `load` compare every bit.
_SPOT_CHECK = 64

_CHANGED = "The weights of the model are not those of the index."


class InfluenceScorer(keras.layers.Layer):
    """Retrieves the proponents and opponents of predictions from an index of encoded examples.

    `index(train)` encodes the training set once; a call encodes its queries, and compares, block by
    block, so that no score matrix is made. The scores are those of `method.scores`. The index lies
    in memory, or in a directory, where it may be larger.

    Args:
        method: a fitted method with encodings: `Arnoldi` or `RandomProjection`. (For the others
            there is `top_influences(method.scores(queries, train), k)`.)
        k: proponents, and opponents, to return for each query.
        search: `"exact"`, or how to search among millions: `FaissFlat()` or `FaissIVF(...)`, which
            want the package faiss-cpu. `summary()` says what share an inexact one finds.

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

    def __init__(
        self, method: EncodingMethod, k: int = 10, *, search: str | Search = "exact", **kwargs: Any
    ):
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
        self.search = search_from(search)
        self._searcher: Callable[[np.ndarray, int], Influences] | None = None
        self._index: HostIndex | indexing.Index | None = None

    def index(self, train: Any, directory: str | os.PathLike | None = None) -> Self:
        """Encodes the training set, whose examples' positions become the ids.

        Args:
            train: the training data; see `data.batches`.
            directory: where the encodings go, part by part, instead of memory. A call with the same
                method, data and directory goes on where a killed one was (two parts of about 4,096
                examples may be lost), and an index that is whole is opened. `load` opens it too.
                Of several workers the first one's, which tells the others, who keep it in memory.

        Raises:
            ValueError: the directory holds an index of another method or weights, of other data, or
                something else.
            storage.StoreInUseError: another process writes there.
        """
        self.method._check_ready()
        self.method._per_train()  # Complains now, and not after the pass over the data.
        if directory is None:
            self._set_index(HostIndex(self.method.encode(train)))
            return self
        path, workers = pathlib.Path(directory), Workers(self.method.model)
        with workers.writing(path):
            index = self._open(path, workers)
            if index.num_datasets == 0:
                indexing.add_dataset(index, self.method, train, workers)
            elif index.first != indexing.fingerprint(next(data.batches(train)), 0):
                raise ValueError(
                    f"{path} holds the index of another data set: its first example is not that of "
                    "the one given. Choose another directory; `append` adds to an index."
                )
        self._set_index(index)
        return self

    def append(self, examples: Any) -> Self:
        """Adds examples to the index, without another fit; their ids go on from the largest one.

        In a directory it is done part by part, as `index` does, and goes on where a killed call
        was. The data set that was added last is not added again.

        Args:
            examples: labelled examples; see `data.batches`.
        """
        index = self._indexed()
        if isinstance(index, HostIndex):
            index.append(self.method.encode(examples))
            self._set_index(index)
            return self
        self._check_weights()
        workers = Workers(self.method.model)
        with workers.writing(index.directory):
            index = self._reopened(index, workers)
            if indexing.is_last_dataset(index, examples):
                logging.info("These examples are in %s already.", index.directory)
            else:
                indexing.add_dataset(index, self.method, examples, workers)
        self._set_index(index)
        return self

    def remove(self, ids: Sequence[int]) -> Self:
        """Takes examples out of the index, so that no call returns them; the others keep their ids.

        Args:
            ids: of examples in the index.
        """
        index = self._indexed()
        gone = np.unique(np.asarray(ids, np.int64))
        unknown = np.setdiff1d(gone, index.ids)
        if len(unknown):
            raise ValueError(f"The index holds no examples of the ids {unknown[:5].tolist()}.")
        if len(index) - len(gone) < self.k:
            raise ValueError(
                f"Of {len(index)} examples {len(index) - len(gone)} would remain, too few to "
                f"retrieve k={self.k}."
            )
        if isinstance(index, HostIndex):
            index.remove(gone)
        else:
            workers = Workers(self.method.model)
            with workers.writing(index.directory):
                index = self._reopened(index, workers)
                workers.each(functools.partial(index.remove, gone))
        self._set_index(index)
        return self

    def _open(self, path: pathlib.Path, workers: Workers) -> indexing.Index:
        return indexing.open_index(path, self.method, *self._to_store(), workers)

    def _reopened(self, index: indexing.Index, workers: Workers) -> indexing.Index:
        # Another process may have written there since; but not where several share the work.
        return index if workers.several else self._open(index.directory, workers)

    def _indexed(self) -> HostIndex | indexing.Index:
        if self._index is None:
            raise ValueError("The scorer has no index yet: call `scorer.index(train)` first.")
        return self._index

    @property
    def encodings(self) -> np.ndarray:
        """[N, rank], of the examples in the index, by id. One on disk is read whole."""
        return np.concatenate([rows for _, rows in self._indexed().blocks(BLOCK_ROWS)])

    @property
    def ids(self) -> np.ndarray:
        """int64 [N], of the examples in the index."""
        return self._indexed().ids

    def _set_index(self, index: HostIndex | indexing.Index) -> None:
        if self.k > len(index):
            raise ValueError(
                f"k={self.k} examples cannot be retrieved out of the {len(index)} indexed."
            )
        method = self.method
        self._index = index
        self._searcher = None
        self._metric = (method.metric * method._per_train()).astype(np.float32)
        self._projectors = list(method._query_encoders())
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
        self._call = tf.function(self._encoded, autograph=False)
        self.built = True

    def call(self, inputs: tuple[Any, ...]) -> Influences:
        index = self._indexed()
        examples = tuple(element for element in inputs if element is not None)
        if not tf.executing_eagerly():
            return self._top(index, examples)
        count = len(tf.nest.flatten(examples)[0])
        try:
            encoded = distribution.here(self._call, self.method.model, _padded(examples, count))
        except tf.errors.InvalidArgumentError as error:
            if _CHANGED in str(error):
                raise ValueError(self._changed()) from None
            raise
        encoded = encoded.numpy()[:count]
        rows = np.arange(count)
        queries = data.Batch(examples, np.ones(len(rows), np.float32), rows)
        self.method._check_finite(encoded, queries, "score")
        return tf.nest.map_structure(tf.convert_to_tensor, self._find(encoded))

    def _find(self, queries: np.ndarray) -> Influences:
        if self._searcher is None:
            self._searcher = self.search.prepare(self._indexed())
        return self._searcher(queries, self.k)

    def _encoded(self, examples: tuple[Any, ...]) -> tf.Tensor:
        """The queries' encodings, weighted: their products with the index are scores."""
        unchanged = tf.reduce_all(
            [
                tf.reduce_all(a == b)
                for a, b in zip(self._read_spots(), self._spot_values, strict=True)
            ]
        )
        with tf.control_dependencies([tf.debugging.Assert(unchanged, [_CHANGED])]):
            encoded = tf.concat([project(examples) for project in self._projectors], axis=1)
        # A norm at the end of an encoding has no counterpart in a query.
        rest = tf.zeros([tf.shape(encoded)[0], len(self._metric) - encoded.shape[1]])
        return tf.concat([tf.cast(encoded, tf.float32), rest], axis=1) * self._metric

    def _top(self, index: HostIndex | indexing.Index, examples: tuple[Any, ...]) -> Influences:
        """In a graph: an index in memory becomes part of it, or it is Python that searches."""
        encoded = self._encoded(examples)
        if isinstance(index, HostIndex) and isinstance(self.search, ExactSearch):
            scores = tf.matmul(encoded, index.encodings.astype(np.float32), transpose_b=True)
            top = top_influences(scores, self.k)
            ids = tf.constant(index.ids)
            return Influences(*(TopExamples(tf.gather(ids, each.ids), each.scores) for each in top))
        flat = tf.numpy_function(
            lambda queries: tf.nest.flatten(self._find(queries)),
            [encoded],
            [tf.int64, tf.float32] * 2,
            stateful=False,
        )
        flat = [tf.ensure_shape(tensor, [encoded.shape[0], self.k]) for tensor in flat]
        return Influences(TopExamples(*flat[:2]), TopExamples(*flat[2:]))

    def _read_spots(self) -> list[tf.Tensor]:
        return [
            tf.gather(tf.reshape(value, [-1]), spots)
            for value, spots in zip(self._values, self._spots, strict=True)
        ]

    def _check_weights(self) -> None:
        if checkpoints.weights_fingerprint(self.method.model) != self._weights_fingerprint:
            raise ValueError(self._changed())

    def _changed(self) -> str:
        return (
            f"The weights of {self.method.model.name!r} are not those of the index: the model was "
            "trained or loaded since. Fit the method and index again, or put the weights back."
        )

    def self_influence(self, dataset: Any = None) -> np.ndarray:
        """Self-influence of the examples of `dataset`, or of the indexed ones: float32 [N]."""
        if dataset is not None:
            return self.method.self_influence(dataset)
        blocks = self._indexed().blocks(BLOCK_ROWS)
        return np.concatenate([self.method.self_influence_of(rows) for _, rows in blocks])

    def summary(self, print_fn: Callable[[str], None] | None = None) -> None:
        """Prints the size of the index, and the method's own summary."""
        emit = print_fn or (lambda line: print(line))
        index = self._index
        if index is None:
            emit(f"InfluenceScorer, k={self.k}: not indexed")
        else:
            size = len(index) * index.rank * index.dtype.itemsize / 2**20
            place = "" if isinstance(index, HostIndex) else f" in {index.directory}"
            emit(
                f"InfluenceScorer, k={self.k}: {len(index):,} examples in {index.rank} numbers "
                f"each, {size:.1f} MiB{place}"
            )
            if not isinstance(self.search, ExactSearch):
                self._find(np.zeros((1, index.rank), np.float32))
                assert self._searcher is not None
                share = recall(index, self._searcher, self._metric, self.k)
                emit(
                    f"  {type(self.search).__name__}: finds {share:.1%} of the proponents and "
                    "opponents of a sample of the indexed examples"
                )
        self.method.summary(emit)

    def save(self, path: str) -> None:
        """Writes method and index into the new directory `path`; `load` brings them back.

        Raises:
            FileExistsError: when `path` exists.
            ValueError: before `index`, or when the weights have changed since.
        """
        if self._index is None:
            raise ValueError("The scorer has no index to save: call `scorer.index(train)` first.")
        self._check_weights()
        manifest, arrays = self._to_store()
        held = {"index": self.encodings, "ids": self.ids}
        storage.save_store(path, {**manifest, "next_id": self._index.next_id}, {**arrays, **held})

    def _to_store(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Manifest and arrays of all but the index."""
        manifest, arrays = self.method._to_store()
        small = [array for name, array in arrays.items() if name not in self.method._large]
        return {
            "kind": type(self).__name__,
            "k": self.k,
            "search": self.search.describe(),
            "method": manifest,
            "state": storage.arrays_fingerprint(small),
            "weights": checkpoints.weights_fingerprint(self.method.model),
        }, {f"method-{name}": array for name, array in arrays.items()}


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
    manifest = storage.read_manifest(path)
    method_manifest = manifest.get("method", manifest)
    prefix = "method-" if "method" in manifest else ""
    in_place = [prefix + name for name in large_arrays(method_manifest)]
    manifest, arrays = storage.load_store(path, in_place)
    if manifest.get("kind") != InfluenceScorer.__name__:
        return method_from_store(manifest, arrays, model)
    index: HostIndex | indexing.Index
    if "encodings" in manifest:
        index = storage.StoredIndex(path, manifest["encodings"])
        if index.num_datasets == 0:
            raise ValueError(
                f"The index in {path} is not whole: {index.num_unfinished} examples so far. Go on "
                "with `scorer.index(train, directory)`."
            )
    else:
        index = HostIndex(arrays.pop("index"), arrays.pop("ids"), manifest["next_id"])
    method = method_from_store(
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
    scorer = InfluenceScorer(method, manifest["k"], search=manifest.get("search", "exact"))
    scorer._set_index(index)
    return scorer
