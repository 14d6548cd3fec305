"""Finds wrong references among translated sentences, and the pairs that are worth training on.

Trains a Transformer on German-English pairs, some with wrong references on purpose, and scores the
self-influence of every pair (Schioppa et al., "Scaling Up Influence Functions", AAAI 2022):

    python examples/translation.py --data=de-en.tsv.gz --output_dir=runs/synthetic
    python examples/translation.py --data=de-en.tsv.gz --output_dir=runs/selection --noise=mixed
    python examples/translation.py --data=de-en.tsv.gz --output_dir=runs/all --noise=none \\
        --ranks=20 --scored=all --forward_mode_pairs=128

The first is the paper's Table 2: how early do permuted references come when pairs are checked by
score? The second is its Table 3: keep the best pairs by each score, train afresh, and compare BLEU
after equal numbers of updates. The third scores every pair of the file and says at which rate.
Without --data the pairs are wmt17_translate/de-en, through tensorflow_datasets.

A stage goes on where it was stopped, and one that is done is not done again; what it was done with
is on record, and another setting is refused. The last stage writes results.json.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from numpy.typing import NDArray

import common_flags
import keras_influence as ki
import runs
import text_flags
import translation_data
import translation_flags
import translation_model
import translation_report
import translation_scoring
import translation_selection
from translation_data import Batches, Corpus
from translation_training import Recipe, Translator, bleu

flags.adopt_module_key_flags(translation_flags)


def settings_file(directory: pathlib.Path, stage: str) -> pathlib.Path:
    """Where it is on record what a stage was done with."""
    return directory / f"{stage}.settings.json"


def claim(directory: pathlib.Path, stage: str) -> None:
    """Records what a stage is done with, or compares with what is on record.

    Raises:
        app.UsageError: They differ.
    """
    path = settings_file(directory, stage)
    settings = translation_flags.settings()[stage]
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, settings)
        return
    found = runs.read_json(path)
    changed = sorted(name for name in settings if settings[name] != found.get(name))
    if changed:
        differences = ", ".join(f"{n} {found.get(n)} and not {settings[n]}" for n in changed)
        raise app.UsageError(
            f"{directory} holds the stage `{stage}` with other settings: {differences}. Pass "
            "those, or another --output_dir."
        )


def prepare(directory: pathlib.Path) -> None:
    """Splits the pairs, makes references wrong, learns the vocabulary, encodes all."""
    if (directory / "corpus.npz").exists():
        return
    data, seed = text_flags.DATA.value, common_flags.SEED.value
    if data:
        pairs = translation_data.read_tsv(data)
    else:
        pairs = translation_data.read_wmt(
            common_flags.DATA_DIR.value, translation_flags.MAX_PAIRS.value
        )
    pairs = translation_data.short(pairs, translation_flags.max_words())
    splits = translation_data.split(
        pairs, translation_flags.NUM_HELD_OUT.value, translation_flags.NUM_PAIRS.value, seed
    )
    german, english = map(list, zip(*pairs, strict=True))
    wrong, is_wrong = translation_data.add_noise(
        [english[position] for position in splits["train"]],
        translation_flags.NOISE.value,
        translation_flags.noise_share(),
        seed,
    )
    for position, reference in zip(splits["train"], wrong, strict=True):
        english[position] = reference
    is_noisy = np.zeros(len(pairs), bool)
    is_noisy[splits["train"]] = is_wrong
    logging.info("Learning a vocabulary of %d pairs", len(splits["train"]))
    sentences = (side[position] for position in splits["train"] for side in (german, english))
    path = directory / "vocabulary.model"
    translation_data.train_vocabulary(sentences, text_flags.NUM_PIECES.value, path)
    vocabulary = translation_data.load_vocabulary(path)
    references = {"references": [english[position] for position in splits["held_out"]]}
    runs.write_json(directory / "held_out.json", references)
    max_tokens = translation_flags.buckets()[-1]
    runs.computed(
        directory / "corpus.npz",
        lambda: {
            "sources": translation_data.encode(vocabulary, german, max_tokens),
            "targets": translation_data.encode(vocabulary, english, max_tokens),
            "is_noisy": is_noisy,
            **splits,
        },
    )


def load(directory: pathlib.Path) -> Corpus:
    """What `prepare` wrote."""
    path = directory / "corpus.npz"
    if not path.exists():
        raise app.UsageError(f"There is no {path}. Run --stage=prepare first.")
    arrays = dict(np.load(path))
    splits = {name: arrays.pop(name) for name in ("held_out", "train", "rest")}
    return Corpus(**arrays, splits=splits)


def make_translator(directory: pathlib.Path, updates: int, num_checkpoints: int) -> Translator:
    vocabulary = translation_data.load_vocabulary(directory / "vocabulary.model")
    return Translator(
        translation_model.SIZES[translation_flags.size()],
        vocabulary.vocab_size(),
        translation_flags.buckets()[-1],
        Recipe(translation_flags.peak_rate(), updates, num_checkpoints, common_flags.SEED.value),
    )


def load_translator(directory: pathlib.Path) -> Translator:
    """With the weights that `train` ended with."""
    if not (directory / "run" / "training.json").exists():
        raise app.UsageError(f"There is no finished run in {directory}. Run --stage=train first.")
    translator = make_translator(
        directory, translation_flags.UPDATES.value, translation_flags.NUM_CHECKPOINTS.value
    )
    translator.load(directory / "run")
    return translator


def batches(corpus: Corpus, ids: NDArray[np.int64], size: int) -> Batches:
    return Batches(corpus, ids, translation_flags.buckets(), size)


def train(directory: pathlib.Path, corpus: Corpus) -> None:
    """Trains on all training pairs, the wrong ones among them."""
    translator = make_translator(
        directory, translation_flags.UPDATES.value, translation_flags.NUM_CHECKPOINTS.value
    )
    chosen = batches(corpus, corpus.splits["train"], translation_flags.TRAIN_BATCH.value)
    translator.train(chosen, directory / "run")


def draw_scored(corpus: Corpus, scored: str, number: int, seed: int) -> NDArray[np.int64]:
    """The pairs to score: those of training, or all; or `number` of them, where it is not 0."""
    parts = ["train"] if scored == "train" else list(corpus.splits)
    ids = np.concatenate([corpus.splits[part] for part in parts])
    if 0 < number < len(ids):
        ids = np.sort(np.random.default_rng(seed).choice(ids, number, replace=False))
    return ids


def score(directory: pathlib.Path, corpus: Corpus) -> None:
    """Scores the pairs by every method."""
    chosen = translation_flags.settings()["score"]
    settings = translation_scoring.Settings(
        batch_size=chosen["score_batch"],
        ranks=translation_flags.ranks(),
        num_iterations=chosen["num_iterations"],
        num_hessian_pairs=chosen["hessian_pairs"],
        last_layers=chosen["last_decoder_layers"],
        num_checkpoints=chosen["tracin_checkpoints"],
        seed=common_flags.SEED.value,
    )
    translator = load_translator(directory)
    ids = draw_scored(corpus, chosen["scored"], chosen["num_scored"], settings.seed)
    scores = directory / "scores"
    for task in translation_scoring.tasks(
        translation_flags.score_by(),
        translator.model,
        batches(corpus, corpus.splits["train"], settings.batch_size),
        ki.checkpoints.list_checkpoints(directory / "run"),
        settings,
        scores,
    ):
        translation_scoring.run(task, batches(corpus, ids, settings.batch_size), scores)
    wanted = translation_flags.FORWARD_MODE_PAIRS.value
    if wanted and not (directory / "forward_mode.json").exists():
        sample = draw_scored(corpus, chosen["scored"], wanted, settings.seed)
        found = translation_scoring.forward_mode_ratio(
            translator.model,
            batches(corpus, sample, settings.batch_size),
            settings.ranks[-1],
            settings.seed,
        )
        runs.write_json(directory / "forward_mode.json", found)
    print(translation_report.format_costs(scores))


def select(directory: pathlib.Path, corpus: Corpus) -> None:
    """Trains afresh on the best pairs by each score."""
    choices = translation_selection.choices(
        corpus,
        directory / "scores",
        translation_flags.ranks(),
        translation_flags.SELECT_BY.value,
        translation_flags.kept(),
        common_flags.SEED.value,
    )
    translator = make_translator(directory, translation_flags.SELECT_UPDATES.value, 1)
    for choice in choices:
        place = directory / "selected" / choice.name
        if (place / "choice.json").exists():
            continue
        logging.info("Training on %s", choice.name)
        chosen = batches(corpus, choice.ids, translation_flags.TRAIN_BATCH.value)
        translator.train(chosen, place)
        runs.write_json(place / "choice.json", choice.record(corpus))


def evaluate(directory: pathlib.Path, corpus: Corpus) -> None:
    """Measures retrieval of wrong references and BLEU, prints both, and writes results.json."""
    translator = load_translator(directory)
    vocabulary = translation_data.load_vocabulary(directory / "vocabulary.model")
    references = runs.read_json(directory / "held_out.json")["references"]
    trained = [directory / "run", *sorted((directory / "selected").glob("*"))]
    for place in trained:
        if (place / "training.json").exists() and not (place / "bleu.json").exists():
            translator.load(place)
            found = translator.translate(corpus.sources[corpus.splits["held_out"]], vocabulary)
            value, signature = bleu(found, references)
            logging.info("%s: BLEU %.2f", place.name, value)
            runs.write_json(place / "bleu.json", {"bleu": value, "signature": signature})
    results = translation_report.results(directory, corpus, translation_flags.ranks())
    layers = translation_flags.LAST_DECODER_LAYERS.value
    variables = {
        "all": translator.model.trainable_variables,
        "last": translation_model.last_decoder_variables(translator.model, layers),
    }
    settings: dict[str, Any] = {"versions": runs.versions(), "matmul_gflops": runs.matmul_gflops()}
    settings["num_parameters"] = {
        name: sum(int(np.prod(variable.shape)) for variable in some)
        for name, some in variables.items()
    }
    for stage in translation_flags.STAGES:
        if settings_file(directory, stage).exists():
            settings |= runs.read_json(settings_file(directory, stage))
    runs.write_json(directory / "results.json", {"settings": settings, **results})
    print(translation_report.format_results(results))
    print(directory / "results.json")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    directory = pathlib.Path(common_flags.OUTPUT_DIR.value or "runs/translation")
    asked = translation_flags.stages()
    if "prepare" in asked:
        claim(directory, "prepare")
        prepare(directory)
    corpus = load(directory)
    for name, stage in (
        ("train", train),
        ("score", score),
        ("select", select),
        ("evaluate", evaluate),
    ):
        if name in asked:
            claim(directory, name)
            stage(directory, corpus)


if __name__ == "__main__":
    app.run(main)
