"""Chips that need not be there: what they hold and how fast they are, and devices to compile for.

`find("v5e:4x4")` gives a `Topology`, whose devices a mesh can be laid over; XLA's TPU and GPU compilers run without
the hardware.  Written are

    v5e:4x4  v5p:4x4x4  v6e:16x16  tpu7x:4x4x4     chips of a TPU slice
    v5e:16x16*4                                    four such slices, which the data-centre network joins
    h100:1x2x8                                     slices x hosts x GPUs
    cpu:8                                          devices of this machine's CPU, for trying things out

Figures are public peaks of one device as JAX counts them (half a chip of tpu7x), not measurements.  Sources:
Google Cloud's pages on each TPU (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x) for memory, compute and the
data-centre network; "How to Scale Your Model" (jax-ml.github.io/scaling-book, chapter "TPUs") for links, which it
gives a tenth below the pages' figures; NVIDIA's data sheet of the H100 SXM (dense, without sparsity).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re

import jax
import numpy as np

from cooper_jax.settings.setup_errors import SetupError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them."""

    name: str
    memory: int  # bytes of HBM
    flops: float  # flop/s in bfloat16, dense
    bandwidth: float  # byte/s of HBM
    link: float  # byte/s of one link one way; of GPUs: of all NVLinks together, one way
    outside: float  # byte/s of its share of the data-centre network, one way
    torus: int  # dimensions of the links' torus; 0: a switch
    wraps: int  # an axis of a multiple of so many chips closes to a ring; 0: none does
    nominal: bool = False  # the figures stand for no product


CHIPS = {
    c.name: c
    for c in (
        Chip("v5e", 16 * GIB, 197e12, 819e9, 45e9, 3.125e9, torus=2, wraps=16),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 90e9, 6.25e9, torus=3, wraps=4),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 90e9, 12.5e9, torus=2, wraps=16),
        Chip("tpu7x", 96 * GIB, 1153.5e12, 3690e9, 45e9, 6.25e9, torus=3, wraps=4),
        Chip("h100", 84978434048, 989e12, 3352e9, 450e9, 50e9, torus=0, wraps=0),
        Chip("cpu", 8 * GIB, 50e9, 10e9, 5e9, 1e9, torus=0, wraps=0, nominal=True),
    )
}

# XLA's GpuTargetConfigProto of an H100 (SXM, 80 GB).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, and the network that joins them."""

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]

    def seconds(self, kind: str, sent: float, group: tuple[jax.Device, ...]) -> float:
        """Seconds in which each device of a group sends `sent` bytes around it, links in use both ways.

        Over several slices (GPUs: hosts) each first does with its own neighbours what it can, and then sends its
        share, a part of one n-th where the slice has n of the group, over the data-centre network.
        """
        islands = {}
        for device in group:
            islands.setdefault(self.island(device), []).append(device)
        inside = max(map(len, islands.values()))
        total, n = 0.0, len(group)
        if kind in ("collective-permute", "collective-broadcast"):
            share, across = (1.0, 0.0) if len(islands) == 1 else (0.0, 1.0)
        else:  # of (n - 1) / n of the whole: what a ring of the island's own sends, and what leaves it
            share = (inside - 1) / inside * n / (n - 1)
            across = (len(islands) - 1) / len(islands) / inside * n / (n - 1)
        if share and sent:
            total += share * sent / self.rate(tuple(max(islands.values(), key=len)))
        if across and sent:
            total += across * sent / self.chip.outside
        return total

    def island(self, device: jax.Device) -> int:
        """What fast links join: a slice, or a host's GPUs."""
        if self.chip.torus:
            return getattr(device, "slice_index", None) or 0
        return device.process_index

    def rate(self, group: tuple[jax.Device, ...]) -> float:
        """byte/s that a device sends within its island: over the links of every axis on which the group extends.

        An axis that the group covers, and that closes to a ring, is used in both directions.
        """
        if not self.chip.torus:
            return self.chip.link
        here, whole = (np.asarray([d.coords for d in devices]) for devices in (group, self.devices))
        links = 0
        for axis in range(self.chip.torus):
            length = int(whole[:, axis].max()) + 1
            covered = len(set(here[:, axis].tolist()))
            closed = self.chip.wraps and length % self.chip.wraps == 0 and covered == length
            links += (covered > 1) * (2 if closed else 1)
        # Devices of one chip alone: their own link is no slower than another.
        return self.chip.link * max(links, 1)


@functools.cache
def find_topology(name: str) -> Topology:
    """The topology of that name.  Raises SetupError for a name that is none, and where a compiler is missing."""
    found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not found or found.group(1) not in CHIPS:
        raise SetupError(
            f"topology {name!r} is unknown: write CHIP:SIZES with a chip of {', '.join(CHIPS)}, as in v5e:4x4, "
            "v5p:4x4x4, v5e:16x16*2 (two slices) or h100:1x2x8 (slices x hosts x GPUs)"
        )
    chip, sizes = CHIPS[found.group(1)], tuple(map(int, found.group(2).split("x")))
    slices = int(found.group(3) or 1)
    wanted = {0: (3,) if chip.name == "h100" else (1,)}.get(chip.torus, (chip.torus,))
    if len(sizes) not in wanted or 0 in (*sizes, slices) or (slices > 1 and not chip.torus):
        raise SetupError(
            f"topology {name!r}: {chip.name} takes {wanted[0]} sizes of at least 1"
            + ("" if chip.torus else ", and no *slices")
        )
    return Topology(name, chip, _devices(name, chip, sizes, slices))


def _devices(name: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> tuple[jax.Device, ...]:
    if chip.name == "cpu":
        there = jax.devices("cpu")
        if sizes[0] > len(there):
            raise SetupError(
                f"topology {name!r}: this process has {len(there)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={sizes[0]}"
            )
        return tuple(there[: sizes[0]])
    from jax.experimental import topologies

    if chip.name == "h100":
        _need("jax_cuda13_plugin", "GPU", "requirements-cuda.txt")
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver to be too old
        make = functools.partial(
            topologies.get_topology_desc,
            platform="cuda",
            target_config=H100,
            topology="x".join(map(str, sizes)),
        )
    else:
        _need("libtpu", "TPU", "requirements-tpu.txt")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU VM's metadata to ask
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to have for oneself
        options = {"num_slices": slices} if slices > 1 else {}
        if math.prod(sizes) < 4:  # a part of a host
            options["chips_per_host_bounds"] = [*sizes, 1, 1][:3]
        make = functools.partial(
            topologies.get_topology_desc,
            platform="tpu",
            topology_name=f"{chip.name}:{'x'.join(map(str, sizes))}",
            **options,
        )
    try:
        return tuple(make().devices)
    except (RuntimeError, ValueError) as error:
        raise SetupError(
            f"topology {name!r}: the compiler refuses it: {str(error).splitlines()[0]}"
        ) from error


def _need(module: str, what: str, requirements: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SetupError(
            f"XLA's {what} compiler is absent: pip install -r {requirements} (no {what} is needed)"
        )
