"""Influences on predictions for sentence pairs, as JSON values and as text."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import keras_influence as ki
from sentence_pairs import Data


def describe(
    top: ki.Influences,
    ids: NDArray[np.int64],
    predicted: NDArray[np.int32],
    data: Data,
) -> list[dict[str, Any]]:
    """Each query and its influences, as JSON values and for `format_query`."""
    names = data.test.class_names
    queries = []
    for row, example in enumerate(ids):
        query: dict[str, Any] = {
            "test_id": int(example),
            "question": data.test.questions[example],
            "sentence": data.test.sentences[example],
            "true_label": names[data.test.labels[example]],
            "predicted_label": names[predicted[row]],
        }
        for kind, ranked in top._asdict().items():
            query[kind] = [
                {
                    "id": int(train_id),
                    "question": data.train.questions[train_id],
                    "sentence": data.train.sentences[train_id],
                    "label": names[data.train.labels[train_id]],
                    "is_mislabeled": bool(data.is_mislabeled[train_id]),
                    "score": float(value),
                }
                for train_id, value in zip(ranked.ids[row], ranked.scores[row], strict=True)
            ]
        queries.append(query)
    return queries


def format_query(query: dict[str, Any]) -> str:
    """A query of `describe` as text."""
    lines = [
        f"test pair #{query['test_id']}, predicted {query['predicted_label']}, in truth "
        f"{query['true_label']}: {query['question']} | {query['sentence']}"
    ]
    for kind in ("proponents", "opponents"):
        lines.append(f"  {kind} of the prediction:")
        for each in query[kind]:
            turned = ", a wrong label" if each["is_mislabeled"] else ""
            lines.append(
                f"    {each['score']:+.3g}  #{each['id']} {each['label']}{turned}: "
                f"{each['question']} | {each['sentence']}"
            )
    return "\n".join(lines)
