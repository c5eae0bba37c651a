"""Runs and compiles a lowered computation without TensorFlow: on CPU devices, and with libtpu for
chips that are not here.

It leans on private names of the JAX release in requirements-verify.txt. Each function is for a
process of its own: how many CPU devices there are is settled once, and libtpu's compiler can end a
process.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
        topologies: by number of cores, as libtpu names them.
        memory: of a chip, in bytes, as Google's documentation states it.
    """

    topologies: dict[int, str]
    memory: int


GIB = 2**30
CHIPS = {
    "v4": Chip({1: "v4:2x2x1", 4: "v4:2x2x1", 8: "v4:2x2x2"}, 32 * GIB),
    "v5e": Chip({1: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4"}, 16 * GIB),
    "v5p": Chip({1: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"}, 95 * GIB),
    "v6e": Chip({1: "v6e:2x2", 4: "v6e:2x2", 8: "v6e:2x4"}, 32 * GIB),
}


def _module(lowered: bytes) -> Any:
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir
    from jaxlib import _jax

    with mlir.make_ir_context():
        return ir.Module.parse(_jax.mlir.hlo_to_stablehlo(lowered))


def _compiled(lowered: bytes, devices: Sequence[Any]) -> Any:
    from jax._src import compiler
    from jaxlib import xla_client

    client = devices[0].client
    options = compiler.get_compile_options(
        num_replicas=len(devices), num_partitions=1, device_assignment=np.array([[d.id] for d in devices]), backend=client
    )
    return compiler.backend_compile_and_load(client, _module(lowered), xla_client.DeviceList(tuple(devices)), options, [])


def execute(lowered: bytes, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Runs it on as many CPU devices as there are cores, which add up with a real all-reduce.

    Args:
        lowered: a serialised HloModuleProto.
        arguments: `[cores, ...]` each.

    Returns:
        Results, `[cores, ...]` each.
    """
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    jax.config.update("jax_enable_x64", True)
    devices = jax.devices("cpu")[: len(arguments[0])]
    mesh = Mesh(np.array(devices), ("cores",))

    def placed(values: np.ndarray) -> Any:
        parts = [jax.device_put(value, device) for value, device in zip(values, devices, strict=True)]
        if values.ndim == 1:
            return jax.make_array_from_single_device_arrays((), NamedSharding(mesh, PartitionSpec()), parts)
        shape = (values.shape[0] * values.shape[1], *values.shape[2:])
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, PartitionSpec("cores")), parts)

    results = _compiled(lowered, devices).execute_sharded([placed(values) for values in arguments])
    return [np.stack([np.asarray(part) for part in parts]) for parts in results.disassemble_into_single_device_arrays()]


def compile_for(lowered: bytes, kind: str, cores: int) -> dict[str, Any]:
    """Compiles it with libtpu.

    Args:
        lowered: a serialised HloModuleProto.
        kind: of chip, one of `CHIPS`.
        cores: number of replicas.

    Returns:
        A `report`.
    """
    from jax.experimental import topologies

    chip = CHIPS[kind]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topologies[cores])
    begin = time.perf_counter()
    program = _compiled(lowered, topology.devices[:cores])
    seconds = time.perf_counter() - begin
    return report(chip, seconds, program.get_compiled_memory_stats(), program.hlo_modules()[0].to_string())


def report(chip: Chip, seconds: float, memory: Any, text: str) -> dict[str, Any]:
    """What is told of a compiled program: compile time in seconds, bytes that it needs on a core
    and that the chip has, and its reductions.

    Args:
        chip: what it was compiled for.
        seconds: of compilation.
        memory: its memory statistics.
        text: its HLO.
    """
    return {
        "seconds": seconds,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "available": chip.memory,
        "reductions": len(re.findall(r" all-reduce(?:-start)?\(", text)),
    }
