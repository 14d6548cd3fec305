"""The curvature inverted as it is, for models of few parameters."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf

from keras_influence.methods.curvature import FrozenCurvature
from keras_influence.methods.inverse import InverseMethod
from keras_influence.methods.negative import check_negative, inverses
from keras_influence.methods.work import Job, Load, Unit, Work

# Numbers of a block of columns of the identity.
_BLOCK = 256
# Size of the matrix whose decomposition is measured for a plan.
_MEASURED = 400


class ExactInfluence(InverseMethod):
    """Influence functions with the whole curvature matrix, decomposed in float64.

    What the other inverses approximate, and the one to take while the p x p matrix fits: 8 p^2
    bytes, and about 9 p^3 flops for its eigenvalues. The matrix takes p products with the
    curvature; or, for the Gauss-Newton and Fisher matrices of classifiers whose weights serve many
    positions, a gradient and its outer product for each example and class, which is compared with a
    product.

    Args:
        model: a built Keras model, trained, of at most `max_parameters` chosen parameters.
        negative_eigenvalues: what becomes of eigenvalues below zero: `"drop"` leaves their
            directions out, `"keep"` divides by them, `"absolute"` by their magnitude. `summary()`
            reports their share.
        max_parameters: refuses more.
        **kwargs: see `InverseMethod`.

    Attributes:
        eigenvalues: after `fit`, float64 [p], rising.
        num_roots: after `fit`, gradients of an example that were multiplied; 0 where the matrix was
            computed by columns.
        discrepancy: after `fit`, relative: between the matrix and its transpose, or, of outer
            products, between one of its products with a vector and the curvature's own.

    Raises:
        ValueError: in `fit`, more parameters than `max_parameters`.

    Example:

    >>> exact = ki.ExactInfluence(model, l2=1e-3).fit(train)
    >>> scores = exact.scores(queries=test, train=train)
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        negative_eigenvalues: str = "drop",
        max_parameters: int = 20_000,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        check_negative(negative_eigenvalues)
        self.negative_eigenvalues = negative_eigenvalues
        self.max_parameters = max_parameters
        self.eigenvalues: np.ndarray | None = None
        self.discrepancy: float | None = None
        self.num_roots = 0
        self._vectors: np.ndarray | None = None

    def _fit(self, dataset: Any) -> int:
        size = self.maps.parameters.size
        if size > self.max_parameters:
            raise ValueError(
                f"The curvature of {size:,} parameters is a matrix of {size:,}^2 numbers. Choose "
                f"fewer by `variables=`, raise `max_parameters` above {self.max_parameters:,}, or "
                "use ConjugateGradient or Arnoldi."
            )
        operator, num_train = self._begin(dataset)
        matrix = self._matrix(operator)
        if not np.isfinite(matrix).all():
            raise FloatingPointError("A product of the curvature is not finite.")
        self.eigenvalues, self._vectors = scipy.linalg.eigh(matrix, overwrite_a=True)
        return num_train

    def _matrix(self, operator: FrozenCurvature) -> np.ndarray:
        num_roots = operator.num_roots()
        if num_roots:
            matrix = self._outer_products(operator, num_roots)
            signs = np.random.default_rng(self.seed).choice([-1.0, 1.0], operator.size)
            dtype = self.maps.parameters.dtype
            product = operator(tf.constant(signs, dtype)).numpy().astype(np.float64)
            self.num_roots, self.discrepancy = num_roots, _relative(matrix @ signs, product)
            # Not so of sample weights below zero, or of two losses of one output.
            if self.discrepancy < np.sqrt(np.finfo(dtype.as_numpy_dtype).eps):
                return matrix
        matrix = self._columns(operator)
        self.num_roots, self.discrepancy = 0, _relative(matrix.T, matrix)
        matrix += matrix.T
        matrix *= 0.5
        return matrix

    def _outer_products(self, operator: FrozenCurvature, num_roots: int) -> np.ndarray:
        progress = self._progress("parts of the curvature", operator.num_grams(num_roots))
        matrix = np.zeros((operator.size, operator.size))
        for part in operator.grams(num_roots):
            matrix += part
            progress.add(1)
        progress.close()
        matrix /= operator.num_examples
        matrix[np.diag_indices_from(matrix)] += self.l2
        return matrix

    def _columns(self, operator: FrozenCurvature) -> np.ndarray:
        dtype = self.maps.parameters.dtype
        progress = self._progress("columns of the curvature", operator.size)
        matrix = np.empty((operator.size, operator.size))
        for start in range(0, operator.size, _BLOCK):
            stop = min(start + _BLOCK, operator.size)
            columns = tf.one_hot(tf.range(start, stop), operator.size, dtype=dtype)
            matrix[start:stop] = operator.products(columns)
            progress.add(stop - start)
        progress.close()
        return matrix

    def _fit_work(self, job: Job) -> Iterator[Work]:
        yield from self._begin_work(job)
        frozen, size = job.joined(self.num_examples), job.size
        block, matrix = min(_BLOCK, size), 8.0 * size**2
        num_roots = job.num_roots(frozen)
        if num_roots:
            yield Work(
                "outer products",
                job.grams(frozen, num_roots),
                frozen.num_batches,
                host=matrix,
                device=frozen.bytes,
            )
            yield Work(
                "a product to compare with",
                job.curvature(frozen),
                frozen.num_batches,
                1,
                host=matrix,
            )
        else:
            yield Work(
                "columns of the curvature",
                job.products(frozen, block),
                size / block * frozen.num_batches,
                size,
                host=matrix,
                device=frozen.bytes + block * job.vector_bytes,
            )
        measured = min(size, _MEASURED)
        # The matrix, a copy in the other order, the eigenvectors.
        yield Work("eigenvalues", decomposition(measured), (size / measured) ** 3, host=3 * matrix)

    def _solve_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        size = job.size
        unit = job.combination(blocks.batch_size, size, np.float64)
        # There and back.
        count = 2 * blocks.num_batches * job.parts(size)
        vectors = blocks.batch_size * (16.0 * size + job.vector_bytes)
        yield Work("products with eigenvectors", unit, count, host=8.0 * size**2 + vectors)

    def _forms_work(self, job: Job, blocks: Load) -> Iterator[Work]:
        for work in self._solve_work(job, blocks):
            yield work._replace(repetitions=work.repetitions / 2)

    def _eigenvectors(self) -> np.ndarray:
        if self._vectors is None:
            self._raise_not_fitted()
        return self._vectors

    def _weights(self) -> np.ndarray:
        """1 / (lambda + damping), and 0 for what is left out."""
        if self.eigenvalues is None:
            self._raise_not_fitted()
        epsilon = np.finfo(self.maps.parameters.dtype.as_numpy_dtype).eps
        return inverses(self.eigenvalues, self._damping, self.negative_eigenvalues, epsilon)

    def _inverse_products(self, vectors: tf.Tensor) -> tf.Tensor:
        eigenvectors = self._eigenvectors()
        inside = np.asarray(vectors, np.float64) @ eigenvectors
        products = (inside * self._weights()) @ eigenvectors.T
        return tf.convert_to_tensor(products, vectors.dtype)

    def _quadratic_forms(self, vectors: tf.Tensor) -> np.ndarray:
        inside = np.asarray(vectors, np.float64) @ self._eigenvectors()
        return np.square(inside) @ self._weights()

    def _report(self) -> Iterator[str]:
        if self.eigenvalues is None:
            return
        values = self.eigenvalues
        yield f"eigenvalues: from {values[0]:.4g} to {values[-1]:.4g}; {self._system()}"
        below = values[values < 0]
        total = np.abs(values).sum()
        share = np.abs(below).sum() / total if total else 0.0
        yield (
            f"negative eigenvalues: {len(below)}, {share:.1%} of the magnitude "
            f"({self.negative_eigenvalues})"
        )
        yield (
            f"matrix: outer products of {self.num_roots} gradients an example; a product differs "
            f"by {self.discrepancy:.1e}"
            if self.num_roots
            else f"matrix: column by column; asymmetry {self.discrepancy:.1e}"
        )
        weights = self._weights()
        left_out = int((weights == 0).sum())
        kept = np.abs(1 / weights[weights != 0])
        epsilon = np.finfo(self.maps.parameters.dtype.as_numpy_dtype).eps
        condition = kept.max() / kept.min() if len(kept) else 1.0
        yield (
            f"error of a quadratic form: about {condition * epsilon:.1e} relative (condition "
            f"{condition:.2g} times the rounding of the products)"
        )
        yield (
            "verdict: exact"
            if not left_out
            else f"verdict: exact but for {left_out} directions that are left out"
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "negative_eigenvalues": self.negative_eigenvalues,
            "max_parameters": self.max_parameters,
        }

    def _state(self) -> dict[str, np.ndarray]:
        if self.eigenvalues is None or self._vectors is None:
            return {}
        return {
            **super()._state(),
            "eigenvalues": self.eigenvalues,
            "eigenvectors": self._vectors,
            "discrepancy": np.array(self.discrepancy),
            "num_roots": np.array(self.num_roots),
        }

    def _set_state(self, arrays: dict[str, np.ndarray]) -> None:
        super()._set_state(arrays)
        if arrays:
            self.eigenvalues, self._vectors = arrays["eigenvalues"], arrays["eigenvectors"]
            self.discrepancy = float(arrays["discrepancy"])
            self.num_roots = int(arrays["num_roots"])


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|, 0 where both are."""
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / norm) if norm else 0.0


def decomposition(size: int) -> Unit:
    """All eigenvectors of a matrix."""

    def prepare() -> Callable[[], Any]:
        matrix = np.random.default_rng(0).standard_normal((size, size))
        return lambda: scipy.linalg.eigh(matrix + matrix.T, overwrite_a=True)

    return Unit(
        ("eigenvalues", size), prepare, flops=lambda: 9.0 * size**3, operands=24.0 * size**2
    )
