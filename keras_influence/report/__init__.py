"""Figures of influences, as matplotlib objects that the caller saves."""

from keras_influence.report.figures import image_sheet, influence_sheet, retrieval_curves

__all__ = ["image_sheet", "influence_sheet", "retrieval_curves"]
