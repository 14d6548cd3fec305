"""Training sets, queries and recipes on which methods are held against retraining."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.linalg
import scipy.optimize
from sklearn import datasets

import image_data
import keras_influence as ki
import models
from full_batch import FullBatch
from keras_influence.trainers.recipe import Recipe, derived_seed, make

_LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Problem(NamedTuple):
    """A recipe and its data: what `RetrainingBank` is given.

    Attributes:
        make_model, fit, train_fn, repeats, seeds: as in `RetrainingBank`.
        train: (x, y) of the training examples.
        queries: (x, y) of the queries.
        masks: bool [subsets, training examples].
        l2: of the objective, which enters the curvature.
        curvature: that influences are to be taken by: where the loss has no single minimum the
            Hessian has negative eigenvalues, and no inverse that answers for anything.
    """

    make_model: Callable[[], keras.Model]
    train: tuple[np.ndarray, np.ndarray]
    queries: tuple[np.ndarray, np.ndarray]
    masks: np.ndarray
    fit: dict[str, Any] | None = None
    train_fn: Callable | None = None
    repeats: int = 1
    seeds: str = "own"
    l2: float = 0.0
    curvature: str = "hessian"

    def bank(self, directory: str | pathlib.Path) -> ki.trainers.RetrainingBank:
        """The bank of this problem, in a directory that is new or holds it."""
        return ki.trainers.RetrainingBank(
            directory,
            self.make_model,
            self.train,
            self.masks,
            queries=self.queries,
            fit=self.fit,
            train_fn=self.train_fn,
            repeats=self.repeats,
            seeds=self.seeds,
        )

    def trained(
        self, callbacks: Sequence[keras.callbacks.Callback] = (), seed: int | None = None
    ) -> keras.Model:
        """The model that is to be explained: of the same recipe, trained on all examples.

        Args:
            callbacks: told of the training, such as `TracInCheckpoint`; not for L-BFGS.
            seed: of its initial weights and of the order of its examples; by default, the one that
                all runs of the bank have where they share it.
        """
        seed = derived_seed(0, 0, 0) if seed is None else seed
        model = make(self.make_model, seed)
        examples = ki.data.read(self.train)
        Recipe(self.fit, self.train_fn).train(model, examples, seed, callbacks)
        return model


@dataclasses.dataclass(frozen=True)
class SoftmaxRegression:
    """Trains one dense layer to the optimum of its mean cross-entropy, + l2/2 |parameters|^2.

    By L-BFGS in float64, down to gradients of 1e-9.
    """

    l2: float

    def __call__(self, model: keras.Model, examples: ki.data.Examples) -> None:
        x, y = examples.arrays
        inputs = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
        classes = model.output_shape[-1]
        targets = np.eye(classes)[y]

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(-1, classes)
            logits = inputs @ weights
            normalizers = np.logaddexp.reduce(logits, axis=1)
            value = np.mean(normalizers - (logits * targets).sum(axis=1))
            errors = np.exp(logits - normalizers[:, np.newaxis]) - targets
            gradient = inputs.T @ errors / len(y) + self.l2 * weights
            return value + self.l2 / 2 * flat @ flat, gradient.reshape(-1)

        start = np.zeros(inputs.shape[1] * classes)
        options = {"maxiter": 20_000, "maxfun": 40_000, "gtol": 1e-9, "ftol": 0, "maxcor": 30}
        result = scipy.optimize.minimize(
            objective, start, jac=True, method="L-BFGS-B", options=options
        )
        gradient = np.abs(objective(result.x)[1]).max()
        if gradient > 1e-6:
            raise FloatingPointError(f"L-BFGS stopped at a gradient of {gradient}.")
        weights = result.x.reshape(-1, classes)
        model.set_weights([weights[:-1], weights[-1]])


@dataclasses.dataclass(frozen=True)
class NewtonSoftmaxRegression:
    """The same optimum by Newton's method: tens of milliseconds where thousands are trained."""

    l2: float

    def __call__(self, model: keras.Model, examples: ki.data.Examples) -> None:
        x, y = examples.arrays
        inputs = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
        size, classes = inputs.shape[1], model.output_shape[-1]
        targets = np.eye(classes)[y]
        weights = np.zeros((size, classes))
        value, probabilities = self._value(weights, inputs, targets)
        for _ in range(100):
            gradient = inputs.T @ (probabilities - targets) / len(y) + self.l2 * weights
            if np.abs(gradient).max() < 1e-10:
                break
            hessian = np.zeros((size, classes, size, classes))
            for a in range(classes):
                for b in range(a, classes):
                    share = probabilities[:, a] * ((a == b) - probabilities[:, b]) / len(y)
                    block = inputs.T @ (share[:, np.newaxis] * inputs)
                    hessian[:, a, :, b] = hessian[:, b, :, a] = block
            matrix = hessian.reshape(gradient.size, gradient.size)
            matrix[np.diag_indices(gradient.size)] += self.l2
            step = scipy.linalg.solve(matrix, gradient.ravel(), assume_a="pos")
            # Halved until it descends, as far from the optimum it may not.
            length, decrease = 1.0, gradient.ravel() @ step
            while True:
                candidate = weights - length * step.reshape(weights.shape)
                value_there, probabilities_there = self._value(candidate, inputs, targets)
                if value_there <= value - 1e-4 * length * decrease or length < 1e-6:
                    break
                length /= 2
            weights, value, probabilities = candidate, value_there, probabilities_there
        else:
            raise FloatingPointError("Newton's method has not converged in 100 steps.")
        model.set_weights([weights[:-1], weights[-1]])

    def _value(
        self, weights: np.ndarray, inputs: np.ndarray, targets: np.ndarray
    ) -> tuple[float, np.ndarray]:
        logits = inputs @ weights
        normalizers = np.logaddexp.reduce(logits, axis=1)
        loss = np.mean(normalizers - (logits * targets).sum(axis=1))
        probabilities = np.exp(logits - normalizers[:, np.newaxis])
        return loss + self.l2 / 2 * np.sum(weights**2), probabilities


