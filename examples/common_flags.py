"""Flags that the examples share. Only their `main` functions read them."""

from typing import Any

import tensorflow as tf
from absl import flags

import attribution
import image_data
import models

DATASET = flags.DEFINE_enum("dataset", "digits", image_data.NAMES, "Images to train on.")
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of tensorflow_datasets; what is absent is downloaded to it."
)
NUM_TRAIN = flags.DEFINE_integer(
    "num_train", 0, "Training examples to use, from the first; 0 for all.", lower_bound=0
)
CORRUPTION = flags.DEFINE_float(
    "corruption",
    0.1,
    "Share of the training labels to replace by another class.",
    lower_bound=0,
    upper_bound=1,
)
MODEL = flags.DEFINE_enum("model", "large_cnn", list(models.MODELS), "Model to train.")
EPOCHS = flags.DEFINE_integer("epochs", 20, "Passes over the training set.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples of a training step.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float(
    "learning_rate",
    0.02,
    "Rate of the optimizer: SGD with a momentum of 0.9 for images, Adam for text.",
    lower_bound=0,
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the replaced labels, the training run and the methods.", lower_bound=0
)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "New directory for the results; by default one under runs/."
)
RANK = flags.DEFINE_list(
    "rank", ["10", "50"], "Ranks of arnoldi and random_projection, separated by commas."
)
CHECKPOINTS = flags.DEFINE_list(
    "checkpoints",
    ["1", "10"],
    "Numbers of checkpoints that tracin sums over, separated by commas: evenly spaced, the last "
    "one included.",
)
SCORE_BATCH_SIZE = flags.DEFINE_integer(
    "score_batch_size", 256, "Examples that a method computes together.", lower_bound=1
)
NUM_ITERATIONS = flags.DEFINE_integer(
    "num_iterations", 0, "Hessian-vector products of arnoldi; 0 for twice the rank.", lower_bound=0
)
NUM_HESSIAN_EXAMPLES = flags.DEFINE_integer(
    "num_hessian_examples",
    0,
    "Training examples in arnoldi's Hessian, and ekfac's factors; 0 for all.",
    lower_bound=0,
)
LISSA_DEPTH = flags.DEFINE_integer("lissa_depth", 100, "Steps of lissa.", lower_bound=1)
LISSA_DAMPING = flags.DEFINE_float(
    "lissa_damping", 0.01, "Added to the eigenvalues of lissa's Hessian.", lower_bound=0
)
LISSA_SCALE = flags.DEFINE_float(
    "lissa_scale", None, "What lissa divides the Hessian by; by default as it measures."
)
LISSA_BATCH_SIZE = flags.DEFINE_integer(
    "lissa_batch_size", 32, "Examples of the Hessian in each step of lissa.", lower_bound=1
)
STRATEGY = flags.DEFINE_enum(
    "strategy",
    "none",
    ["none", "mirrored", "tpu"],
    "tf.distribute strategy of the model: mirrored for all GPUs of this machine.",
)
TPU = flags.DEFINE_string("tpu", None, "Name or address of the TPU of --strategy=tpu.")


def is_counts(values: list[str]) -> bool:
    """Whether these are the digits of distinct positive integers, and at least one."""
    whole = all(value.isdecimal() and int(value) > 0 for value in values)
    return bool(values) and whole and len(set(map(int, values))) == len(values)


for _holder in (RANK, CHECKPOINTS):
    flags.register_validator(_holder, is_counts, "must be distinct positive integers")


flags.register_multi_flags_validator(
    [STRATEGY, TPU],
    lambda values: (values["strategy"] == "tpu") == (values["tpu"] is not None),
    "--strategy=tpu and --tpu=NAME go together",
)


def make_strategy() -> tf.distribute.Strategy:
    """The strategy that --strategy asks for; TensorFlow's default one for none."""
    if STRATEGY.value == "mirrored":
        return tf.distribute.MirroredStrategy()
    if STRATEGY.value == "tpu":
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(TPU.value)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    return tf.distribute.get_strategy()


def method_settings() -> attribution.MethodSettings:
    """The settings of the methods that the flags ask for."""
    return attribution.MethodSettings(
        batch_size=SCORE_BATCH_SIZE.value,
        seed=SEED.value,
        num_iterations=NUM_ITERATIONS.value or None,
        num_hessian_examples=NUM_HESSIAN_EXAMPLES.value or None,
        lissa_depth=LISSA_DEPTH.value,
        lissa_damping=LISSA_DAMPING.value,
        lissa_scale=LISSA_SCALE.value,
        lissa_batch_size=LISSA_BATCH_SIZE.value,
    )


def counts(holder: flags.FlagHolder[list[str]]) -> list[int]:
    """The values of a list flag of numbers, smallest first."""
    return sorted(int(value) for value in holder.value)


def checkpoint_counts() -> list[int]:
    """The values of --checkpoints; by default no more than the run's epochs, one of each."""
    chosen = counts(CHECKPOINTS)
    if CHECKPOINTS.present:
        return chosen
    return sorted({min(count, EPOCHS.value) for count in chosen})


def as_settings(program: str) -> dict[str, Any]:
    """Every flag of a program and its value, for the record.

    Args:
        program: Name of the module whose key flags these are; `sys.argv[0]` for the main one.
    """
    settings = {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(program)}
    return settings | {RANK.name: counts(RANK), CHECKPOINTS.name: checkpoint_counts()}
