"""Finds wrong labels among sentence pairs, and shows which pairs made a BERT's predictions.

Fine-tunes a BERT on QNLI (does this sentence answer that question?) with some of the labels turned
to another class, scores the self-influence of every training pair by several methods, compares how
early the turned ones come when pairs are checked by score, and prints the top proponents and
opponents of some predictions.

    python examples/text_classification.py --weights=DIRECTORY
    python examples/text_classification.py --weights=DIRECTORY --data=qnli.tsv.gz

With --folds the BERT is also trained again without each fold of the pairs, so that methods that
look at one training can be compared with what a pair's absence does: its memorization.

--weights is a directory with config.json, model.safetensors and vocab.txt, such as that of a
MiniLM; without it a small BERT is trained from nothing. --data is a file with the columns question,
sentence and label, tabs between them; without it glue/qnli comes through tensorflow_datasets. The
same --output_dir again goes on where a killed run was. Writes scores.npz, retrieval_curve.png and,
last, results.json.
"""

import pathlib
import sys
from collections.abc import Sequence

import keras
import keras_hub
import numpy as np
import tokenizers
from absl import app, flags, logging
from numpy.typing import NDArray
from scipy import stats

import attribution
import bert
import common_flags
import epochs
import method_flags
import mislabel_report
import pair_memorization
import pair_report
import pair_scoring
import retraining_flags
import runs
import sentence_pairs
import text_flags
import training
from mislabel_report import Suspicion
from sentence_pairs import Data

METHODS = ("arnoldi", "random_projection", "tracin", "gradient_dot")
# Models that are trained without a pair, as many as an estimate of memorization needs.
_REPEATS = 2

_WEIGHTS = flags.DEFINE_string("weights", None, "Directory of the BERT to fine-tune.")
_LENGTHS = flags.DEFINE_list(
    "lengths",
    ["48", "80", "128"],
    "Numbers of tokens to pad to, separated by commas: a pair goes to the next one above its own, "
    "and is cut to the last.",
)
_NUM_LAST_LAYERS = flags.DEFINE_integer(
    "num_last_layers",
    0,
    "Attribute through the variables of so many layers, the last ones, and of those above; 0 for "
    "all variables.",
    lower_bound=0,
)
_FOLDS = flags.DEFINE_integer(
    "folds",
    0,
    f"Measure memorization by {_REPEATS} trainings without each of so many parts of the pairs; 0 "
    "not to.",
    lower_bound=0,
)
flags.register_validator(_LENGTHS, common_flags.is_counts, "must be distinct positive integers")
for _holder in (
    common_flags.DATA_DIR,
    common_flags.NUM_TRAIN,
    common_flags.CORRUPTION,
    common_flags.EPOCHS,
    common_flags.BATCH_SIZE,
    common_flags.LEARNING_RATE,
    common_flags.SEED,
    common_flags.OUTPUT_DIR,
    common_flags.RANK,
    common_flags.CHECKPOINTS,
    common_flags.SCORE_BATCH_SIZE,
    common_flags.NUM_ITERATIONS,
    common_flags.NUM_HESSIAN_EXAMPLES,
    method_flags.METHODS,
    method_flags.K,
    method_flags.NUM_QUERIES,
    retraining_flags.PROCESSES,
    text_flags.DATA,
    text_flags.NUM_PIECES,
):
    flags.declare_key_flag(_holder.name)
# A run in a directory may be gone on with under other values of these.
_FREE = {
    holder.name
    for holder in (
        method_flags.METHODS,
        method_flags.K,
        method_flags.NUM_QUERIES,
        common_flags.RANK,
        common_flags.CHECKPOINTS,
        common_flags.OUTPUT_DIR,
        retraining_flags.PROCESSES,
        _FOLDS,
    )
}


