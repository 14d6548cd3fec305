"""Callbacks for `model.fit`."""

from keras_influence.callbacks.tracin_checkpoint import CheckpointReport, TracInCheckpoint

__all__ = ["CheckpointReport", "TracInCheckpoint"]
