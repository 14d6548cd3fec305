"""Flags of the examples that retrain."""

from absl import flags

BANK = flags.DEFINE_string(
    "bank", None, "Directory that keeps the retrainings; by default one among the results."
)
PROCESSES = flags.DEFINE_integer("processes", 1, "Processes that retrain.", lower_bound=1)
