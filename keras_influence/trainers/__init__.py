"""Seen by a training loop: retraining on subsets."""

from keras_influence.trainers.bank import RetrainingBank
from keras_influence.trainers.bank_directory import StoredBank
from keras_influence.trainers.callables import Patch, Retraining
from keras_influence.trainers.subsets import leave_group_out, leave_one_out, random_subsets

__all__ = [
    "Patch",
    "Retraining",
    "RetrainingBank",
    "StoredBank",
    "leave_group_out",
    "leave_one_out",
    "random_subsets",
]