def load_bert(
    weights: str | None,
    directory: pathlib.Path,
    data: Data,
    max_length: int,
    num_pieces: int,
) -> tuple[keras_hub.models.BertBackbone, tokenizers.BertWordPieceTokenizer]:
    """The BERT to train, and the tokenizer that goes with it."""
    if weights is not None:
        tokenizer = sentence_pairs.tokenizer(
            pathlib.Path(weights, bert.VOCABULARY_FILE), bert.is_lowercase(weights)
        )
    else:
        vocabulary = directory / bert.VOCABULARY_FILE
        if not vocabulary.exists():
            sentence_pairs.train_vocabulary(data.train, num_pieces, vocabulary)
        tokenizer = sentence_pairs.tokenizer(vocabulary, lowercase=True)
    backbone = bert.make_backbone(weights, tokenizer.get_vocab_size(), max_length)
    if max_length > backbone.max_sequence_length:
        raise ValueError(
            f"--lengths must be at most {backbone.max_sequence_length}, the positions of the BERT. "
            f"Received: {max_length}."
        )
    return backbone, tokenizer


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    names = list(dict.fromkeys(method_flags.METHODS.value))
    if not set(names) <= set(METHODS):
        raise app.UsageError(f"--methods must be out of {', '.join(METHODS)}. Received: {names}.")
    if _FOLDS.value == 1:
        raise app.UsageError("--folds must be 0 or at least 2. Received: 1.")
    num_epochs, seed = common_flags.EPOCHS.value, common_flags.SEED.value
    counts = common_flags.checkpoint_counts()
    if "tracin" in names and counts[-1] >= num_epochs:
        raise app.UsageError(
            f"--checkpoints={counts[-1]} needs more --epochs: each gives one, and at the last the "
            f"learning rate is 0. Received: --epochs={num_epochs}."
        )
    data = sentence_pairs.load(
        text_flags.DATA.value,
        common_flags.DATA_DIR.value,
        common_flags.NUM_TRAIN.value,
        common_flags.CORRUPTION.value,
        seed,
    )
    wrong = data.is_mislabeled
    if wrong.all() or not wrong.any():
        raise app.UsageError(
            f"--corruption={common_flags.CORRUPTION.value} turns {wrong.sum()} of {wrong.size} "
            "labels; retrieval needs wrong and right ones."
        )
    program = sys.argv[0] if __name__ == "__main__" else __name__
    texts = [[*pairs[:2], pairs.labels.tolist()] for pairs in (data.train, data.test)]
    settings = common_flags.as_settings(program) | {"data_sha256": runs.digest(texts)}
    fixed = {key: value for key, value in settings.items() if key not in _FREE}
    directory = runs.resumable_directory(
        common_flags.OUTPUT_DIR.value, "text_classification", f"{seed}", fixed
    )
    buckets = common_flags.counts(_LENGTHS)
    keras.utils.set_random_seed(seed)
    backbone, tokenizer = load_bert(
        _WEIGHTS.value, directory, data, buckets[-1], text_flags.NUM_PIECES.value
    )
    train, test = (
        sentence_pairs.encode(pairs, tokenizer, buckets[-1]) for pairs in (data.train, data.test)
    )

    def epoch(number: int) -> list[NDArray[np.int64]]:
        return sentence_pairs.shuffled(train.lengths, buckets, recipe.batch_size, (seed, number))

    recipe = pair_memorization.Recipe(
        _WEIGHTS.value,
        tokenizer.get_vocab_size(),
        len(data.train.class_names),
        common_flags.LEARNING_RATE.value,
        tuple(buckets),
        common_flags.BATCH_SIZE.value,
        num_epochs,
    )
    model = bert.classifier(
        backbone, recipe.num_classes, recipe.learning_rate, recipe.num_steps(train.lengths)
    )
    logging.info("Training on %d pairs", wrong.size)
    trained = epochs.train(
        model,
        lambda number: sentence_pairs.batches(train, buckets, epoch(number)),
        directory / "checkpoints",
        num_epochs,
    )
    batch_size = common_flags.SCORE_BATCH_SIZE.value
    logits, given = (
        pair_scoring.predict(model, each, buckets, batch_size) for each in (test, train)
    )
    predicted = logits.argmax(axis=1).astype(np.int32)
    accuracy = float((predicted == test.labels).mean())
    title = f"QNLI: {wrong.sum()} of {wrong.size} labels turned"
    train_accuracy = float((given.argmax(axis=1) == train.labels).mean())
    print(
        f"{title}\naccuracy: {train_accuracy:.3f} on the given training labels, {accuracy:.3f} on "
        f"{test.labels.size} test pairs"
    )

    # The last epoch's weights are the model's own; TracIn would weigh them by a rate of 0.
    task = pair_scoring.make_task(model, trained.checkpoints[:-1], train, buckets, batch_size)
    method_settings = common_flags.method_settings()._replace(
        shared={"variables": bert.last_layers(backbone, _NUM_LAST_LAYERS.value)}
    )
    ranks = common_flags.counts(common_flags.RANK)
    variants = [
        pair_scoring.Variant(name, rank, count)
        for name in names
        for rank in (ranks if name in attribution.WITH_RANK else [None])
        for count in (counts if name == "tracin" else [None])
    ]
    scored = pair_scoring.score_all(task, variants, method_settings, directory / "scores")
    losses = keras.losses.sparse_categorical_crossentropy(train.labels, given, from_logits=True)
    baseline = Suspicion("loss", keras.ops.convert_to_numpy(losses), np.arange(wrong.size))
    suspicions = [*(each.suspicion for each in scored), baseline]
    retrained = []
    if _FOLDS.value:
        retrained = pair_memorization.measure(
            directory / f"folds-{_FOLDS.value}",
            train,
            recipe,
            _FOLDS.value,
            _REPEATS,
            seed,
            retraining_flags.PROCESSES.value,
        )
    rows = [mislabel_report.make_row(each, wrong) for each in suspicions + retrained]
    print(mislabel_report.format_table([each.name for each in suspicions + retrained], rows))
    if retrained:
        for row, each in zip(rows, suspicions, strict=False):
            correlation = stats.spearmanr(each.scores, retrained[0].scores).statistic
            row["memorization_correlation"] = float(correlation)
            print(f"{each.label}: rank correlation with memorization {correlation:.3f}")
    suspicions += retrained
    for row, each in zip(rows, scored, strict=False):
        row["throughput"] = each.throughput._asdict()

    method = pair_scoring.fitted_method(task, variants[0], method_settings, directory / "scores")
    ids = training.choose_queries(predicted, test.labels, method_flags.NUM_QUERIES.value)
    asked = test.take(ids)._replace(labels=predicted[ids])
    queries = pair_report.describe(
        pair_scoring.explain(method, task, asked, method_flags.K.value), ids, predicted[ids], data
    )
    print("\n".join(pair_report.format_query(query) for query in queries))

    curves, results = directory / "retrieval_curve.png", directory / "results.json"
    mislabel_report.save_scores(
        directory / "scores.npz", suspicions, train.labels, data.true_labels
    )
    mislabel_report.save_curves(curves, suspicions, wrong, title)
    found = {
        "versions": runs.versions(),
        "matmul_gflops": runs.matmul_gflops(),
        "num_parameters": model.count_params(),
        "num_attributed": method.maps.parameters.size,
        "num_train_examples": wrong.size,
        "num_mislabeled": int(wrong.sum()),
        "num_tokens": int(train.lengths.sum()),
        "train_accuracy": train_accuracy,
        "test_accuracy": accuracy,
        "num_test_examples": test.labels.size,
        "train_seconds": trained.seconds,
        "epochs_resumed": trained.resumed,
        "num_retrainings": _REPEATS * _FOLDS.value,
    }
    content = {
        "settings": settings | found,
        "rows": rows,
        "explained_by": variants[0].name,
        "queries": queries,
    }
    runs.write_json(results, content)
    for path in (directory / "scores.npz", curves, results):
        print(path)


if __name__ == "__main__":
    # What a BERT's fine-tuning needs, where the images' defaults are others.
    flags.set_default(common_flags.EPOCHS, 2)
    flags.set_default(common_flags.LEARNING_RATE, 1e-4)
    flags.set_default(common_flags.RANK, ["10"])
    flags.set_default(common_flags.CHECKPOINTS, ["1"])
    flags.set_default(common_flags.SCORE_BATCH_SIZE, 64)
    flags.set_default(common_flags.NUM_HESSIAN_EXAMPLES, 500)
    flags.set_default(method_flags.METHODS, list(METHODS))
    app.run(main)
