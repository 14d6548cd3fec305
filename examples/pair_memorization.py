"""How far a BERT has its training pairs by heart: it is trained again without each of them."""

import dataclasses
import os
from typing import NamedTuple

import keras
import numpy as np
import scipy.special
from numpy.typing import NDArray

import bert
import keras_influence as ki
import sentence_pairs
from mislabel_report import Suspicion
from sentence_pairs import Tokens


class Recipe(NamedTuple):
    """How `text_classification` trains; see its flags.

    Attributes:
        vocabulary_size: Of the tokenizer, for a BERT without weights.
    """

    weights: str | None
    vocabulary_size: int
    num_classes: int
    learning_rate: float
    buckets: tuple[int, ...]
    batch_size: int
    epochs: int

    def num_steps(self, lengths: NDArray[np.int64]) -> int:
        """Of a training on pairs of these lengths."""
        batches = sentence_pairs.in_order(lengths, self.buckets, self.batch_size)
        return self.epochs * len(batches)


# Objects, and not closures, so that other processes can import what they are.
@dataclasses.dataclass(frozen=True)
class MakeModel:
    recipe: Recipe
    num_steps: int

    def __call__(self) -> keras.Model:
        recipe = self.recipe
        backbone = bert.make_backbone(recipe.weights, recipe.vocabulary_size, recipe.buckets[-1])
        return bert.classifier(backbone, recipe.num_classes, recipe.learning_rate, self.num_steps)


@dataclasses.dataclass(frozen=True)
class Train:
    recipe: Recipe

    def __call__(self, model: keras.Model, examples: ki.data.Examples) -> None:
        recipe, tokens = self.recipe, unpadded(examples)
        # The bank seeds NumPy for each of its runs.
        seed = int(np.random.randint(2**31))
        chosen = [
            rows
            for epoch in range(recipe.epochs)
            for rows in sentence_pairs.shuffled(
                tokens.lengths, recipe.buckets, recipe.batch_size, (seed, epoch)
            )
        ]
        dataset = sentence_pairs.batches(tokens, recipe.buckets, chosen)
        model.fit(ki.data.untuned(dataset), shuffle=False, verbose=0)


def padded(tokens: Tokens, length: int) -> tuple[dict[str, NDArray[np.int32]], NDArray[np.int32]]:
    """Pairs as arrays: a BERT's inputs, each `[N, length]`, and the labels."""
    everything = sentence_pairs.batches(tokens, [length], [np.arange(len(tokens.labels))])
    ((inputs, labels),) = everything.as_numpy_iterator()
    return inputs, labels


def unpadded(examples: ki.data.Examples) -> Tokens:
    """The pairs that `padded` was given."""
    inputs, labels = examples.arrays
    lengths = inputs["padding_mask"].sum(axis=1)
    token_ids, segment_ids = (
        [row[:length] for row, length in zip(inputs[name], lengths, strict=True)]
        for name in ("token_ids", "segment_ids")
    )
    return Tokens(token_ids, segment_ids, labels)


def measure(
    directory: str | os.PathLike,
    tokens: Tokens,
    recipe: Recipe,
    folds: int,
    repeats: int,
    seed: int,
    processes: int,
) -> list[Suspicion]:
    """Memorization of each pair's given label, its loss in the models without it, and in all.

    The pairs are split into folds, `repeats` times, and a model is trained without each fold.
    Memorization is how much less likely a label is without its pair (Feldman and Zhang 2020, eq. 1,
    with the probability in place of whether the most likely label is right).

    Args:
        directory: Of the `RetrainingBank`, new or the same again; a bank that was killed goes on.
        tokens: The training pairs with their given labels.
        recipe: How each model is trained.
        folds: Of each split.
        repeats: Splits, two at least: as many models are trained without each pair.
        seed: Of the splits and the trainings.
        processes: That train at once.
    """
    masks = ki.trainers.leave_fold_out(len(tokens.labels), folds, repeats, seed)
    # Folds differ in lengths, and so by a step or two.
    num_steps = max(recipe.num_steps(tokens.lengths[mask]) for mask in masks)
    bank = ki.trainers.RetrainingBank(
        directory,
        MakeModel(recipe, num_steps),
        padded(tokens, recipe.buckets[-1]),
        masks,
        train_fn=Train(recipe),
        seed=seed,
        measurements=("loss", "margin"),
    ).run(processes=processes)
    # A margin is log p - log(1 - p), and its loss the negative: this is 1 - p.
    errors = scipy.special.expit(bank.losses("margin", on="train"))
    losses = bank.losses(on="train")
    ids, seconds = np.arange(len(tokens.labels)), bank.seconds()
    return [
        Suspicion(name, values.astype(np.float32), ids, fit_seconds=seconds)
        for name, values in (
            ("memorization", ki.Memorization.of_training(masks, errors).values),
            ("held_out_loss", ki.Memorization.of_training(masks, losses).without),
            ("mean_loss", losses.mean(axis=0)),
        )
    ]
