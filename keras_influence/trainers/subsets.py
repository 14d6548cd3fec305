"""Which examples to train on: boolean masks [subsets, training examples]."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import model_selection


def random_subsets(
    num_train: int, num_subsets: int, alpha: float = 0.5, seed: int = 0
) -> NDArray[np.bool_]:
    """Subsets of `round(alpha * num_train)` examples each, drawn without replacement.

    Args:
        num_train: N, examples to draw from.
        num_subsets: how many to draw.
        alpha: share of the examples in each, above 0 and below 1.
        seed: of the draws. The first subsets of a longer list are those of a shorter one.

    Returns:
        bool [num_subsets, N], True where the example is trained on.

    Raises:
        ValueError: a share that leaves a subset empty or whole.
    """
    size = round(alpha * num_train)
    if not 0 < size < num_train:
        raise ValueError(
            f"`alpha` must leave between 1 and {num_train - 1} of the {num_train} examples in a "
            f"subset. Received: alpha={alpha}, which leaves {size}."
        )
    random = np.random.default_rng(seed)
    masks = np.zeros((num_subsets, num_train), bool)
    for mask in masks:
        mask[random.choice(num_train, size, replace=False)] = True
    return masks


def leave_group_out(
    num_train: int, groups: Sequence[ArrayLike], controls: int = 1
) -> NDArray[np.bool_]:
    """All examples, `controls` times, and then all but those of each group.

    The runs on all examples are what the others are compared with; more than one of them, each
    with a seed of its own, says how much of a difference is the training's own noise.

    Args:
        num_train: N.
        groups: ids of the examples that each subset leaves out.
        controls: subsets that leave out nothing.

    Returns:
        bool [controls + len(groups), N], the controls first.

    Raises:
        ValueError: an id that is no position of the training set.
    """
    masks = np.ones((controls + len(groups), num_train), bool)
    for mask, group in zip(masks[controls:], groups, strict=True):
        ids = np.atleast_1d(np.asarray(group, np.int64))
        if ids.size and not 0 <= ids.min() <= ids.max() < num_train:
            raise ValueError(
                f"A group holds ids from 0 to {num_train - 1}. Received: {ids.min()} to "
                f"{ids.max()}."
            )
        mask[ids] = False
    return masks


def leave_one_out(num_train: int, ids: ArrayLike, controls: int = 1) -> NDArray[np.bool_]:
    """All examples, `controls` times, and then all but each of `ids`; see `leave_group_out`."""
    return leave_group_out(num_train, list(np.asarray(ids, np.int64)), controls)


def leave_fold_out(
    num_train: int, folds: int, repeats: int = 1, seed: int = 0
) -> NDArray[np.bool_]:
    """All examples but those of each fold, in `repeats` splits of the examples into folds.

    `repeats` of the subsets leave an example out, and the others have it, which is what
    cross-validated outputs and `Memorization` need of each example: random subsets of the same
    share leave some examples out of none.

    Args:
        num_train: N.
        folds: parts of each split, as equal as they can be.
        repeats: splits, each at random.
        seed: of the splits.

    Returns:
        bool [repeats * folds, N], the folds of one split after another.

    Raises:
        ValueError: fewer folds than two, more than examples, or no split.
    """
    if not 2 <= folds <= num_train or repeats < 1:
        raise ValueError(
            f"There must be from 2 to {num_train} folds, no more than examples, and `repeats` at "
            f"least 1. Received: folds={folds}, repeats={repeats}."
        )
    splits = model_selection.RepeatedKFold(n_splits=folds, n_repeats=repeats, random_state=seed)
    masks = np.zeros((repeats * folds, num_train), bool)
    for mask, (kept, _) in zip(masks, splits.split(np.empty(num_train)), strict=True):
        mask[kept] = True
    return masks
