import json
import math

import numpy as np
import pytest
import safetensors.numpy

import bert

IDS = np.array([[2, 5, 7, 3, 8, 9, 3], [2, 6, 3, 10, 3, 0, 0]])
SEGMENTS = np.array([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]])
MASK = np.array([[1] * 7, [1] * 5 + [0] * 2])


def _forward(tensors, ids, segments, mask):
    """Devlin et al. (2019), as PyTorch's tensors mean it: x W' + b, float64, one layer, 2 heads."""

    def dense(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * tensors[f"{name}.LayerNorm.weight"] + tensors[f"{name}.LayerNorm.bias"]

    def heads(x):
        return x.reshape(*x.shape[:2], 2, 4).transpose(0, 2, 1, 3)

    words, positions, kinds = (
        tensors[f"embeddings.{part}_embeddings.weight"]
        for part in ("word", "position", "token_type")
    )
    x = norm(words[ids] + positions[: ids.shape[1]] + kinds[segments], "embeddings")
    layer = "encoder.layer.0."
    q, k, v = (
        heads(dense(x, f"{layer}attention.self.{part}")) for part in ("query", "key", "value")
    )
    logits = q @ k.transpose(0, 1, 3, 2) / 2 + np.where(mask[:, None, None] == 1, 0, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    x = norm(x + dense(mixed, f"{layer}attention.output.dense"), f"{layer}attention.output")
    inner = dense(x, f"{layer}intermediate.dense")
    inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
    x = norm(x + dense(inner, f"{layer}output.dense"), f"{layer}output")
    return x, np.tanh(dense(x[:, 0], "pooler.dense"))


def test_a_loaded_bert_is_the_published_one(bert_directory):
    backbone = bert.load_backbone(bert_directory)
    found = backbone({"token_ids": IDS, "segment_ids": SEGMENTS, "padding_mask": MASK})
    tensors = safetensors.numpy.load_file(bert_directory / "model.safetensors")
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
    sequence, pooled = _forward(tensors, IDS, SEGMENTS, MASK)
    there = MASK == 1
    np.testing.assert_allclose(found["sequence_output"].numpy()[there], sequence[there], atol=2e-6)
    np.testing.assert_allclose(found["pooled_output"], pooled, atol=2e-6)


@pytest.fixture
def altered(bert_directory, tmp_path):
    """Copies the directory with some tensors and settings altered; None leaves one out."""

    def alter(tensors=(), config=()):
        changed = safetensors.numpy.load_file(bert_directory / "model.safetensors")
        changed = {k: v for k, v in {**changed, **dict(tensors)}.items() if v is not None}
        safetensors.numpy.save_file(changed, tmp_path / "model.safetensors")
        settings = json.loads((bert_directory / "config.json").read_text()) | dict(config)
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return tmp_path

    return alter


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"cls.bias": np.zeros(3)}, {}, r"Of no use: \['cls.bias'\]"),
        ({"pooler.dense.bias": None}, {}, r"Missing: \['pooler.dense.bias'\]"),
        # As many numbers, the wrong way round.
        ({"encoder.layer.0.output.dense.weight": np.zeros((16, 8))}, {}, r"shape \(16, 8\)"),
        ({"embeddings.position_ids": np.arange(16)[::-1].copy()}, {}, "count from 0 to 15"),
        ({}, {"hidden_act": "relu"}, "hidden_act='gelu'.* Received: 'relu'"),
        ({}, {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-12"),
        ({}, {"num_hidden_layers": 2}, "a BERT with 2 layers"),
    ],
)
def test_another_model_is_refused(altered, tensors, config, message):
    with pytest.raises(ValueError, match=message):
        bert.load_backbone(altered(tensors, config))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        bert.load_backbone(tmp_path)


def test_upper_case(altered, bert_directory):
    assert bert.is_lowercase(bert_directory)
    (altered() / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert not bert.is_lowercase(altered())


def test_last_layers():
    backbone = bert.small_backbone(10, 4)
    model = bert.classifier(backbone, 3, 0.1, 20)
    assert bert.last_layers(backbone, 0) is None
    chosen = bert.last_layers(backbone, 1)
    names = {v.path.split("/")[0] for v in model.trainable_variables if chosen(v)}
    assert names == {"transformer_layer_1", "label"}
    with pytest.raises(ValueError, match="has 2 layers, of which the last 3"):
        bert.last_layers(backbone, 3)


def test_classifier_compares_the_means_of_two_sentences(bert_directory):
    backbone = bert.load_backbone(bert_directory)
    model = bert.classifier(backbone, 3, 0.1, 20)
    inputs = {"token_ids": IDS, "segment_ids": SEGMENTS, "padding_mask": MASK}
    outputs = np.asarray(backbone(inputs)["sequence_output"])
    u, v = (
        np.stack(
            [
                row[(mask > 0) & (segments == segment)].mean(axis=0)
                for row, mask, segments in zip(outputs, MASK, SEGMENTS, strict=True)
            ]
        )
        for segment in (0, 1)
    )
    kernel, bias = (np.asarray(each) for each in model.get_layer("label").weights)
    expected = np.concatenate([u, v, abs(u - v), u * v], axis=1) @ kernel + bias
    np.testing.assert_allclose(model(inputs), expected, rtol=1e-5, atol=1e-6)


def test_classifier_warms_up_and_cools_down():
    model = bert.classifier(bert.small_backbone(10, 4), 3, 0.1, 20)
    rates = [float(model.optimizer._learning_rate(step)) for step in (0, 1, 2, 11, 20)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.0])
