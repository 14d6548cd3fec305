import threading

import numpy as np
import pytest
import threadpoolctl

from keras_influence import storage
from keras_influence.linalg import arnoldi, distill


def _rows(tmp_path, shape=(6, 1000), width=300, dtype="float32"):
    return storage.StoredRows.create(tmp_path, "rows", shape, dtype, width)


def test_rows_come_back_in_blocks_and_by_number(tmp_path):
    values = np.random.default_rng(0).standard_normal((6, 1000)).astype(np.float32)
    rows = _rows(tmp_path)
    for row in values[:5]:
        rows.append(row)
    assert rows.shape == (5, 1000)
    blocks = [(columns, block.copy()) for columns, block in rows.blocks(4)]
    assert [columns for columns, _ in blocks] == [
        slice(0, 300),
        slice(300, 600),
        slice(600, 900),
        slice(900, 1000),
    ]
    np.testing.assert_array_equal(np.concatenate([b for _, b in blocks], axis=1), values[:4])
    np.testing.assert_array_equal(rows[1:4], values[1:4])
    # A row that is forgotten, and another in its place.
    rows.truncate(4)
    rows.append(values[5])
    np.testing.assert_array_equal(rows[:], values[[0, 1, 2, 3, 5]])
    opened = storage.StoredRows.open(storage.ArrayFile(tmp_path, "rows", **rows.file.describe()))
    assert opened.shape == (5, 1000)
    np.testing.assert_array_equal(opened[4:], values[5:])
    with pytest.raises(storage.TornStoreError, match=r"5 of its 6 rows"):
        opened.check_whole()


def test_a_row_that_is_not_whole_ends_the_rows(tmp_path):
    rows = _rows(tmp_path)
    for value in range(4):
        rows.append(np.full(1000, value, np.float32))
    (tmp_path / "rows/c/2/1").unlink()
    opened = storage.StoredRows.open(rows.file)
    assert opened.shape == (2, 1000)
    intact = (tmp_path / "rows/c/1/3").read_bytes()
    (tmp_path / "rows/c/1/3").write_bytes(intact[:-1] + b"!")
    with pytest.raises(storage.TornStoreError, match=r"rows/ .*c/1/3"):
        list(opened.blocks(2))


def test_rows_that_were_checked_are_read_from_their_files(tmp_path, monkeypatch):
    values = np.random.default_rng(0).standard_normal((6, 1000)).astype(np.float32)
    rows = _rows(tmp_path)
    for row in values:
        rows.append(row)
    opened = storage.StoredRows.open(rows.file)
    first, second, own = (
        np.concatenate([block.copy() for _, block in each.blocks(6)], axis=1)
        for each in (opened, opened, rows)
    )
    for found in (first, second, own):
        np.testing.assert_array_equal(found, values)
    with monkeypatch.context() as patch:
        # Blocks narrower than a chunk, checked and unchecked, are the same, in the same places.
        for name in ("_BLOCK_BYTES", "_MAPPED_BYTES"):
            patch.setattr(f"keras_influence.storage.rows.{name}", 4 * 6 * 70)
        again = storage.StoredRows.open(rows.file)
        narrow = [[(columns, block.copy()) for columns, block in again.blocks(6)] for _ in range(2)]
        # Four of 70 and one of 20 of each chunk of 300, and of the last 100 one and a rest.
        assert [columns.stop - columns.start for columns, _ in narrow[0]] == (
            3 * [70, 70, 70, 70, 20] + [70, 30]
        )
        sums = [each.map_blocks(6, lambda _, block: block.copy()) for each in (rows, again)]
        for found in (*narrow, *([(None, block) for block in each] for each in sums)):
            np.testing.assert_array_equal(np.concatenate([b for _, b in found], axis=1), values)
        # Written in such blocks, it is there in whole chunks.
        copy = storage.StoredRows.create(tmp_path, "copy", (6, 1000), "float32", 300)
        for columns, block in again.blocks(6):
            copy.write(columns, block)
        np.testing.assert_array_equal(copy[:], values)
    (tmp_path / "rows/c/3/1").write_bytes(b"short")
    with pytest.raises(storage.TornStoreError, match=r"c/3/1 was shortened"):
        list(opened.blocks(6))
    (tmp_path / "rows/c/3/1").unlink()
    with pytest.raises(storage.TornStoreError, match=r"c/3/1 was removed"):
        list(opened.blocks(6))


def test_one_thread_multiplies_while_another_reads(tmp_path):
    def threads():
        return [
            each["num_threads"]
            for each in threadpoolctl.threadpool_info()
            if each["user_api"] == "blas"
        ]

    rows = _rows(tmp_path)
    rows.append(np.ones(1000, np.float32))
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        assert threads()
        assert set(threads()) == {2}
        blocks = rows.blocks(1)
        next(blocks)
        assert set(threads()) == {1}
        blocks.close()
        assert set(threads()) == {2}


