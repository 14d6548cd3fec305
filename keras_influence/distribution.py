"""How a function of a batch runs over a dataset, on all devices of the model's strategy.

The only module that names tf.distribute. Every process reads the same dataset; a batch is filled up
to a multiple of the number of replicas, and each replica takes its slice, so that every example is
computed exactly once. What comes back is the same on every worker, to the bit. Without a strategy,
a function is simply called.

Under a strategy, functions must be `tf.function`s that last, as those of `gradients.LossMaps` do:
TensorFlow traces each once.
"""

import contextlib
import functools
import operator
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_influence import steps
from keras_influence.data import Batch

# What collectives raise when a worker is gone, or has restarted; a failure of the model's own code
# is none of these.
_LOST = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)


class WorkerLostError(RuntimeError):
    """A worker of a multi-worker strategy ended or cannot be reached."""


class Placed(NamedTuple):
    """A batch, or a stack of them, on the devices.

    Attributes:
        examples: as in `Batch`, or [steps, B, ...]; under a strategy of distributed values: the
            slice of each replica in this process.
        weights: likewise.
        ids: int64 [n], positions in the dataset of the n examples of all replicas.
        rows: positions in the batch of the examples of this process's replicas, in order.
        size: examples of all replicas in one batch, padding included.
        checksum: of the bytes of the whole batch; 0 where no other process has it too.
        count: batches of a stack, each replica's copy; None where it is one batch and no stack.
    """

    examples: Any
    weights: Any
    ids: np.ndarray
    rows: np.ndarray
    size: int
    checksum: int
    count: Any = None

    @property
    def num_examples(self) -> int:
        return len(self.ids)


def is_chief(model: keras.Model) -> bool:
    """Whether this process is the one that writes files for `model`'s training run."""
    strategy = _found_strategy(model)
    return bool(strategy.extended.should_checkpoint)


def has_several_workers(model: keras.Model) -> bool:
    """Whether other processes run the same program under `model`'s strategy."""
    strategy = strategy_of(model)
    return strategy is not None and several_workers(strategy)


def worker_number(model: keras.Model) -> int:
    """Of this process among those that run the program, from 0."""
    strategy = strategy_of(model)
    assert strategy is not None
    return _worker_number(strategy)


def sum_over_workers(model: keras.Model, array: np.ndarray) -> np.ndarray:
    """The sum of the arrays that each process gives, in every process.

    Raises:
        WorkerLostError: another worker ended.
    """
    strategy = strategy_of(model)
    assert strategy is not None
    return _sum_over_workers(strategy, array)


def gather(
    function: Callable[..., tf.Tensor],
    batches: Iterable[Batch],
    model: keras.Model,
    operands: Callable[[Any], Any] | None = None,
    check: Callable[[Batch, np.ndarray], None] | None = None,
    steps_per_execution: int = 1,
) -> np.ndarray:
    """Rows of `function(examples)` for every example, in order, without the padding's.

    Args:
        function: (examples[, operands]) -> [B, ...], row by row.
        batches: the same in every process.
        model: whose strategy it runs under.
        operands: examples -> what `function` is given beside them, the same for every replica. It
            is copied to the devices when it is another object than for the batch before.
        check: (batch, rows [n, ...]) -> raises FloatingPointError for rows that are not finite. On
            several workers each sees the rows that it computed, and zeros for the others.
        steps_per_execution: batches that one execution goes through; see `steps`.

    Raises:
        FloatingPointError: by `check`, on every worker.
        WorkerLostError: another worker ended.
        ValueError: the workers' datasets differ.
    """
    strategy = strategy_of(model)
    rows = []
    if strategy is None:
        for group in steps.groups(batches, steps_per_execution):
            # Once, for both: TensorFlow copies an array each time that it makes a tensor of it.
            first = tf.nest.map_structure(tf.convert_to_tensor, group[0].examples)
            beside = () if operands is None else (operands(first),)
            if steps_per_execution == 1:
                results = np.asarray(function(first, *beside))[np.newaxis]
            else:
                examples, count = _stack(group, steps_per_execution)[::2]
                results = np.asarray(steps.listed(function)(examples, count, *beside))
            for batch, result in zip(group, results, strict=False):
                found = result[: batch.num_examples]
                if check is not None:
                    check(batch, found)
                rows.append(found)
        return np.concatenate(rows)

    last: Any = None
    placed_beside: tuple[Any, ...] = ()
    tally = _Tally(strategy)
    failure: FloatingPointError | None = None
    for group in steps.groups(batches, steps_per_execution):
        placed = _place(strategy, group, steps_per_execution)
        tally.add(placed)
        if operands is not None:
            now = operands(group[0].examples)
            if now is not last:
                last, placed_beside = now, (copies(strategy, now),)
        result = _run(strategy, *_of_stack(steps.listed, function, placed), *placed_beside)
        # [steps, rows of this process's replicas, ...]
        own = np.concatenate(
            [
                np.asarray(part) if placed.count is not None else np.asarray(part)[np.newaxis]
                for part in strategy.experimental_local_results(result)
            ],
            axis=1,
        )
        for batch, own_rows in zip(group, own, strict=False):
            found = np.zeros((placed.size, *own.shape[2:]), own.dtype)
            found[placed.rows] = own_rows
            found = found[: batch.num_examples]
            if check is not None and failure is None:
                try:
                    check(batch, found)
                except FloatingPointError as error:
                    if not several_workers(strategy):
                        raise
                    # The others wait for this one where results are exchanged.
                    failure = error
            rows.append(found)
    if not several_workers(strategy):
        return np.concatenate(rows)
    failures = tally.agree(failure is not None)
    if failure is not None:
        raise failure
    if failures:
        raise FloatingPointError(
            f"Worker {failures[0]} found a result that is not finite; its own error names the "
            "example."
        )
    # Zeros where other workers have the rows: a sum that changes no bit of them.
    return _sum_over_workers(strategy, np.concatenate(rows))


