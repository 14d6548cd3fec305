"""What an iteration over Hessian products will do, to be planned."""

import pathlib
import tempfile
import weakref
from collections.abc import Callable, Iterator

from keras_influence import storage
from keras_influence.linalg import Basis
from keras_influence.methods.work import Job, Work


def iteration_work(
    job: Job,
    num_iterations: int,
    rank: int,
    num_examples: int | None,
    directory: str | None,
    block_bytes: float,
) -> Iterator[Work]:
    """Of the products, the orthogonalisation and the eigenvectors.

    Args:
        job: on the training data.
        num_iterations: steps that are asked for.
        rank: eigenvectors that are kept.
        num_examples: of the Hessian, drawn; None for all.
        directory: where the vectors lie; None for memory.
        block_bytes: of the vectors on the disk, that are in memory at a time.
    """
    steps, vector = min(num_iterations, job.size), job.vector_bytes
    rank = min(rank, steps)
    frozen = job.frozen(num_examples)
    basis, disk = steps * vector, 0.0
    if directory is not None:
        width = storage.block_width((steps, job.size), job.dtype, block_bytes)
        basis, disk = 2.0 * width * steps * job.dtype.itemsize, basis
    # The vector on its way: as it was, its image, the rest of it.
    host, device = basis + 3 * vector, frozen.bytes + 2 * vector
    yield Work(
        "Hessian products, a batch",
        job.curvature(frozen),
        steps * frozen.num_batches,
        steps,
        host=host,
        device=device,
        disk=disk,
    )
    yield Work(
        "orthogonalisation, a pair",
        job.orthogonalization(steps, None if directory is None else _scratch(job, directory)),
        steps * (steps + 1) // 2,
        host=host,
        device=device,
        disk=disk,
        disk_vectors=0 if directory is None else steps,
    )
    kept = rank * vector
    yield Work(
        f"{rank:,} eigenvectors",
        job.combination(rank, steps),
        job.parts(steps),
        host=basis + (2 * kept if directory is None else 0.0),
        disk=0.0 if directory is None else disk + kept,
        disk_vectors=0 if directory is None else rank,
    )


def _scratch(job: Job, directory: str) -> Callable[[int], Basis]:
    """Bases where that of the fit will be, which are gone when they are forgotten."""
    place = pathlib.Path(directory).absolute()
    place = next(each for each in (place, *place.parents) if each.is_dir())

    def make(rows: int) -> Basis:
        scratch = tempfile.TemporaryDirectory(dir=place)
        shape = (rows, job.size)
        width = storage.block_width(shape, job.dtype, 2.0**26)
        basis = storage.StoredRows.create(scratch.name, "scratch", shape, job.dtype, width)
        weakref.finalize(basis, scratch.cleanup)
        return basis

    return make
