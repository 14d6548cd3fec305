"""The step functions through the TPU's own compiler, on a machine that has none.

Flops are those of HLO: two for a multiplication and an addition. The counts beside which they are
held are of the products with weights and directions alone; what multiplies no weight (activations,
softmax, the loss) is what the tolerance is for.
"""

import pytest
import tensorflow as tf

from benchmarks import tpu_compile
from keras_influence.gradients import Contraction, projection_flops

# Of a v5e chip; libtpu itself refuses a program that takes more.
MEMORY = 16e9


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("stablehlo.add %0 : tensor<4x8xf32>", []),
        ("stablehlo.add %0 : tensor<?x8xf32>", ["tensor<?x8xf32>"]),
        ('"stablehlo.dynamic_reshape"(%0, %1)', ["stablehlo.dynamic_reshape"]),
        ("stablehlo.dynamic_slice %0 : tensor<4xf32>", []),  # A fixed size, a start that moves.
        ("stablehlo.custom_call @xla_python_cpu_callback(%0)", ["stablehlo.custom_call"]),
        ('"stablehlo.outfeed"(%0)', ["stablehlo.outfeed"]),
    ],
)
def test_what_a_tpu_cannot_do_is_found(text, found):
    assert tpu_compile.forbidden(text) == found


def test_a_dynamic_shape_is_found_in_a_program():
    lowered = tpu_compile.lower(lambda x: tf.boolean_mask(x, x > 0), tf.TensorSpec([4]))
    assert tpu_compile.forbidden(lowered.text) != []


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    return tpu_compile.make_environment(tmp_path_factory.mktemp("tpu") / "venv")


def _compiled(compiler, *steps):
    lowered = [step.lower() for step in steps]
    for step, each in zip(steps, lowered, strict=True):
        assert tpu_compile.forbidden(each.text) == [], step.name
    modules, chips = [each.module for each in lowered], [step.chips for step in steps]
    reports = tpu_compile.compile_modules(compiler, modules, chips)
    for step, report in zip(steps, reports, strict=True):
        memory = sum(report[f"{kind}_bytes"] for kind in ("argument", "output", "temp"))
        print(f"{step.name}: {report}")
        assert memory < MEMORY, step.name
        assert report["host_transfers"] == [], step.name
    return lowered, reports


def _check_flops(report, counted):
    assert counted <= report["flops"] < 1.03 * counted


@pytest.mark.slow
def test_large_cnn_compiles_for_a_tpu(compiler):
    maps, batch, size = tpu_compile.problem("large_cnn")
    assert size == 256
    steps = [
        tpu_compile.curvature(maps, batch),
        tpu_compile.project(maps, batch, 32),
        tpu_compile.orthogonalization(793_894, 200),
        tpu_compile.curvature_loop(maps, batch, 8),
        tpu_compile.sharded_orthogonalization(793_894, 200),
    ]
    lowered, reports = _compiled(compiler, *steps)
    # Of one example, each layer once: positions x window x filters, or inputs x outputs.
    first = 2 * 26 * 26 * (9 * 1) * 32
    second = 2 * 24 * 24 * (9 * 32) * 64
    third = 2 * 9216 * 84
    fourth = 2 * 84 * 10
    # With a' and d' what enters and comes back along v, and d the losses' gradient by a layer's
    # linear output: W a, V a and W a'; W'd, V'd and W'd'; and for the gradient d' a and d a'. Below
    # the first layer nothing is asked for, and there is no a': W a, V a and d' a are left. And W'd
    # of the second layer is asked for by no product of the first.
    _check_flops(reports[0], 256 * (3 * first + 7 * second + 8 * third + 8 * fourth))
    # Once forwards, and once back to the first layer; each gradient of a convolution formed, and
    # multiplied with 32 directions; of a dense layer, with one position, through the directions.
    formed = first + second + 2 * 32 * (9 * 32 + 9 * 32 * 64)
    through = 32 * (third + fourth)
    once = 2 * (first + second + third + fourth) - first
    _check_flops(reports[1], 256 * (once + formed + through))
    # Four products of [200, p] and a vector.
    assert reports[2]["flops"] == pytest.approx(4 * 2 * 200 * 793_894, rel=1e-3)
    # Arguments: the weights, p float32, and here beside them v, p more, and a batch.
    examples = 256 * (28 * 28 * 4 + 4)
    assert reports[0]["argument_bytes"] == pytest.approx(2 * 4 * 793_894 + examples, rel=0.05)
    assert reports[2]["argument_bytes"] == pytest.approx(4 * 201 * 793_894, rel=0.01)
    # The loop is on the chip: its body is counted once, and eight batches come with its weights.
    assert "stablehlo.while" in lowered[3].text
    _check_flops(reports[3], reports[0]["flops"])
    expected = 2 * 4 * 793_894 + 8 * examples
    assert reports[3]["argument_bytes"] == pytest.approx(expected, rel=0.05)
    # A quarter of the columns on each of four chips, and a sum over them in each of two passes.
    columns = 198_474
    assert (reports[4]["chips"], reports[4]["all_reduces"]) == (4, 2)
    assert reports[4]["flops"] == pytest.approx(4 * 2 * 200 * columns, rel=1e-3)
    assert reports[4]["argument_bytes"] == pytest.approx(4 * 201 * columns, rel=0.01)


