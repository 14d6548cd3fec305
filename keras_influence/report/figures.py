"""Figures: retrieval curves, sheets of images, and sheets of queries with their influences.

Every function returns a `matplotlib.figure.Figure` that belongs to no window and to no global
state; save it with `figure.savefig(path)`. Colours are those of Okabe and Ito, which stay apart
under colour blindness, with brown for their yellow, which fades on white; and no meaning hangs on
colour alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keras_influence.evaluation import MislabelRetrieval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 8 colours and 5 dashes have no common factor: 40 curves differ.
_LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B4513"]
_DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 1.5))]
_MARKED, _PLAIN, _GRAY = "#D55E00", "#BBBBBB", "#666666"

# Inches and points. Sheets are laid out by hand, so that a caption never moves its image.
_CELL, _GAP, _MARGIN, _TITLE, _HEADING = 1.2, 0.14, 0.2, 0.36, 0.3
_FONT, _LINE = 8.0, 0.155


class RankedInfluences(Protocol):
    """What a scorer returns for each query: `ids` and `scores`, shape `[queries, k]`."""

    @property
    def ids(self) -> ArrayLike: ...

    @property
    def scores(self) -> ArrayLike: ...


def retrieval_curves(
    curves: Mapping[str, MislabelRetrieval], title: str | None = None, max_checked: float = 0.5
) -> Figure:
    """Draws the share of mislabeled examples found against the share of examples checked.

    Args:
        curves: Retrievals by the name to show in the legend, which adds the AUC of each.
        title: Title of the figure.
        max_checked: Where the horizontal axis ends, a share of the examples. The start tells the
            methods apart; few people check more than half of their data.

    Returns:
        A figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no curve, or `max_checked` is not in `(0, 1]`.

    Example:

    ```python
    retrieval = ki.evaluation.mislabel_retrieval(suspicion, is_mislabeled)
    report.retrieval_curves({"Arnoldi": retrieval}).savefig("curves.png", dpi=150)
    ```
    """
    if not curves:
        raise ValueError("`curves` must hold at least one retrieval. Received: none.")
    if not 0 < max_checked <= 1:
        raise ValueError(f"`max_checked` must be in (0, 1]. Received: {max_checked}.")
    figure = _figure(8.4, 4.6, layout="constrained")
    axes = figure.add_subplot()
    styles = zip(itertools.cycle(_LINES), itertools.cycle(_DASHES), strict=False)
    for (name, curve), (color, dashes) in zip(curves.items(), styles, strict=False):
        axes.plot(
            100 * curve.checked,
            100 * curve.found,
            color=color,
            linestyle=dashes,
            linewidth=1.8,
            label=f"{name} (AUC {curve.auc:.3f})",
        )
    shares = {curve.num_mislabeled / curve.num_examples for curve in curves.values()}
    if len(shares) == 1:
        perfect = [0, 100 * shares.pop(), 100]
        axes.plot(perfect, [0, 100, 100], color="#DDDDDD", linewidth=5, zorder=0, label="perfect")
    axes.plot([0, 100], [0, 100], color=_GRAY, linewidth=1, linestyle=":", label="chance")
    axes.set(xlim=(0, 100 * max_checked), ylim=(0, 102))
    axes.set_title(title or "", loc="left", fontsize=11)
    axes.set_xlabel("training examples checked, most suspicious first (%)")
    axes.set_ylabel("mislabeled examples found (%)")
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=_FONT)
    return figure


def image_sheet(
    images: ArrayLike,
    captions: Sequence[str],
    columns: int = 5,
    title: str | None = None,
    marked: Sequence[bool] | None = None,
    note: str | None = None,
) -> Figure:
    """Draws images in a grid, row by row, each above its caption.

    Args:
        images: Shape `[n, height, width]`, or with 1 or 3 channels last. Integers are taken as 0 to
            255, floats as 0 to 1; floats beyond that are rescaled together.
        captions: One for each image; lines are split at `"\\n"`.
        columns: Images in a row.
        title: Title of the sheet.
        marked: True for images to set apart by a thick frame.
        note: A line under the title, such as what the frames mean.

    Returns:
        A figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the images are not images, or the numbers of images, captions and marks
            differ.

    Example:

    ```python
    suspects = np.argsort(-suspicion)[:25]
    figure = report.image_sheet(images[suspects], [f"label {y}" for y in labels[suspects]])
    ```
    """
    pictures = _displayable(images)
    frames = [False] * len(pictures) if marked is None else [bool(mark) for mark in marked]
    if not len(pictures) == len(captions) == len(frames):
        raise ValueError(
            "`images`, `captions` and `marked` must be of the same length. "
            f"Received: {len(pictures)}, {len(captions)} and {len(frames)}."
        )
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1. Received: {columns}.")
    columns = min(columns, len(pictures))
    pitch = _CELL + _LINE * _num_lines(captions) + _GAP
    top = _MARGIN + (_TITLE if title else 0) + (_HEADING if note else 0)
    width = max(2 * _MARGIN + columns * (_CELL + _GAP) - _GAP, _text_width(title, 12, note))
    left = (width - columns * (_CELL + _GAP) + _GAP) / 2
    figure = _figure(width, top + -(-len(pictures) // columns) * pitch + _MARGIN - _GAP)
    _add_titles(figure, title, note)
    for position, (picture, caption, frame) in enumerate(
        zip(pictures, captions, frames, strict=True)
    ):
        row, column = divmod(position, columns)
        _add_image(
            figure, left + column * (_CELL + _GAP), top + row * pitch, picture, caption, frame
        )
    return figure


def influence_sheet(
    query_images: ArrayLike,
    query_captions: Sequence[str],
    train_images: ArrayLike,
    train_labels: Sequence[object],
    proponents: RankedInfluences,
    opponents: RankedInfluences,
    title: str | None = None,
    marked: Sequence[bool] | None = None,
    note: str | None = None,
) -> Figure:
    """Draws each query in a row with its proponents and opponents, their labels and influences.

    Args:
        query_images: Shape as `images` in `image_sheet`.
        query_captions: One for each query, such as its label and its prediction.
        train_images: The training set that the ids refer to.
        train_labels: The label of each training image, as it is to be shown.
        proponents: `ids`, positions in `train_images`, and `scores`, both `[queries, k]`; the
            `proponents` that `InfluenceScorer` and `top_influences` return.
        opponents: The same for opponents, the most negative first.
        title: Title of the sheet.
        marked: True for training images to set apart by a thick frame. Shape `[N]`.
        note: A line under the title, such as what the frames mean.

    Returns:
        A figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the images are not images, the lengths differ, or an id is no position in
            `train_images`.

    Example:

    ```python
    top = scorer((x_test[:3], y_test[:3]))
    figure = report.influence_sheet(
        x_test[:3], ["a", "b", "c"], x_train, y_train, top.proponents, top.opponents
    )
    ```
    """
    queries = _displayable(query_images)
    examples = np.asarray(train_images)
    tables = []
    for name, effect, ranked in [
        ("proponents", "raises the query's loss", proponents),
        ("opponents", "lowers it", opponents),
    ]:
        ids, scores = np.asarray(ranked.ids), np.asarray(ranked.scores)
        if ids.shape != scores.shape or ids.ndim != 2 or len(ids) != len(queries):
            raise ValueError(
                f"Ids and scores must have shape [{len(queries)} queries, k]. "
                f"Received: {ids.shape} and {scores.shape} for the {name}."
            )
        if ids.size and (ids.min() < 0 or ids.max() >= len(examples)):
            raise ValueError(
                f"Ids must be positions in `train_images`, of length {len(examples)}. "
                f"Received: {ids.min()} to {ids.max()}."
            )
        # The words need the width of three images.
        heading = f"{name}: removing one {effect}" if ids.shape[1] > 2 else name
        tables.append((heading, ids, scores))
    if len(query_captions) != len(queries) or len(train_labels) != len(examples):
        raise ValueError(
            "Every query needs a caption and every training image a label. Received: "
            f"{len(query_captions)} captions for {len(queries)} queries, "
            f"{len(train_labels)} labels for {len(examples)} training images."
        )
    marks = np.zeros(len(examples), bool) if marked is None else np.asarray(marked, bool)
    pitch = _CELL + _LINE * max(2, _num_lines(query_captions)) + _GAP
    top = _MARGIN + (_TITLE if title else 0) + (_HEADING if note else 0) + _HEADING
    lefts = [_MARGIN + _CELL + 3 * _GAP]
    for _, ids, _ in tables:
        lefts.append(lefts[-1] + ids.shape[1] * (_CELL + _GAP) + 2 * _GAP)
    width = max(lefts[-1] - 3 * _GAP + _MARGIN, _text_width(title, 12, note))
    figure = _figure(width, top + len(queries) * pitch + _MARGIN - _GAP)
    _add_titles(figure, title, note)
    _add_text(figure, _MARGIN, top - 0.08, "query", weight="bold", va="bottom")
    for left, (heading, ids, scores) in zip(lefts, tables, strict=False):
        _add_text(figure, left, top - 0.08, heading, weight="bold", va="bottom")
        for (row, column), example in np.ndenumerate(ids):
            caption = f"#{example}  {scores[row, column]:+.1e}\nlabel {train_labels[example]}"
            place = left + column * (_CELL + _GAP), top + row * pitch
            picture = _displayable(examples[example : example + 1])[0]
            _add_image(figure, *place, picture, caption, bool(marks[example]))
    for row, (picture, caption) in enumerate(zip(queries, query_captions, strict=True)):
        _add_image(figure, _MARGIN, top + row * pitch, picture, caption, False)
    return figure


def _figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Figures need matplotlib, which is not installed. Install it, or this package with its "
            "extra `examples`: pip install 'keras_influence[examples]'."
        ) from error
    return Figure(figsize=(width, height), facecolor="white", layout=layout)


def _displayable(images: ArrayLike) -> NDArray:
    """Images as `[n, height, width]` or `[n, height, width, 3]`, floats from 0 to 1."""
    pictures = np.asarray(images)
    if pictures.ndim == 4 and pictures.shape[-1] == 1:
        pictures = pictures[..., 0]
    if pictures.ndim not in (3, 4) or (pictures.ndim == 4 and pictures.shape[-1] != 3):
        raise ValueError(
            "Images must have shape [n, height, width], or with 1 or 3 channels last. "
            f"Received: {np.shape(images)}."
        )
    if len(pictures) == 0:
        raise ValueError("A sheet needs at least one image. Received: none.")
    if np.issubdtype(pictures.dtype, np.integer):
        return pictures / 255
    low, high = min(0, pictures.min()), max(1, pictures.max())
    return (pictures - low) / (high - low)


def _num_lines(captions: Sequence[str]) -> int:
    return max(caption.count("\n") + 1 for caption in captions)


def _text_width(title: str | None, size: float, note: str | None) -> float:
    """Inches that the widest of two lines needs; 0.6 em is a generous mean for a letter."""
    return 2 * _MARGIN + 0.6 / 72 * max(len(title or "") * size, len(note or "") * _FONT)


def _add_titles(figure: Figure, title: str | None, note: str | None) -> None:
    if title:
        _add_text(figure, _MARGIN, _MARGIN * 0.8, title, size=12)
    if note:
        _add_text(
            figure, _MARGIN, _MARGIN * 0.8 + (_TITLE - 0.08 if title else 0), note, color=_GRAY
        )


def _add_text(
    figure: Figure, left: float, top: float, text: str, size: float = _FONT, **style: Any
) -> None:
    width, height = figure.get_size_inches()
    style = {"va": "top"} | style
    figure.text(left / width, 1 - top / height, text, fontsize=size, **style)


def _add_image(
    figure: Figure, left: float, top: float, picture: NDArray, caption: str, marked: bool
) -> None:
    width, height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / width, 1 - (top + _CELL) / height, _CELL / width, _CELL / height),
        xticks=[],
        yticks=[],
    )
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set(color=_MARKED if marked else _PLAIN, linewidth=3.5 if marked else 0.8)
    _add_text(figure, left + _CELL / 2, top + _CELL + 0.05, caption, ha="center")
