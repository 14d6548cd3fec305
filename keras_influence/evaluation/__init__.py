"""Arrays in, numbers out: measures of whether an attribution is right. Knows no model."""

from keras_influence.evaluation.datamodeling import (
    LinearDatamodelingScore,
    linear_datamodeling_score,
    predicted_outputs,
)
from keras_influence.evaluation.leave_one_out import LeaveOneOut, leave_one_out
from keras_influence.evaluation.mislabeled import (
    MislabelRetrieval,
    MislabelRetrievalInterval,
    mislabel_retrieval,
    mislabel_retrieval_interval,
)
from keras_influence.evaluation.removal import (
    Brittleness,
    Counterfactual,
    RemovalCurve,
    brittleness,
    counterfactual,
    removal_curve,
)
from keras_influence.evaluation.sanity import (
    ClassAgreement,
    DuplicateQuery,
    RandomizedWeights,
    class_agreement,
    duplicate_query,
    randomized_weights,
)
from keras_influence.evaluation.tail_patch import TailPatch, tail_patch

__all__ = [
    "Brittleness",
    "ClassAgreement",
    "Counterfactual",
    "DuplicateQuery",
    "LeaveOneOut",
    "LinearDatamodelingScore",
    "MislabelRetrieval",
    "MislabelRetrievalInterval",
    "RandomizedWeights",
    "RemovalCurve",
    "TailPatch",
    "brittleness",
    "class_agreement",
    "counterfactual",
    "duplicate_query",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_retrieval",
    "mislabel_retrieval_interval",
    "predicted_outputs",
    "randomized_weights",
    "removal_curve",
    "tail_patch",
]
