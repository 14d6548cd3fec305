"""Products of gradients at the model's current weights."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_influence import data
from keras_influence.methods.direction import GradientMethod
from keras_influence.methods.scoring import Steps
from keras_influence.methods.work import Job, Load, Work

SIMILARITIES = ("dot", "cosine")


class GradientDot(GradientMethod):
    """Products, or cosines, of the gradients of two examples at the current weights.

    Influence with the identity in place of the inverse Hessian: TracIn at one checkpoint and
    learning rate 1. The cheapest method that looks at gradients, and the control for any that
    claims to gain by curvature. Cosines are robust against a few examples of huge gradients, at the
    price of the unit, and of self-influence (every example's cosine with itself is 1).

    Args:
        model: a built Keras model, trained.
        similarity: `"dot"`: (1/N) <grad l(z), grad l(x)>; `"cosine"`: the cosine, never scaled.
        **kwargs: see `InfluenceMethod`.
    """

    def __init__(self, model: keras.Model, similarity: str = "dot", **kwargs: Any):
        super().__init__(model, **kwargs)
        if similarity not in SIMILARITIES:
            raise ValueError(
                f"`similarity` must be one of {SIMILARITIES}. Received: {similarity!r}."
            )
        self.similarity = similarity

    def _fit(self, dataset: Any) -> int:
        return data.count(dataset)

    def _per_train(self) -> float:
        return 1.0 if self.similarity == "cosine" else super()._per_train()

    def _scores(self, queries: Any, train: Any, steps: Steps) -> np.ndarray:
        scores = super()._scores(queries, train, steps)
        if self.similarity == "dot":
            return scores
        of_queries = self._squared_norms(queries, steps.within("query-norms"), self.query_maps)
        of_train = self._squared_norms(train, steps.within("norms"))
        product = np.sqrt(of_queries)[:, np.newaxis] * np.sqrt(of_train)
        # An example without a gradient points nowhere, and agrees with no other.
        return np.divide(scores, product, out=np.zeros_like(scores), where=product > 0)

    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        factor = self._per_train()
        norms = self._squared_norms(dataset, steps)
        if self.similarity == "cosine":
            return (norms > 0).astype(np.float32)
        return (norms * factor).astype(np.float32)

    def _fit_work(self, job: Job) -> Iterator[Work]:
        yield from job.counting()

    def _scores_work(self, job: Job) -> Iterator[Work]:
        yield from super()._scores_work(job)
        if self.similarity == "cosine" and job.queries is not None:
            for load in (job.queries, job.train):
                yield from self._self_influence_work(job, load)

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        # Of `_self_influence` above, which is not the parent's: plans ask for its own description.
        yield from super()._self_influence_work(job, load)

    def _report(self) -> Iterator[str]:
        yield f"similarity: {self.similarity}"

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "similarity": self.similarity}
