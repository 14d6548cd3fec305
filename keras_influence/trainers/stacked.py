"""R models of one architecture trained at once: their weights stacked, each batch a batch of R."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence.trainers.recipe import Recipe, epoch_order

# Each output example of these depends on its own input alone, and no weight or draw enters it.
_WEIGHTLESS = (
    keras.layers.Activation,
    keras.layers.Add,
    keras.layers.Average,
    keras.layers.AveragePooling2D,
    keras.layers.Concatenate,
    keras.layers.ELU,
    keras.layers.Flatten,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.LeakyReLU,
    keras.layers.MaxPooling2D,
    keras.layers.Multiply,
    keras.layers.ReLU,
    keras.layers.Rescaling,
    keras.layers.Reshape,
    keras.layers.Softmax,
    keras.layers.Subtract,
    keras.layers.ZeroPadding2D,
)
# Their step changes each number by itself.
_OPTIMIZERS = (
    keras.optimizers.SGD,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
)
_REGULARIZERS = (
    type(None),
    keras.regularizers.L1,
    keras.regularizers.L2,
    keras.regularizers.L1L2,
)
_REDUCTIONS = ("sum_over_batch_size", "mean", "sum")


class _Stacked(keras.layers.Layer):
    """A layer with R sets of weights, for inputs [R * B, ...] of which each R-th part has one."""

    def __init__(self, replicas: int, layer: Any):
        super().__init__(dtype=layer.dtype_policy)
        self.replicas = replicas
        self.activation = layer.activation
        # The method alone: a layer as an attribute would bring its own weights along.
        self._output_shape_of = layer.compute_output_shape
        for variable in layer.weights:
            self.add_weight(
                name=variable.name,
                shape=(replicas, *variable.shape),
                dtype=variable.dtype,
                initializer="zeros",
                regularizer=getattr(variable, "regularizer", None),
            )
        self.trainable = layer.trainable
        self.built = True

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self._output_shape_of(input_shape)

    def _multiplied(self, inputs: tf.Tensor) -> tf.Tensor:
        """Inputs [R * B, ..., a] times the kernels [R, ..., b], plus the biases, activated."""
        kernel, *bias = (weight.value for weight in self.weights)
        rows = tf.reshape(inputs, (self.replicas, -1, inputs.shape[-1]))
        outputs = rows @ tf.reshape(kernel, (self.replicas, -1, kernel.shape[-1]))
        if bias:
            outputs += bias[0][:, tf.newaxis]
        shape = tf.concat([tf.shape(inputs)[:-1], [kernel.shape[-1]]], axis=0)
        return self.activation(tf.reshape(outputs, shape))


class _StackedDense(_Stacked):
    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self._multiplied(inputs)


class _StackedConv2D(_Stacked):
    def __init__(self, replicas: int, layer: Any):
        super().__init__(replicas, layer)
        self._windows = (layer.kernel_size, layer.strides, layer.dilation_rate)
        self._padding = layer.padding.upper()

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        windows = [(1, *window, 1) for window in self._windows]
        return self._multiplied(tf.image.extract_patches(inputs, *windows, self._padding))


def obstacle(model: keras.Model, recipe: Recipe) -> str | None:
    """Why models like this one cannot be trained as a stack; None where they can."""
    if recipe.train_fn is not None or recipe.class_weight:
        return "the recipe is more than epochs and batches"
    if type(model) is not keras.Sequential and type(model).__name__ != "Functional":
        return f"{type(model).__name__} is no Sequential or functional model"
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        return "the model has several inputs or outputs"
    for layer in model.layers:
        reason = _layer_obstacle(layer)
        if reason is not None:
            return f"the layer {layer.name!r} {reason}"
    optimizer = model.optimizer
    if type(optimizer) not in _OPTIMIZERS:
        return f"the optimizer {type(optimizer).__name__} is not known to work number by number"
    config = optimizer.get_config()
    for option in ("clipnorm", "global_clipnorm", "use_ema", "loss_scale_factor"):
        if config.get(option):
            return f"the optimizer has {option}={config[option]}"
    if config.get("gradient_accumulation_steps") or _excludes_from_decay(optimizer):
        return "the optimizer accumulates gradients, or decays only some of the weights"
    loss = model.loss
    if not isinstance(loss, (str, keras.Loss)) or model.get_compile_config()["loss_weights"]:
        return "the loss is no Keras loss or name of one"
    reduction = getattr(loss, "reduction", "sum_over_batch_size")
    if reduction not in _REDUCTIONS:
        return f"the loss has reduction={reduction!r}"
    return None


def _layer_obstacle(layer: keras.layers.Layer) -> str | None:
    if isinstance(layer, keras.layers.InputLayer) or type(layer) in _WEIGHTLESS:
        return None
    if type(layer) is keras.layers.Dropout:
        return "drops at random" if layer.rate else None
    if type(layer) not in (keras.layers.Dense, keras.layers.Conv2D):
        return f"is a {type(layer).__name__}"
    if getattr(layer, "lora_enabled", False) or getattr(layer, "groups", 1) > 1:
        return "has groups or low-rank weights"
    if getattr(layer, "data_format", None) == "channels_first":
        return "has its channels first"
    if layer.dtype_policy.compute_dtype != layer.dtype_policy.variable_dtype:
        return "computes in mixed precision"
    if layer.activity_regularizer is not None or layer.kernel_constraint or layer.bias_constraint:
        return "regularises its activity or constrains its weights"
    for regularizer in (layer.kernel_regularizer, layer.bias_regularizer):
        if type(regularizer) not in _REGULARIZERS:
            return "has a regulariser that may not work number by number"
    return None


def _excludes_from_decay(optimizer: keras.optimizers.Optimizer) -> bool:
    return bool(
        getattr(optimizer, "_exclude_from_weight_decay", None)
        or getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    )


class Stack:
    """R models that train at once, each on examples and in an order of its own.

    With the weights of a layer stacked to [R, ...], its R products are one batched product, and an
    optimizer that works number by number makes R steps in one. What differs from training one by
    one is rounding.

    Args:
        model: built and compiled, without an `obstacle`; it is left as it is.
        initial: weights of each of the R models, as `model.get_weights` gives them.
    """

    def __init__(self, model: keras.Model, initial: Sequence[list[np.ndarray]]):
        self._replicas = len(initial)
        self._model = keras.models.clone_model(model, clone_function=self._stack_layer)
        optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
        self._model.compile(optimizer=optimizer, loss=model.loss, jit_compile=False)
        for stacked, *own in zip(self._model.weights, *initial, strict=True):
            stacked.assign(np.stack(own))
        variables = self._model.trainable_variables
        optimizer.build(variables)
        # Compiled, the optimizer's many operations become one pass over the weights, which is where
        # half of the time would go.
        self._update = tf.function(
            lambda gradients: optimizer.apply(gradients, variables), jit_compile=True
        )
        self._sums = getattr(model.loss, "reduction", None) == "sum"

    def _stack_layer(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.layers.Dense):
            return _StackedDense(self._replicas, layer)
        if isinstance(layer, keras.layers.Conv2D):
            return _StackedConv2D(self._replicas, layer)
        return type(layer).from_config(layer.get_config())

    def train(
        self,
        arrays: tuple[Any, ...],
        subsets: Sequence[np.ndarray],
        seeds: Sequence[int],
        recipe: Recipe,
    ) -> None:
        """Trains each model on its subset.

        Args:
            arrays: (x, y[, sample_weight]) of all examples.
            subsets: positions of each model's examples, as many for each.
            seeds: of the order of each model's examples.
            recipe: epochs, batch size, and whether to shuffle.
        """
        tensors = tf.nest.map_structure(tf.constant, arrays)
        size = recipe.batch_size
        steps, rest = divmod(len(subsets[0]), size)

        @tf.function(reduce_retracing=True)
        def run(order: tf.Tensor) -> None:
            for rows in order:
                self._step(tf.nest.map_structure(lambda t, rows=rows: tf.gather(t, rows), tensors))

        for epoch in range(recipe.epochs):
            order = np.stack(
                [
                    epoch_order(ids, seed, epoch, recipe.shuffle)
                    for ids, seed in zip(subsets, seeds, strict=True)
                ]
            )
            whole = order[:, : steps * size].reshape(self._replicas, steps, size)
            if steps:
                run(tf.constant(np.moveaxis(whole, 0, 1).reshape(steps, -1)))
            if rest:
                run(tf.constant(order[:, steps * size :].reshape(1, -1)))

    def _step(self, examples: tuple[Any, ...]) -> None:
        x, y, *weights = examples
        model = self._model
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = model.compute_loss(x, y, outputs, *weights)
            penalties = tf.add_n(model.losses) if model.losses else 0.0
            # A mean over the examples of all R models, of which each wants its own mean.
            scale = 1 if self._sums else self._replicas
            objective = scale * (loss - penalties) + penalties
        variables = [variable.value for variable in model.trainable_variables]
        self._update(tape.gradient(objective, variables))

    def weights(self, replica: int) -> list[np.ndarray]:
        """Weights of one of the models, in the order of `model.weights`."""
        return [variable.value[replica].numpy() for variable in self._model.weights]
