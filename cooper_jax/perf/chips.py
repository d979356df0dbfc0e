"""Chips and topologies to compile for: memory, peak rates and abstract devices, without the hardware.

`find_topology("v5e:4x4")` returns a `Topology`, whose devices can form a mesh.  XLA's TPU and GPU compilers
run without the hardware.  Names are

    v5e:4x4  v5p:4x4x4  v6e:16x16  tpu7x:4x4x4     chips of a TPU slice
    v5e:16x16*4                                    four such slices, joined by the data-centre network
    h100:1x2x8  l4:1x1x1                           slices x hosts x GPUs
    cpu:8                                          devices of this machine's CPU, for tests and trials

Figures are public peaks of one device as JAX counts devices (half a chip of tpu7x), not measurements.
Sources:

    memory, compute, data-centre network   Google Cloud's page on each TPU: v5e, v5p, v6e and tpu7x below
                                           docs.cloud.google.com/tpu/docs
    links                                  "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter
                                           "TPUs", whose figures are a tenth below those of Google's pages
    h100                                   NVIDIA's data sheet of the H100 SXM (dense, without sparsity)
    l4                                     NVIDIA's data sheet of the L4: 24 GB, 300 GB/s, and half of the 242
                                           TFLOP/s that it states with sparsity; PCIe 4.0 x16 joins the GPUs.
                                           Memory: what CUDA reports with error correction on, 22.0 GiB.
                                           Network: a g2-standard-96 of Google Cloud, 100 Gbit/s for 8 GPUs
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
    """Peak figures of one device, as JAX counts devices."""

    name: str
    # One device.
    memory: int  # bytes of HBM
    flops: float  # FLOP/s in bfloat16, dense
    bandwidth: float  # byte/s of HBM
    # The network.
    link: float  # byte/s of one link in one direction; GPUs: all NVLinks together
    outside: float  # byte/s of a device's share of the data-centre network, in one direction
    torus: int  # dimensions of the torus that links form; 0 for devices joined by a switch
    wraps: int  # an axis closes to a ring if its length is a multiple of this; 0 if no axis does
    # Round figures in place of a product's.
    nominal: bool = False


CHIPS = {
    c.name: c
    for c in (
        Chip("v5e", 16 * GIB, 197e12, 819e9, 45e9, 3.125e9, torus=2, wraps=16),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 90e9, 6.25e9, torus=3, wraps=4),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 90e9, 12.5e9, torus=2, wraps=16),
        Chip("tpu7x", 96 * GIB, 1153.5e12, 3690e9, 45e9, 6.25e9, torus=3, wraps=4),
        Chip("h100", 84978434048, 989e12, 3352e9, 450e9, 50e9, torus=0, wraps=0),
        Chip("l4", 22 * GIB, 121e12, 300e9, 32e9, 1.5625e9, torus=0, wraps=0),
        Chip("cpu", 8 * GIB, 50e9, 10e9, 5e9, 1e9, torus=0, wraps=0, nominal=True),
    )
}

# XLA's GpuTargetConfigProto of each GPU.
GPU_TARGETS = {
    # The SXM version, 80 GB.
    "h100": """
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
""",
    # Limits of a block and a multiprocessor: compute capability 8.9 in the CUDA C++ Programming Guide.  58
    # multiprocessors of 128 lanes at 2.04 GHz are the data sheet's 30.3 TFLOP/s in float32.
    "l4": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 102400
  threads_per_core_limit: 1536 core_count: 58 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 300000000000 l2_cache_size: 50331648 clock_rate_ghz: 2.04
  device_memory_size: 23622320128 shared_memory_per_block_optin: 101376
  cuda_compute_capability { major: 8 minor: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA L4"
""",
}


# Beginnings of jax's names of devices (`device.device_kind`), the longer ones first.
DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA L4": "l4",
}


