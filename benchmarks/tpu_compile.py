"""The step functions, compiled for a TPU by its own compiler, on a machine that has none.

    python benchmarks/tpu_compile.py

Each is lowered to StableHLO by `tf.function(jit_compile=True)` for the CPU (TensorFlow's wheels
lower for no TPU), checked for what a TPU cannot do well (dynamic shapes, calls of the host), and
compiled for one chip of a v5e 2x2, or for its four together, by `libtpu`, in a virtual environment
of its own with `jax`, which calls it. What the compiler reports (flops, bytes, memory) is of the
program that each chip would run; nothing is run. Flops are those of HLO: a multiplication and an
addition are two, whatever the precision, and a loop's body is counted once, so the projections here
are lowered in one block of examples, and `curvature_loop` counts one batch of several. The
translation model's curvature and projection took five and six minutes to compile. Writes
benchmarks/results/tpu-compile-MODEL.json.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from absl import app, flags
from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_all_reduce

from keras_influence.gradients import Contraction, LossMaps, projection_flops
from keras_influence.linalg.device import gram_schmidt, orthogonalize
from keras_influence.steps import summed

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path += [str(ROOT), str(ROOT / "examples")]

import models  # noqa: E402
import runs  # noqa: E402
from benchmarks import projection  # noqa: E402

TOPOLOGY = "v5e:2x2"
NUM_CHIPS = 4
# One version each: what the compiler reports is what this one makes of a program.
PACKAGES = ("jax==0.10.2", "libtpu==0.0.52")
# All examples of a batch in one block, for a loop's body is counted once.
ONE_BLOCK = Contraction(budget=2.0**33)
RANK = 32
# Rows of the basis: Arnoldi's 200 products.
BASIS = 200
# Batches of a loop on the chip.
LOOP = 8
BATCH_SIZES = {"large_cnn": 256, "transformer": 64, "translation": 16}
# The transformer at the size of the paper's translation model: 299,408,448 parameters.
TRANSLATION = {
    "num_tokens": 64,
    "vocabulary": 40_000,
    "width": 1_024,
    "num_layers": 6,
    "num_heads": 16,
    "feed_forward": 4_096,
}
# Of the translation model, ten directions and sixteen examples' gradients in one block take more
# than a chip's memory.
TRANSLATION_RANK, TRANSLATION_EXAMPLES = 4, 4
# For which the flops of a projection are counted beside what is compiled.
RANKS = (10, 32, 100)

# What has no fixed shape, and what waits for the host.
_FORBIDDEN = re.compile(
    r"tensor<[^>]*\?[^>]*>"
    r"|stablehlo\.(?:dynamic_(?:broadcast_in_dim|conv|gather|iota|pad|reshape)|real_dynamic_slice"
    r"|get_dimension_size|set_dimension_size|infeed|outfeed|send|recv|custom_call)\b"
)

_COPY = re.compile(r"mhlo\.copy (%\S+) : (tensor<[^>]*>)")


class Lowered(NamedTuple):
    """A step function in StableHLO.

    Attributes:
        text: to be read.
        module: serialized, or as text, for the compiler.
    """

    text: str
    module: bytes


def specification(tensor: Any) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def lower(function: Callable[..., Any], *arguments: Any) -> Lowered:
    """`function` of tensors, or of what only says what they would be, as one program of a TPU.

    Args:
        function: of nests of tensors.
        *arguments: nests of tensors or of `tf.TensorSpec`s.
    """

    def of_leaves(*leaves: tf.Tensor) -> Any:
        return function(*tf.nest.pack_sequence_as(arguments, leaves))

    leaves = [specification(leaf) for leaf in tf.nest.flatten(arguments)]
    compiled = tf.function(of_leaves, autograph=False, jit_compile=True)
    stage = compiled.experimental_get_compiler_ir(*leaves)
    text = stage(stage="stablehlo")
    if not _COPY.search(text):
        return Lowered(text, stage(stage="stablehlo_serialized"))
    # A loop hands on the weights by an operation that StableHLO has none of: here, by one that
    # changes nothing.
    text = _COPY.sub(r"stablehlo.reshape \1 : (\2) -> \2", text)
    return Lowered(text, text.encode())


def forbidden(text: str) -> list[str]:
    """The dynamic shapes and the calls of the host in a StableHLO text, each once."""
    return sorted({match.group() for match in _FORBIDDEN.finditer(text)})


def prepared(maps: LossMaps, batch: Any, rank: int) -> Any:
    """What `maps.prepare` makes of `rank` directions: its shapes alone."""
    coverage = maps.coverage(batch)
    directions = tf.TensorSpec([rank, maps.parameters.size], maps.parameters.dtype)
    traced = tf.function(lambda rows: maps.lay_out(rows, coverage), autograph=False)
    outputs = traced.get_concrete_function(directions).structured_outputs
    return tf.nest.map_structure(specification, outputs)


class Step(NamedTuple):
    """A step function, and what it is given.

    Attributes:
        name: `"curvature"`, `"curvature_loop"`, `"project"`, `"squared_norms"`, `"orthogonalize"`
            or `"orthogonalize_shard"`.
        rank: of the directions, rows of the basis, or batches of a loop; None where there are none.
        batch_size: examples; None where there are none.
        chips: that run it together.
    """

    name: str
    rank: int | None
    batch_size: int | None
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    chips: int = 1

    def describe(self) -> dict[str, Any]:
        return {"step": self.name, "rank": self.rank, "batch_size": self.batch_size}

    def lower(self) -> Lowered:
        return lower(self.function, *self.arguments)


def curvature(maps: LossMaps, batch: Any) -> Step:
    size = tf.nest.flatten(batch)[0].shape[0]
    vector = tf.TensorSpec([maps.parameters.size], maps.parameters.dtype)
    weights = tf.TensorSpec([size], tf.float32)
    return Step("curvature", None, size, maps.curvature, (batch, vector, weights))


def curvature_loop(maps: LossMaps, batch: Any, num_batches: int) -> Step:
    """The product over so many batches, with the loop over them on the chip."""
    size = tf.nest.flatten(batch)[0].shape[0]
    stack = tf.nest.map_structure(
        lambda leaf: tf.TensorSpec([num_batches, *leaf.shape], leaf.dtype), batch
    )
    vector = tf.TensorSpec([maps.parameters.size], maps.parameters.dtype)
    weights = tf.TensorSpec([num_batches, size], tf.float32)
    arguments = (stack, tf.TensorSpec([], tf.int32), vector, weights)
    return Step("curvature_loop", num_batches, size, summed(maps.curvature), arguments)


def project(maps: LossMaps, batch: Any, rank: int) -> Step:
    size = tf.nest.flatten(batch)[0].shape[0]
    return Step("project", rank, size, maps.project, (batch, prepared(maps, batch, rank)))


def squared_norms(maps: LossMaps, batch: Any) -> Step:
    size = tf.nest.flatten(batch)[0].shape[0]
    return Step("squared_norms", None, size, maps.squared_norms, (batch,))


def orthogonalization(num_parameters: int, rows: int) -> Step:
    basis = tf.TensorSpec([rows, num_parameters], tf.float32)
    vector = tf.TensorSpec([num_parameters], tf.float32)
    return Step("orthogonalize", rows, None, orthogonalize, (basis, vector))


def sharded_orthogonalization(num_parameters: int, rows: int, chips: int = NUM_CHIPS) -> Step:
    """The same with a share of the columns on each chip, as `DeviceBasis` has them."""
    width = -(-num_parameters // chips)
    basis = tf.TensorSpec([rows, width], tf.float32)
    vector = tf.TensorSpec([width], tf.float32)

    def of_all_chips(value: tf.Tensor) -> tf.Tensor:
        # What a TPUStrategy's sum becomes; TensorFlow's own operation is for TPUs alone.
        return xla_all_reduce(
            input=value,
            group_assignment=tf.constant([list(range(chips))]),
            reduce_op="Add",
            mode="CrossReplica",
        )

    def step(basis: tf.Tensor, vector: tf.Tensor) -> Any:
        return gram_schmidt(basis, vector, of_all_chips)

    return Step("orthogonalize_shard", rows, None, step, (basis, vector), chips)


def make_environment(directory: pathlib.Path) -> pathlib.Path:
    """A virtual environment with the TPU's compiler: the path of its interpreter.

    Raises:
        RuntimeError: pip cannot install the compiler.
    """
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run(
        [*install, *PACKAGES], env=_environment(), capture_output=True, text=True
    )
    if installed.returncode:
        raise RuntimeError(
            f"The TPU's compiler is the packages {PACKAGES}, and pip cannot install them in "
            f"{directory}. Without a network, have pip's own settings name a mirror that has "
            f"them. pip says:\n{installed.stderr}"
        )
    return python


def _environment() -> dict[str, str]:
    """That of this process without what would lead another interpreter to its packages."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    # So that libtpu does not ask the host's network what hardware it stands on.
    chip = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    # And so that two of these may run at once: nothing is loaded on a chip.
    chip["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    return {**kept, **chip, "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3"}


def compile_modules(
    python: pathlib.Path,
    modules: Sequence[bytes],
    chips: Sequence[int],
    topology: str = TOPOLOGY,
) -> list[dict[str, Any]]:
    """What the compiler reports of each module; see `tpu_compiler.compile_module`.

    Args:
        python: of `make_environment`.
        modules: of `Lowered`.
        chips: that run each of them.

    Raises:
        RuntimeError: the compiler refuses a module, or does not start.
    """
    program = ROOT / "benchmarks" / "tpu_compiler.py"
    with tempfile.TemporaryDirectory() as directory:
        paths = [pathlib.Path(directory) / f"{number}.stablehlo" for number in range(len(modules))]
        for path, module in zip(paths, modules, strict=True):
            path.write_bytes(module)
        arguments = [f"{path}:{count}" for path, count in zip(paths, chips, strict=True)]
        finished = subprocess.run(
            [str(python), str(program), topology, *arguments],
            env=_environment(),
            capture_output=True,
            text=True,
        )
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    if finished.returncode or len(rows) != len(modules):
        raise RuntimeError(
            f"The TPU's compiler took {len(rows)} of {len(modules)} modules and ended with code "
            f"{finished.returncode}:\n{finished.stderr[-4000:]}"
        )
    return rows


def problem(
    name: str, contraction: Contraction = ONE_BLOCK, batch_size: int | None = None
) -> projection.Problem:
    """A model of `BATCH_SIZES`, and a batch of random examples."""
    batch_size = batch_size or BATCH_SIZES[name]
    if name != "translation":
        return projection.problem(name, batch_size, contraction)
    keras.utils.set_random_seed(projection.SEED)
    return projection.token_problem(models.transformer(**TRANSLATION), batch_size, contraction)


def steps(name: str) -> Iterator[Step]:
    """The steps of a model of `BATCH_SIZES` that are compiled."""
    maps, batch, _ = problem(name)
    yield curvature(maps, batch)
    yield curvature_loop(maps, batch, LOOP)
    if name == "translation":
        maps, batch, _ = problem(name, batch_size=TRANSLATION_EXAMPLES)
        yield project(maps, batch, TRANSLATION_RANK)
        return
    yield project(maps, batch, RANK)
    yield squared_norms(maps, batch)
    yield orthogonalization(maps.parameters.size, BASIS)
    yield sharded_orthogonalization(maps.parameters.size, BASIS)


def describe(name: str) -> dict[str, Any]:
    """What stands beside the compiler's reports of a model."""
    given = problem(name, batch_size=1)
    return {
        "settings": {"topology": TOPOLOGY, "versions": runs.versions()},
        "model": name,
        "num_parameters": given.maps.parameters.size,
        "num_tokens": None if name == "large_cnn" else given.maps.model.output_shape[1],
        "required_flops": {rank: projection_flops(given.maps, given.batch, rank) for rank in RANKS},
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are taken. Received: {argv[1:]}.")
    options = flags.FLAGS
    with tempfile.TemporaryDirectory() as directory:
        python = make_environment(pathlib.Path(options.environment or directory))
        for name in options.models:
            result = {**describe(name), "rows": []}
            for step in steps(name):
                lowered = step.lower()
                found = forbidden(lowered.text)
                if found:
                    raise RuntimeError(f"{step.name} of {name} holds {found}.")
                (report,) = compile_modules(python, [lowered.module], [step.chips])
                result["rows"].append({**step.describe(), **report})
                print(json.dumps(result["rows"][-1]), flush=True)
            runs.write_json(pathlib.Path(options.output_dir) / f"tpu-compile-{name}.json", result)
            keras.backend.clear_session()


if __name__ == "__main__":
    flags.DEFINE_list("models", list(BATCH_SIZES), "What to compile.")
    flags.DEFINE_string(
        "environment", None, "Directory of the compiler's virtual environment; a new one if unset."
    )
    flags.DEFINE_string("output_dir", str(RESULTS), "Directory of the files, one a model.")
    app.run(main)
