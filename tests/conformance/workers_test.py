"""Directories under several workers: the first one's, and the same bits for all after a kill."""

import numpy as np
import pytest
import tensorflow as tf

from tests.conformance import workers_program
from tests.conformance.strategies_test import (
    _assert_close,
    _cluster,
    _finish,
    _no_process_outlives_its_test,  # noqa: F401
    _start,
)


def _run(path, deaths=(None, None)):
    """Both workers of a cluster; each writes what it found into a file of its own."""
    cluster = _cluster()
    return [
        _start(
            cluster,
            index,
            program="workers_program",
            output=str(path / f"found{index}.npz"),
            # Where the second one would write, no directory can be.
            files=str(path / "files" if index == 0 else "/dev/null/files"),
            disk=str(path / f"disk{index}"),
            dies_at=deaths[index],
        )
        for index in range(2)
    ]


def _found(path, processes):
    for process in processes:
        code, text = _finish(process)
        assert code == 0, text
    found = [dict(np.load(path / f"found{index}.npz")) for index in range(2)]
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name], err_msg=name)
    return found[0]


def _but_vectors(found):
    """Without what has no sign of its own."""
    return {name: array for name, array in found.items() if not name.startswith("eigenvectors")}


@pytest.mark.slow
def test_kills_of_either_worker_change_no_bit(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = _found(tmp_path / "whole", _run(tmp_path / "whole"))
    # Those of one process without a strategy.
    alone = tmp_path / "alone"
    expected = workers_program.results(tf.distribute.get_strategy(), alone, tmp_path / "disk")
    _assert_close(_but_vectors(whole), _but_vectors(expected))
    path = tmp_path / "killed"
    path.mkdir()
    for victim, exchange in ((0, 12), (1, 40), (0, 90), (1, 130)):
        processes = _run(path, [exchange if index == victim else None for index in range(2)])
        assert _finish(processes[victim])[0] == -9
        code, text = _finish(processes[1 - victim], seconds=90)
        assert code != 0
        assert "WorkerLostError: A worker of the cluster ended, restarted, or cannot be" in text
    found = _found(path, _run(path))
    assert found.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