@pytest.mark.slow
def test_the_transformer_compiles_for_a_tpu(compiler):
    maps, batch, size = tpu_compile.problem("transformer")
    assert size == 64
    steps = [
        tpu_compile.curvature(maps, batch),
        tpu_compile.project(maps, batch, 32),
        tpu_compile.orthogonalization(9_854_784, 200),
    ]
    _, reports = _compiled(compiler, *steps)
    # 32 tokens; 6 attentions of 4 square kernels, 4 pairs of 256 x 1024, and 256 x 8000.
    kernels = 6 * 4 * 256**2 + 4 * 2 * 256 * 1024 + 256 * 8000
    weights = 2 * 32 * kernels
    # In each attention, queries by keys and the shares by values.
    attention = 6 * 2 * (2 * 32 * 32 * 256)
    # A product of two inner results is differentiated by both: once forwards, twice back; along v
    # twice, and four times.
    _check_flops(reports[0], 64 * (8 * weights + 9 * attention))
    # Forwards and back; gradients formed; and multiplied with 32 directions.
    assert projection_flops(maps, batch, 32)["forward_pass"] == weights
    _check_flops(reports[1], 64 * (3 * weights + 3 * attention + 2 * 32 * kernels))
    assert reports[2]["flops"] == pytest.approx(4 * 2 * 200 * 9_854_784, rel=1e-3)


@pytest.mark.slow
def test_blocks_of_examples_compile_for_a_tpu_and_keep_to_their_budget(compiler):
    steps = []
    for contraction in (tpu_compile.ONE_BLOCK, Contraction()):
        maps, batch, _ = tpu_compile.problem("large_cnn", contraction)
        steps.append(tpu_compile.project(maps, batch, 32))
    (whole, parts), reports = _compiled(compiler, *steps)
    assert "stablehlo.while" not in whole.text
    assert "stablehlo.while" in parts.text
    # What a block holds comes on top of what all examples hold, at the most.
    assert reports[1]["temp_bytes"] < reports[0]["temp_bytes"] + Contraction().budget


def test_orthogonalisation_leaves_no_product_to_the_unit_that_rounds():
    step = tpu_compile.orthogonalization(1_000, 10)
    text = step.lower().text
    assert "stablehlo.dot" not in text
    assert text.count("stablehlo.reduce") >= 4


def test_a_shard_sums_over_the_chips_and_a_loop_stays_on_them():
    text = tpu_compile.sharded_orthogonalization(1_000, 10, chips=4).lower().text
    assert text.count("stablehlo.all_reduce") == 2
    assert "tensor<10x250xf32>" in text
    maps, batch, _ = tpu_compile.problem("large_cnn", batch_size=2)
    lowered = tpu_compile.curvature_loop(maps, batch, 3).lower()
    assert tpu_compile.forbidden(lowered.text) == []
    assert lowered.text.count("stablehlo.while") == 1
    assert "mhlo.copy" not in lowered.text


def test_without_the_compiler_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_compile, "PACKAGES", ("keras-influence-has-no-such-package==0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"pip cannot install them in .* name a mirror"):
        tpu_compile.make_environment(tmp_path / "venv")
