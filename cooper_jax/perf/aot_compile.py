"""Lowered programs to compiled ones: what XLA says of each, kept on the disk where a folder is given.

XLA's own cache of programs needs the devices that they run on; here a program is found again by its text before
optimisation, its devices and the compiler's version, and what is kept is what it said.
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

SAID = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes",
        "generated_code_size_in_bytes")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes are those of one device."""

    text: str  # optimised
    seconds: float  # of compiling; of the first time, where it was kept
    arguments: int
    made: int  # outputs
    aliased: int  # of them: in the place of arguments
    temporaries: int
    code: int
    outputs: Any  # as the next program's inputs


SIZE = r"([\d.]+[KMGT]i?B?)"
COMPILERS = ("jaxlib", "libtpu", "jax-cuda13-plugin")


class TooLarge(SetupError):
    """A program that the compiler refuses because it alone takes more memory than a device has."""


def compile_program(
    name: str, lowered: jax.stages.Lowered, layout: Layout, keep: Path | None = None
) -> Compiled:
    """Raises TooLarge with both numbers, where the compiler gives them, and SetupError for its other refusals."""
    path = None if keep is None else keep / f"{_key(lowered, layout)}.gz"
    if path is None or not path.exists():
        found = _compile(name, lowered)
        if path is not None:
            keep.mkdir(parents=True, exist_ok=True)
            write_atomically(path, gzip.compress(json.dumps(found).encode()))
    else:
        found = json.loads(gzip.decompress(path.read_bytes()))
    leaves, tree = jax.tree.flatten(lowered.out_info)
    outputs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(layout.mesh, _spec(place)))
        for x, place in zip(leaves, found["places"], strict=True)
    ]
    arguments, made, aliased, temporaries, code = (found["said"][name] for name in SAID)
    return Compiled(
        found["text"], found["seconds"], arguments, made, aliased, temporaries, code, tree.unflatten(outputs)
    )


def _compile(name: str, lowered: jax.stages.Lowered) -> dict:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:  # those of XLA, Mosaic and Triton have no other base in common
        said = str(error)
        if "RESOURCE_EXHAUSTED" not in said and "Ran out of memory" not in said:
            raise SetupError(f"{name}: the compiler refuses it: {said.splitlines()[0]}") from error
        numbers = re.search(rf"[Uu]sed {SIZE} of {SIZE}|\({SIZE}\) exceeds available HBM \({SIZE}\)", said)
        numbers = [x for x in numbers.groups() if x] if numbers else []
        numbers = " of a device's ".join(numbers) or said.splitlines()[0]
        raise TooLarge(f"{name}: by itself it takes {numbers}") from error
    seconds, said = time.perf_counter() - start, compiled.memory_analysis()
    return {
        "seconds": seconds,
        "said": {name: getattr(said, name) for name in SAID},
        "places": [_written(name, x) for x in jax.tree.leaves(compiled.output_shardings)],
        "text": compiled.as_text(),
    }


def _key(lowered: jax.stages.Lowered, layout: Layout) -> str:
    devices = layout.mesh.devices.flat
    where = [layout.platform, devices[0].device_kind, [str(getattr(d, "coords", d.id)) for d in devices]]
    names = (str(x.sharding) for x in jax.tree.leaves(lowered.in_avals) if getattr(x, "sharding", None))
    there = [p for p in COMPILERS if importlib.util.find_spec(p.replace("-", "_"))]
    versions = [f"{p} {metadata.version(p)}" for p in there]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts = (jax.__version__, *versions, *flags, *map(str, where), *names, lowered.as_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _written(name: str, place: jax.sharding.Sharding) -> list:
    """A PartitionSpec for JSON."""
    if not isinstance(place, NamedSharding):
        raise SetupError(f"{name}: an output lies by {place}, which no mesh axes describe")
    return [list(x) if isinstance(x, tuple) else x for x in place.spec]


def _spec(written: list) -> PartitionSpec:
    return PartitionSpec(*(tuple(x) if isinstance(x, list) else x for x in written))
