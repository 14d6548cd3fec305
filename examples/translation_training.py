"""Trains the translation example's model, in runs that can be stopped and gone on with."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import sacrebleu
import sentencepiece
import tensorflow as tf
from numpy.typing import NDArray

import epochs
import keras_influence as ki
import runs
import translation_data
import translation_model
from translation_data import Batches

_RECORD = "training.json"
_DECODED_TOGETHER = 128


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
        learning_rate: The highest one, of Adam.
        updates: In all. The rate rises through the first tenth of them, and falls by a cosine to a
            tenth of itself.
        num_checkpoints: At even distances, the last at the end.
        seed: Of the weights and of the order of the pairs.
    """

    learning_rate: float
    updates: int
    num_checkpoints: int
    seed: int


class Translator:
    """A model, and what it takes to train it anew and to translate, compiled once for all runs."""

    def __init__(
        self, size: translation_model.Size, vocabulary_size: int, max_tokens: int, recipe: Recipe
    ):
        keras.utils.set_random_seed(recipe.seed)
        warmup = max(recipe.updates // 10, 1)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0,
            max(recipe.updates - warmup, 1),
            alpha=0.1,
            warmup_target=recipe.learning_rate,
            warmup_steps=warmup,
        )
        self.recipe = recipe
        self.model = translation_model.build(size, vocabulary_size, max_tokens)
        self.model.compile(
            optimizer=keras.optimizers.Adam(schedule, beta_2=0.98, clipnorm=1.0),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self._max_tokens = max_tokens
        self._decode = translation_model.greedy_decoder(self.model, max_tokens)
        self._variables = [*self.model.variables, *self.model.optimizer.variables]
        self._initial = [variable.numpy().copy() for variable in self._variables]

    def train(self, batches: Batches, directory: pathlib.Path) -> dict[str, Any]:
        """Trains a fresh model, or goes on with the run in `directory`; not if it is finished.

        Returns:
            The record of the run: seconds, updates made by this process, and checkpoints.
        """
        record = directory / _RECORD
        if record.exists():
            return runs.read_json(record)
        for variable, value in zip(self._variables, self._initial, strict=True):
            variable.assign(value)
        updates = self.recipe.updates // self.recipe.num_checkpoints

        def stream(epoch: int) -> tf.data.Dataset:
            part = batches.stream(self.recipe.seed, epoch * updates).take(updates)
            return part.apply(tf.data.experimental.assert_cardinality(updates))

        trained = epochs.train(self.model, stream, directory, self.recipe.num_checkpoints)
        found = {
            "num_pairs": len(batches.ids),
            "num_parameters": self.model.count_params(),
            "updates": updates * self.recipe.num_checkpoints,
            "updates_before": trained.resumed * updates,
            "train_seconds": trained.seconds,
        }
        runs.write_json(record, found)
        return found

    def load(self, directory: pathlib.Path) -> None:
        """Gives the model the weights that the finished run in `directory` ended with."""
        ki.checkpoints.load_weights(self.model, ki.checkpoints.list_checkpoints(directory)[-1])

    def translate(
        self, sources: NDArray[np.int32], vocabulary: sentencepiece.SentencePieceProcessor
    ) -> list[str]:
        """Greedy translations of token ids [N, max_tokens], in batches of like lengths.

        Every batch has one shape: the last one is filled with copies.
        """
        order = np.argsort(np.count_nonzero(sources, axis=1), kind="stable")
        found = np.zeros((len(sources), self._max_tokens), np.int32)
        for start in range(0, len(order), _DECODED_TOGETHER):
            rows = order[start : start + _DECODED_TOGETHER]
            filled = np.resize(rows, _DECODED_TOGETHER)
            found[rows] = self._decode(keras.ops.convert_to_tensor(sources[filled]))[: len(rows)]
        return translation_data.decode(vocabulary, found)


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU by sacrebleu, and the signature that says how it was computed."""
    metric = sacrebleu.metrics.BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return score.score, str(metric.get_signature())
