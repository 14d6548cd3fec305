"""Flags of the translation example, and their defaults, some of which depend on the noise."""

import pathlib
from typing import Any

from absl import flags

import common_flags
import text_flags
import translation_data
import translation_model
import translation_scoring

STAGES = ("prepare", "train", "score", "select", "evaluate")

# The sizes of what was published as Table 2 and Table 3 of which two seeds, side by side, take an
# hour and a quarter and two hours of two cores at 130 GFLOP/s each. In seconds of a core:
#
#   permuted: 4.7 M parameters, pairs of at most 16 tokens a side as a rule: .18 GFLOP forward, .70
#   to score at rank 20. Measured a pair: .0085 s in an update, .004 for a loss, .028 to project on
#   all layers and .009 on one, .013 for norms, .04 and .011 for a Hessian product. 3,000 updates of
#   64: 1,600 s. 40 products of 512 pairs, twice: 1,050 s. 16,000 pairs by two projections each,
#   norms at two checkpoints, and a loss: 1,700 s.
#
#   mixed: 1.5 M parameters, .06 GFLOP forward, .21 to score at rank 20. Measured a pair: .0037 s in
#   an update, .0023 for a loss, .01 to project, .016 for a Hessian product; 20 s for 2,000
#   translations. 3,000 updates: 700 s. 40 products of 512 pairs: 340 s. 50,000 pairs by a
#   projection and a loss: 650 s. 21 models of 1,000 updates: 4,900 s. 22 times 2,000 translations:
#   440 s.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "permuted": {
        "stage": ["prepare", "train", "score", "evaluate"],
        "noise_share": 0.06,
        "max_words": 10,
        "size": "small",
        "peak_rate": 1.5e-3,
        "num_scored": 16_000,
        "score_by": list(translation_scoring.METHODS),
    },
    "mixed": {
        "stage": list(STAGES),
        "noise_share": 0.3,
        "max_words": 10,
        "size": "mini",
        "peak_rate": 3e-3,
        "num_scored": 0,
        "score_by": ["arnoldi-all", "loss"],
    },
    "none": {
        "stage": ["prepare", "train", "score", "evaluate"],
        "noise_share": 0.0,
        "max_words": 0,
        "size": "small",
        "peak_rate": 1.5e-3,
        "num_scored": 0,
        "score_by": ["arnoldi-all"],
    },
}

_STAGE = flags.DEFINE_list(
    "stage",
    None,
    f"What to do, separated by commas, out of {', '.join(STAGES)}; by default all, but `select` "
    "with mixed noise only.",
)
NOISE = flags.DEFINE_enum(
    "noise",
    "permuted",
    translation_data.NOISES,
    "How references of training pairs are made wrong: permuted among pairs, or half of them so and "
    "half cut at the wrong place.",
)
_NOISE_SHARE = flags.DEFINE_float(
    "noise_share",
    None,
    "Share of the training pairs to make wrong; by default .06 of permuted and .3 of mixed noise.",
    lower_bound=0,
    upper_bound=1,
)
_MAX_WORDS = flags.DEFINE_integer(
    "max_words",
    None,
    "Words that a sentence of a pair may have, 0 for any number; by default 10 with noise, 0 "
    "without. Longer pairs are not read.",
    lower_bound=0,
)
MAX_PAIRS = flags.DEFINE_integer(
    "max_pairs", 200_000, "Pairs to read of wmt17_translate, from the first.", lower_bound=1
)
NUM_PAIRS = flags.DEFINE_integer(
    "num_pairs", 50_000, "Training pairs; 0 for all that are not held out.", lower_bound=0
)
NUM_HELD_OUT = flags.DEFINE_integer(
    "num_held_out", 2_000, "Pairs to translate, which are not trained on.", lower_bound=1
)
_BUCKETS = flags.DEFINE_list(
    "buckets",
    ["16", "24", "32", "48", "64"],
    "Lengths in tokens that pairs are padded to, separated by commas; what is longer is cut.",
)
_SIZE = flags.DEFINE_enum(
    "size",
    None,
    list(translation_model.SIZES),
    "Size of the model; base and big are published. By default mini with mixed noise, else small.",
)
UPDATES = flags.DEFINE_integer("updates", 3_000, "Steps of Adam.", lower_bound=1)
NUM_CHECKPOINTS = flags.DEFINE_integer(
    "num_checkpoints", 4, "Checkpoints of the run, at even distances.", lower_bound=1
)
TRAIN_BATCH = flags.DEFINE_integer("train_batch", 64, "Pairs of an update.", lower_bound=1)
_PEAK_RATE = flags.DEFINE_float(
    "peak_rate",
    None,
    "Highest rate of Adam; by default .003 with mixed noise, else .0015.",
    lower_bound=0,
)
SCORE_BATCH = flags.DEFINE_integer(
    "score_batch", 16, "Pairs that a method computes together.", lower_bound=1
)
SCORED = flags.DEFINE_enum(
    "scored", "train", ["train", "all"], "Pairs to score: those of training, or all of the file."
)
_NUM_SCORED = flags.DEFINE_integer(
    "num_scored",
    None,
    "Size of a random sample of these that is scored, 0 for all; by default 16,000 with permuted "
    "noise, else 0.",
    lower_bound=0,
)
_SCORE_BY = flags.DEFINE_list(
    "score_by",
    None,
    f"Methods out of {', '.join(translation_scoring.METHODS)}; -all or -last after arnoldi and "
    "random_projection for one choice of variables, all or those of the last decoder layers. By "
    "default all methods with permuted noise, arnoldi-all and loss with mixed, else arnoldi-all.",
)
_RANKS = flags.DEFINE_list(
    "ranks", ["10", "20"], "Ranks of arnoldi and random_projection, separated by commas."
)
LAST_DECODER_LAYERS = flags.DEFINE_integer(
    "last_decoder_layers", 1, "Decoder layers of the smaller choice of variables.", lower_bound=1
)
HESSIAN_PAIRS = flags.DEFINE_integer(
    "hessian_pairs", 512, "Training pairs in arnoldi's Hessian.", lower_bound=1
)
TRACIN_CHECKPOINTS = flags.DEFINE_integer(
    "tracin_checkpoints", 2, "Checkpoints that tracin sums over.", lower_bound=1
)
FORWARD_MODE_PAIRS = flags.DEFINE_integer(
    "forward_mode_pairs",
    0,
    "Pairs of the sample on which projections are timed beside forward mode of the whole network; "
    "0 for none.",
    lower_bound=0,
)
SELECT_BY = flags.DEFINE_list(
    "select_by",
    ["arnoldi-all-20-tokens", "loss_per_token", "random", "length_ratio"],
    "Scores that choose what is trained on afresh: names as the table of scores has them, random, "
    "or length_ratio.",
)
_KEPT = flags.DEFINE_list(
    "kept", ["0.01", "0.05", "0.1", "0.25", "0.5"], "Shares of the pairs to keep."
)
SELECT_UPDATES = flags.DEFINE_integer(
    "select_updates", 1_000, "Steps of Adam on each choice.", lower_bound=1
)


