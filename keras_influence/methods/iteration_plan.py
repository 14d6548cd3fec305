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
    num_products: int,
    rows: int,
    block_size: int,
    rank: int,
    num_examples: int | None,
    directory: str | None,
    block_bytes: float,
) -> Iterator[Work]:
    """Of the products, the orthogonalisation and the eigenvectors.

    Args:
        job: on the training data.
        num_products: with the Hessian, at most.
        rows: vectors that the basis has room for.
        block_size: vectors that are multiplied together.
        rank: eigenvectors that are kept.
        num_examples: of the Hessian, drawn; None for all.
        directory: where the vectors lie; None for memory.
        block_bytes: of the vectors on the disk, that are in memory at a time.
    """
    vector = job.vector_bytes
    rank = min(rank, rows)
    frozen = job.joined(num_examples)
    basis, disk = rows * vector, 0.0
    if directory is not None:
        width = storage.block_width((rows, job.size), job.dtype, block_bytes)
        # A restart writes the new rows beside the old ones.
        copies = 2 if num_products > rows else 1
        basis, disk = 2.0 * width * rows * job.dtype.itemsize, copies * basis
    # The vectors on their way: as they were, their images, the rest of them.
    host, device = basis + 3 * block_size * vector, frozen.bytes + 2 * block_size * vector
    yield Work(
        "Hessian products, a batch",
        job.curvature(frozen),
        num_products * frozen.num_batches,
        num_products,
        host=host,
        device=device,
        disk=disk,
    )
    yield Work(
        "orthogonalisation, a pair",
        job.orthogonalization(rows, None if directory is None else _scratch(job, directory)),
        # Beyond the first basis, against one that is nearly full.
        rows * (rows + 1) // 2 + (num_products - rows) * rows,
        host=host,
        device=device,
        disk=disk,
        disk_vectors=0 if directory is None else rows,
    )
    # A product of all vectors with all.
    yield Work(
        "test of orthogonality",
        job.combination(rows, rows),
        job.parts(rows),
        host=basis,
        disk=disk,
    )
    kept = rank * vector
    yield Work(
        f"{rank:,} eigenvectors",
        job.combination(rank, rows),
        job.parts(rows),
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
