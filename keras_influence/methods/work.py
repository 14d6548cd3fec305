"""What a method says that it will do: how often what is done, and what is held meanwhile."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_influence import data
from keras_influence.gradients import LossMaps, graph_flops, num_roots, projection_flops
from keras_influence.linalg import Basis, arnoldi
from keras_influence.methods.curvature import FrozenCurvature, batches_together

if TYPE_CHECKING:
    from keras_influence.methods.base import InfluenceMethod

# Batches that are looked at.
_BATCHES = 3
# Bytes of vectors that a measured orthogonalisation reads: more than caches hold.
_BASIS_BYTES = 2**26


class Unit(NamedTuple):
    """Work that is measured once, and done many times.

    Attributes:
        key: units of the same key are the same.
        prepare: () -> a call that does the work; what it needs is made before.
        share: units that one call does.
        flops: () -> of one unit.
        calls: the map of `gradients.LossMaps` that one unit calls; "" for none. Of `curvatures`,
            as many calls of `curvature` as there are vectors.
        num_calls: how often.
        operands: bytes that what it needs takes, while it is measured.
    """

    key: tuple[Any, ...]
    prepare: Callable[[], Callable[[], Any]]
    share: int = 1
    flops: Callable[[], float] = lambda: 0.0
    calls: str = ""
    num_calls: int = 1
    operands: float = 0.0


class Work(NamedTuple):
    """A stage as a method describes it, before anything is measured.

    Attributes:
        name: what is done.
        unit: what is done again and again; None where only memory is held.
        repetitions: of the unit.
        hessian_products: of all repetitions.
        host, device: bytes held meanwhile, with the unit's operands, besides what it takes for
            itself. Where the model is on the CPU the two are one.
        disk: bytes, new, on the disk meanwhile.
        disk_vectors: written.
        directions: held laid out.
        seconds: of one repetition, where it is known.
    """

    name: str
    unit: Unit | None
    repetitions: float = 1
    hessian_products: int = 0
    host: float = 0.0
    device: float = 0.0
    disk: float = 0.0
    disk_vectors: int = 0
    directions: int = 0
    seconds: float = 0.0

    def times(self, count: int) -> "Work":
        """The same, done so many times."""
        return self._replace(
            repetitions=count * self.repetitions,
            hessian_products=count * self.hessian_products,
            disk_vectors=count * self.disk_vectors,
        )


class Load(NamedTuple):
    """A dataset as a method will read it.

    Attributes:
        sample: its first batches.
        num_examples: N, the last batch of a `tf.data.Dataset` taken to be full.
        batch_size: of its batches.
        example_bytes: of one example.
        seconds: to read one batch, the median.
        in_memory: whether it is arrays, of which batches are views.
        dataset: itself.
    """

    sample: list[data.Batch]
    num_examples: int
    batch_size: int
    example_bytes: float
    seconds: float
    in_memory: bool
    dataset: Any

    @property
    def num_batches(self) -> int:
        return -(-self.num_examples // self.batch_size)

    @classmethod
    def of(cls, dataset: Any, batch_size: int | None) -> "Load":
        stream = data.batches(dataset, batch_size)
        sample: list[data.Batch] = []
        seconds: list[float] = []
        while len(sample) < _BATCHES:
            start = time.perf_counter()
            batch = next(stream, None)
            if batch is None:
                break
            seconds.append(time.perf_counter() - start)
            sample.append(batch)
        size = len(sample[0].weights)
        leaves = tf.nest.flatten(sample[0].examples)
        return cls(
            sample,
            data.estimated_count(dataset),
            size,
            sum(np.asarray(leaf).nbytes for leaf in leaves) / size,
            # The first one starts what reads ahead.
            float(np.median(seconds[1:] or seconds)),
            isinstance(dataset, tuple),
            dataset,
        )

    @property
    def bytes(self) -> float:
        return self.num_examples * self.example_bytes

    def cut(self, batch_size: int) -> "Load":
        """In batches of another size."""
        return Load.of(self.dataset, batch_size)

    def first(self, num_examples: int) -> "Load":
        """Of so many examples, read with the others."""
        return self._replace(num_examples=num_examples)


class Job:
    """Work on some data, to be planned.

    Args:
        method: that will do it.
        train: the training data.
        queries: or None.

    Attributes:
        train, queries: as a `Load`.
        size, dtype, vector_bytes: p, and the type and the bytes of a vector [p].
    """

    def __init__(self, method: "InfluenceMethod", train: Any, queries: Any = None):
        self.method = method
        self.train = Load.of(train, method.batch_size)
        self.query_data = queries
        self.queries = None if queries is None else Load.of(queries, method.batch_size)
        self.parameters = method.maps.parameters
        self.size = self.parameters.size
        self.dtype = np.dtype(self.parameters.dtype.as_numpy_dtype)
        self.vector_bytes = float(self.size * self.parameters.dtype.size)
        self._joined: dict[int | None, Load] = {}

    # Units.

    def rows(self, name: str, load: Load, maps: LossMaps | None = None) -> Unit:
        """A map of `LossMaps` that gives rows, such as `squared_norms`, of one batch."""
        method = self.method
        function = getattr(maps or method.maps, name)

        def prepare() -> Callable[[], Any]:
            return lambda: method._rows(function, load.sample, name)

        return Unit(
            (name, load.batch_size, id(maps or method.maps)),
            prepare,
            len(load.sample),
            lambda: self._projection_flops(load, 1),
            name,
        )

    def projection(
        self, load: Load, count: int, directions: Any = None, with_norms: bool = False
    ) -> Unit:
        """One batch is projected on `count` directions, which are laid out.

        Args:
            with_norms: by `project_with_norms`.
            directions: batch of examples -> `Directions`, made once; those of the right shape by
                default.
        """
        method = self.method
        name = "project_with_norms" if with_norms else "project"

        def prepare() -> Callable[[], Any]:
            if directions is None:
                made = method.maps.prepare(self.vectors(count), load.sample[0].examples)
            else:
                made = directions()
            project = getattr(method.maps, name)
            return lambda: method._rows(project, load.sample, "projection", lambda _: made)

        return Unit(
            (name, load.batch_size, count, directions is None),
            prepare,
            len(load.sample),
            lambda: self._projection_flops(load, count, directions is not None),
            name,
            operands=count * self.vector_bytes,
        )

    def layout(self, count: int, rows: Callable[[], Any] | None = None) -> Unit:
        """`count` directions, as `rows` gives them, are laid out for projections."""
        maps, examples = self.method.maps, self.train.sample[0].examples

        def prepare() -> Callable[[], Any]:
            make = rows or (lambda: self.vectors(count))
            return lambda: maps.prepare(make(), examples)

        return Unit(("layout", count, rows is None), prepare)

    def curvature(self, load: Load) -> Unit:
        """One batch's part of the product of the Hessian and a vector."""

        def prepare() -> Callable[[], Any]:
            operator = self._operator(load)
            vector = self.vectors(1)[0]
            return lambda: operator(vector).numpy()

        return Unit(
            ("curvature", load.batch_size),
            prepare,
            len(load.sample),
            lambda: self._curvature_flops(load),
            "curvature",
            operands=self._sample_bytes(load) + self.vector_bytes,
        )

    def products(self, load: Load, count: int) -> Unit:
        """One batch's part of the products of the Hessian and `count` vectors at once."""

        def prepare() -> Callable[[], Any]:
            operator = self._operator(load)
            vectors = self.vectors(count)
            return lambda: operator.products(vectors).numpy()

        return Unit(
            ("products", load.batch_size, count),
            prepare,
            len(load.sample),
            lambda: count * self._curvature_flops(load),
            "curvature",
            count,
            self._sample_bytes(load) + count * self.vector_bytes,
        )

    def num_roots(self, load: Load) -> int:
        """See `FrozenCurvature.num_roots`."""
        return num_roots(self.method.maps, load.sample[0].examples, self._kind)

    def grams(self, load: Load, num_roots: int) -> Unit:
        """One batch's part of the curvature as outer products."""

        def prepare() -> Callable[[], Any]:
            operator = self._operator(load)
            return lambda: sum(part.shape[0] for part in operator.grams(num_roots))

        def flops() -> float:
            gradient = self._projection_flops(load, 1)
            return num_roots * (gradient + 2.0 * load.batch_size * self.size**2)

        rows = min(num_roots * load.batch_size * self.vector_bytes, self.method.direction_bytes)
        return Unit(
            ("grams", load.batch_size, num_roots),
            prepare,
            len(load.sample),
            flops,
            operands=self._sample_bytes(load) + rows + self.size * self.vector_bytes,
        )

    def orthogonalization(self, count: int, make: Callable[[int], Basis] | None = None) -> Unit:
        """A vector is orthogonalised against one other, on the way to `count`.

        Args:
            count: vectors of the iteration.
            make: number of rows -> a basis for them, on the disk, say; in memory by default.
        """
        rows = max(1, min(count, max(4, int(_BASIS_BYTES // self.vector_bytes))))

        def prepare() -> Callable[[], Any]:
            start = np.random.default_rng(0).standard_normal(self.size).astype(self.dtype)

            def call() -> None:
                # Whatever has products outside of what was seen serves for the Hessian.
                basis = None if make is None else make(rows)
                arnoldi(lambda vector: np.roll(vector, 1), start, rows, basis=basis)

            return call

        # Two products with the basis, twice.
        flops, held = 8.0 * self.size, 0.0 if make is not None else rows * self.vector_bytes
        return Unit(
            ("orthogonalize", rows, make),
            prepare,
            rows * (rows + 1) // 2,
            lambda: flops,
            operands=held,
        )

    def combination(self, count: int, rows: int, dtype: Any = None) -> Unit:
        """`count` vectors are made of `rows`: one in so many `parts` of them."""
        dtype = dtype or self.dtype
        columns = self._columns(rows)

        def prepare() -> Callable[[], Any]:
            inner, basis = np.ones((count, rows), dtype), np.ones((rows, columns), dtype)
            return lambda: inner @ basis

        flops = 2.0 * count * rows * columns
        # The result as well, which a stage that makes vectors counts among what it holds.
        held = (count * rows + (count + rows) * columns) * float(np.dtype(dtype).itemsize)
        return Unit(("combine", count, rows, dtype), prepare, 1, lambda: flops, operands=held)

    def parts(self, rows: int) -> float:
        """See `combination`."""
        return self.size / self._columns(rows)

    def _columns(self, rows: int) -> int:
        return max(1, min(self.size, int(_BASIS_BYTES // (4 * rows))))

    def once(self, name: str, function: Callable[[], Any], calls: str = "") -> Unit:
        """Something of the method's own."""
        return Unit((name,), lambda: function, calls=calls)

    def vectors(self, count: int) -> tf.Tensor:
        """[count, p], of unit length; what the numbers are does not matter to their time."""
        return tf.fill([count, self.size], tf.cast(self.size**-0.5, self.parameters.dtype))

    def _sample_bytes(self, load: Load) -> float:
        return len(load.sample) * load.batch_size * load.example_bytes

    @property
    def _kind(self) -> str:
        return getattr(self.method, "curvature", "hessian")

    def _operator(self, load: Load) -> FrozenCurvature:
        method = self.method
        return FrozenCurvature(
            method.maps,
            method.model,
            list(load.sample),
            budget=method.direction_bytes,
            kind=self._kind,
            steps_per_execution=method.steps_per_execution,
        )

    def _curvature_flops(self, load: Load) -> float:
        batch, (curvature, _) = load.sample[0], self.method.maps.products(self._kind)
        return graph_flops(curvature, batch.examples, self.vectors(1)[0], batch.weights)

    def _projection_flops(self, load: Load, count: int, of_gradients: bool = False) -> float:
        examples = load.sample[0].examples
        each = projection_flops(self.method.maps, examples, count, of_gradients)
        return load.batch_size * sum(each.values())

    def reading(self, load: Load, passes: int = 1, host: float = 0.0, device: float = 0.0) -> Work:
        """All batches of a dataset are read."""
        return Work(
            "reading", None, passes * load.num_batches, 0, host, device, seconds=load.seconds
        )

    def frozen(self, num_examples: int | None) -> Load:
        """The examples of the Hessian; None for all."""
        return self.train if num_examples is None else self.train.first(num_examples)

    def joined(self, num_examples: int | None) -> Load:
        """The same in the batches that a `FrozenCurvature` makes of them."""
        load, method = self.frozen(num_examples), self.method
        if method.steps_per_execution != 1:
            return load
        if num_examples not in self._joined:
            example, number = load.sample[0].examples, load.num_batches
            together = batches_together(method.maps, method.model, self._kind, example, number)
            size = data.joined_size(load.num_examples, number, together)
            self._joined[num_examples] = (
                load if together == 1 else load.cut(size).first(load.num_examples)
            )
        return self._joined[num_examples]

    def freezing(self, num_examples: int | None) -> Work:
        """They are read, and placed on the devices."""
        drawn, frozen = num_examples is not None, self.frozen(num_examples)
        # Of arrays, batches are views; a draw copies. It must know the number first.
        copied = 0.0 if frozen.in_memory and not drawn else frozen.bytes
        passes = 2 if drawn and not frozen.in_memory else 1
        return self.reading(self.train, passes, host=copied, device=frozen.bytes)

    def counting(self) -> Iterator[Work]:
        """The training examples are counted, which arrays are already."""
        if not self.train.in_memory:
            yield self.reading(self.train)


def blocks(count: int, most: int) -> tuple[int, int]:
    """Blocks of one size that `count` is done in, at most `most` together; and their size."""
    number = -(-count // max(1, most))
    return number, -(-count // number)