def _is_out_of(names: tuple[str, ...]) -> Any:
    return lambda values: values is None or (bool(values) and set(values) <= set(names))


for _holder, _names in ((_STAGE, STAGES), (_SCORE_BY, translation_scoring.NAMES)):
    flags.register_validator(_holder, _is_out_of(_names), f"must be out of {', '.join(_names)}")
for _holder in (_BUCKETS, _RANKS):
    flags.register_validator(_holder, common_flags.is_counts, "must be distinct positive integers")


def _value(holder: flags.FlagHolder) -> Any:
    """The value of a flag whose default depends on the noise."""
    return _DEFAULTS[NOISE.value][holder.name] if holder.value is None else holder.value


def stages() -> list[str]:
    return _value(_STAGE)


def noise_share() -> float:
    return _value(_NOISE_SHARE)


def max_words() -> int:
    return _value(_MAX_WORDS)


def size() -> str:
    return _value(_SIZE)


def peak_rate() -> float:
    return _value(_PEAK_RATE)


def num_scored() -> int:
    return _value(_NUM_SCORED)


def score_by() -> tuple[str, ...]:
    return tuple(_value(_SCORE_BY))


def buckets() -> list[int]:
    return common_flags.counts(_BUCKETS)


def ranks() -> tuple[int, ...]:
    return tuple(common_flags.counts(_RANKS))


def kept() -> list[float]:
    return sorted(map(float, _KEPT.value))


def settings() -> dict[str, dict[str, Any]]:
    """What each stage is done with, by the names of the flags."""
    file = text_flags.DATA.value
    source = pathlib.PurePath(file).name if file else "wmt17_translate/de-en"
    adam = {"train_batch": TRAIN_BATCH.value, "peak_rate": peak_rate()}
    model = {"seed": common_flags.SEED.value, "size": size(), "buckets": buckets()}
    return {
        "prepare": {
            "data": source,
            "max_pairs": None if file else MAX_PAIRS.value,
            "noise": NOISE.value,
            "noise_share": noise_share(),
            "num_pairs": NUM_PAIRS.value,
            "num_held_out": NUM_HELD_OUT.value,
            "max_words": max_words(),
            "num_pieces": text_flags.NUM_PIECES.value,
            "max_tokens": buckets()[-1],
            "seed": common_flags.SEED.value,
        },
        "train": {
            **model,
            **adam,
            "updates": UPDATES.value,
            "num_checkpoints": NUM_CHECKPOINTS.value,
        },
        "score": {
            **model,
            "score_batch": SCORE_BATCH.value,
            "scored": SCORED.value,
            "num_scored": num_scored(),
            "ranks": list(ranks()),
            "num_iterations": common_flags.NUM_ITERATIONS.value or 2 * ranks()[-1],
            "hessian_pairs": HESSIAN_PAIRS.value,
            "last_decoder_layers": LAST_DECODER_LAYERS.value,
            "tracin_checkpoints": TRACIN_CHECKPOINTS.value,
        },
        "select": {**model, **adam, "select_updates": SELECT_UPDATES.value},
        "evaluate": {**model},
    }
