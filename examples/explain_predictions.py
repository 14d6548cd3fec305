"""Shows the training images that speak for and against the predictions of test images.

Trains a classifier, takes some test images (by default half of them misclassified), and draws each
with its top proponents and opponents by one attribution method.

    python examples/explain_predictions.py
    python examples/explain_predictions.py --method=tracin --test_ids=3,14,15

Writes influences.png and, last, influences.json.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from numpy.typing import NDArray

import attribution
import common_flags
import image_data
import keras_influence as ki
import method_flags
import runs
import training
from image_data import ImageData
from keras_influence.methods import EncodingMethod
from training import TrainedModel

_TEST_IDS = flags.DEFINE_list(
    "test_ids", [], "Positions of the test images to explain, separated by commas."
)
_EXPLAIN = flags.DEFINE_enum(
    "explain",
    "predicted",
    ["predicted", "true"],
    "The label whose loss is attributed: who argues for the prediction, or for the truth?",
)
flags.adopt_module_key_flags(common_flags)
for _holder in (method_flags.METHOD, method_flags.K, method_flags.NUM_QUERIES):
    flags.declare_key_flag(_holder.name)
flags.register_validator(
    _TEST_IDS, lambda ids: all(each.isdecimal() for each in ids), "must be positions, from 0"
)


def find_influences(
    name: str,
    trained: TrainedModel,
    data: ImageData,
    queries: tuple[NDArray[np.float32], NDArray[np.int32]],
    settings: attribution.MethodSettings,
    rank: int,
    num_checkpoints: int,
    k: int,
) -> ki.Influences:
    """Finds the `k` top proponents and opponents of each query.

    Args:
        name: One of `attribution.METHODS`.
        trained: The model and its checkpoints.
        data: What the model was trained on.
        queries: Images and the labels whose loss is attributed.
        settings: What the method is told.
        rank: Rank of a method that has one.
        num_checkpoints: How many checkpoints TracIn sums over.
        k: Training images of either kind.
    """
    method = attribution.build(
        name,
        trained.model,
        settings,
        rank if name in attribution.WITH_RANK else None,
        training.evenly_spaced(trained.checkpoints, num_checkpoints) if name == "tracin" else [],
    )
    train = (data.train_images, data.train_labels)
    method.fit(train)
    if isinstance(method, EncodingMethod):
        return ki.InfluenceScorer(method, k=k).index(train)(queries)
    return ki.top_influences(method.scores(queries, train), k)


def describe_influences(
    top: ki.Influences,
    ids: NDArray[np.int64],
    labels: NDArray[np.int32],
    predicted: NDArray[np.int32],
    data: ImageData,
    is_mislabeled: NDArray[np.bool_],
) -> list[dict[str, Any]]:
    """Describes each query, and its influences, for influences.json.

    Args:
        top: Influences on the queries.
        ids: Positions of the queries in the test set.
        labels: Labels whose loss was attributed.
        predicted: Labels that the model predicts for the queries.
        data: Training and test set.
        is_mislabeled: Which training labels were replaced.
    """
    names = data.class_names
    queries = []
    for row, example in enumerate(ids):
        query: dict[str, Any] = {
            "test_id": int(example),
            "true_label": names[data.test_labels[example]],
            "predicted_label": names[predicted[row]],
            "explained_label": names[labels[row]],
        }
        for kind, ranked in top._asdict().items():
            query[kind] = [
                {
                    "id": int(train_id),
                    "label": names[data.train_labels[train_id]],
                    "is_mislabeled": bool(is_mislabeled[train_id]),
                    "score": float(score),
                }
                for train_id, score in zip(ranked.ids[row], ranked.scores[row], strict=True)
            ]
        queries.append(query)
    return queries


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    dataset, model_name = common_flags.DATASET.value, common_flags.MODEL.value
    name, seed = method_flags.METHOD.value, common_flags.SEED.value
    rank = common_flags.counts(common_flags.RANK)[-1]
    num_checkpoints = common_flags.checkpoint_counts()[-1]
    data = image_data.load(dataset, common_flags.DATA_DIR.value, common_flags.NUM_TRAIN.value)
    labels, is_mislabeled = image_data.corrupt_labels(
        data.train_labels, common_flags.CORRUPTION.value, data.num_classes, seed
    )
    data = data._replace(train_labels=labels)
    ids = np.array([int(each) for each in _TEST_IDS.value], np.int64)
    if ids.size and ids.max() >= len(data.test_labels):
        raise app.UsageError(
            f"--test_ids must be below {len(data.test_labels)}, the size of the test set of "
            f"{dataset}. Received: {ids.max()}."
        )
    directory = runs.new_directory(
        common_flags.OUTPUT_DIR.value,
        "explain_predictions",
        f"{dataset}-{model_name}-{name}-{seed}",
    )

    logging.info("Training %s on %d examples of %s", model_name, labels.size, dataset)
    trained = training.train(
        data,
        model_name,
        directory / "checkpoints",
        epochs=common_flags.EPOCHS.value,
        batch_size=common_flags.BATCH_SIZE.value,
        learning_rate=common_flags.LEARNING_RATE.value,
        seed=seed,
        strategy=common_flags.make_strategy(),
    )
    predictions = training.predict_labels(trained.model, data.test_images)
    if not ids.size:
        number = method_flags.NUM_QUERIES.value
        ids = training.choose_queries(predictions, data.test_labels, number)
    predicted, true = predictions[ids], data.test_labels[ids]
    explained = predicted if _EXPLAIN.value == "predicted" else true
    # What a prediction rests on lies outside of the kept eigenvectors, too.
    settings = common_flags.method_settings()._replace(complement="rayleigh")
    logging.info("Attributing %d predictions by %s", ids.size, name)
    top = find_influences(
        name,
        trained,
        data,
        (data.test_images[ids], explained),
        settings,
        rank,
        num_checkpoints,
        method_flags.K.value,
    )

    names = data.class_names
    sheet, results = directory / "influences.png", directory / "influences.json"
    ki.report.influence_sheet(
        data.test_images[ids],
        [
            f"test #{example}\ntrue {names[data.test_labels[example]]}\npredicted {names[label]}"
            for example, label in zip(ids, predicted, strict=True)
        ],
        data.train_images,
        [names[label] for label in labels],
        top.proponents,
        top.opponents,
        title=f"{dataset}, {model_name}: influences on the loss of the {_EXPLAIN.value} label",
        note=f"by {name}; numbers: influences, in the unit of the method"
        + ("; thick frame: label replaced" if is_mislabeled.any() else ""),
        marked=is_mislabeled.tolist(),
    ).savefig(sheet, dpi=120)
    program = sys.argv[0] if __name__ == "__main__" else __name__
    described = common_flags.as_settings(program) | {
        "versions": runs.versions(),
        "train_accuracy": trained.train_accuracy,
        "test_accuracy": trained.test_accuracy,
    }
    queries = describe_influences(top, ids, explained, predicted, data, is_mislabeled)
    runs.write_json(results, {"settings": described, "queries": queries})
    print(f"accuracy on the test set: {trained.test_accuracy:.3f}")
    for path in (sheet, results):
        print(path)


if __name__ == "__main__":
    # Here a wrong label is no test of the method: leave the labels as they are unless asked.
    flags.set_default(common_flags.CORRUPTION, 0.0)
    app.run(main)
