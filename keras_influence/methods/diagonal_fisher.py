"""The diagonal of the Fisher matrix, inverted."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_influence.gradients.fisher_blocks import Basis, Spectrum
from keras_influence.gradients.kronecker import square_sums
from keras_influence.methods.fisher import FisherMethod
from keras_influence.methods.means import Sums


class DiagonalFisher(FisherMethod):
    """Influence functions with the diagonal of the Fisher matrix: mean squared gradients, inverted.

        I(z, x) = (1/N) sum_p g_p(z) g_p(x) / (F_p + l2 + damping),  F_p = mean_i g_p(x_i)^2

    One pass over the data, no more memory than the weights, and any layer. It is the cheapest
    curvature there is, and the crudest: use it as the control for EKFAC and Arnoldi, or where
    nothing else fits.

    Args:
        model: a built Keras model, trained.
        **kwargs: see `FisherMethod` and `InverseMethod`.

    Example:

    >>> diagonal = ki.DiagonalFisher(model).fit(train)
    >>> suspects = np.argsort(-diagonal.self_influence(train))[:25]
    """

    def __init__(self, model: keras.Model, **kwargs: Any):
        super().__init__(model, **kwargs)
        self._square_sums = self.maps.compiled(self._square_map)

    def _square_map(self, packed: Any, draw: tf.Tensor, weights: tf.Tensor) -> list[Spectrum]:
        found = self._linearize(packed, draw, weights)
        return square_sums(found, self.blocks, [_EMPTY] * len(self.blocks))

    def _sums_in_graphs(self, bases: list[Basis]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        yield "squared gradients", self._square_sums, ()

    def _passes(self, sums: Sums) -> tuple[list[Basis], list[Spectrum]]:
        like = [Spectrum(0, 0)] * len(self.blocks)
        self._spreads = [np.zeros(1)] * len(self.blocks)
        spectra = sums.means("squares", like, self._square_sums)
        return [_EMPTY] * len(self.blocks), spectra


_EMPTY = Basis(np.zeros([0, 0, 0], np.float32), np.zeros([0, 0, 0], np.float32))
