import numpy as np

from keras_influence import evaluation
from keras_influence.trainers import Patch, Retraining, random_subsets
from tests.trainers import recipes


def data():
    random = np.random.default_rng(0)
    x = random.standard_normal((9, 2)).astype(np.float32)
    return x, random.standard_normal(9).astype(np.float32)


def test_masks_in_losses_out_and_trained_once(tmp_path):
    x, y = data()
    retrain = Retraining(
        tmp_path, recipes.line, (x, y), (x[:2], y[:2]), train_fn=recipes.least_squares, verbose=0,
        measurements=["loss"],
    )  # fmt: skip
    masks = random_subsets(9, 3, alpha=0.7)
    losses = retrain(masks)
    for mask, found in zip(masks, losses, strict=True):
        w = np.linalg.lstsq(x[mask].astype(float), y[mask], rcond=None)[0]
        np.testing.assert_allclose(found, (x[:2] @ w - y[:2]) ** 2, rtol=1e-4, atol=1e-6)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("manifest.json")}
    np.testing.assert_array_equal(retrain(masks), losses)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("manifest.json")} == written
    # What each query's own losses predict, removed one by one.
    found = evaluation.counterfactual(np.random.default_rng(1).random((2, 9)), 1, retrain)
    assert np.isfinite(found.actual).all()


def test_a_step_on_chosen_examples_and_back():
    x, y = data()
    model = recipes.line()
    model.set_weights([np.array([[0.5], [-1.0]])])
    patch = Patch(model, (x, y), (x[:2], y[:2]), learning_rate=0.1)
    w = np.array([0.5, -1.0])
    for ids in ([], [3, 5]):
        # The gradient of the mean of (x w - y)^2 is 2 x' (x w - y) / n.
        step = 2 * x[ids].T @ (x[ids] @ w - y[ids]) / 2 if ids else 0
        expected = (x[:2] @ (w - 0.1 * step) - y[:2]) ** 2
        np.testing.assert_allclose(patch(np.array(ids, int)), expected, rtol=1e-5)
        np.testing.assert_array_equal(model.get_weights()[0].ravel(), w)
