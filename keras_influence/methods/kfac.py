"""The Fisher matrix approximated by Kronecker products, inverted."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence.gradients.fisher_blocks import (
    DIAGONAL,
    KRONECKER,
    ROWS,
    Basis,
    Block,
    Spectrum,
)
from keras_influence.gradients.kronecker import factor_sums, square_sums
from keras_influence.linalg import Leading, leading_eigenpairs
from keras_influence.methods.exact import decomposition
from keras_influence.methods.fisher import FisherMethod
from keras_influence.methods.means import Sums
from keras_influence.methods.work import Job, Work

# Size of the matrix whose decomposition is measured for a plan.
_MEASURED = 400


class KFAC(FisherMethod):
    """Influence functions with a Kronecker product for each layer (Martens & Grosse, 2015).

    The gradient of a layer's kernel is a sum of outer products a d' of what entered the layer (with
    a one for the bias) and of what came back to it; its Fisher matrix is taken for the product of
    the means A = sum_t a a' and G = sum_t d d' / T over the T positions (Grosse & Martens, 2016,
    for convolutions), which is inverted by two small eigenproblems. Positions to which no gradient
    comes back, such as the padding of a sequence, are none. Layers are taken to be independent of
    one another. A table of embeddings has the frequencies of its rows for A. What is
    no such layer (scales, weights used by several layers, layers without a rule) has a diagonal;
    `summary()` says how much.

    `EKFAC` is better, at the price of a second pass. Use this one to compare, or where that pass is
    too dear.

    Args:
        model: a built Keras model, trained.
        max_rank: eigenvectors to keep of each A: all, of those that are no wider. Of wider ones the
            rest counts by one eigenvalue, its mean as gradients meet it, and the leading ones are
            found by products with a random block. In memory, A has as many numbers as the layer's
            inputs squared. G is decomposed whole; a layer of more than four times as many outputs
            has a diagonal.
        **kwargs: see `FisherMethod` and `InverseMethod`.

    Example:

    >>> kfac = ki.KFAC(model).fit(train)
    >>> scores = kfac.scores(queries=test, train=train)
    """

    def __init__(self, model: keras.Model, *, max_rank: int = 1024, **kwargs: Any):
        super().__init__(model, **kwargs)
        if max_rank < 1:
            raise ValueError(f"`max_rank` must be at least 1. Received: {max_rank}.")
        self.max_rank = max_rank
        self._both_sums = self.maps.compiled(self._both_map)
        self._right_sums = self.maps.compiled(self._right_map)
        self._square_sums = self.maps.compiled(self._square_map)

    @property
    def _max_columns(self) -> int:
        return 4 * self.max_rank

    # In graphs: sums over a batch.

    def _both_map(self, packed: Any, draw: tf.Tensor, weights: tf.Tensor) -> Any:
        """The sums of a a' and of positions, and those of d d'."""
        found = self._linearize(packed, draw, weights)
        sums = factor_sums(found, self.blocks, weights)
        return [(left, count) for left, _, count in sums], [right for _, right, _ in sums]

    def _right_map(self, packed: Any, draw: tf.Tensor, weights: tf.Tensor) -> Any:
        found = self._linearize(packed, draw, weights)
        return [right for _, right, _ in factor_sums(found, self.blocks, weights, left=False)]

    def _square_map(
        self, packed: Any, bases: list[Basis], draw: tf.Tensor, weights: tf.Tensor
    ) -> list[Spectrum]:
        found = self._linearize(packed, draw, weights)
        return square_sums(found, self.blocks, bases)

    def _squares(self, sums: Sums, bases: list[Basis]) -> list[Spectrum]:
        """Mean squares in the bases."""
        like = [Spectrum(0, 0)] * len(self.blocks)
        squares = sums.means("squares", like, self._square_sums, bases)
        # What a basis leaves out counts as spread over so many directions.
        return [
            square._replace(rest=square.rest / np.maximum(spread, 1)[:, np.newaxis])
            for square, spread in zip(squares, self._spreads, strict=True)
        ]

    # Whether eigenvalues are mean squares, or products of the factors' own.
    _corrected = False

    def _passes(self, sums: Sums) -> tuple[list[Basis], list[Spectrum]]:
        bases, spectra = self._factors(sums)
        if self._corrected:
            return bases, self._squares(sums, bases)
        if any(block.kind == DIAGONAL for block in self.blocks):
            squares = self._squares(sums, bases)
            spectra = [
                square if block.kind == DIAGONAL else spectrum
                for block, spectrum, square in zip(self.blocks, spectra, squares, strict=True)
            ]
        return bases, spectra

    def _factors(self, sums: Sums) -> tuple[list[Basis], list[Spectrum]]:
        """One pass: the eigenvectors of A and G, and the products of their eigenvalues."""
        like = ([(0, 0)] * len(self.blocks), [0] * len(self.blocks))
        lefts, rights = sums.means("factors", like, self._right_sums, first=self._both_sums)
        bases, spectra = [], []
        self._spreads = []
        for block in self.blocks:
            (left, positions), right = lefts.pop(0), rights.pop(0)
            if block.kind == DIAGONAL:
                self._spreads.append(np.zeros(1))
                bases.append(Basis(_NOTHING, _NOTHING))
                spectra.append(Spectrum(_NOTHING, _NOTHING))
                continue
            columns = [leading_eigenpairs(matrix, len(matrix)) for matrix in right]
            if block.kind == KRONECKER:
                rank = min(self.max_rank, block.sizes[1])
                rows = [leading_eigenpairs(matrix, rank, self.seed) for matrix in left]
            else:
                rows = [Leading(left.astype(np.float64), _NOTHING, 0.0, 0.0)]
            self._spreads.append(np.array([a.spread for a in rows]))
            scale = 1.0 / max(float(positions), 1e-30)
            pairs = list(zip(rows, columns, strict=True))
            spectra.append(
                Spectrum(
                    _stacked([np.outer(a.values, g.values) * scale for a, g in pairs], left),
                    _stacked(
                        [a.rest / max(a.spread, 1) * g.values * scale for a, g in pairs], left
                    ),
                )
            )
            vectors = _NOTHING if block.kind == ROWS else _stacked([a.vectors for a in rows], left)
            bases.append(Basis(vectors, _stacked([g.vectors for g in columns], left)))
        return bases, spectra

    def _sums_in_graphs(self, bases: list[Basis]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        yield "Kronecker factors", self._both_sums, ()
        if self._corrected or any(block.kind == DIAGONAL for block in self.blocks):
            yield "squares in the eigenbases", self._square_sums, (bases,)

    def _width(self, block: Block) -> int:
        return min(block.sizes[1], self.max_rank) if block.kind == KRONECKER else block.sizes[1]

    def _numbers(self) -> int:
        kronecker = (block.sizes for block in self.blocks if block.kind == KRONECKER)
        factors = sum(g * (m**2 + n**2) for g, m, n in kronecker)
        return factors + self.maps.parameters.size

    def _fit_work(self, job: Job) -> Iterator[Work]:
        yield from super()._fit_work(job)
        widths = [
            (groups * side, min(side, self.max_rank))
            for groups, *sides in (b.sizes for b in self.blocks if b.kind == KRONECKER)
            for side in sides
        ]
        flops = sum(9.0 * width * rank**2 for width, rank in widths)
        unit = decomposition(_MEASURED)
        yield Work("eigenvectors", unit, flops / unit.flops(), host=8.0 * self._numbers())

    def _verdict(self, diagonal: float) -> str:
        text = "verdict: layers are independent of one another by assumption"
        if diagonal > 0.1:
            text += f"; {diagonal:.0%} of the parameters have no Kronecker form, but a diagonal"
        return text

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "max_rank": self.max_rank}


class EKFAC(KFAC):
    """Influence functions with eigenvalue-corrected Kronecker products (George et al., 2018).

    KFAC's eigenvectors U, V for each layer, and in place of the products of their eigenvalues the
    mean squares of the examples' gradients along them,

        I(z, x) = (1/N) sum_jk (U' g(z) V)_jk (U' g(x) V)_jk / (Lambda_jk + l2 + damping),

    which is, of all matrices with these eigenvectors, the nearest to the Fisher matrix. It is how
    Grosse et al., "Studying Large Language Model Generalization with Influence Functions" (2023),
    invert the Gauss-Newton matrix. An example's gradient is summed over its positions before it is
    squared, and means are taken over examples.

    Use it for networks of dense, convolutional and attention layers, to predict the effect of
    removals as well as to find wrong labels: two passes over the data, and no iteration. It does
    not see what layers have to do with one another, and a query costs a pass over the training set;
    to ask many questions of an index, use `Arnoldi`.

    Args:
        model: a built Keras model, trained.
        max_rank: see `KFAC`.
        **kwargs: see `FisherMethod` and `InverseMethod`.

    Example:

    >>> ekfac = ki.EKFAC(model).fit(train)
    >>> ekfac.summary()
    >>> suspects = np.argsort(-ekfac.self_influence(train))[:25]
    """

    _corrected = True


_NOTHING = np.zeros([0, 0, 0], np.float32)


def _stacked(arrays: list[np.ndarray], like: np.ndarray) -> np.ndarray:
    return np.stack(arrays).astype(like.dtype)