def test_a_mapping_that_fails_says_so_and_leaves_no_thread(tmp_path):
    rows = _rows(tmp_path, (2, 1000), 100)
    rows.append(np.ones(1000, np.float32))
    before = threading.active_count()
    seen = []

    def fails(columns, block):
        seen.append(columns.start)
        if columns.start == 700:
            raise FloatingPointError("700")

    with pytest.raises(FloatingPointError, match="700"):
        rows.map_blocks(1, fails)
    assert 700 in seen
    assert threading.active_count() == before
    # What is not checked yet goes through the store, with the same numbers.
    opened = storage.StoredRows.open(rows.file)
    for each in (opened, opened):
        assert each.map_blocks(1, lambda columns, block: (columns.start, block.sum())) == [
            (start, 100) for start in range(0, 1000, 100)
        ]


def test_rows_in_bfloat16(tmp_path):
    values = np.random.default_rng(0).standard_normal((6, 1000)).astype(np.float32)
    rounded = values.astype("bfloat16").astype(np.float32)
    rows = _rows(tmp_path, dtype="bfloat16")
    for row in values:
        rows.append(row)
    opened = storage.StoredRows.open(rows.file)
    for each in (rows, opened, opened):
        assert (each.dtype, each.stored_dtype) == (np.float32, np.dtype("bfloat16"))
        np.testing.assert_array_equal(each[:], rounded)
        blocks = [block.copy() for _, block in each.blocks(6)]
        np.testing.assert_array_equal(np.concatenate(blocks, axis=1), rounded)
    # Two bytes an entry, and a checksum.
    assert (tmp_path / "rows/c/0/0").stat().st_size == 2 * 300 + 4


def test_block_width():
    # Two blocks of 10 rows of 4 bytes, 2^20 columns each, are 80 MiB.
    assert storage.block_width((10, 10**8), "float32", 80 * 2**20) == 2**20
    assert storage.block_width((10, 10**8), "float32", 40 * 2**20) == 2**19
    assert storage.block_width((10, 100), "float64", 1e9) == 100
    assert storage.block_width((10, 10**6), "float64", 1.0) == 2**14


@pytest.mark.parametrize("rank", [3, 12])
def test_an_iteration_on_the_disk(tmp_path, rank):
    random = np.random.default_rng(0)
    matrix = random.standard_normal((1000, 40))
    matrix = matrix @ matrix.T
    start = random.standard_normal(1000)
    expected = distill(arnoldi(lambda v: matrix @ v, start, 12), rank)
    basis = storage.StoredRows.create(tmp_path, "basis", (12, 1000), "float64", 300)
    result = arnoldi(lambda v: matrix @ v, start, 12, basis=basis)
    vectors = storage.StoredRows.create(tmp_path, "vectors", (rank, 1000), "float64", 300)
    found = distill(result, rank, vectors)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-9)
    np.testing.assert_allclose(found.residuals, expected.residuals, rtol=1e-6, atol=1e-7)
    assert found.vectors is vectors
    # The last one of twelve belongs to an eigenvalue of zero, which is none's in particular.
    count = min(rank, 11)
    np.testing.assert_allclose(np.abs(vectors[:count]), np.abs(expected.vectors[:count]), atol=1e-9)


@pytest.mark.parametrize("size", [40, 1000])  # Whether the space is exhausted on the way.
def test_an_iteration_goes_on_where_its_journal_ends(tmp_path, size):
    random = np.random.default_rng(0)
    factor = random.standard_normal((size, 6))
    matrix = factor @ factor.T
    start = random.standard_normal(size)
    whole = arnoldi(lambda v: matrix @ v, start, 20)

    class Journal:
        def __init__(self):
            self.found = []

        def steps(self):
            return list(self.found)

        def record(self, step):
            self.found.append(step)
            if len(self.found) % 3 == 0:
                raise InterruptedError

    journal = Journal()
    basis = storage.StoredRows.create(tmp_path, "basis", (20, size), "float64", size)
    products = []

    def product(vector):
        products.append(vector)
        return matrix @ vector

    result = None
    while result is None:
        try:
            result = arnoldi(product, start, 20, basis=basis, journal=journal)
        except InterruptedError:
            basis = storage.StoredRows.open(basis.file)
    assert len(products) == len(whole.matrix) + 1  # The last one showed that nothing is left.
    np.testing.assert_allclose(result.matrix, whole.matrix, atol=1e-9)
    assert result.remainder == whole.remainder == 0
    again = arnoldi(product, start, 20, basis=basis, journal=journal)
    np.testing.assert_array_equal(again.matrix, result.matrix)


def test_a_basis_must_fit(tmp_path):
    with pytest.raises(ValueError, match=r"vectors \[4\] of float64. Received: .*\[5\] of float32"):
        arnoldi(lambda v: v, np.ones(4), 2, basis=_rows(tmp_path, (2, 5), 5))

    class Journal:
        def steps(self):
            return [arnoldi_step(1), arnoldi_step(2)]

    def arnoldi_step(rows):
        from keras_influence.linalg import Step

        return Step(np.ones((rows, 1)), np.ones((1, 1)), 1.0, (False,))

    with pytest.raises(ValueError, match=r"journal has 2 steps, .* must hold: 3. It holds 0"):
        basis = _rows(tmp_path, (3, 4), 4, "float64")
        arnoldi(lambda v: v, np.ones(4), 3, basis=basis, journal=Journal())
