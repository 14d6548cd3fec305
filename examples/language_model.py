"""Which training passages made this continuation likely?

Trains a small GPT on plain text, cut into passages of some tokens, and asks of each query, a prompt
and a continuation, which passages raised the log-likelihood of the continuation, and which lowered
it. A score is the log-likelihood, in nats, that the continuation would lose were the model trained
without the passage, by the method's reckoning (TracIn's has no such unit).

    python examples/language_model.py --data=wiki.valid.tokens
    python examples/language_model.py --data=text.txt.gz --query="The song was => released in May"

Without --query, passages that were held out are asked about: the first half of each is the prompt,
and the second the continuation. --data takes several files, with commas between them; of WikiText
the articles' titles are used. The same --output_dir again goes on where a killed run was, and takes
other queries without another training. Writes the vocabulary and checkpoints, and in a directory
for each set of queries scores.npz and, last, results.json.
"""

import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tokenizers
from absl import app, flags, logging
from numpy.typing import NDArray

import attribution
import common_flags
import epochs
import gpt
import keras_influence as ki
import method_flags
import passages
import runs
import text_flags
import throughput
import training
from keras_influence.checkpoints import Checkpoint
from keras_influence.methods import EncodingMethod
from passages import Passages

_QUERY = flags.DEFINE_multi_string(
    "query",
    [],
    "A prompt and a continuation, with ' => ' between them; may be given several times.",
)
_LENGTH = flags.DEFINE_integer("length", 64, "Tokens of a passage.", lower_bound=2)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 2, "Decoder layers.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 128, "Width of the layers, 32 to a head.", lower_bound=32)
_COMPLEMENT = flags.DEFINE_enum(
    "complement",
    "rayleigh",
    ["rayleigh", "none"],
    "What stands for the inverse curvature outside of arnoldi's eigenvectors: an inverse Rayleigh "
    "quotient, or, as published, nothing, so that the eigenvectors alone count.",
)
# What a directory's model depends on, and then what is asked of it.
_OF_TRAINING = (
    text_flags.DATA,
    text_flags.NUM_PIECES,
    common_flags.NUM_TRAIN,
    common_flags.EPOCHS,
    common_flags.BATCH_SIZE,
    common_flags.LEARNING_RATE,
    common_flags.SEED,
    _LENGTH,
    _NUM_LAYERS,
    _WIDTH,
)
_OF_SCORES = (
    method_flags.METHOD,
    method_flags.NUM_QUERIES,
    _QUERY,
    common_flags.RANK,
    _COMPLEMENT,
    common_flags.CHECKPOINTS,
    common_flags.NUM_ITERATIONS,
    common_flags.NUM_HESSIAN_EXAMPLES,
    common_flags.SCORE_BATCH_SIZE,
)
for _holder in (*_OF_TRAINING, *_OF_SCORES, method_flags.K, common_flags.OUTPUT_DIR):
    flags.declare_key_flag(_holder.name)


class Answers(NamedTuple):
    """What the queries' continuations owe to each passage.

    Attributes:
        scores: Log-likelihood lost without the passage, `[queries, passages]`.
        fit_seconds: Time to prepare the method.
        throughput: Of the passages scored, for all queries at once.
    """

    scores: NDArray[np.float32]
    fit_seconds: float
    throughput: throughput.Throughput


def log_likelihood(labels: Any, logits: Any) -> Any:
    """Of each token, in nats: what the methods are asked about, summed over a continuation."""
    return -keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


def token_log_likelihoods(model: keras.Model, asked: Passages) -> NDArray[np.float32]:
    """The sum over each passage's tokens that count, `[N]`."""
    found = []
    for start in range(0, len(asked.sources), 64):
        logits = model.predict_on_batch(asked.inputs[start : start + 64])
        values = log_likelihood(asked.labels[start : start + 64], logits)
        weights = asked.weights[start : start + 64]
        found.append((keras.ops.convert_to_numpy(values) * weights).sum(axis=1))
    return np.concatenate(found)


