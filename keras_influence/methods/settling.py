"""How much is done at once, so that a job fits the memory that it may take."""

from typing import TYPE_CHECKING, Any

from absl import logging

from keras_influence import distribution
from keras_influence.methods import planning
from keras_influence.methods.plan import Plan
from keras_influence.methods.work import Job, Load

if TYPE_CHECKING:
    from keras_influence.methods.base import InfluenceMethod

# Batches are tried from one example on, each time so many times larger.
_GROWTH = 4
# Of the memory that is left, the part that directions may take: as they come, on their way and
# laid out, they are there three times for a moment.
_SHARE = 6


def settle(method: "InfluenceMethod", dataset: Any, places: tuple[str, ...] = ()) -> None:
    """Chooses `batch_size`, `direction_bytes` and the place of a basis for a memory budget.

    A job of one example and one direction at a time is tried first: what it takes is the least.
    Of what is left, directions get a part, and batches grow until the next ones would not fit;
    each size is tried, so that what is chosen was seen to fit. The batches of the method, or of
    the dataset, and the bytes of the method are not exceeded.

    Args:
        method: with a `memory_budget`.
        dataset: the training data.
        places: where a basis may lie, in the order of preference; none where there is no basis.

    Raises:
        ValueError: not even the least fits.
        NotImplementedError: several workers.
    """
    if distribution.has_several_workers(method.model):
        # Each measures something else, and would choose something else.
        raise NotImplementedError(
            "`memory_budget` is for one worker. Pass `batch_size` and `direction_bytes`, as "
            "`plan` says that they fit."
        )
    before = {
        name: getattr(method, name)
        for name in ("batch_size", "direction_bytes", "basis")
        if hasattr(method, name)
    }
    try:
        _settle(method, dataset, places)
    except BaseException:
        for name, value in before.items():
            setattr(method, name, value)
        raise


def _settle(method: "InfluenceMethod", dataset: Any, places: tuple[str, ...]) -> None:
    budget = method.memory_budget
    assert budget is not None
    asked = Load.of(dataset, method.batch_size).batch_size, method.direction_bytes
    vector = float(method.maps.parameters.size * method.maps.parameters.dtype.size)
    least: list[tuple[float, str]] = []
    place = None
    for place in places or (None,):
        if place is not None:
            method.basis = place
        least.append(_needed(method, dataset, 1, vector))
        if least[-1][0] <= budget:
            break
    else:
        bytes_, stage = min(least)
        where = (
            ""
            if "disk" in _kinds(places) or not places
            else (" A basis may lie on the disk: pass a directory to `fit`.")
        )
        raise ValueError(
            f"The job needs {bytes_ / 1e6:,.0f} MB at least, one example and one direction at a "
            f"time; the most for: {stage}. Received: memory_budget={budget:,.0f} "
            f"({budget / 1e6:,.0f} MB).{where}"
        )
    left = budget - least[-1][0]
    directions = min(asked[1], max(vector, left / _SHARE))
    size, needed = 1, least[-1][0]
    while size < asked[0]:
        larger = min(_GROWTH * size, asked[0])
        now, _ = _needed(method, dataset, larger, directions)
        if now > budget:
            break
        # What the next ones would take, if it goes on like this.
        rise, size, needed = _GROWTH * (now - needed), larger, now
        if now + rise > budget:
            break
    method.batch_size, method.direction_bytes = size, directions
    logging.info(
        "For %.0f MB: batches of %d, %.0f MB for directions%s.",
        budget / 1e6,
        size,
        directions / 1e6,
        "" if place is None else f", the basis in {place!r}",
    )


def _needed(
    method: "InfluenceMethod", dataset: Any, batch_size: int, direction_bytes: float
) -> tuple[float, str]:
    """Bytes that the job adds on the host or the device, whichever is more, and the stage."""
    method.batch_size, method.direction_bytes = batch_size, direction_bytes
    plan = trial(method, dataset)
    stages = (
        (
            max(stage.host_bytes - plan.host_before, stage.device_bytes - plan.device_before),
            f"{stage.phase}, {stage.name}",
        )
        for stage in plan.stages
    )
    return max(stages)


def trial(method: "InfluenceMethod", dataset: Any) -> Plan:
    """A plan for its memory alone; queries are as many as a batch has examples."""
    job = Job(method, dataset)
    job = Job(method, dataset, job.train.sample[0].examples)
    phases = [
        ("fit", method._fit_work(job)),
        ("self_influence", method._self_influence_work(job, job.train)),
        ("scores", method._scores_work(job)),
    ]
    return planning.plan(job, phases, planning.ONCE)


def _kinds(places: tuple[str, ...]) -> set[str]:
    return {place if place in ("host", "device") else "disk" for place in places}
