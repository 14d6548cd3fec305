"""How a plan is made: one of each kind of a method's work is done and measured."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_influence.methods.plan import Plan, Stage
from keras_influence.methods.resident import MemoryWatch, accelerator, resident_bytes
from keras_influence.methods.work import Job, Unit, Work

# For how long a unit of work is repeated, and how often.
_SECONDS, _MOST_CALLS, _LEAST_CALLS = 1.0, 20, 3
# Seconds after which a unit is repeated no more, even if it was so only once.
_PATIENCE = 20.0


class Measured(NamedTuple):
    """What a unit takes.

    Attributes:
        seconds: of one unit, the median.
        tracing: seconds of the first call beyond that.
        host, device: bytes at the peak, beyond what its operands take and what stays.
        stays: bytes of the host's that stay: graphs, pools.
    """

    seconds: float
    tracing: float
    host: float
    device: float
    stays: float


NOTHING = Measured(0.0, 0.0, 0.0, 0.0, 0.0)


def measure(unit: Unit, device: str | None) -> Measured:
    """Does a unit a few times; memory is that of the accelerator `device` too, if there is one."""
    call = unit.prepare()
    with MemoryWatch(device) as watch:
        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        seconds: list[float] = []
        while len(seconds) < _LEAST_CALLS or (
            sum(seconds) < _SECONDS and len(seconds) < _MOST_CALLS
        ):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
            if first + sum(seconds) > _PATIENCE:
                break
    median = float(np.median(seconds))
    return Measured(
        median / unit.share,
        max(first - median, 0.0),
        watch.peak - watch.after,
        watch.device_peak - watch.device_before,
        max(watch.after - watch.before, 0),
    )


def survey(job: Job) -> Measured:
    """Which rules serve the layers: traced when a fit begins."""
    with MemoryWatch() as watch:
        start = time.perf_counter()
        job.method._survey(job.train.dataset)
        seconds = time.perf_counter() - start
    return NOTHING._replace(tracing=seconds, stays=max(watch.after - watch.before, 0))


def plan(job: Job, phases: Iterable[tuple[str, Iterable[Work]]]) -> Plan:
    """Measures what the phases are made of."""
    before = resident_bytes()
    device = accelerator(job.method.model)
    device_before = 0.0
    if device is not None:
        device_before = tf.config.experimental.get_memory_info(device)["current"]
    found: dict[Any, Measured] = {"survey": survey(job)}
    works = [(phase, work) for phase, each in phases for work in each]
    for _, work in works:
        if work.unit is not None and work.unit.key not in found:
            found[work.unit.key] = measure(work.unit, device)
    stays = sum(measured.stays for measured in found.values())
    stages = []
    for phase, work in works:
        measured = NOTHING if work.unit is None else found[work.unit.key]
        on_host = work.host + (work.device if device is None else 0.0)
        stages.append(
            Stage(
                phase,
                work.name,
                work.repetitions,
                measured.seconds + work.seconds,
                0.0 if work.unit is None else work.unit.flops(),
                work.hessian_products,
                _calls(work),
                0.0 if device is None else device_before + work.device + measured.device,
                before + stays + on_host + measured.host,
                work.disk,
                work.disk_vectors,
            )
        )
    return Plan(
        type(job.method).__name__,
        job.train.num_examples,
        0 if job.queries is None else job.queries.num_examples,
        job.train.batch_size,
        max((work.directions for _, work in works), default=0),
        tuple(stages),
        sum(measured.tracing for measured in found.values()),
        before,
        device_before,
    )


def _calls(work: Work) -> dict[str, int]:
    unit = work.unit
    if unit is None or not unit.calls:
        return {}
    return {unit.calls: round(work.repetitions * unit.num_calls)}