def answer(
    name: str,
    model: keras.Model,
    checkpoints: Sequence[Checkpoint],
    settings: attribution.MethodSettings,
    rank: int,
    train: Passages,
    asked: Passages,
    directory: pathlib.Path,
) -> Answers:
    """Scores the training passages against the queries, once in `directory`.

    Args:
        name: One of `attribution.METHODS`.
        model: The trained model.
        checkpoints: Those that TracIn sums over.
        settings: What the method is told.
        rank: Of a method that has one.
        train: The training passages.
        asked: The queries.
        directory: Where the scores are kept, and Arnoldi's steps.
    """

    def compute() -> dict[str, Any]:
        method = attribution.build(
            name,
            model,
            # A passage counts as much as it has tokens, as it did in training.
            settings._replace(shared={"measurement": log_likelihood, "sequence_reduction": "sum"}),
            rank if name in attribution.WITH_RANK else None,
            checkpoints if name == "tracin" else (),
        )
        start = time.perf_counter()
        if isinstance(method, ki.Arnoldi):
            method.fit(train.arrays, directory=directory / "arnoldi")
        else:
            method.fit(train.arrays)
        fitted = time.perf_counter()
        # What the log-likelihood would gain without a passage is minus what it owes to it.
        scores = -method.scores(asked.arrays, train.arrays)
        end = time.perf_counter()
        # Encodings are of the rank; what is no encoding has a direction for each query.
        encodes = isinstance(method, EncodingMethod) and not (
            isinstance(method, ki.Arnoldi) and method.complement
        )
        directions = rank if encodes else len(asked.sources)
        flops = throughput.flops_per_example(method, train.arrays, directions)
        flops *= len(method.checkpoints) if isinstance(method, ki.TracIn) else 1
        rates = throughput.measure(end - fitted, len(train.sources), train.num_tokens, flops)
        return {"scores": scores, "fit_seconds": fitted - start, "rates": rates}

    kept = runs.computed(directory / "scores.npz", compute)
    rates = throughput.Throughput(*kept["rates"].tolist())
    return Answers(kept["scores"], float(kept["fit_seconds"]), rates)


def describe(
    top: ki.Influences,
    asked: Passages,
    likelihoods: NDArray[np.float32],
    train: Passages,
    tokenizer: tokenizers.Tokenizer,
) -> list[dict[str, Any]]:
    """Each query and its passages, for results.json and `format_query`.

    Args:
        top: Influences on the queries.
        asked: The queries.
        likelihoods: Of the continuations.
        train: The training passages.
        tokenizer: Of both.
    """
    queries = []
    for row, source in enumerate(asked.sources):
        prompt, continuation = passages.text(asked, row, tokenizer)
        query: dict[str, Any] = {
            "source": source,
            "prompt": prompt,
            "continuation": continuation,
            "log_likelihood": float(likelihoods[row]),
        }
        for kind, ranked in top._asdict().items():
            query[kind] = [
                {
                    "id": int(passage),
                    "source": train.sources[passage],
                    "text": passages.text(train, passage, tokenizer)[1],
                    "score": float(score),
                }
                for passage, score in zip(ranked.ids[row], ranked.scores[row], strict=True)
            ]
        queries.append(query)
    return queries


def format_query(query: dict[str, Any]) -> str:
    """A query of `describe` as text."""
    lines = [
        f"{query['prompt']} =>{query['continuation']} ({query['source']}; log-likelihood "
        f"{query['log_likelihood']:.2f})"
    ]
    for kind, effect in (("proponents", "likelier"), ("opponents", "less likely")):
        lines.append(f"  {kind}, which made it {effect}:")
        for each in query[kind]:
            lines.append(
                f"    {each['score']:+.3g}  #{each['id']} ({each['source']}) {each['text']}"
            )
    return "\n".join(lines)