def digits_model() -> keras.Model:
    """Softmax regression on 64 pixels: 650 parameters."""
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile("sgd", _LOSS)
    return model


def cnn_model(dtype: str = "float32") -> keras.Model:
    """The small CNN on 8 x 8 pixels: 2,616 parameters."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = models.small_cnn((8, 8, 1), 10)
    finally:
        keras.config.set_dtype_policy(policy)
    model.compile("sgd", _LOSS)
    return model


class Continued:
    """Makes the small CNN with the weights that a file keeps, to go on from there.

    By steps of the whole set: 1 / (the sum of their effective rates) is the damping of influences
    that predict where so many lead.

    Args:
        path: of weights, as `np.savez` writes them.
        l2: of the objective.
    """

    rate, momentum, steps = 0.05, 0.9, 200

    def __init__(self, path: str | pathlib.Path, l2: float):
        self.path = str(path)
        self.l2 = l2

    def __repr__(self) -> str:
        # Without the path: what the file holds is in a bank's record.
        return f"Continued(l2={self.l2})"

    @property
    def damping(self) -> float:
        return (1 - self.momentum) / (self.rate * self.steps)

    def __call__(self) -> keras.Model:
        model = cnn_model()
        with np.load(self.path) as stored:
            model.set_weights([stored[name] for name in stored.files])
        # In the objective, and not an optimizer's decay: at the minimum the two gradients cancel.
        for variable in model.trainable_variables:
            variable.regularizer = keras.regularizers.L2(self.l2 / 2)
        model.compile(keras.optimizers.SGD(self.rate, self.momentum), _LOSS)
        return model


def mnist_model(kernel_initializer: str | dict[str, Any] = "glorot_uniform") -> keras.Model:
    """Softmax regression on 784 pixels: 7,850 parameters."""
    dense = keras.layers.Dense(10, kernel_initializer=kernel_initializer)
    model = keras.Sequential([keras.Input((784,)), dense])
    model.compile(keras.optimizers.SGD(0.01), _LOSS)
    return model


def narrow_mnist_model() -> keras.Model:
    """The same from weights within 1 / sqrt(784), as PyTorch draws them: of 0.41 the deviation."""
    width = 784**-0.5
    config = {"minval": -width, "maxval": width}
    return mnist_model({"class_name": "RandomUniform", "config": config})


def fashion_model() -> keras.Model:
    """The mlp of the examples: 567,434 parameters."""
    model = models.mlp((28, 28, 1), 10)
    model.compile(keras.optimizers.SGD(0.03, momentum=0.9, weight_decay=1e-3), _LOSS)
    return model


def digits(l2: float, num_subsets: int = 100, num_train: int = 600) -> Problem:
    """The first of scikit-learn's digits, and 40 as queries: those from the 600th on."""
    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    return Problem(
        digits_model,
        (x[:num_train], y[:num_train]),
        (x[600:640], y[600:640]),
        ki.trainers.random_subsets(num_train, num_subsets),
        train_fn=SoftmaxRegression(l2),
        seeds="shared",  # The optimum is one, wherever the training begins.
        l2=l2,
    )


