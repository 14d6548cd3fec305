"""Which parameters' curvature is approximated together, and in which form."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_influence.gradients.coverage import Coverage
from keras_influence.gradients.factors import Explicit, Layout, Outer, Rows
from keras_influence.gradients.rules.dense import einsum_letters

KRONECKER = "kronecker"
ROWS = "rows"
DIAGONAL = "diagonal"


class Block(NamedTuple):
    """Parameters whose curvature is approximated together.

    Attributes:
        kind: `KRONECKER`; `ROWS`, a table whose left basis is that of its rows; or `DIAGONAL`.
        positions: of its variables: a kernel, and the bias that is its last row; or one variable.
        layer: the layer's name.
        sizes: (G, m, n): groups, rows (with the bias), columns. (1, 1, size) of a diagonal.
        layout: of the kernel; None of a diagonal.
    """

    kind: str
    positions: tuple[int, ...]
    layer: str
    sizes: tuple[int, int, int]
    layout: Layout | None

    @property
    def has_bias(self) -> bool:
        return len(self.positions) > 1


class Basis(NamedTuple):
    """Orthonormal bases of one block.

    Attributes:
        left: [G, m, r], r <= m; empty for rows and diagonals.
        right: [G, n, n]; empty for diagonals.
    """

    left: tf.Tensor
    right: tf.Tensor


class Spectrum(NamedTuple):
    """Numbers for each direction of a block's basis.

    Attributes:
        values: [G, r, n]; [1, rows, n] of rows; [1, 1, size] of a diagonal.
        rest: [G, n]: what the left basis leaves out; zeros where it leaves nothing.
    """

    values: tf.Tensor
    rest: tf.Tensor


def find_blocks(coverage: Coverage, max_columns: int) -> list[Block]:
    """The blocks of a model, for batches of the coverage's structure.

    Args:
        max_columns: of a block that is no diagonal; 0 for diagonals alone.
    """
    variables = coverage.variables
    implicit = {v for unit in coverage.units.values() for v in unit.implicit}.union(
        coverage.network
    )

    def kernel(position: int) -> Outer | Rows | None:
        """The factor that a variable's gradients are, where a Kronecker form follows from it."""
        templates = coverage.templates.get(position, [])
        if len(templates) != 1 or position in implicit:
            return None
        (only,) = templates
        if isinstance(only, Outer) and only.layout.sizes[2] <= max_columns:
            return only
        return only if isinstance(only, Rows) and only.shape[1] <= max_columns else None

    biases = {k: bias for k, bias in _biases(coverage).items() if isinstance(kernel(k), Outer)}
    layers = {row.variable: row.layer for row in coverage.served}
    blocks = []
    for position, variable in enumerate(variables):
        layer = layers.get(variable.path, "")
        only = kernel(position)
        if isinstance(only, Outer):
            groups, rows, columns = only.layout.sizes
            bias = biases.get(position)
            positions = (position,) if bias is None else (position, bias)
            sizes = (groups, rows + len(positions) - 1, columns)
            blocks.append(Block(KRONECKER, positions, layer, sizes, only.layout))
        elif isinstance(only, Rows):
            rows, columns = only.shape
            layout = Layout.matrix(only.shape)
            blocks.append(Block(ROWS, (position,), layer, (1, rows, columns), layout))
        elif position not in biases.values():
            size = int(variable.value.shape.num_elements())
            blocks.append(Block(DIAGONAL, (position,), layer, (1, 1, size), None))
    return blocks


def written(blocks: Sequence[Block]) -> bytes:
    """As JSON."""
    return json.dumps([block._asdict() for block in blocks]).encode()


def read(text: bytes) -> list[Block]:
    """What `written` gave."""
    return [
        Block(
            each["kind"],
            tuple(each["positions"]),
            each["layer"],
            tuple(each["sizes"]),
            None if each["layout"] is None else Layout(*map(tuple, each["layout"])),
        )
        for each in json.loads(text)
    ]


def _biases(coverage: Coverage) -> dict[int, int]:
    """For kernels, the bias whose gradient is the sum of the right sides: their last row."""
    uses: dict[int, list[Any]] = {}
    for key, unit in coverage.units.items():
        for position in unit.explained:
            uses.setdefault(position, []).append(key)
    found: dict[int, int] = {}
    for position, keys in uses.items():
        layer = coverage.units[keys[0]].layer
        bias = getattr(layer, "bias", None)
        other = next((v for v in uses if coverage.variables[v] is bias), None)
        templates = coverage.templates.get(position, [])
        if (
            other is not None
            and uses[other] == keys
            and len(templates) == 1
            and isinstance(templates[0], Outer)
            and all(isinstance(t, Explicit) for t in coverage.templates.get(other, []))
            and _is_row(layer, templates[0], bias)
            and other not in found.values()
        ):
            found[position] = other
    return found


def _is_row(layer: keras.layers.Layer, kernel: Outer, bias: keras.Variable) -> bool:
    """Whether a bias has an entry for each column of the kernel, in the same order."""
    groups, _, columns = kernel.layout.sizes
    if groups * columns != int(bias.value.shape.num_elements()):
        return False
    if not isinstance(layer, keras.layers.EinsumDense):
        return isinstance(layer, (keras.layers.Dense, *_CONVOLUTIONS))
    rank = len(kernel.tensors[1].shape)
    inputs, letters, outputs = einsum_letters(layer.equation, len(kernel.tensors[0].shape), rank)
    ours = [c for c in letters if c in inputs and c in outputs]
    ours += [c for c in letters if c not in inputs]
    theirs = outputs[-len(bias.shape) :]
    sizes = dict(zip(theirs, bias.shape, strict=True))
    return [c for c in ours if sizes.get(c) != 1] == [c for c in theirs if sizes[c] != 1]


_CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
