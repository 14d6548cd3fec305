"""Arrays in, numbers out: measures of whether an attribution is right. Knows no model."""

from keras_influence.evaluation.mislabeled import (
    MislabelRetrieval,
    MislabelRetrievalInterval,
    mislabel_retrieval,
    mislabel_retrieval_interval,
)

__all__ = [
    "MislabelRetrieval",
    "MislabelRetrievalInterval",
    "mislabel_retrieval",
    "mislabel_retrieval_interval",
]