def digits_cnn(l2: float, start: pathlib.Path, num_train: int = 500) -> Problem:
    """The small CNN on fewer of the same digits, near a minimum: further steps from there.

    Args:
        l2: of the objective.
        start: file of the weights at the minimum; where there is none, they are trained, and
            written.
        num_train: training examples. The queries are the same as of `digits`.
    """
    problem = digits(l2, 2, num_train)
    train, queries = ((x.reshape(-1, 8, 8, 1), y) for x, y in (problem.train, problem.queries))
    if not start.exists():
        model = make(functools.partial(cnn_model, "float64"), derived_seed(0, 0, 0))
        doubled = train[0].astype(np.float64), train[1]
        FullBatch(l2)(model, ki.data.read(doubled))
        start.parent.mkdir(parents=True, exist_ok=True)
        np.savez(start, *model.get_weights())
    return Problem(
        Continued(start, l2),
        train,
        queries,
        problem.masks,
        fit={"epochs": Continued.steps, "batch_size": num_train, "shuffle": False},
        seeds="shared",  # Nothing is drawn.
        l2=l2,
    )


def mnist(seeds: str, make_model: Callable[[], keras.Model], data_dir: str | None) -> Problem:
    """5,000 training images and 500 test images, 20 epochs of plain SGD: not converged."""
    data = image_data.load("mnist", data_dir, 5000)
    images, queries = (
        ((images.reshape(len(images), -1) - 0.1307) / 0.3081).astype(np.float32)
        for images in (data.train_images, data.test_images[:500])
    )
    return Problem(
        make_model,
        (images, data.train_labels),
        (queries, data.test_labels[:500]),
        ki.trainers.random_subsets(5000, 100),
        fit={"epochs": 20, "batch_size": 32},
        seeds=seeds,
    )


def fashion(data_dir: str | None) -> Problem:
    """6,144 training images and 100 test images of Fashion-MNIST, and a network of 4 layers."""
    data = image_data.load("fashion_mnist", data_dir, 6144)
    return Problem(
        fashion_model,
        (data.train_images, data.train_labels),
        (data.test_images[:100], data.test_labels[:100]),
        ki.trainers.random_subsets(6144, 100),
        fit={"epochs": 20, "batch_size": 64},
        repeats=5,
        # Keras takes the rate times the decay off the weights, where momentum makes the gradient's
        # step 1 / (1 - .9) of the rate: a penalty's gradient of a tenth of the decay.
        l2=1e-4,
        curvature="gauss_newton",
    )


PROBLEMS: dict[str, Callable[[str | None], Problem]] = {
    "digits-1e-2": lambda data_dir: digits(1e-2),
    "digits-1e-3": lambda data_dir: digits(1e-3),
    "mnist-one": functools.partial(mnist, "shared", mnist_model),
    "mnist-own": functools.partial(mnist, "own", mnist_model),
    "mnist-own-narrow": functools.partial(mnist, "own", narrow_mnist_model),
    "fashion": fashion,
}
