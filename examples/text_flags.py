"""Flags that the examples on text share. Only their `main` functions read them."""

from absl import flags

DATA = flags.DEFINE_string("data", None, "File of the examples; what it holds, the program says.")
NUM_PIECES = flags.DEFINE_integer(
    "num_pieces", 4_000, "Pieces of a vocabulary that is learnt from the text.", lower_bound=100
)
