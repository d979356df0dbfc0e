"""Compilation of one lowered program to the compiler's report on it, cached on disk if a folder is given.

JAX's own compilation cache needs the devices that a program runs on.  This cache does not: its key is a hash
of the program's text before optimisation, the devices and the compiler's version.  It stores the compiler's
report, not the executable.
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

# Fields of XLA's memory analysis, in the order of CompiledProgram's.
MEMORY_FIELDS = (
    "argument_size_in_bytes",
    "output_size_in_bytes",
    "alias_size_in_bytes",
    "temp_size_in_bytes",
    "generated_code_size_in_bytes",
    "peak_memory_in_bytes",
)
# A size in the compilers' error messages, such as 17.25G or 80.00GiB.
SIZE = r"([\d.]+[KMGT]i?B?)"
# Part of the hash: change it with the format of reports, so that reports of earlier versions are not read.
REPORT_FORMAT = "3"
# Packages whose versions are part of the hash, as far as they are installed.
COMPILERS = ("jaxlib", "libtpu", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """The compiler's report on a program; bytes are those of one device."""

    text: str  # optimised HLO
    seconds: float  # of the compilation; of the original one if the report comes from the cache
    # Bytes by use.
    arguments: int
    outputs: int
    aliased: int  # part of `outputs`, written over donated arguments
    temporaries: int
    code: int
    # At the program's peak, arguments included.  XLA:TPU's `temporaries` are more than the temporaries at any one
    # time; this is not.  0: the compiler does not say.
    peak: int
    output_arrays: Any  # abstract arrays with shardings, to lower the next program with

    @property
    def most_memory(self) -> int:
        """Bytes at the program's peak, its arguments and its code included; without a peak, the sum of all uses."""
        summed = self.arguments + self.temporaries + self.outputs - self.aliased
        return (self.peak or summed) + self.code


class TooLarge(SetupError):
    """A program that needs more memory than a device has, so that the compiler refuses it."""


def compile_program(
    name: str, lowered: jax.stages.Lowered, layout: Layout, cache: Path | None = None
) -> CompiledProgram:
    """Compile a program, or read the report of an earlier compilation from the folder `cache`.

    Raises TooLarge, with both numbers where the compiler gives them, and SetupError if the compiler refuses
    the program for another reason.
    """
    path = None if cache is None else cache / f"{_hash_program(lowered, layout)}.gz"
    if path is not None and path.exists():
        report = json.loads(gzip.decompress(path.read_bytes()))
    else:
        report = _compile(name, lowered)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, gzip.compress(json.dumps(report).encode()))

    # The cached report has no Python objects: the outputs' shapes come from the lowered program.
    leaves, tree = jax.tree.flatten(lowered.out_info)
    output_arrays = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(layout.mesh, _spec_from_json(spec)))
        for x, spec in zip(leaves, report["output_specs"], strict=True)
    ]
    arguments, outputs, aliased, temporaries, code, peak = (
        report["memory"][field] for field in MEMORY_FIELDS
    )
    return CompiledProgram(
        text=report["text"],
        seconds=report["seconds"],
        arguments=arguments,
        outputs=outputs,
        aliased=aliased,
        temporaries=temporaries,
        code=code,
        peak=peak,
        output_arrays=jax.tree.unflatten(tree, output_arrays),
    )


def _compile(name: str, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Compile a program; returns the compiler's report as JSON values."""
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
    """Hash everything that the compiler's report on a program depends on."""
    # The devices.  TPUs have coordinates, on which the routes of collectives depend.
    devices = layout.mesh.devices.flat
    coordinates = [str(getattr(d, "coords", d.id)) for d in devices]
    machine = [layout.platform, devices[0].device_kind, coordinates]
    # The text of a lowered program may leave out shardings of arguments, so they are hashed as well.
    shardings = (str(x.sharding) for x in jax.tree.leaves(lowered.in_avals) if getattr(x, "sharding", None))

    installed = [p for p in COMPILERS if importlib.util.find_spec(p.replace("-", "_"))]
    versions = [f"{p} {metadata.version(p)}" for p in installed]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    if layout.compiler_options is not None:
        flags.append(str(layout.compiler_options))
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
    """Convert the PartitionSpec of an output to lists and strings."""
    if not isinstance(sharding, NamedSharding):
        raise SetupError(f"{name}: the sharding of an output, {sharding}, is not one over mesh axes")
    return [list(axes) if isinstance(axes, tuple) else axes for axes in sharding.spec]


def _spec_from_json(entries: list) -> PartitionSpec:
    """Convert the result of `_spec_to_json` back."""
    return PartitionSpec(*(tuple(axes) if isinstance(axes, list) else axes for axes in entries))