def total(
    function: Callable[..., Any],
    batches: Iterable[Batch | Placed],
    model: keras.Model,
    *operands: Any,
    on_replicas: bool = False,
) -> Any:
    """Sum over the batches of `function(examples, *operands, weights)`, a tensor or a nest of them.

    Args:
        function: weighs its examples by `weights`, so that padding counts for nothing.
        batches: the same in every process; as `place` gives them, if they serve more than once.
        model: whose strategy it runs under.
        *operands: the same for every replica, and in every process.
        on_replicas: the sum of all replicas is not brought together; what each replica has summed
            is left on it, for `all_reduced` in a function that `everywhere` runs.

    Raises:
        WorkerLostError: another worker ended.
        ValueError: there is no batch, or the workers' datasets differ.
    """
    strategy = strategy_of(model)
    result = None
    if strategy is None:
        for batch in batches:
            looped, *arguments = _of_stack(steps.summed, function, batch)
            part = looped(*arguments, *operands, batch.weights)
            result = part if result is None else tf.nest.map_structure(operator.add, result, part)
    else:
        tally = _Tally(strategy)
        beside = copies(strategy, operands)
        for batch in batches:
            placed = batch if isinstance(batch, Placed) else _place(strategy, [batch])
            tally.add(placed)
            looped = _of_stack(steps.summed, function, placed)
            part = _run(strategy, *looped, *beside, placed.weights)
            result = part if result is None else _run(strategy, _add, result, part)
        if several_workers(strategy):
            tally.agree()
    if result is None:
        raise ValueError("There is no batch to sum over.")
    if strategy is None or on_replicas:
        return result
    return tf.nest.map_structure(lambda value: _reduced(strategy, value), result)


def all_reduced(value: tf.Tensor) -> tf.Tensor:
    """The sum of all replicas' values, on each; in a plain function that `everywhere` runs."""
    return tf.distribute.get_replica_context().all_reduce("sum", value)


def all_gathered(value: tf.Tensor) -> tf.Tensor:
    """All replicas' values, one after another along the first axis, on each; likewise."""
    return tf.distribute.get_replica_context().all_gather(value, axis=0)


