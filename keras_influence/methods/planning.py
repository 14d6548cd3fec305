"""How a plan is made: one of each kind of a method's work is done and measured."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_influence import distribution
from keras_influence.methods.plan import Plan, Stage
from keras_influence.methods.resident import MemoryWatch, accelerator, resident_bytes
from keras_influence.methods.work import Job, Unit, Work


class Patience(NamedTuple):
    """How often a unit of work is repeated after the first time.

    Attributes:
        seconds: for so long,
        most, least: at most, and at least so often;
        limit: seconds after which it is repeated no more in any case.
    """

    seconds: float = 1.0
    most: int = 20
    least: int = 3
    limit: float = 20.0


TIMED = Patience()
# The same number of times on every worker, for they wait for each other.
COUNTED = Patience(0.0, 3, 3, float("inf"))
# For the memory, and not for the time.
ONCE = Patience(0.0, 1, 1, 0.0)


class Measured(NamedTuple):
    """What a unit takes.

    Attributes:
        seconds: of one unit, the median.
        tracing: seconds of the first call beyond that.
        host: bytes resident at the peak. TensorFlow keeps in a pool what it once took, and units
            are measured in the order of the work: so what earlier stages left there is in it.
        device: bytes at the peak beyond what was held, the operands among it.
        after: bytes resident in the end.
    """

    seconds: float
    tracing: float
    host: float
    device: float
    after: float


def measure(unit: Unit, device: str | None, patience: Patience = TIMED) -> Measured:
    """Does a unit a few times; memory is that of the accelerator `device` too, if there is one."""
    call = unit.prepare()
    with MemoryWatch(device) as watch:
        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        seconds: list[float] = []
        while len(seconds) < patience.least or (
            sum(seconds) < patience.seconds and len(seconds) < patience.most
        ):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
            if first + sum(seconds) > patience.limit:
                break
    median = float(np.median(seconds))
    return Measured(
        median / unit.share,
        max(first - median, 0.0),
        watch.peak,
        watch.device_peak - watch.device_before,
        watch.after,
    )


def survey(job: Job) -> Measured:
    """Which rules serve the layers: traced when a fit begins."""
    with MemoryWatch() as watch:
        start = time.perf_counter()
        job.method._survey(job.train.dataset)
        seconds = time.perf_counter() - start
    return Measured(0.0, seconds, watch.peak, 0.0, watch.after)


def plan(
    job: Job, phases: Iterable[tuple[str, Iterable[Work]]], patience: Patience | None = None
) -> Plan:
    """Measures what the phases are made of."""
    before = resident_bytes()
    device = accelerator(job.method.model)
    device_before = 0.0
    if device is not None:
        device_before = tf.config.experimental.get_memory_info(device)["current"]
    if patience is None:
        patience = COUNTED if distribution.has_several_workers(job.method.model) else TIMED
    last = survey(job)
    tracing, directions = last.tracing, 0
    found: dict[Any, Measured] = {}
    stages = []
    for phase, works in phases:
        for work in works:
            unit, operands = work.unit, 0.0
            if unit is None:
                measured = Measured(0.0, 0.0, last.after, 0.0, last.after)
            else:
                if unit.key not in found:
                    found[unit.key] = last = measure(unit, device, patience)
                    tracing += last.tracing
                measured, operands = found[unit.key], unit.operands
            held = work.host + (work.device if device is None else 0.0)
            stages.append(
                Stage(
                    phase,
                    work.name,
                    work.repetitions,
                    measured.seconds + work.seconds,
                    0.0 if unit is None else unit.flops(),
                    work.hessian_products,
                    _calls(work),
                    0.0 if device is None else device_before + work.device + measured.device,
                    measured.host + max(held - operands, 0.0),
                    work.disk,
                    work.disk_vectors,
                )
            )
            directions = max(directions, work.directions)
    return Plan(
        type(job.method).__name__,
        job.train.num_examples,
        0 if job.queries is None else job.queries.num_examples,
        job.train.batch_size,
        directions,
        tuple(stages),
        tracing,
        before,
        device_before,
    )


def _calls(work: Work) -> dict[str, int]:
    unit = work.unit
    if unit is None or not unit.calls:
        return {}
    return {unit.calls: round(work.repetitions * unit.num_calls)}