def from_own_source(
    queries: Sequence[dict[str, Any]], train: Passages
) -> tuple[float, float] | None:
    """Share of the proponents from their query's article, and of all passages; None without any."""
    shares = [train.sources.count(query["source"]) / len(train.sources) for query in queries]
    if not any(shares):
        return None
    found = [each["source"] == query["source"] for query in queries for each in query["proponents"]]
    return float(np.mean(found)), float(np.mean(shares))


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    if text_flags.DATA.value is None:
        raise app.UsageError(
            "--data is needed: text files, with commas between them, such as WikiText-2's "
            "wiki.train.tokens."
        )
    if _WIDTH.value % 32:
        raise app.UsageError(f"--width must be a multiple of 32. Received: {_WIDTH.value}.")
    name, num_epochs, seed = (
        method_flags.METHOD.value,
        common_flags.EPOCHS.value,
        common_flags.SEED.value,
    )
    count, length = common_flags.checkpoint_counts()[-1], _LENGTH.value
    if name == "tracin" and count > num_epochs:
        raise app.UsageError(
            f"--checkpoints={count} needs at least as many --epochs, each of which gives one. "
            f"Received: --epochs={num_epochs}."
        )
    paragraphs = passages.read(text_flags.DATA.value.split(","))
    program = sys.argv[0] if __name__ == "__main__" else __name__
    settings = common_flags.as_settings(program)
    of_training = {holder.name: settings[holder.name] for holder in _OF_TRAINING}
    of_training["data_sha256"] = runs.digest(paragraphs)
    directory = runs.resumable_directory(
        common_flags.OUTPUT_DIR.value, "language_model", f"{seed}", of_training
    )
    tokenizer = passages.vocabulary(
        paragraphs, text_flags.NUM_PIECES.value, directory / "vocabulary.json"
    )
    whole = passages.cut(paragraphs, tokenizer, length)
    train, test = passages.split(whole, common_flags.NUM_TRAIN.value, seed)
    if _QUERY.value:
        asked = passages.questions(_QUERY.value, tokenizer, length)
    else:
        number = min(method_flags.NUM_QUERIES.value, len(test.sources))
        asked = passages.halves(test.take(np.arange(number)))

    keras.utils.set_random_seed(seed)
    model = gpt.build(
        gpt.Size(_NUM_LAYERS.value, _WIDTH.value, _WIDTH.value // 32),
        tokenizer.get_vocab_size(),
        length,
        common_flags.LEARNING_RATE.value,
    )

    def epoch(number: int) -> tf.data.Dataset:
        rows = np.random.default_rng((seed, number)).permutation(len(train.sources))
        arrays = tuple(array[rows] for array in train.arrays)
        return tf.data.Dataset.from_tensor_slices(arrays).batch(common_flags.BATCH_SIZE.value)

    logging.info("Training on %d passages, %d tokens", len(train.sources), train.num_tokens)
    trained = epochs.train(model, epoch, directory / "checkpoints", num_epochs)
    perplexities = [
        float(np.exp(-token_log_likelihoods(model, each).sum() / each.num_tokens))
        for each in (train, test)
    ]
    print(
        f"{len(train.sources)} passages, {train.num_tokens} tokens; perplexity "
        f"{perplexities[0]:.1f} on them, {perplexities[1]:.1f} on {len(test.sources)} held out"
    )
    answered = directory / runs.digest([settings[holder.name] for holder in _OF_SCORES])[:16]
    answered.mkdir(exist_ok=True)
    answers = answer(
        name,
        model,
        training.evenly_spaced(trained.checkpoints, count) if name == "tracin" else (),
        common_flags.method_settings()._replace(
            complement=None if _COMPLEMENT.value == "none" else _COMPLEMENT.value
        ),
        common_flags.counts(common_flags.RANK)[-1],
        train,
        asked,
        answered,
    )
    print(f"{name}, {len(asked.sources)} queries: {answers.throughput}")
    top = ki.top_influences(answers.scores, method_flags.K.value)
    likelihoods = token_log_likelihoods(model, asked)
    queries = describe(top, asked, likelihoods, train, tokenizer)
    print("\n".join(format_query(query) for query in queries))
    own = from_own_source(queries, train)
    if own is not None:
        print(f"from the query's own source: {own[0]:.1%} of the proponents, {own[1]:.1%} of all")
    found = {
        "versions": runs.versions(),
        "matmul_gflops": runs.matmul_gflops(),
        "num_parameters": model.count_params(),
        "num_train_passages": len(train.sources),
        "num_train_tokens": train.num_tokens,
        "train_perplexity": perplexities[0],
        "test_perplexity": perplexities[1],
        "train_seconds": trained.seconds,
        "epochs_resumed": trained.resumed,
        "fit_seconds": answers.fit_seconds,
    }
    content = {
        "settings": settings | of_training | found,
        "throughput": answers.throughput._asdict(),
        "from_own_source": None if own is None else {"proponents": own[0], "chance": own[1]},
        "queries": queries,
    }
    runs.write_json(answered / "results.json", content)
    for file in ("scores.npz", "results.json"):
        print(answered / file)


if __name__ == "__main__":
    # What a language model's training needs, where the images' defaults are others.
    flags.set_default(common_flags.EPOCHS, 10)
    flags.set_default(common_flags.LEARNING_RATE, 1e-3)
    flags.set_default(common_flags.CHECKPOINTS, ["5"])
    flags.set_default(common_flags.SCORE_BATCH_SIZE, 32)
    flags.set_default(common_flags.NUM_HESSIAN_EXAMPLES, 500)
    flags.set_default(method_flags.METHOD, "ekfac")
    app.run(main)
