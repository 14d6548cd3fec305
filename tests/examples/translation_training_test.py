import numpy as np
import pytest

import translation_model
import translation_training
from translation_data import Batches, Corpus
from translation_training import Recipe, Translator


@pytest.fixture(scope="module")
def translator():
    # With dropout, so that its random state counts.
    size = translation_model.SIZES["tiny"]._replace(dropout=0.2)
    return Translator(size, 20, 6, Recipe(0.01, updates=6, num_checkpoints=3, seed=1))


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(0)
    tokens = random.integers(4, 20, (12, 6)).astype(np.int32)
    return Batches(Corpus(tokens, tokens, np.zeros(12, bool), {}), np.arange(12), [6], 4)


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(
    translator, batches, tmp_path, monkeypatch
):
    record = translator.train(batches, tmp_path / "whole")
    assert record["updates"] == 6 and record["updates_before"] == 0
    expected = translator.model.get_weights()

    class Stopped(Exception):
        pass

    def stop(self, epoch, logs=None):
        if epoch == 2:
            raise Stopped

    recorder = translation_training.ki.callbacks.TracInCheckpoint
    begin = recorder.on_epoch_begin
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(
            recorder,
            "on_epoch_begin",
            lambda self, epoch, logs=None: (stop(self, epoch), begin(self, epoch, logs)),
        )
        translator.train(batches, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "training.json").exists()
    record = translator.train(batches, tmp_path / "stopped")
    assert record["updates_before"] == 4
    for found, value in zip(translator.model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(found, value)

    # A finished run is not touched; its weights are there to load.
    translator.model.set_weights([np.zeros_like(value) for value in expected])
    assert translator.train(batches, tmp_path / "whole")["updates_before"] == 0
    assert not any(value.any() for value in translator.model.get_weights())
    translator.load(tmp_path / "whole")
    for found, value in zip(translator.model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(found, value)


def test_bleu_has_a_signature():
    sentences = ["the cat sat on the mat", "a dog"]
    value, signature = translation_training.bleu(sentences, sentences)
    assert value == pytest.approx(100) and "tok:13a" in signature
    assert translation_training.bleu(["x", "y"], sentences)[0] < 5
