"""The training examples of greatest influence, out of as many as there are. Knows no model."""

from keras_influence.retrieval.approximate import FaissFlat, FaissIVF
from keras_influence.retrieval.exact import BLOCK_ROWS, search
from keras_influence.retrieval.host import HostIndex
from keras_influence.retrieval.results import Influences, TopExamples, top_influences
from keras_influence.retrieval.searches import Encodings, ExactSearch, Search, recall, search_from

__all__ = [
    "BLOCK_ROWS",
    "Encodings",
    "ExactSearch",
    "FaissFlat",
    "FaissIVF",
    "HostIndex",
    "Influences",
    "Search",
    "TopExamples",
    "recall",
    "search",
    "search_from",
    "top_influences",
]