def replica_number() -> Any:
    """Of the replica that runs the function; likewise."""
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def place(batches: Iterable[Batch], model: keras.Model, steps_per_execution: int = 1) -> list[Any]:
    """The batches as tensors on the devices that `total` will use them on, once for many sums.

    Args:
        batches: the same in every process.
        model: whose strategy they are placed for.
        steps_per_execution: batches that `total` goes through in one execution; see `steps`.
    """
    strategy = strategy_of(model)
    batches = list(batches)
    # As few executions as can be, and stacks as even as can be.
    executions = -(-len(batches) // steps_per_execution)
    size = -(-len(batches) // executions) if batches else 1
    found = list(steps.groups(batches, size))
    if strategy is not None:
        return [_place(strategy, group, size) for group in found]
    placed = []
    for group in found:
        if size == 1:
            (batch,) = group
            examples, weights, count = batch.examples, batch.weights, None
        else:
            examples, weights, count = _stack(group, size)
        examples, weights = tf.nest.map_structure(tf.convert_to_tensor, (examples, weights))
        ids = np.concatenate([batch.ids for batch in group])
        rows = len(group[0].weights)
        placed.append(Placed(examples, weights, ids, np.arange(rows), rows, 0, count))
    return placed


def _stack(group: list[Batch], size: int) -> tuple[Any, Any, tf.Tensor]:
    examples = steps.stacked([batch.examples for batch in group], size)
    weights = steps.stacked([batch.weights for batch in group], size)
    return examples, weights, tf.constant(len(group))


def _of_stack(
    loop: Callable[[Callable[..., Any]], Callable[..., Any]],
    function: Callable[..., Any],
    batch: Batch | Placed,
) -> tuple[Any, ...]:
    """What is called for a batch, or for a stack of them, and its first arguments."""
    if isinstance(batch, Placed) and batch.count is not None:
        return loop(function), batch.examples, batch.count
    return function, batch.examples


def everywhere(function: Callable[..., Any], model: keras.Model, *arguments: Any) -> Any:
    """`function(*arguments)`, computed by every replica: operands that need no copying.

    Args:
        function: one that lasts. With `all_reduced` in it, it must be no `tf.function`: those know
            nothing of the other replicas.
    """
    strategy = strategy_of(model)
    if strategy is None:
        return function(*arguments)
    return _run(strategy, function, *copies(strategy, arguments))


def here(function: Callable[..., Any], model: keras.Model, *arguments: Any) -> Any:
    """`function(*arguments)`, computed by this process's replicas and no other worker."""
    strategy = strategy_of(model)
    if strategy is None:
        return function(*arguments)
    results = everywhere(function, model, *arguments)
    return tf.nest.map_structure(
        lambda value: strategy.experimental_local_results(value)[0], results
    )


def _found_strategy(model: keras.Model) -> tf.distribute.Strategy:
    """Of the model's variables, or of the model, or that in scope; or TensorFlow's default."""
    # Those of a OneDeviceStrategy do not know it, and need not.
    for variable in getattr(model, "variables", ()):
        strategy = getattr(variable.value, "distribute_strategy", None)
        if strategy is not None:
            return strategy
    # Keras gives that in scope, where the model has none of its own.
    return getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()


def strategy_of(model: keras.Model) -> tf.distribute.Strategy | None:
    """`_found_strategy`, or None where there is nothing to distribute.

    Raises:
        NotImplementedError: a parameter server strategy, whose workers do not step together.
    """
    strategy = _found_strategy(model)
    if not tf.distribute.has_strategy() and strategy is tf.distribute.get_strategy():
        return None
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise NotImplementedError(
            "The variables of a ParameterServerStrategy are on servers, and its workers do not "
            "step together. Build the model under a MirroredStrategy, MultiWorkerMirroredStrategy, "
            "TPUStrategy or none, and load its weights."
        )
    return strategy


# For each function, and each strategy, what runs it on the replicas.
_runners: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _run(strategy: tf.distribute.Strategy, function: Callable[..., Any], *arguments: Any) -> Any:
    """`strategy.run` of a function that lasts, as one graph of all replicas.

    Given a `tf.function`, `strategy.run` makes such a graph by itself, and keeps it with the
    function, and the model behind that, until the process ends.
    """
    runners = _runners.setdefault(function, weakref.WeakKeyDictionary())
    if strategy not in runners:
        wanted, where = weakref.ref(function), weakref.ref(strategy)

        def on_replica(*arguments: Any) -> Any:
            return wanted()(*arguments)  # type: ignore[misc]

        def on_replicas(*arguments: Any) -> Any:
            return where().run(on_replica, args=arguments)  # type: ignore[union-attr]

        # A partial, because TensorFlow counts traces by code object, and would blame one function
        # for those of another.
        runners[strategy] = tf.function(functools.partial(on_replicas), autograph=False)
    return runners[strategy](*arguments)


def _place(strategy: tf.distribute.Strategy, group: list[Batch], size: int = 1) -> Placed:
    """A batch, or a stack of some of one shape."""
    replicas = strategy.num_replicas_in_sync
    length = len(group[0].weights)
    each = -(-length // replicas)
    arrays = [tf.nest.map_structure(np.asarray, (batch.examples, batch.weights)) for batch in group]
    mine: list[np.ndarray] = []

    def one_slice(replica: int) -> tuple[Any, ...]:
        rows = np.arange(replica * each, (replica + 1) * each)
        mine.append(rows)
        real = rows < length
        # Beyond the batch, copies of its first example, of weight 0.
        taken = np.where(real, rows, 0)
        cuts = []
        for examples, weights in arrays:
            cut = tf.nest.map_structure(lambda array: array[taken], examples)
            cuts.append((*cut, np.where(real, weights[taken], 0).astype(weights.dtype)))
        return cuts[0] if size == 1 else steps.stacked(cuts, size)

    *cut, weights_cut = per_replica(strategy, one_slice)
    checksum = 0
    if several_workers(strategy):
        for array in tf.nest.flatten(arrays):
            # The bytes of an array of strings are addresses.
            text = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
            checksum = zlib.crc32(text, checksum)
    return Placed(
        tuple(cut),
        weights_cut,
        np.concatenate([batch.ids for batch in group]),
        np.concatenate(mine),
        each * replicas,
        checksum,
        None if size == 1 else copies(strategy, tf.constant(len(group))),
    )


def per_replica(strategy: tf.distribute.Strategy, make: Callable[[int], Any]) -> Any:
    """What `make` gives for each replica of this process by its number, on the replica's device."""
    devices = iter(strategy.extended.worker_devices)

    def one_replica(context: Any) -> Any:
        with tf.device(next(devices)):
            return tf.nest.map_structure(tf.identity, make(context.replica_id_in_sync_group))

    return strategy.experimental_distribute_values_from_function(one_replica)


def copies(strategy: tf.distribute.Strategy, nest: Any) -> Any:
    """The nest's tensors on the device of each replica; what is there already stays."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, tf.distribute.DistributedValues):
            return leaf
        return per_replica(strategy, lambda _: leaf)

    return tf.nest.map_structure(of_leaf, nest)


@tf.function(autograph=False)
def _add(a: Any, b: Any) -> Any:
    return tf.nest.map_structure(operator.add, a, b)


def several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether some replicas belong to other processes, which run the same program."""
    return strategy.num_replicas_in_sync > len(strategy.extended.worker_devices)


def _reduced(strategy: tf.distribute.Strategy, value: Any) -> tf.Tensor:
    """The sum over all replicas, in every process."""
    with _naming_lost_workers(strategy):
        return strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)


def _worker_number(strategy: tf.distribute.Strategy) -> int:
    replicas: list[int] = []

    def number(replica: int) -> np.ndarray:
        replicas.append(replica)
        return np.zeros(())

    per_replica(strategy, number)
    return replicas[0] // len(strategy.extended.worker_devices)


def _rows_of_workers(strategy: tf.distribute.Strategy, row: np.ndarray) -> np.ndarray:
    """Each process's row, in every process: [workers, n]. Float64 holds integers to 2^53."""
    local = len(strategy.extended.worker_devices)
    table = np.zeros((strategy.num_replicas_in_sync // local, len(row)))
    table[_worker_number(strategy)] = row
    return _sum_over_workers(strategy, table)


def _sum_over_workers(strategy: tf.distribute.Strategy, array: np.ndarray) -> np.ndarray:
    """The sum of each process's array, in every process."""
    parts = iter([array])
    shares = per_replica(strategy, lambda _: next(parts, np.zeros_like(array)))
    return _reduced(strategy, shares).numpy()


class _Tally:
    """What a worker has read, to be compared with what the others have.

    A worker that reads fewer batches would leave the others waiting for its part for ever, and one
    that reads them in another order would add to the sums of other examples.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self.strategy = strategy
        self.batches = 0
        self.examples = 0
        self.checksum = 0

    def add(self, placed: Placed) -> None:
        self.batches += 1
        self.examples += placed.num_examples
        self.checksum = zlib.crc32(placed.checksum.to_bytes(4, "little"), self.checksum)

    def agree(self, failed: bool = False) -> list[int]:
        """The numbers of the workers whose work failed.

        Raises:
            ValueError: the workers did not read the same.
        """
        mine = (self.batches, self.examples, self.checksum, failed)
        table = _rows_of_workers(self.strategy, np.array(mine, np.float64))
        if (table[:, :3] != table[0, :3]).any():
            read = ", ".join(f"{int(b)} batches of {int(n)} examples" for b, n, _, _ in table)
            differ = "" if len(set(table[:, 1])) > 1 else ", which differ in content"
            raise ValueError(
                "The workers must read the same examples in the same order. They read: "
                f"{read}{differ}. Give every worker the whole dataset, unshuffled and unsharded."
            )
        return [int(worker) for worker in np.flatnonzero(table[:, 3])]


@contextlib.contextmanager
def _naming_lost_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    try:
        yield
    except _LOST as error:
        if not several_workers(strategy):
            raise
        raise WorkerLostError(
            "A worker of the cluster ended, restarted, or cannot be reached, so that no results "
            "can be exchanged. Look at the other workers' logs for the cause, then start the "
            f"programs of all workers again. TensorFlow says: {error.message.splitlines()[0]}"
        ) from error
