import numpy as np
import pytest

import mislabel_report
from mislabel_report import Suspicion

TRUTH = np.array([True, False, True, False, False])


def test_row_by_hand():
    # In the order + - + - -: AUC 5/6 and AP 5/6, as in the tests of the retrieval.
    scores = np.array([5, 4, 3, 2, 1], np.float32)
    row = mislabel_report.make_row(
        Suspicion("arnoldi", scores, np.arange(5), 1.5, 2.5, rank=10),
        TRUTH,
        sample=np.array([1, 2]),
    )
    assert row["method"] == "arnoldi" and row["rank"] == 10 and row["checkpoints"] is None
    assert row["auc"] == pytest.approx(5 / 6)
    assert row["average_precision"] == pytest.approx(5 / 6)
    assert (row["fit_seconds"], row["score_seconds"], row["seconds_per_example"]) == (1.5, 2.5, 0.5)
    # Of examples 1 and 2 the second is mislabeled, and scores lower.
    assert row["on_lissa_sample"] == {"auc": 0.0, "average_precision": 0.5}


def test_row_of_some_examples_only():
    row = mislabel_report.make_row(
        Suspicion("lissa", np.array([2.0, 1.0], np.float32), np.array([2, 4])), TRUTH
    )
    assert row["auc"] == 1 and row["num_scored"] == 2 and "on_lissa_sample" not in row


@pytest.mark.parametrize(
    ("settings", "label", "key"),
    [
        ({"method": "arnoldi", "rank": 10}, "arnoldi, rank 10", "arnoldi_10"),
        ({"method": "tracin", "checkpoints": 1}, "tracin, 1 checkpoint", "tracin_1"),
        ({"method": "tracin", "checkpoints": 3}, "tracin, 3 checkpoints", "tracin_3"),
        ({"method": "lissa"}, "lissa, 2 examples", "lissa"),
        ({"method": "loss"}, "loss", "loss"),
    ],
)
def test_names(settings, label, key):
    suspicion = Suspicion(scores=np.zeros(2, np.float32), ids=np.arange(2), **settings)
    assert (suspicion.label, suspicion.key) == (label, key)


def test_table():
    row = {"rank": None, "fit_seconds": 0, "score_seconds": 0.256, "auc": 0.5}
    rows = [
        row | {"rank": 10, "fit_seconds": 12.345, "auc": 0.9876, "average_precision": 1.0},
        row | {"average_precision": 0.1},
    ]
    assert mislabel_report.format_table(["arnoldi", "chance"], rows) == (
        "method   rank  fit s  score s   AUC     AP\n"
        "------------------------------------------\n"
        "arnoldi    10  12.35     0.26  98.8  100.0\n"
        "chance          0.00     0.26  50.0   10.0"
    )


def test_table_with_the_sample_of_lissa():
    row = {"rank": None, "fit_seconds": 0, "score_seconds": 0, "auc": 0.5, "average_precision": 0.1}
    row["on_lissa_sample"] = {"auc": 0.25, "average_precision": 0.2}
    lines = mislabel_report.format_table(["chance"], [row]).splitlines()
    assert lines[0].split()[-4:] == ["AUC", "AP", "AUC*", "AP*"]
    assert lines[2].split() == ["chance", "0.00", "0.00", "50.0", "10.0", "25.0", "20.0"]
    assert lines[3] == "* on the training examples that lissa scored"
