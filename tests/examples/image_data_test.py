import sys
import types

import numpy as np
import pytest

import image_data


def test_digits():
    data = image_data.load("digits")
    # 1,797 digits, of which round(.2 x 1797) = 359 test.
    assert data.train_images.shape == (1438, 8, 8, 1)
    assert data.test_images.shape == (359, 8, 8, 1)
    assert data.train_images.dtype == np.float32 and data.train_labels.dtype == np.int32
    # The pixels are whole sixteenths from 0 to 1.
    assert data.train_images.min() == 0 and data.train_images.max() == 1
    assert np.all(data.train_images * 16 % 1 == 0)
    # About 180 of each class in all, so 144 to train on.
    assert np.bincount(data.train_labels).min() > 120
    assert data.num_classes == 10 and data.class_names == tuple("0123456789")


def test_num_train_takes_the_first():
    few, all_ = image_data.load("digits", num_train=7), image_data.load("digits")
    np.testing.assert_array_equal(few.train_images, all_.train_images[:7])
    np.testing.assert_array_equal(few.train_labels, all_.train_labels[:7])
    np.testing.assert_array_equal(few.test_labels, all_.test_labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "letters"}, "'letters'"),
        ({"name": "digits", "num_train": 1439}, "at most 1438"),
        ({"name": "digits", "num_train": -1}, "at least 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        image_data.load(**settings)


class FakeBuilder:
    """A data set of `tensorflow_datasets` whose test split is one image."""

    def __init__(self, prepared):
        self.prepared = prepared
        self.data_path = "/nowhere"
        label = types.SimpleNamespace(names=["shirt", "boot"])
        self.info = types.SimpleNamespace(features={"label": label})

    def is_prepared(self):
        return self.prepared

    def download_and_prepare(self):
        self.prepared = True

    def as_dataset(self, split, batch_size, as_supervised):
        assert self.prepared and batch_size == -1 and as_supervised
        count = {"train": 3, "test": 1}[split]
        return np.full((count, 4, 4, 1), 51, np.uint8), np.arange(count) % 2


@pytest.mark.parametrize("prepared", [True, False])
def test_tensorflow_datasets_are_downloaded_only_where_absent(monkeypatch, prepared):
    builder, asked = FakeBuilder(prepared), []
    downloads = []
    monkeypatch.setattr(
        builder,
        "download_and_prepare",
        lambda: downloads.append(1) or setattr(builder, "prepared", 1),
    )
    fake = types.ModuleType("tensorflow_datasets")
    fake.builder = lambda name, data_dir: asked.append((name, data_dir)) or builder
    fake.as_numpy = lambda arrays: arrays
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    data = image_data.load("fashion_mnist", data_dir="/data", num_train=2)
    assert asked == [("fashion_mnist", "/data")]
    assert len(downloads) == (0 if prepared else 1)
    # 51 of 255 is .2.
    np.testing.assert_allclose(data.train_images, np.full((2, 4, 4, 1), 0.2))
    assert data.train_labels.tolist() == [0, 1] and data.test_labels.tolist() == [0]
    assert data.num_classes == 2 and data.class_names == ("shirt", "boot")


def test_missing_tensorflow_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"keras_influence\[examples\]"):
        image_data.load("mnist")


def test_corrupt_labels_replaces_exactly_the_share():
    labels = np.arange(200, dtype=np.int32) % 10
    corrupted, is_mislabeled = image_data.corrupt_labels(labels, 0.1, 10, seed=3)
    assert is_mislabeled.sum() == 20
    np.testing.assert_array_equal(corrupted != labels, is_mislabeled)
    assert corrupted.dtype == labels.dtype and corrupted.min() >= 0 and corrupted.max() <= 9
    np.testing.assert_array_equal(labels, np.arange(200) % 10)
    again, _ = image_data.corrupt_labels(labels, 0.1, 10, seed=3)
    np.testing.assert_array_equal(again, corrupted)
    other, _ = image_data.corrupt_labels(labels, 0.1, 10, seed=4)
    assert (other != corrupted).any()


def test_corrupt_labels_draws_every_other_class_alike():
    labels = np.full(30_000, 2, np.int32)
    corrupted, is_mislabeled = image_data.corrupt_labels(labels, 1.0, 4, seed=0)
    assert is_mislabeled.all()
    # A third each, with a standard deviation of sqrt(30000 x 2/9) = 82.
    counts = np.bincount(corrupted, minlength=4)
    assert counts[2] == 0
    np.testing.assert_allclose(counts[[0, 1, 3]], 10_000, atol=400)


def test_corrupt_labels_refuses_what_cannot_be():
    labels = np.zeros(4, np.int32)
    with pytest.raises(ValueError, match=r"\[0, 1\]. Received: 10"):
        image_data.corrupt_labels(labels, 10, 10, seed=0)
    with pytest.raises(ValueError, match=r"two classes\. Received: 1"):
        image_data.corrupt_labels(labels, 0.5, 1, seed=0)
