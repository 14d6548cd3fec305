"""Arrays in, numbers out: measures of whether an attribution is right. Knows no model."""

from keras_influence.evaluation.datamodeling import (
    LinearDatamodelingScore,
    linear_datamodeling_score,
    predicted_outputs,
)
from keras_influence.evaluation.mislabeled import (
    MislabelRetrieval,
    MislabelRetrievalInterval,
    mislabel_retrieval,
    mislabel_retrieval_interval,
)

__all__ = [
    "LinearDatamodelingScore",
    "MislabelRetrieval",
    "MislabelRetrievalInterval",
    "linear_datamodeling_score",
    "mislabel_retrieval",
    "mislabel_retrieval_interval",
    "predicted_outputs",
]
