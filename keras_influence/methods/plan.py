"""What long work will cost, as a table."""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Stage(NamedTuple):
    """Work of one kind, as often as a method will do it.

    Attributes:
        phase: the verb that it belongs to: `"fit"`, `"scores"` or `"self_influence"`.
        name: what is done.
        repetitions: how often.
        seconds_each: measured, the median of a few times.
        flops_each: counted; see `Plan`.
        hessian_products: of all repetitions: products of a Hessian with a vector.
        calls: of all repetitions: calls of a map of `gradients.LossMaps`, by its name.
        device_bytes: held on the accelerator at most, with what it held before; 0 without one.
        host_bytes: resident at most, with what was resident before.
        disk_bytes: on the disk, new, at most.
        disk_vectors: written to the disk.
    """

    phase: str
    name: str
    repetitions: float
    seconds_each: float
    flops_each: float
    hessian_products: int
    calls: dict[str, int]
    device_bytes: float
    host_bytes: float
    disk_bytes: float
    disk_vectors: int

    @property
    def seconds(self) -> float:
        return self.repetitions * self.seconds_each

    @property
    def flops(self) -> float:
        return self.repetitions * self.flops_each


class Plan(NamedTuple):
    """What a method's work on a dataset will cost.

    Seconds are those of a few batches, measured, times their number. Memory is counted where it
    grows with the data, the parameters or the directions, and measured for a batch's own step.
    Flops are two for a multiplication and an addition: of projections and norms, the layers'
    products by their weights on the way forward and back, and with the directions, by the engine's
    own counts; of Hessian products, what TensorFlow's profiler counts in the graph. What no rule
    serves, and loops of recurrent layers, are counted too low.

    Attributes:
        method: the class's name.
        num_train: N.
        num_queries: Q; 0 where none were given.
        batch_size: examples computed together.
        directions: in parameter space, held laid out at once, at most.
        stages: in their order.
        tracing_seconds: that the first batches took on top, which the plan has paid for this
            process, and which a new one pays again.
        host_before: bytes resident before anything was done.
        device_before: bytes held on the accelerator.
    """

    method: str
    num_train: int
    num_queries: int
    batch_size: int
    directions: int
    stages: tuple[Stage, ...]
    tracing_seconds: float
    host_before: float
    device_before: float

    @property
    def seconds(self) -> float:
        """Of all stages, without tracing."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def hessian_products(self) -> int:
        return sum(stage.hessian_products for stage in self.stages)

    @property
    def calls(self) -> dict[str, int]:
        """Of the maps of `gradients.LossMaps`, by their names."""
        total: dict[str, int] = {}
        for stage in self.stages:
            for name, count in stage.calls.items():
                total[name] = total.get(name, 0) + count
        return total

    @property
    def host_bytes(self) -> float:
        """The most that will be resident, with `host_before`."""
        return max((stage.host_bytes for stage in self.stages), default=self.host_before)

    @property
    def device_bytes(self) -> float:
        """The most that will be held on the accelerator, with `device_before`."""
        return max((stage.device_bytes for stage in self.stages), default=self.device_before)

    @property
    def disk_bytes(self) -> float:
        return max((stage.disk_bytes for stage in self.stages), default=0.0)

    @property
    def disk_vectors(self) -> int:
        return sum(stage.disk_vectors for stage in self.stages)

    def summary(self, print_fn: Callable[[str], None] | None = None) -> None:
        """Prints the plan as a table."""
        emit = print_fn or (lambda line: print(line, file=sys.stdout))
        for line in self._lines():
            emit(line)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        queries = f", {self.num_queries:,} queries" if self.num_queries else ""
        directions = f", {self.directions:,} directions" if self.directions else ""
        yield (
            f"{self.method} on {self.num_train:,} training examples{queries}: batches of "
            f"{self.batch_size:,}{directions} at a time"
        )
        accelerated = self.device_bytes > 0
        head = ["phase", "stage", "times", "each", "total", "GFLOP", "host, MB"]
        head += ["device, MB"] if accelerated else []
        rows = [
            [
                stage.phase,
                stage.name,
                f"{stage.repetitions:,.0f}",
                duration(stage.seconds_each) if stage.seconds_each else "",
                duration(stage.seconds) if stage.seconds_each else "",
                f"{stage.flops / 1e9:,.1f}",
                f"{stage.host_bytes / 1e6:,.0f}",
                *([f"{stage.device_bytes / 1e6:,.0f}"] if accelerated else []),
            ]
            for stage in self.stages
        ]
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        for row in [head, *rows]:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            yield "  " + "  ".join(left + right)
        device = f", of the device {self.device_bytes / 1e6:,.0f} MB" if accelerated else ""
        disk = f", {self.disk_bytes / 1e6:,.0f} MB on the disk" if self.disk_bytes else ""
        yield (
            f"In all {duration(self.seconds)}, and {duration(self.tracing_seconds)} for tracing; "
            f"{self.hessian_products:,} Hessian products, {self.flops / 1e9:,.0f} GFLOP; at most "
            f"{self.host_bytes / 1e6:,.0f} MB resident ({self.host_before / 1e6:,.0f} MB "
            f"now){device}{disk}."
        )


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, length in (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.3g} ms"
