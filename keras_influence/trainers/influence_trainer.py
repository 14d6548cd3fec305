"""Training that takes note of what each step was made of: TracIn by the step."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from keras_influence import data
from keras_influence.gradients import LossMaps


class InfluenceRecord:
    """What the steps of a training run were made of.

    Attributes:
        ids: of each step's batch, a list of int64 [batch].
        learning_rates: of each step.
        losses: each example's loss just before the step, where asked for.
        products: of each example's gradient with each query's, just before the step, float32
            [batch, queries], where there are queries.
        squared_norms: of each example's gradient just before the step, where asked for.
    """

    def __init__(self) -> None:
        self.ids: list[NDArray[np.int64]] = []
        self.learning_rates: list[float] = []
        self.losses: list[NDArray[np.float32]] = []
        self.products: list[NDArray[np.float32]] = []
        self.squared_norms: list[NDArray[np.float32]] = []

    def __len__(self) -> int:
        """Steps that were recorded."""
        return len(self.ids)

    def scores(self, num_train: int) -> NDArray[np.float32]:
        """TracIn, each step by itself (Pruthi et al. 2020, their "idealized" influence).

            I(z, x) = sum over the steps t with x of eta_t / B_t <grad l(z), grad l(x)>,

        both gradients at the weights before the step. It is, to first order, what the steps on x
        took off the loss of z in a run of plain SGD; momentum and adaptive rates are not followed.

        Args:
            num_train: N, one more than the largest id.

        Returns:
            float32 [queries, N]; positive for proponents.

        Raises:
            ValueError: nothing recorded, or an id beyond `num_train`.
        """
        return self._summed(self.products, "`queries`", num_train).T

    def self_influence(self, num_train: int) -> NDArray[np.float32]:
        """The same of each example on itself: float32 [N]."""
        columns = [norms[:, np.newaxis] for norms in self.squared_norms]
        return self._summed(columns, "`self_influence`", num_train)[:, 0]

    def _summed(
        self, values: list[NDArray[np.float32]], option: str, num_train: int
    ) -> NDArray[np.float32]:
        if not values:
            raise ValueError(f"The run recorded no such products: record with {option}.")
        largest = max(int(ids.max()) for ids in self.ids)
        if largest >= num_train:
            raise ValueError(
                f"`num_train` must be above the largest id, {largest}. Received: {num_train}."
            )
        total = np.zeros((num_train, values[0].shape[1]))
        for ids, rate, rows in zip(self.ids, self.learning_rates, values, strict=True):
            # An example may be in a batch twice.
            np.add.at(total, ids, rate / len(ids) * rows.astype(np.float64))
        return total.astype(np.float32)


class InfluenceTrainerMixin:
    """For a `keras.Model` of one's own: its train step takes note of what it is made of.

    Put it before `keras.Model` among the bases, and train on a dataset with ids. `record` says what
    is to be noted besides the ids and the learning rate. The model itself never sees the ids.

    Example:

    ```python
    class Recorded(ki.trainers.InfluenceTrainerMixin, keras.Model):
        pass

    model = Recorded(inputs, outputs)
    model.compile("sgd", loss)
    model.record(queries=(x_test[:5], y_test[:5]))
    model.fit(ki.data.with_ids(train), epochs=3)
    model.influence_record.scores(num_train)  # [5, num_train]
    ```
    """

    influence_record: InfluenceRecord
    _noted: tuple[bool, bool] = (False, False)
    _queries: tuple[Any, ...] | None = None
    _maps: LossMaps | None = None

    def record(
        self, queries: Any = None, losses: bool = False, self_influence: bool = False
    ) -> InfluenceRecord:
        """Begins a new record.

        Args:
            queries: a few labelled examples, for the product of each training example's gradient
                with theirs at every step. Each step then costs about two of the batch and of the
                queries together, and the products.
            losses: whether to note each example's loss before the step: a forward pass.
            self_influence: whether to note each example's squared gradient norm.

        Returns:
            The record, which grows while the model trains.
        """
        self.influence_record = InfluenceRecord()
        self._noted = (losses, self_influence)
        self._queries = None
        if queries is not None:
            self._queries = tf.nest.map_structure(tf.constant, data.read(queries).arrays)
        self.train_function = None  # Traced with what was to be noted before.
        return self.influence_record

    def compile(self, *args: Any, **kwargs: Any) -> None:
        # What XLA compiles cannot call back: Keras then leaves it, also where it would choose it.
        self.supports_jit = False
        super().compile(*args, **kwargs)  # type: ignore[misc]

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, data.Identified):
            inputs = inputs.inputs
        return super().__call__(inputs, *args, **kwargs)  # type: ignore[misc]

    def train_step(self, batch: Any) -> Any:
        x, y, weights = keras.utils.unpack_x_y_sample_weight(batch)
        if not isinstance(x, data.Identified):
            raise ValueError(
                "An InfluenceTrainer needs the id of each example: train on "
                f"`ki.data.with_ids(dataset)`. Received inputs of type {type(x).__name__}."
            )
        if not hasattr(self, "influence_record"):
            self.record()
        examples = (x.inputs, y) if weights is None else (x.inputs, y, weights)
        values = self._values(examples)
        optimizer: Any = self.optimizer  # type: ignore[attr-defined]
        rate = tf.cast(tf.convert_to_tensor(optimizer.learning_rate), tf.float32)
        tf.numpy_function(self._note, [x.ids, rate, *values], [], stateful=True)
        return super().train_step(examples)  # type: ignore[misc]

    def _values(self, examples: tuple[Any, ...]) -> list[tf.Tensor]:
        """What is noted of each example, at the weights before the step."""
        losses, self_influence = self._noted
        if not (losses or self_influence or self._queries):
            return []
        if self._maps is None:
            self._maps = LossMaps(self)
        values = []
        if losses:
            values.append(self._maps.losses(examples))
        if self._queries is not None:
            directions = self._maps.example_gradients(self._queries)
            values.append(self._maps.project(examples, directions))
        if self_influence:
            values.append(self._maps.squared_norms(examples))
        return values

    def _note(self, ids: np.ndarray, rate: np.ndarray, *values: np.ndarray) -> None:
        record = self.influence_record
        # Copies: TensorFlow may reuse what it hands out.
        rest = [np.array(value, np.float32) for value in values]
        losses, self_influence = self._noted
        if losses:
            record.losses.append(rest.pop(0))
        if self._queries is not None:
            record.products.append(rest.pop(0))
        if self_influence:
            record.squared_norms.append(rest.pop(0))
        record.ids.append(np.array(ids, np.int64))
        record.learning_rates.append(float(rate))


class InfluenceTrainer(InfluenceTrainerMixin, keras.Model):
    """Trains a model that is there already, and takes note of what each step was made of.

    The model's weights are trained in place; the trainer is compiled and fitted in its stead. One
    device; XLA is not used, whatever `jit_compile` says.

    Args:
        model: a built model.
        queries, losses, self_influence: see `InfluenceTrainerMixin.record`.

    Example:

    ```python
    trainer = ki.trainers.InfluenceTrainer(model, queries=(x_test[:5], y_test[:5]))
    trainer.compile(keras.optimizers.SGD(0.1), loss)
    trainer.fit(ki.data.with_ids(train), epochs=3)
    trainer.influence_record.scores(num_train)  # [5, num_train]
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        queries: Any = None,
        losses: bool = False,
        self_influence: bool = False,
    ):
        super().__init__()
        if not model.built:
            raise ValueError(
                f"`model` must be built. Received an unbuilt {type(model).__name__}: call it on a "
                "batch first."
            )
        self.model = model
        self.built = True
        self.record(queries, losses, self_influence)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)
