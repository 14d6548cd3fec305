"""Rows, table, figures and files of `find_mislabeled`."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import keras_influence as ki
from image_data import ImageData

_SHEET_SIZE = 25


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """How suspicious a method finds training examples: higher is more.

    Attributes:
        method: Name of the method, or of a baseline.
        scores: Shape `[n]`.
        ids: Which training examples they are of, shape `[n]`.
        fit_seconds: Time to prepare the method, tracing included.
        score_seconds: Time to score these examples, tracing included.
        rank: Length of the encodings, where there are any.
        checkpoints: Number of checkpoints, for TracIn.
    """

    method: str
    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    fit_seconds: float = 0.0
    score_seconds: float = 0.0
    rank: int | None = None
    checkpoints: int | None = None

    @property
    def name(self) -> str:
        """The method as a reader should see it, without its rank."""
        if self.checkpoints is not None:
            return f"{self.method}, {self.checkpoints} checkpoint{'s' * (self.checkpoints > 1)}"
        if self.method == "lissa":
            return f"lissa, {self.ids.size} examples"
        return self.method

    @property
    def label(self) -> str:
        return self.name if self.rank is None else f"{self.name}, rank {self.rank}"

    @property
    def key(self) -> str:
        """Name of the scores in scores.npz."""
        number = self.rank or self.checkpoints
        return self.method if number is None else f"{self.method}_{number}"


def make_row(
    suspicion: Suspicion, is_mislabeled: NDArray[np.bool_], sample: NDArray[np.int64] | None = None
) -> dict[str, Any]:
    """Makes the row of results.json for one method.

    Args:
        suspicion: The scores.
        is_mislabeled: Shape `[N]`, of all training examples.
        sample: The examples that LiSSA scored, on which every method is measured too.
    """
    truth = is_mislabeled[suspicion.ids]
    retrieval = ki.evaluation.mislabel_retrieval(suspicion.scores, truth)
    interval = ki.evaluation.mislabel_retrieval_interval(suspicion.scores, truth)
    row = {
        "method": suspicion.method,
        "rank": suspicion.rank,
        "checkpoints": suspicion.checkpoints,
        "fit_seconds": suspicion.fit_seconds,
        "score_seconds": suspicion.score_seconds,
        "auc": retrieval.auc,
        "average_precision": retrieval.average_precision,
        "auc_interval": interval.auc,
        "average_precision_interval": interval.average_precision,
        "recall": {f"{fraction:g}": recall for fraction, recall in retrieval.recall.items()},
        "num_scored": suspicion.ids.size,
        "seconds_per_example": suspicion.score_seconds / suspicion.ids.size,
    }
    if sample is not None:
        shared = np.isin(suspicion.ids, sample)
        measured = ki.evaluation.mislabel_retrieval(suspicion.scores[shared], truth[shared])
        row["on_lissa_sample"] = {
            "auc": measured.auc,
            "average_precision": measured.average_precision,
        }
    return row


def format_table(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Formats rows as aligned text: times in seconds, AUC and AP in per cent.

    Args:
        names: What to call each method.
        rows: As `make_row` makes them.
    """
    with_sample = any("on_lissa_sample" in row for row in rows)
    lines = [["method", "rank", "fit s", "score s", "AUC", "AP"] + ["AUC*", "AP*"] * with_sample]
    for name, row in zip(names, rows, strict=True):
        rank = "" if row["rank"] is None else str(row["rank"])
        line = [name, rank, f"{row['fit_seconds']:.2f}", f"{row['score_seconds']:.2f}"]
        for part in [row, row["on_lissa_sample"]] if with_sample else [row]:
            line += [f"{100 * part['auc']:.1f}", f"{100 * part['average_precision']:.1f}"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *cells]))
    text.insert(1, "-" * len(text[0]))
    if with_sample:
        text.append("* on the training examples that lissa scored")
    return "\n".join(text)


def save_curves(
    path: pathlib.Path,
    suspicions: Sequence[Suspicion],
    is_mislabeled: NDArray[np.bool_],
    title: str,
) -> None:
    """Saves the retrieval curves of the methods and of the loss; chance is in every such figure."""
    curves = {
        suspicion.label: ki.evaluation.mislabel_retrieval(
            suspicion.scores, is_mislabeled[suspicion.ids]
        )
        for suspicion in suspicions
        if suspicion.method != "chance"
    }
    ki.report.retrieval_curves(curves, title=title).savefig(path, dpi=150)


def save_sheet(
    path: pathlib.Path,
    suspicion: Suspicion,
    data: ImageData,
    true_labels: NDArray[np.int32],
    is_mislabeled: NDArray[np.bool_],
) -> None:
    """Saves the most suspicious training images with given and true labels.

    Args:
        path: The PNG to write.
        suspicion: The scores to choose by.
        data: The training images and their given labels.
        true_labels: Shape `[N]`.
        is_mislabeled: Shape `[N]`.
    """
    ids = suspicion.ids[np.argsort(-suspicion.scores, kind="stable")[:_SHEET_SIZE]]
    captions = [
        f"#{example}\ngiven {data.class_names[data.train_labels[example]]}\n"
        f"true {data.class_names[true_labels[example]]}"
        for example in ids
    ]
    ki.report.image_sheet(
        data.train_images[ids],
        captions,
        title=f"{ids.size} most suspicious: {suspicion.label}",
        marked=is_mislabeled[ids].tolist(),
        note=f"thick frame: the label was replaced ({is_mislabeled[ids].sum()} of {ids.size})",
    ).savefig(path, dpi=120)


def save_scores(
    path: pathlib.Path,
    suspicions: Sequence[Suspicion],
    labels: NDArray[np.int32],
    true_labels: NDArray[np.int32],
) -> None:
    """Saves every score, NaN where a method did not score an example, and the labels."""
    scores: dict[str, Any] = {}
    for suspicion in suspicions:
        scores[suspicion.key] = np.full(labels.size, np.nan, np.float32)
        scores[suspicion.key][suspicion.ids] = suspicion.scores
    np.savez_compressed(path, given_labels=labels, true_labels=true_labels, **scores)
