"""The linear maps of a model's per-example loss: everything that a method asks of a model.

With l_i the loss of example i at the model's current parameters:

    gradient(batch, weights)       sum_i w_i grad l_i                  [p]
    project(batch, directions)     <grad l_i, v_j>                     [batch, k]
    curvature(batch, v, weights)   sum_i w_i Hessian(l_i) v            [p]
    curvatures(batch, V, weights)  the same of k vectors at once       [k, p]

and the Gauss-Newton and Fisher products in place of the Hessian's; see `convexity`. The model runs
with `training=False`. Vectors are flat; see `ParameterVector`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from keras_influence.gradients.coverage import (
    LAYER_FALLBACK,
    NETWORK_FALLBACK,
    Coverage,
)
from keras_influence.gradients.factors import CONTRACTIONS, Contraction
from keras_influence.gradients.gauss_newton import gauss_newton
from keras_influence.gradients.graphs import tensor_bytes
from keras_influence.gradients.labels import Terms, label_terms, pairing_losses
from keras_influence.gradients.linearization import (
    Directions,
    Linearization,
    linearize,
    prepare,
)
from keras_influence.gradients.losses import PerExampleLoss
from keras_influence.gradients.parameters import ParameterVector, Variables, select_variables
from keras_influence.gradients.second_order import (
    cheap_second_derivatives,
    twice_differentiable_moments,
)
from keras_influence.gradients.separation import check_separate
from keras_influence.gradients.slope import slope
from keras_influence.gradients.survey import survey

# Share of the parameters that forward mode may serve without a warning.
_SLOW_SHARE = 0.03


# (batch, vector [p], weights [B] or None) -> [p]; or of vectors [k, p] -> [k, p].
Product = Callable[..., tf.Tensor]


class LossMaps:
    """`gradient`, `project` and `curvature` of one model, one loss and one choice of variables.

    A batch is what `model.fit` sees: a tuple (x, y) or (x, y, sample_weight) of tensors or nests of
    tensors. The model's weights are read at each call, so one `LossMaps` serves every checkpoint.
    Where they live on a TPU, each map is one program that XLA compiles whole.

    Args:
        model: a built Keras model.
        loss: as in `model.compile`; defaults to the compiled loss.
        variables: layers or variables to differentiate by, or a predicate; see `select_variables`.
        sequence_reduction: `"mean"` or `"sum"` of the tokens' losses; see `PerExampleLoss`.
        contraction: how per-example gradients are multiplied: memory, order, precision.

    Attributes:
        parameters: the `ParameterVector`.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: Any = None,
        variables: Variables = None,
        sequence_reduction: str = "mean",
        contraction: Contraction | None = None,
    ):
        self.model = model
        self.parameters = ParameterVector(select_variables(model, variables))
        self.loss = PerExampleLoss(model, loss, sequence_reduction)
        self.contraction = contraction or Contraction()
        if self.contraction.order not in CONTRACTIONS or self.contraction.budget <= 0:
            raise ValueError(
                f"A contraction's `order` must be one of {CONTRACTIONS}, and its `budget` above "
                f"zero. Received: {self.contraction}."
            )
        self._coverages: dict[str, Coverage] = {}
        self._warned = False
        self.losses = _compiled(self._losses, self.parameters.values)
        self.gradient = _compiled(self._gradient, self.parameters.values)
        self.project = _compiled(self._project, self.parameters.values)
        self.project_with_norms = _compiled(self._project_with_norms, self.parameters.values)
        self.curvature = _compiled(self._curvature, self.parameters.values)
        self.gauss_newton = _compiled(self._gauss_newton, self.parameters.values)
        self.fisher = _compiled(self._fisher, self.parameters.values)
        self.curvatures = self._of_rows(self._curvature)
        self._kinds = {
            "hessian": (self.curvature, self.curvatures),
            "gauss_newton": (self.gauss_newton, self._of_rows(self._gauss_newton)),
            "fisher": (self.fisher, self._of_rows(self._fisher)),
        }
        self.forward_curvature = _compiled(self._forward_curvature, self.parameters.values)
        self.squared_norms = _compiled(self._squared_norms, self.parameters.values)
        self.example_gradients = _compiled(self._example_gradients, self.parameters.values)
        self.gradient_directions = _compiled(self._gradient_directions, self.parameters.values)
        self.forward_project = _compiled(self._forward_project, self.parameters.values)

    def _losses(self, batch: Any) -> tf.Tensor:
        """(x, y[, sample_weight]) -> l_i [batch]."""
        x, y, sample_weight = (*batch, None)[:3]
        return self.output_losses(y, self.outputs(x), sample_weight)

    def outputs(self, x: Any) -> Any:
        with twice_differentiable_moments():
            return self.model(x, training=False)

    def output_losses(self, y: Any, outputs: Any, sample_weight: Any) -> tf.Tensor:
        losses = self.loss(y, outputs, sample_weight)
        if losses is None or losses.shape.rank != 1:
            raise ValueError(
                "The loss must give one number for each example. It gave "
                f"{'nothing' if losses is None else f'shape {losses.shape}'}."
            )
        return losses

    def _gradient(self, batch: Any, weights: tf.Tensor | None = None) -> tf.Tensor:
        """sum_i weights_i grad l_i, [p]; weights [batch] default to ones."""
        return self.parameters.flatten(self._reverse(batch, weights))

    def _reverse(self, batch: Any, weights: tf.Tensor | None) -> list[Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.parameters.values)
            losses = self._losses(batch)
            if weights is not None:
                losses *= tf.cast(weights, losses.dtype)
            total = tf.reduce_sum(losses)
        return [
            None if gradient is None else tf.convert_to_tensor(gradient)
            for gradient in tape.gradient(total, self.parameters.values)
        ]

    def _curvature(
        self, batch: Any, vector: tf.Tensor, weights: tf.Tensor | None = None
    ) -> tf.Tensor:
        """sum_i weights_i Hessian(l_i) vector, [p], vector [p]: reverse over reverse."""
        coverage = self.coverage(batch)
        with cheap_second_derivatives():
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(self.parameters.values)
                along = slope(coverage, self.parameters, self._losses, batch, vector, weights)
            gradient = along.gradient(tape, self.parameters.values)
        return self.parameters.flatten(gradient)

    def products(self, kind: str) -> tuple[Product, Product]:
        """One of `CURVATURES` as `curvature`, and as `curvatures`."""
        return self._kinds[kind]

    def _of_rows(self, product: Product) -> Product:
        """`product` of each row of vectors [k, p]: [k, p], by one pass of the network.

        What does not depend on the vector is computed once; the rest is as large as k times
        `curvature_bytes`.
        """

        def products(batch: Any, vectors: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
            return tf.vectorized_map(lambda vector: product(batch, vector, weights), vectors)

        return _compiled(products, self.parameters.values)

    def curvature_bytes(self, batch: Any, kind: str = "hessian") -> int:
        """Size of all tensors that a product makes of a batch, of those of known shape."""
        vector = tf.TensorSpec([self.parameters.size], self.parameters.dtype)
        with tf.init_scope():
            leaves = tf.nest.map_structure(tf.convert_to_tensor, batch)
        specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, leaves)
        size = len(tf.nest.flatten(leaves)[0])
        weights = tf.TensorSpec([size], tf.float32)
        traced: Any = self._kinds[kind][0]
        return tensor_bytes(traced.get_concrete_function(specs, vector, weights).graph)

    def _gauss_newton(
        self, batch: Any, vector: tf.Tensor, weights: tf.Tensor | None = None
    ) -> tf.Tensor:
        """sum_i weights_i J_i' L_i J_i vector, [p], vector [p]; see `convexity`."""
        return self._semidefinite(batch, vector, weights, fisher=False)

    def _fisher(self, batch: Any, vector: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
        """The same with the mean of L_i over labels drawn from the model."""
        return self._semidefinite(batch, vector, weights, fisher=True)

    def _semidefinite(
        self, batch: Any, vector: tf.Tensor, weights: tf.Tensor | None, fisher: bool
    ) -> tf.Tensor:
        coverage = self.coverage(batch)
        with cheap_second_derivatives():
            products = gauss_newton(
                coverage,
                self.parameters,
                self.outputs,
                self.output_losses,
                batch,
                vector,
                weights,
                fisher,
            )
        return self.parameters.flatten(products)

    def _forward_curvature(
        self, batch: Any, vector: tf.Tensor, weights: tf.Tensor | None = None
    ) -> tf.Tensor:
        """`curvature`, forward over reverse: an independent way, to be compared with.

        It is not the one in use: it is slower by up to a fifth, fails in a recurrent layer's loop,
        and is silently wrong where Keras compiles an operation by itself (see
        `graphs.is_plain`).
        """
        tangents = self.parameters.unflatten(vector)
        with tf.autodiff.ForwardAccumulator(self.parameters.values, tangents) as accumulator:
            gradients = self._reverse(batch, weights)
        return self.parameters.flatten(
            [None if g is None else accumulator.jvp(g) for g in gradients]
        )

    def linearize(self, batch: Any) -> Linearization:
        """One forward and one backward pass of a batch, with the factors of all its gradients.

        What `project`, `squared_norms` and the others are made of; for use in a `tf.function`.
        """
        return linearize(
            self.coverage(batch), self.parameters, self._losses, batch, self.contraction
        )

    def linearize_labels(
        self,
        batch: Any,
        ids: tf.Tensor,
        weights: tf.Tensor,
        draw: tf.Tensor,
        labels: str,
        seed: int,
    ) -> Linearization:
        """`linearize` with gradients whose mean square is a Fisher matrix; see `labels`.

        Args:
            ids: of the examples, integers [B].
            weights: of their gradients, [B]; 0 for padding.
            draw: number of the draw.
            labels: one of `LABELS`; `"empirical"` for those that the batch has.
            seed: of all draws.
        """

        def losses(batch: Any) -> tf.Tensor:
            if labels == "empirical":
                examples, _, weights = batch
                own = self._losses(examples)
                return own * tf.cast(weights, own.dtype)
            return pairing_losses(
                self.outputs, self.output_losses, batch, draw, seed, labels == "expected"
            )

        weights = tf.cast(weights, self.parameters.dtype)
        coverage = self.coverage(batch)
        return linearize(coverage, self.parameters, losses, (batch, ids, weights), self.contraction)

    def label_terms(self, batch: Any) -> Terms:
        """What `labels="expected"` takes the expectation of."""
        return label_terms(self.outputs, self.output_losses, batch)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as one graph for each shape of its arguments, as the maps are."""
        return _compiled(function, self.parameters.values)

    def coverage(self, batch: Any) -> Coverage:
        """Which layers' rules serve the variables, for batches like `batch`.

        The first call for batches of a structure traces the model twice; nothing is run.
        """
        leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(batch)]
        specifications = tf.nest.pack_sequence_as(
            batch, [tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype) for leaf in leaves]
        )
        key = str(specifications)
        if key not in self._coverages:
            self._coverages[key] = survey(
                self.model,
                self.parameters.variables,
                self._losses,
                specifications,
                self.parameters.dtype,
            )
            self._warn_of_fallbacks(self._coverages[key])
        return self._coverages[key]

    def check_separate(self, batch: Any) -> None:
        """Raises where an example's loss depends on the others; see `separation`."""
        check_separate(self.model, self._losses, batch)

    @property
    def known_coverage(self) -> Coverage | None:
        """The last coverage that was asked for."""
        return next(reversed(self._coverages.values()), None)

    def _warn_of_fallbacks(self, coverage: Coverage) -> None:
        # A variable may be served by a rule in one call and without one in another.
        fallbacks = (LAYER_FALLBACK, NETWORK_FALLBACK)
        slow = [row for row in coverage.served if any(each in row.rule for each in fallbacks)]
        share = sum(row.parameters for row in slow) / self.parameters.size
        if share <= _SLOW_SHARE or self._warned:
            return
        self._warned = True
        largest = max(slow, key=lambda row: row.parameters)
        logging.warning(
            "%.0f%% of the parameters of %r have no rule, and are served by forward mode, which is "
            "slow; the largest is %r (%s). `keras_influence.gradients.register_rule` declares one.",
            100 * share,
            self.model.name,
            largest.variable,
            largest.layer or "in no layer's call",
        )

    def prepare(self, directions: Any, batch: Any) -> Directions:
        """Directions [k, p] laid out for `project`, once for all batches like `batch`."""
        return self.lay_out(directions, self.coverage(batch))

    def lay_out(self, directions: Any, coverage: Coverage) -> Directions:
        """Directions [k, p] laid out for the batches of a coverage."""
        directions = tf.convert_to_tensor(directions, self.parameters.dtype)
        return prepare(coverage, self.parameters, directions, self.contraction)

    def _project(self, batch: Any, directions: Any) -> tf.Tensor:
        """<grad l_i, directions_j>: [batch, k] of directions [k, p], or of `Directions`."""
        if not isinstance(directions, Directions):
            directions = self.prepare(tf.cast(directions, self.parameters.dtype), batch)
        return self.linearize(batch).project(directions)

    def _project_with_norms(self, batch: Any, directions: Directions) -> tf.Tensor:
        """`project`, and |grad l_i|^2 as the last column: [batch, k + 1], from one pass."""
        linearized = self.linearize(batch)
        norms = linearized.squared_norms()[:, tf.newaxis]
        return tf.concat([linearized.project(directions), norms], axis=1)

    def _forward_project(self, batch: Any, directions: tf.Tensor) -> tf.Tensor:
        """`project` by forward mode through the whole network, a direction at a time.

        What published implementations do. It is here to be compared with.
        """

        def one_direction(vector: tf.Tensor) -> tf.Tensor:
            tangents = self.parameters.unflatten(vector)
            with tf.autodiff.ForwardAccumulator(self.parameters.values, tangents) as accumulator:
                losses = self._losses(batch)
            tangent = accumulator.jvp(losses, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return tf.cast(tangent, self.parameters.dtype)

        columns = [one_direction(vector) for vector in tf.unstack(directions)]
        return tf.stack(columns, axis=1)

    def _squared_norms(self, batch: Any) -> tf.Tensor:
        """|grad l_i|^2, [batch]."""
        return self.linearize(batch).squared_norms()

    def _example_gradients(self, batch: Any) -> tf.Tensor:
        """grad l_i of each example, [batch, p]. For few examples: it holds them all."""
        return self.linearize(batch).rows()

    def _gradient_directions(self, batch: Any) -> Directions:
        """The examples' gradients as directions, for products with those of other batches.

        Of a layer whose examples have one position each, a gradient is kept as the two vectors
        whose outer product it is, and the product of two gradients is that of two small Gram
        matrices.
        """
        return self.linearize(batch).as_directions()


def _compiled(
    method: Callable[..., tf.Tensor], values: Sequence[tf.Variable]
) -> Callable[..., tf.Tensor]:
    # A graph for each batch size: with known sizes the contractions are planned better, and
    # the same batch gives the same bits whatever came before it. A partial, because TensorFlow
    # counts traces by code object, and would blame one LossMaps for those of another. Without
    # autograph, as in Keras's own training step.
    return tf.function(
        functools.partial(method), autograph=False, jit_compile=on_tpu(values) or None
    )


def on_tpu(values: Sequence[tf.Variable]) -> bool:
    """Whether XLA must compile what reads these variables.

    A TPU runs nothing else. On a CPU XLA is slower than TensorFlow's own kernels (projections: 8
    times), and folds the constants of forward-mode convolutions for minutes.
    """
    return any(tf.DeviceSpec.from_string(v.device).device_type == "TPU" for v in values)
