"""Finds labels that were replaced on purpose: which attribution method does it best?

Trains a classifier on images some of whose labels were replaced by another class, scores the
self-influence of every training image by several methods, and compares how early the replaced ones
come when images are checked by score (Table 1 of Schioppa et al., "Scaling Up Influence Functions",
AAAI 2022). A method must beat two baselines: chance, and the training loss of each image.

    python examples/find_mislabeled.py
    python examples/find_mislabeled.py --dataset=mnist --model=large_cnn --num_train=10000

Writes scores.npz, retrieval_curve.png, suspicious.png (the most suspicious images) and, last,
results.json (the settings and the table).
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from numpy.typing import NDArray

import attribution
import common_flags
import image_data
import method_flags
import mislabel_report
import runs
import training
from image_data import ImageData
from mislabel_report import Suspicion
from training import TrainedModel

_LISSA_EXAMPLES = flags.DEFINE_integer(
    "lissa_examples",
    100,
    "Size of the random sample of training examples that lissa scores: it solves a system for "
    "each.",
    lower_bound=1,
)
_SHEET_BY = flags.DEFINE_string(
    "sheet_by",
    None,
    "Method, or `loss`, that chooses the most suspicious images, at its largest rank; by default "
    "the first of --methods.",
)
flags.adopt_module_key_flags(common_flags)
flags.declare_key_flag(method_flags.METHODS.name)


def score_methods(
    names: Sequence[str],
    trained: TrainedModel,
    data: ImageData,
    settings: attribution.MethodSettings,
    ranks: Sequence[int],
    checkpoint_counts: Sequence[int],
    lissa_ids: NDArray[np.int64] | None = None,
) -> tuple[list[Suspicion], dict[str, str]]:
    """Scores the self-influence of the training examples by every method.

    Args:
        names: Methods, of `attribution.METHODS`.
        trained: The model and its checkpoints.
        data: What the model was trained on.
        settings: What the methods are told.
        ranks: Ranks to try of the methods that have one.
        checkpoint_counts: Numbers of checkpoints to try of TracIn.
        lissa_ids: The examples that LiSSA scores; all by default.

    Returns:
        The scores, and the messages of the methods that diverged, by method.
    """
    suspicions, failures = [], {}
    for name in names:
        variants: list[dict[str, int]] = [{}]
        if name in attribution.WITH_RANK:
            variants = [{"rank": rank} for rank in ranks]
        elif name == "tracin":
            variants = [{"checkpoints": count} for count in checkpoint_counts]
        for variant in variants:
            logging.info("Scoring by %s %s", name, variant or "")
            ids = lissa_ids if name == "lissa" else None
            try:
                suspicions.append(score_method(name, trained, data, settings, ids=ids, **variant))
            except (FloatingPointError, ValueError) as error:
                # A run of hours must not lose its other methods to one that cannot go on.
                logging.error("%s is left out of the table. %s", name, error)
                failures[name] = str(error)
    return suspicions, failures


def score_method(
    name: str,
    trained: TrainedModel,
    data: ImageData,
    settings: attribution.MethodSettings,
    rank: int | None = None,
    checkpoints: int | None = None,
    ids: NDArray[np.int64] | None = None,
) -> Suspicion:
    """Scores the self-influence of the training examples `ids`, by default all, by one method."""
    chosen = training.evenly_spaced(trained.checkpoints, checkpoints) if checkpoints else []
    method = attribution.build(name, trained.model, settings, rank, chosen)
    if ids is None:
        ids = np.arange(len(data.train_labels))
    start = time.perf_counter()
    method.fit((data.train_images, data.train_labels))
    fitted = time.perf_counter()
    scores = method.self_influence((data.train_images[ids], data.train_labels[ids]))
    end = time.perf_counter()
    return Suspicion(name, scores, ids, fitted - start, end - fitted, rank, checkpoints)


def score_baselines(trained: TrainedModel, data: ImageData) -> list[Suspicion]:
    """Scores the training examples by their loss, and all alike."""
    ids = np.arange(len(data.train_labels))
    start = time.perf_counter()
    losses = training.example_losses(trained.model, data.train_images, data.train_labels)
    seconds = time.perf_counter() - start
    return [
        Suspicion("loss", losses, ids, score_seconds=seconds),
        Suspicion("chance", np.zeros(ids.size, np.float32), ids),
    ]


def draw_sample(is_mislabeled: NDArray[np.bool_], size: int, seed: int) -> NDArray[np.int64]:
    """Draws training examples uniformly, in order; refuses a sample that could measure nothing."""
    size = min(size, is_mislabeled.size)
    ids = np.sort(np.random.default_rng(seed).choice(is_mislabeled.size, size, replace=False))
    if is_mislabeled[ids].all() or not is_mislabeled[ids].any():
        raise ValueError(
            f"The {size} examples drawn for lissa hold {is_mislabeled[ids].sum()} mislabeled ones; "
            "retrieval needs both kinds. Pass a larger --lissa_examples."
        )
    return ids


def describe(trained: TrainedModel, is_mislabeled: NDArray[np.bool_]) -> dict[str, Any]:
    """Describes the training run for the settings of results.json."""
    return {
        "num_parameters": trained.model.count_params(),
        "num_train_examples": is_mislabeled.size,
        "num_mislabeled": int(is_mislabeled.sum()),
        "train_accuracy": trained.train_accuracy,
        "test_accuracy": trained.test_accuracy,
        "train_seconds": trained.train_seconds,
        "checkpoint_report": dataclasses.asdict(trained.checkpoint_report),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    names = list(dict.fromkeys(method_flags.METHODS.value))
    counts = common_flags.checkpoint_counts()
    sheet_by = _SHEET_BY.value or names[0]
    if sheet_by not in (*names, "loss"):
        raise app.UsageError(f"--sheet_by must be `loss` or among --methods. Received: {sheet_by}.")
    if "tracin" in names and counts[-1] > common_flags.EPOCHS.value:
        raise app.UsageError(
            f"--checkpoints={counts[-1]} needs at least as many --epochs, each of which gives one. "
            f"Received: --epochs={common_flags.EPOCHS.value}."
        )
    dataset, model_name = common_flags.DATASET.value, common_flags.MODEL.value
    seed = common_flags.SEED.value
    clean = image_data.load(dataset, common_flags.DATA_DIR.value, common_flags.NUM_TRAIN.value)
    corruption = common_flags.CORRUPTION.value
    labels, is_mislabeled = image_data.corrupt_labels(
        clean.train_labels, corruption, clean.num_classes, seed
    )
    if is_mislabeled.all() or not is_mislabeled.any():
        raise app.UsageError(
            f"--corruption={corruption} replaces {is_mislabeled.sum()} of {is_mislabeled.size} "
            "labels; retrieval needs mislabeled and correct ones."
        )
    data = clean._replace(train_labels=labels)
    sample = draw_sample(is_mislabeled, _LISSA_EXAMPLES.value, seed) if "lissa" in names else None
    directory = runs.new_directory(
        common_flags.OUTPUT_DIR.value, "find_mislabeled", f"{dataset}-{model_name}-{seed}"
    )
    strategy = common_flags.make_strategy()
    environment = {"versions": runs.versions(), "matmul_gflops": runs.matmul_gflops()}

    logging.info("Training %s on %d examples of %s", model_name, labels.size, dataset)
    trained = training.train(
        data,
        model_name,
        directory / "checkpoints",
        epochs=common_flags.EPOCHS.value,
        batch_size=common_flags.BATCH_SIZE.value,
        learning_rate=common_flags.LEARNING_RATE.value,
        seed=seed,
        strategy=strategy,
    )
    title = f"{dataset}, {model_name}: {is_mislabeled.sum()} of {labels.size} labels replaced"
    print(
        f"{title}\naccuracy: {trained.train_accuracy:.3f} on the given training labels, "
        f"{trained.test_accuracy:.3f} on the test set"
    )
    suspicions, failures = score_methods(
        names,
        trained,
        data,
        common_flags.method_settings(),
        common_flags.counts(common_flags.RANK),
        counts,
        sample,
    )
    suspicions += score_baselines(trained, data)
    rows = [mislabel_report.make_row(each, is_mislabeled, sample) for each in suspicions]
    print(mislabel_report.format_table([each.name for each in suspicions], rows))

    curves, sheet = directory / "retrieval_curve.png", directory / "suspicious.png"
    scores, results = directory / "scores.npz", directory / "results.json"
    mislabel_report.save_scores(scores, suspicions, labels, clean.train_labels)
    mislabel_report.save_curves(curves, suspicions, is_mislabeled, title)
    shown = [each for each in suspicions if each.method == sheet_by]
    if shown:
        mislabel_report.save_sheet(sheet, shown[-1], data, clean.train_labels, is_mislabeled)
    program = sys.argv[0] if __name__ == "__main__" else __name__
    settings = common_flags.as_settings(program) | environment | describe(trained, is_mislabeled)
    runs.write_json(results, {"settings": settings | {"failures": failures}, "rows": rows})
    for path in (scores, curves, sheet, results):
        print(path)


if __name__ == "__main__":
    app.run(main)
