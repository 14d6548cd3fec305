"""Compiles StableHLO modules for a TPU that is not there, and prints what the compiler says.

    python benchmarks/tpu_compiler.py v5e:2x2 MODULE:CHIPS...

For an interpreter with `jax` and `libtpu`, and no TensorFlow: `tpu_compile.py` makes one, and calls
this. Each MODULE is a file that holds StableHLO, serialized or as text, which so many chips run
together; for each, a line of JSON.
"""

import json
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import libtpu
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib import _jax, xla_client
from jax._src.lib.mlir import ir
from jax.experimental import topologies

# What moves between the chip and its host within a program.
HOST_TRANSFERS = re.compile(r"\b(infeed|outfeed|send|recv)\(|host_transfer=true|S\(5\)")


def compile_module(path: pathlib.Path, devices: Sequence[Any]) -> dict[str, Any]:
    """What the compiler reports of one module, of each of the chips that run it."""
    with mlir.make_ir_context():
        text = path.read_bytes()
        serialized = text.startswith(b"ML\xefR")
        read = _jax.mlir.deserialize_portable_artifact if serialized else ir.Module.parse
        module = read(text)
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = len(devices), 1
        numbers = np.array([[device.id] for device in devices])
        options.device_assignment = xla_client.DeviceAssignment.create(numbers)
        start = time.perf_counter()
        compiled = devices[0].client.compile(
            module,
            executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=options,
        )
        seconds = time.perf_counter() - start
    cost = compiled.cost_analysis()
    memory = compiled.get_compiled_memory_stats()
    (program,) = compiled.hlo_modules()
    text = program.to_string()
    return {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
        "host_transfers": sorted({match.group() for match in HOST_TRANSFERS.finditer(text)}),
        "chips": len(devices),
        "all_reduces": len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)),
        "device": devices[0].device_kind,
        "versions": {"jax": jax.__version__, "libtpu": libtpu.__version__},
    }


def main(arguments: Sequence[str]) -> None:
    if len(arguments) < 2:
        raise SystemExit(f"Expected a topology and modules. Received: {list(arguments)}.")
    devices = topologies.get_topology_desc(arguments[0], "tpu").devices
    for argument in arguments[1:]:
        path, _, chips = argument.rpartition(":")
        print(json.dumps(compile_module(pathlib.Path(path), devices[: int(chips)])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
