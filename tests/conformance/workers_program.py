"""What goes on after a kill in directories of the first of two workers, in a process of its own.

The arguments are one JSON object; see `main`.
"""

import json
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_influence as ki
from keras_influence import indexing
from keras_influence.methods import means, scoring
from tests import cases
from tests.conformance.strategies_program import NUM_TRAIN, die_at

# 163 parameters of four bytes: two queries at a time.
TWO_ROWS = 2 * 163 * 4


def results(strategy, directory, disk):
    """What each kind of directory leads to, by name.

    Args:
        strategy: of the model.
        directory: of files that the first worker alone may write.
        disk: directory of a basis that each has on its own disk.
    """
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = cases.image_model()
    train, queries, more = cases.images(NUM_TRAIN), cases.images(3, seed=5), cases.images(7, seed=6)
    kwargs = {"batch_size": 6, "direction_bytes": TWO_ROWS, "verbose": 0}
    found = {}
    kronecker = ki.EKFAC(model, **kwargs).fit(train, directory / "factors")
    found["kronecker: self-influence"] = kronecker.self_influence(train)
    again = ki.EKFAC(model, **kwargs).fit(train, directory / "factors")
    np.testing.assert_array_equal(again.self_influence(train), found["kronecker: self-influence"])
    dot = ki.GradientDot(model, **kwargs).fit(train)
    found["self-influence"] = dot.self_influence(train, directory / "self-influence")
    for name, place in (("memory", directory / "fit"), ("disk", disk)):
        basis = "host" if name == "memory" else place
        arnoldi = ki.Arnoldi(model, 3, 8, basis=basis, **kwargs).fit(train, place)
        found[f"eigenvalues, {name}"] = arnoldi.eigenbasis.values
        found[f"eigenvectors, {name}"] = arnoldi.eigenbasis.vectors[:]
        # When all is done, it is read.
        again = ki.Arnoldi(model, 3, 8, basis=basis, **kwargs).fit(train, place)
        np.testing.assert_array_equal(again.eigenbasis.vectors[:], arnoldi.eigenbasis.vectors[:])
    lissa = ki.LiSSA(model, 3, 0.1, 20.0, **kwargs).fit(train)
    found["scores"] = lissa.scores(queries, train, directory / "scores")
    projection = ki.RandomProjection(model, 4, **kwargs).fit(train)
    scorer = ki.InfluenceScorer(projection, k=3).index(train, directory / "index")
    scorer.append(more).remove([4, 11])
    top = scorer(queries)
    found["index"] = scorer.encodings
    found["ids"] = scorer.ids
    found["proponents"], found["opponents"] = (each.scores.numpy() for each in top)
    return found


def main(output, files, disk, dies_at=None):
    """Writes arrays to `output`.

    Args:
        files, disk: see `results`.
        dies_at: see `die_at`.
    """
    scoring._PART_BATCHES = 2
    means._BATCHES, means._SECONDS = 1, 0.0
    indexing._PART_ROWS = 6
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if dies_at is not None:
        die_at(dies_at)
    np.savez(output, **results(strategy, pathlib.Path(files), pathlib.Path(disk)))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
