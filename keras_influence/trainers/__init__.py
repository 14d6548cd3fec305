"""Seen by a training loop: step-exact recording, and retraining on subsets."""

from keras_influence.trainers.bank import RetrainingBank
from keras_influence.trainers.bank_directory import StoredBank
from keras_influence.trainers.callables import Patch, Retraining
from keras_influence.trainers.influence_trainer import (
    InfluenceRecord,
    InfluenceTrainer,
    InfluenceTrainerMixin,
)
from keras_influence.trainers.subsets import (
    leave_fold_out,
    leave_group_out,
    leave_one_out,
    random_subsets,
)

__all__ = [
    "InfluenceRecord",
    "InfluenceTrainer",
    "InfluenceTrainerMixin",
    "Patch",
    "Retraining",
    "RetrainingBank",
    "StoredBank",
    "leave_fold_out",
    "leave_group_out",
    "leave_one_out",
    "random_subsets",
]
