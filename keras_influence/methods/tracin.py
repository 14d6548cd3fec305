"""Gradient products summed over the checkpoints of a training run."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from absl import logging

from keras_influence import checkpoints as run_checkpoints
from keras_influence import data
from keras_influence.methods.direction import GradientMethod
from keras_influence.methods.scoring import Steps
from keras_influence.methods.work import Job, Load, Work


class TracIn(GradientMethod):
    """TracIn over the checkpoints that `callbacks.TracInCheckpoint` wrote (Pruthi et al., 2020).

        I(z, x) = sum_k eta_k <grad l(z; theta_k), grad l(x; theta_k)>,

    with eta_k the optimizer's learning rate recorded at checkpoint k (TracInCP, their section 3.2).
    A checkpoint at which a schedule had reached 0 adds nothing, and is left out with a warning.
    It follows the run itself and needs no Hessian, which makes it strong for mislabeled examples;
    it costs a pass over the data for each checkpoint. There is no 1/N in it: `scale` does not
    apply, and `fit` only counts the training examples.

    While it computes, it loads each checkpoint into the model; the model's own weights are put
    back, also after an error.

    Args:
        model: a model of the run's architecture.
        checkpoints: the directory that the callback wrote; or a sequence of
            `checkpoints.Checkpoint`, as `checkpoints.list_checkpoints(directory)` gives, of which
            any choice may be made.
        **kwargs: see `InfluenceMethod`.

    Raises:
        ValueError: no checkpoints, or none with a learning rate above 0.
        FileNotFoundError: no checkpoint in the directory.
        storage.TornStoreError: a checkpoint that is incomplete or altered.

    Example:

    >>> recorder = ki.callbacks.TracInCheckpoint("runs/mnist")
    >>> model.fit(train, epochs=10, callbacks=[recorder])
    >>> scores = ki.TracIn(model, checkpoints="runs/mnist").scores(queries=test, train=train)
    """

    def __init__(
        self,
        model: keras.Model,
        checkpoints: str | os.PathLike | Sequence[run_checkpoints.Checkpoint],
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        if isinstance(checkpoints, (str, os.PathLike)):
            checkpoints = run_checkpoints.list_checkpoints(checkpoints)
        given = list(checkpoints)
        if not given:
            raise ValueError("`checkpoints` is empty: TracIn sums over one at least.")
        self.checkpoints = [each for each in given if each.learning_rate != 0]
        ended = [each.step for each in given if each.learning_rate == 0]
        if not self.checkpoints:
            raise ValueError(
                "TracIn weighs each checkpoint by its learning rate, which is 0 at all of "
                f"`checkpoints`, of steps {ended}. Pass earlier ones, from before the schedule "
                "reached 0."
            )
        if ended:
            logging.warning(
                "TracIn leaves out the checkpoints of steps %s: their learning rate is 0.", ended
            )

    def _fit(self, dataset: Any) -> int:
        return data.count(dataset)

    def _per_train(self) -> float:
        return 1.0

    def _scores(self, queries: Any, train: Any, steps: Steps) -> np.ndarray:
        # A sum over checkpoints of products, never a product of sums over checkpoints.
        at_checkpoint = super()._scores
        return self._sum_over_checkpoints(lambda part: at_checkpoint(queries, train, part), steps)

    def _self_influence(self, dataset: Any, steps: Steps) -> np.ndarray:
        return self._sum_over_checkpoints(lambda part: self._squared_norms(dataset, part), steps)

    def _sum_over_checkpoints(
        self, at_checkpoint: Callable[[Steps], np.ndarray], steps: Steps
    ) -> np.ndarray:
        total: Any = 0.0
        with run_checkpoints.weights_restored(self.model):
            for number, checkpoint in enumerate(self.checkpoints):
                run_checkpoints.load_weights(self.model, checkpoint)
                found = at_checkpoint(steps.within(f"checkpoint{number}"))
                total = total + checkpoint.learning_rate * found.astype(np.float64)
        return total.astype(np.float32)

    def _scores_depend_on(self) -> dict[str, Any]:
        found = super()._scores_depend_on()
        del found["weights"]  # Of no checkpoint: another process may have built the model anew.
        run = [(each.fingerprint, each.learning_rate) for each in self.checkpoints]
        return {**found, "checkpoints": run}

    def _fit_work(self, job: Job) -> Iterator[Work]:
        yield from job.counting()

    def _scores_work(self, job: Job) -> Iterator[Work]:
        return self._checkpoints_work(job, super()._scores_work(job))

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        return self._checkpoints_work(job, super()._self_influence_work(job, load))

    def _checkpoints_work(self, job: Job, at_checkpoint: Iterator[Work]) -> Iterator[Work]:
        def load() -> None:
            with run_checkpoints.weights_restored(self.model):
                run_checkpoints.load_weights(self.model, self.checkpoints[0])

        count = len(self.checkpoints)
        weights = sum(4.0 * np.prod(variable.shape) for variable in self.model.variables)
        yield Work("loading checkpoints", job.once("checkpoint", load), count, host=weights)
        for work in at_checkpoint:
            yield work.times(count)._replace(host=work.host + weights)

    def _report(self) -> Iterator[str]:
        for checkpoint in self.checkpoints:
            yield (
                f"checkpoint at step {checkpoint.step}, epoch {checkpoint.epoch}: learning rate "
                f"{checkpoint.learning_rate:g}"
            )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "checkpoints": [str(checkpoint.path) for checkpoint in self.checkpoints],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], model: keras.Model) -> "TracIn":
        paths = config["checkpoints"]
        return super().from_config(
            {**config, "checkpoints": [run_checkpoints.read_checkpoint(path) for path in paths]},
            model,
        )
