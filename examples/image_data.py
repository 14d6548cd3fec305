"""Image classification data of the examples, and label noise put in on purpose."""

from typing import NamedTuple

import numpy as np
from absl import logging
from numpy.typing import NDArray
from sklearn import datasets

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10")

# The split of the 1,797 digits is a property of the data, like that of the others: no run's seed.
_DIGITS_TEST_SHARE = 0.2


class ImageData(NamedTuple):
    """Images `[n, height, width, channels]`, from 0 to 1, and labels `[n]` to train and test on."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int32]
    num_classes: int
    class_names: tuple[str, ...]


def load(name: str, data_dir: str | None = None, num_train: int = 0) -> ImageData:
    """Loads a data set, downloading it only where `data_dir` does not hold it.

    Args:
        name: One of `NAMES`. `"digits"` comes with scikit-learn; the others are of
            `tensorflow_datasets`.
        data_dir: Directory of `tensorflow_datasets`; by default its own.
        num_train: How many training examples to take, from the first; 0 for all.

    Raises:
        ValueError: If the name is unknown, or the data set has fewer than `num_train` examples.
    """
    if name not in NAMES:
        raise ValueError(f"The data set must be one of {NAMES}. Received: {name!r}.")
    if num_train < 0:
        raise ValueError(f"`num_train` must be at least 0 (for all). Received: {num_train}.")
    data = _load_digits() if name == "digits" else _load_tfds(name, data_dir)
    if num_train > len(data.train_labels):
        raise ValueError(
            f"`num_train` must be at most {len(data.train_labels)}, the training examples of "
            f"{name}. Received: {num_train}."
        )
    if num_train:
        data = data._replace(
            train_images=data.train_images[:num_train], train_labels=data.train_labels[:num_train]
        )
    return data


def corrupt_labels(
    labels: NDArray[np.int32], fraction: float, num_classes: int, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Replaces `round(fraction * N)` labels, each by another class drawn uniformly.

    Returns:
        The new labels and, for each example, whether its label was replaced.

    Raises:
        ValueError: If `fraction` is not in `[0, 1]`, or there is no other class to draw.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"The share of labels to replace must be in [0, 1]. Received: {fraction}.")
    if num_classes < 2:
        raise ValueError(f"Replacing a label needs two classes. Received: {num_classes}.")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(labels), round(fraction * len(labels)), replace=False)
    corrupted = labels.copy()
    # A step of 1 to num_classes - 1 around the circle of classes never ends where it began.
    corrupted[chosen] += rng.integers(1, num_classes, chosen.size, dtype=labels.dtype)
    corrupted[chosen] %= num_classes
    is_mislabeled = np.zeros(len(labels), np.bool_)
    is_mislabeled[chosen] = True
    return corrupted, is_mislabeled


def _load_digits() -> ImageData:
    digits = datasets.load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    # The digits come writer by writer, so that an unshuffled split would test on other hands.
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [round(_DIGITS_TEST_SHARE * len(labels))])
    names = tuple(str(name) for name in digits.target_names)
    return ImageData(images[train], labels[train], images[test], labels[test], len(names), names)


def _load_tfds(name: str, data_dir: str | None) -> ImageData:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"The data set {name} needs tensorflow_datasets, which could not be imported. Install "
            "this package with its extra `examples`: pip install 'keras_influence[examples]'. "
            "The data set digits needs no download."
        ) from error
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
        logging.info("%s is not in %s: downloading it.", name, builder.data_path)
        builder.download_and_prepare()
    splits = []
    for split in ("train", "test"):
        whole = builder.as_dataset(split=split, batch_size=-1, as_supervised=True)
        images, labels = tfds.as_numpy(whole)
        splits.append((images.astype(np.float32) / 255, labels.astype(np.int32)))
    names = tuple(builder.info.features["label"].names)
    return ImageData(*splits[0], *splits[1], len(names), names)
