import itertools
import sys
from typing import NamedTuple

import numpy as np
import pytest
from matplotlib import image as matplotlib_image
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg

from keras_influence.evaluation import mislabel_retrieval
from keras_influence.report import image_sheet, influence_sheet, retrieval_curves


class Ranked(NamedTuple):
    ids: np.ndarray
    scores: np.ndarray


IMAGES = np.random.default_rng(0).random((6, 8, 8, 1))
RANKED = Ranked(ids=np.array([[4, 0, 1], [5, 1, 2]]), scores=np.array([[3e-4, 2e-4, 0]] * 2))


def texts(figure):
    return [text.get_text() for text in figure.texts]


def frames(figure):
    return [axes.spines["left"].get_linewidth() > 1 for axes in figure.axes]


def assert_legible(figure):
    """Every text lies inside the figure, no two texts touch, and none lies on an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)
    for box, axes in itertools.product(boxes, figure.axes):
        assert not box.overlaps(axes.bbox)


def sheet(**changes):
    settings = {
        "query_images": IMAGES[:2],
        "query_captions": ["test #8: truck\npredicted ship", "test #9: cat\npredicted cat"],
        "train_images": IMAGES,
        "train_labels": ["automobile"] * 6,
        "proponents": RANKED,
        "opponents": Ranked(RANKED.ids[:, ::-1], -RANKED.scores),
    }
    return influence_sheet(**settings | changes)


def test_retrieval_curves_draws_each_curve_in_per_cent():
    labels = [1, 0, 1, 0, 0]
    curves = {
        "right": mislabel_retrieval([5.0, 1.0, 4.0, 3.0, 2.0], labels),
        "wrong": mislabel_retrieval([1.0, 5.0, 2.0, 3.0, 4.0], labels),
    }
    figure = retrieval_curves(curves, title="Two scores")
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert list(lines) == ["right (AUC 1.000)", "wrong (AUC 0.000)", "perfect", "chance"]
    # The mislabeled are 2/5 of the examples: the perfect curve turns there, and `right` is perfect.
    np.testing.assert_allclose(lines["perfect"], [[0, 0], [40, 100], [100, 100]])
    np.testing.assert_allclose(lines["right (AUC 1.000)"][2], [40, 100])
    np.testing.assert_allclose(lines["wrong (AUC 0.000)"][3], [60, 0])
    assert axes.get_xlim() == (0, 50)
    assert axes.get_title(loc="left") == "Two scores"


def test_perfect_curve_is_left_out_where_the_shares_differ():
    curves = {
        "all": mislabel_retrieval([2.0, 1.0, 0.0], [1, 0, 0]),
        "sample": mislabel_retrieval([2.0, 1.0], [1, 0]),
    }
    labels = [line.get_label() for line in retrieval_curves(curves).axes[0].lines]
    assert labels == ["all (AUC 1.000)", "sample (AUC 1.000)", "chance"]


def test_many_curves_have_styles_of_their_own():
    curve = mislabel_retrieval([2.0, 1.0], [1, 0])
    figure = retrieval_curves({f"method {i}": curve for i in range(40)})
    lines = figure.axes[0].lines[:40]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 40


def test_image_sheet_marks_and_captions():
    figure = image_sheet(
        IMAGES[:5],
        [f"given {i}, true {i + 1}\nscore 1e-04" for i in range(5)],
        columns=2,
        title="Five images in two columns, under a title wider than they are",
        marked=[True, False, False, True, False],
        note="thick frame: the label was replaced",
    )
    assert frames(figure) == [True, False, False, True, False]
    assert texts(figure)[0].startswith("Five images")
    assert texts(figure)[-1] == "given 4, true 5\nscore 1e-04"
    rows = {round(axes.get_position().y0, 6) for axes in figure.axes}
    assert len(rows) == 3
    assert_legible(figure)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (np.full((1, 4, 4), 0.25), 0.25),
        (np.full((1, 4, 4, 1), 51, np.uint8), 0.2),
        (np.full((1, 4, 4, 3), 51, np.int64), 0.2),
        # From -1 to 3, rescaled: 0 lies at a quarter.
        (np.array([[[-1.0, 3.0], [0.0, 0.0]]]), 0.25),
    ],
)
def test_images_are_shown_in_their_range(images, expected):
    (shown,) = image_sheet(images, [""]).axes[0].get_images()
    assert np.max(shown.get_array()[-1, -1]) == pytest.approx(expected)
    assert shown.get_clim() == (0, 1)


def test_influence_sheet_names_ids_labels_and_scores():
    figure = sheet(
        title="Who made this prediction?", note="thick frame: relabeled", marked=[1, 0, 0, 0, 0, 1]
    )
    assert_legible(figure)
    captions = texts(figure)
    assert captions[:5] == [
        "Who made this prediction?",
        "thick frame: relabeled",
        "query",
        "proponents: removing one raises the query's loss",
        "#4  +3.0e-04\nlabel automobile",
    ]
    assert captions.count("#1  -2.0e-04\nlabel automobile") == 1
    assert "test #8: truck\npredicted ship" in captions
    # Examples 0 and 5 are marked; each is drawn once as a proponent and once as an opponent.
    assert sum(frames(figure)) == 4
    assert len(figure.axes) == 2 + 6 + 6


def test_influence_sheet_of_one_example_each_keeps_its_headings_apart():
    one = Ranked(RANKED.ids[:, :1], RANKED.scores[:, :1])
    assert_legible(sheet(proponents=one, opponents=one))


def test_influence_sheet_shows_the_image_of_the_id():
    figure = sheet()
    first = figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(first, IMAGES[4, ..., 0])


def test_figures_can_be_saved_and_leave_no_global_state(tmp_path):
    sheet().savefig(tmp_path / "sheet.png", dpi=50)
    picture = matplotlib_image.imread(tmp_path / "sheet.png")
    assert picture.shape[1] > picture.shape[0] and picture[..., :3].std() > 0
    assert pyplot.get_fignums() == []


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"keras_influence\[examples\]"):
        image_sheet(IMAGES, [""] * 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval_curves({}), "at least one retrieval"),
        (
            lambda: retrieval_curves({"a": mislabel_retrieval([1, 0], [1, 0])}, max_checked=50),
            r"\(0, 1\]. Received: 50",
        ),
        (lambda: image_sheet(np.zeros((2, 4, 4, 2)), ["", ""]), r"Received: \(2, 4, 4, 2\)"),
        (lambda: image_sheet(np.zeros((4, 4)), [""]), r"Received: \(4, 4\)"),
        (lambda: image_sheet(IMAGES[:0], []), "at least one image"),
        (lambda: image_sheet(IMAGES, ["a"]), "Received: 6, 1 and 6"),
        (lambda: image_sheet(IMAGES, [""] * 6, marked=[True]), "Received: 6, 6 and 1"),
        (lambda: image_sheet(IMAGES, [""] * 6, columns=0), "`columns` must"),
        (lambda: sheet(proponents=Ranked(np.zeros((1, 3)), np.zeros((1, 3)))), "the proponents"),
        (lambda: sheet(opponents=Ranked(RANKED.ids, np.zeros((2, 1)))), "the opponents"),
        (lambda: sheet(train_images=IMAGES[:5], train_labels=[""] * 5), "Received: 0 to 5"),
        (lambda: sheet(query_captions=["one"]), "1 captions for 2 queries"),
        (lambda: sheet(train_labels=["one"]), "1 labels for 6 training images"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