def find_chip(device_kind: str) -> Chip | None:
    """Find the chip of jax's name of a device; None if its peaks are not in CHIPS."""
    for beginning, name in DEVICE_KINDS.items():
        # NVIDIA's L40 is no L4.
        rest = device_kind.removeprefix(beginning)
        if rest != device_kind and not rest[:1].isalnum():
            return CHIPS[name]
    return None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, and the network that joins them."""

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]

    def seconds(self, kind: str, sent: float, group: tuple[jax.Device, ...]) -> float:
        """Seconds that a ring collective takes in which each device of a group sends `sent` bytes.

        An island is a set of devices joined by fast links: a TPU slice, or the GPUs of a host.  If a group
        spans several islands, the collective first runs within each island.  Then each device exchanges its
        share over the data-centre network: 1 / n of the island's result if n devices of the island belong to
        the group.
        """
        islands: dict[int, list[jax.Device]] = {}
        for device in group:
            islands.setdefault(self.island(device), []).append(device)
        largest = max(islands.values(), key=lambda island: len(island))

        # Shares of `sent` that a device sends within its island and to other islands.
        size, inside = len(group), len(largest)
        if kind in ("collective-permute", "collective-broadcast"):
            # The slowest device decides: one that sends to another island, if there is one.
            inner_share, outer_share = (1.0, 0.0) if len(islands) == 1 else (0.0, 1.0)
        else:
            # `sent` is (size - 1) / size of the whole array.
            inner_share = (inside - 1) / inside * size / (size - 1)
            outer_share = (len(islands) - 1) / len(islands) / inside * size / (size - 1)

        # The two stages run one after the other.
        total = 0.0
        if inner_share and sent:
            total += inner_share * sent / self.rate(tuple(largest))
        if outer_share and sent:
            total += outer_share * sent / self.chip.outside
        return total

    def island(self, device: jax.Device) -> int:
        """The number of a device's island: its slice, or its host for GPUs."""
        if self.chip.torus:
            return getattr(device, "slice_index", None) or 0
        return device.process_index

    def rate(self, group: tuple[jax.Device, ...]) -> float:
        """Rate in byte/s at which a device sends within its island.

        It uses the links of all axes that the group spans.
        An axis is used in both directions if the group covers all of it and it closes to a ring.
        """
        if not self.chip.torus:
            return self.chip.link
        group_coords = np.asarray([d.coords for d in group])  # i32[devices, 3]
        all_coords = np.asarray([d.coords for d in self.devices])

        # Count the links that a device can use at once: one per spanned axis, two on a ring.
        links = 0
        for axis in range(self.chip.torus):
            length = int(all_coords[:, axis].max()) + 1
            covered = len(set(group_coords[:, axis].tolist()))
            is_ring = self.chip.wraps and length % self.chip.wraps == 0 and covered == length
            if covered > 1:
                links += 2 if is_ring else 1
        # Devices of one chip span no axis.  The link within the chip is assumed to be as fast as one outside.
        return self.chip.link * max(links, 1)


@functools.cache
def find_topology(name: str) -> Topology:
    """Find the topology of a name.

    Raises SetupError for an unknown name and for a compiler that is not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not match or match.group(1) not in CHIPS:
        raise SetupError(
            f"topology {name!r} is unknown: write CHIP:SIZES with a chip of {', '.join(CHIPS)}, as in "
            "v5e:4x4, v5p:4x4x4, v5e:16x16*2 (two slices), h100:1x2x8 (slices x hosts x GPUs) or l4:1x1x1"
        )
    chip, sizes = CHIPS[match.group(1)], tuple(map(int, match.group(2).split("x")))
    slices = int(match.group(3) or 1)

    # Only TPUs have slices: hosts of GPUs are a size of their own, and CPU devices have one size.
    dimensions = chip.torus
    if not chip.torus:
        dimensions = 3 if chip.name in GPU_TARGETS else 1
    if len(sizes) != dimensions or 0 in (*sizes, slices) or (slices > 1 and not chip.torus):
        no_slices = "" if chip.torus else ", and no *slices"
        raise SetupError(f"topology {name!r}: {chip.name} takes {dimensions} sizes of at least 1{no_slices}")
    return Topology(name, chip, _list_devices(name, chip, sizes, slices))


def _list_devices(name: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> tuple[jax.Device, ...]:
    """List this machine's CPU devices, or abstract devices of XLA's TPU or GPU compiler."""
    # The CPU's devices are real: their number is set when JAX starts.
    if chip.name == "cpu":
        available = jax.devices("cpu")
        if sizes[0] > len(available):
            raise SetupError(
                f"topology {name!r}: this process has {len(available)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={sizes[0]}"
            )
        return tuple(available[: sizes[0]])

    from jax.experimental import topologies

    if chip.name in GPU_TARGETS:
        _require_compiler("jax_cuda13_plugin", "GPU", "requirements-cuda.txt")
        # There is no driver whose version could be checked.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        make_topology = functools.partial(
            topologies.get_topology_desc,
            platform="cuda",
            target_config=GPU_TARGETS[chip.name],
            topology="x".join(map(str, sizes)),
        )
    else:
        _require_compiler("libtpu", "TPU", "requirements-tpu.txt")
        # There is no TPU VM to query for metadata, and no chip that two processes could both open.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        options: dict[str, int | list[int]] = {"num_slices": slices} if slices > 1 else {}
        # A host has at least 4 chips unless the compiler is told otherwise.
        if math.prod(sizes) < 4:
            options["chips_per_host_bounds"] = [*sizes, 1, 1][:3]
        make_topology = functools.partial(
            topologies.get_topology_desc,
            platform="tpu",
            topology_name=f"{chip.name}:{'x'.join(map(str, sizes))}",
            **options,
        )

    try:
        return tuple(make_topology().devices)
    except (RuntimeError, ValueError) as error:
        raise SetupError(
            f"topology {name!r}: the compiler refuses it: {str(error).splitlines()[0]}"
        ) from error


def _require_compiler(module: str, kind: str, requirements: str) -> None:
    """Raise SetupError if the package with XLA's compiler for TPUs or GPUs is not installed."""
    if importlib.util.find_spec(module) is None:
        raise SetupError(
            f"XLA's {kind} compiler is absent: pip install -r {requirements} (no {kind} is needed)"
        )
