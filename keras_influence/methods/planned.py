"""Methods that say beforehand what they will do."""

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from keras_influence.methods import planning
from keras_influence.methods.plan import Plan
from keras_influence.methods.resumption import begun_with
from keras_influence.methods.settling import settle
from keras_influence.methods.work import Job, Load, Work

if TYPE_CHECKING:
    from keras_influence.methods.base import InfluenceMethod

# What does the work, and what says what it is.
_SAID_BY = {
    "_fit": "_fit_work",
    "fit": "_fit_work",
    "scores": "_scores_work",
    "_scores": "_scores_work",
    "_projector": "_scores_work",
    "self_influence": "_self_influence_work",
    "_self_influence": "_self_influence_work",
    "_inverse_products": "_solve_work",
    "_quadratic_forms": "_forms_work",
}


class Planned:
    """What a method adds to be planned: the work of its verbs, in units that can be measured.

    A class that overrides a verb overrides its description too; `plan` holds it to that.
    """

    def plan(self: "InfluenceMethod", dataset: Any, queries: Any = None) -> Plan:  # type: ignore[misc]
        """Predicts what `fit(dataset)` and the scores will take: time, memory, Hessian products.

        A few batches are computed, each kind of work at its real size, and timed; nothing else.
        Methods that end early (an iteration that has converged, or met all of a small space) take
        less than is planned. The first call pays for the tracing that the work needs, so that in
        the same process the work need not pay it again.

        Args:
            dataset: the training data.
            queries: labelled examples. With them the plan is that of `fit(dataset)` and
                `scores(queries, dataset)`; without, of `fit(dataset)` and
                `self_influence(dataset)`.

        Returns:
            A `Plan`: print it, or see its `seconds`, `host_bytes`, `hessian_products` ...

        Example:

        >>> print(ki.Arnoldi(model, rank=100).plan(train, queries=test))
        """
        _check_described(type(self))
        self._choose_sizes(dataset)
        job = Job(self, dataset, queries)
        phases = [("fit", self._fit_work(job))]
        if queries is None:
            phases.append(("self_influence", self._self_influence_work(job, job.train)))
        else:
            phases.append(("scores", self._scores_work(job)))
        return planning.plan(job, phases)

    def _choose_sizes(  # type: ignore[misc]
        self: "InfluenceMethod", dataset: Any, path: pathlib.Path | None = None
    ) -> None:
        """What is done at once, for the memory budget, where there is one.

        Args:
            dataset: the training data.
            path: the directory of the fit, which goes on as it was begun.
        """
        if self.memory_budget is None:
            return
        begun = None if path is None else begun_with(path)
        if begun is None:
            settle(self, dataset, self._places(path))
            return
        self.batch_size = begun["batch_size"]
        if begun.get("place") == "disk":
            self.basis = str(path)

    def _places(self, path: pathlib.Path | None) -> tuple[str, ...]:
        """Where a basis may lie, the best first; none without a basis."""
        del path
        return ()

    def _fit_work(self, job: Job) -> Iterator[Work]:
        """Of `fit` on `job.train`."""
        raise NotImplementedError

    def _scores_work(self, job: Job) -> Iterator[Work]:
        """Of `scores` for `job.queries` on `job.train`."""
        raise NotImplementedError

    def _self_influence_work(self, job: Job, load: Load) -> Iterator[Work]:
        """Of `self_influence` on a dataset."""
        raise NotImplementedError


def _check_described(cls: type) -> None:
    """Raises where a class does other work than what its parent's description says."""
    order = cls.__mro__
    for verb, description in _SAID_BY.items():
        doing, saying = (
            next((i for i, each in enumerate(order) if name in vars(each)), len(order))
            for name in (verb, description)
        )
        own = order[min(doing, len(order) - 1)]
        if doing < saying and own.__name__ != "InfluenceMethod":
            raise NotImplementedError(
                f"{own.__name__}.{verb} is its own, but no `{description}` says what it does, so "
                f"that {cls.__name__} cannot be planned. Override it; see `methods/planned.py`."
            )
