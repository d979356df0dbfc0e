"""Compilation of one lowered program: what XLA reports about it, cached on disk if a folder is given.

JAX's own compilation cache needs the devices that a program runs on.  This one finds a program by a hash of its
text before optimisation, its devices and the compiler's version.  It stores the compiler's report, not the
executable.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from cooper_jax.runtime.mesh import Layout
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.settings.setup_errors import SetupError

# Fields of XLA's memory analysis.
MEMORY_FIELDS = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes",
                 "generated_code_size_in_bytes")  # fmt: skip
SIZE = r"([\d.]+[KMGT]i?B?)"
REPORT_FORMAT = "2"  # part of the hash: a change makes the cached reports of earlier versions unused
COMPILERS = ("jaxlib", "libtpu", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """The compiler's report on a program; bytes are those of one device."""

    text: str  # optimised HLO
    seconds: float  # of compiling, when it was really compiled
    arguments: int  # bytes
    outputs: int
    aliased: int  # bytes of outputs that lie in the place of arguments
    temporaries: int
    code: int
    output_arrays: Any  # abstract arrays with shardings, to lower the next program with


class TooLarge(SetupError):
    """A program that the compiler refuses because it alone needs more memory than a device has."""


def compile_program(
    name: str, lowered: jax.stages.Lowered, layout: Layout, cache: Path | None = None
) -> CompiledProgram:
    """Compile a program, or read the report of an earlier compilation from the folder `cache`.

    Raises TooLarge, with both numbers where the compiler gives them, and SetupError if the compiler refuses the
    program for another reason.
    """
    path = None if cache is None else cache / f"{_hash_program(lowered, layout)}.gz"
    if path is not None and path.exists():
        report = json.loads(gzip.decompress(path.read_bytes()))
    else:
        report = _compile(name, lowered)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, gzip.compress(json.dumps(report).encode()))

    leaves, tree = jax.tree.flatten(lowered.out_info)
    output_arrays = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(layout.mesh, _spec_from_json(spec)))
        for x, spec in zip(leaves, report["output_specs"], strict=True)
    ]
    arguments, outputs, aliased, temporaries, code = (report["memory"][field] for field in MEMORY_FIELDS)
    return CompiledProgram(
        text=report["text"],
        seconds=report["seconds"],
        arguments=arguments,
        outputs=outputs,
        aliased=aliased,
        temporaries=temporaries,
        code=code,
        output_arrays=jax.tree.unflatten(tree, output_arrays),
    )


def _compile(name: str, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """The compiler's report as JSON values."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:  # the errors of XLA, Mosaic and Triton have no narrower base class in common
        message = str(error)
        first_line = message.splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise SetupError(f"{name}: the compiler refuses it: {first_line}") from error
        # The TPU's and the GPU's compilers word this differently.
        match = re.search(rf"[Uu]sed {SIZE} of {SIZE}|\({SIZE}\) exceeds available HBM \({SIZE}\)", message)
        sizes = [size for size in match.groups() if size] if match else []
        needed = " of a device's ".join(sizes) or first_line
        raise TooLarge(f"{name}: by itself it takes {needed}") from error

    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    return {
        "seconds": seconds,
        "memory": {field: getattr(memory, field) for field in MEMORY_FIELDS},
        "output_specs": [_spec_to_json(name, x) for x in jax.tree.leaves(compiled.output_shardings)],
        "text": compiled.as_text(),
    }


def _hash_program(lowered: jax.stages.Lowered, layout: Layout) -> str:
    """A hash of everything that decides what the compiler makes of a program."""
    devices = layout.mesh.devices.flat
    coordinates = [str(getattr(d, "coords", d.id)) for d in devices]
    machine = [layout.platform, devices[0].device_kind, coordinates]
    shardings = (str(x.sharding) for x in jax.tree.leaves(lowered.in_avals) if getattr(x, "sharding", None))

    installed = [p for p in COMPILERS if importlib.util.find_spec(p.replace("-", "_"))]
    versions = [f"{p} {metadata.version(p)}" for p in installed]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts = (
        REPORT_FORMAT,
        jax.__version__,
        *versions,
        *flags,
        *map(str, machine),
        *shardings,
        lowered.as_text(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _spec_to_json(name: str, sharding: jax.sharding.Sharding) -> list:
    """The PartitionSpec of an output as lists and strings."""
    if not isinstance(sharding, NamedSharding):
        raise SetupError(f"{name}: the sharding of an output, {sharding}, is not one over mesh axes")
    return [list(axes) if isinstance(axes, tuple) else axes for axes in sharding.spec]


def _spec_from_json(written: list) -> PartitionSpec:
    return PartitionSpec(*(tuple(axes) if isinstance(axes, list) else axes for axes in written))
