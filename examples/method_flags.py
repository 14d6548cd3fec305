"""Flags of what is asked of the methods, each of which some of the examples have."""

from absl import flags

import attribution

METHODS = flags.DEFINE_list(
    "methods",
    ["arnoldi", "ekfac", "random_projection", "tracin", "gradient_dot"],
    f"Methods to compare, separated by commas, out of {', '.join(attribution.METHODS)}.",
)
METHOD = flags.DEFINE_enum("method", "arnoldi", attribution.METHODS, "Attribution method.")
K = flags.DEFINE_integer("k", 5, "Proponents, and opponents, of each query.", lower_bound=1)
NUM_QUERIES = flags.DEFINE_integer(
    "num_queries",
    6,
    "How many queries to explain where none are given: of a test set the first misclassified ones "
    "as far as half.",
    lower_bound=1,
)
flags.register_validator(
    METHODS,
    lambda names: bool(names) and set(names) <= set(attribution.METHODS),
    f"must be out of {', '.join(attribution.METHODS)}",
)
