"""Devices that are not there, for XLA's TPU and GPU compilers: they run without hardware.

TPU: an environment with `jax[tpu]`; GPU: one with `jax[cuda13]`.  Without the compiler the caller skips.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import pytest  # noqa: E402
from jax.experimental import topologies  # noqa: E402

TPUS = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4"}  # 16 chips each

# XLA's GpuTargetConfigProto of an H100 (SXM, 80 GB).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
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


def devices(chip: str) -> np.ndarray:
    """The devices of a 16-chip TPU slice ("v5e", "v5p", "v6e") or of a host with 8 GPUs ("h100")."""
    if chip == "h100":
        if importlib.util.find_spec("jax_cuda13_plugin") is None:
            pytest.skip("XLA's GPU compiler is absent: install requirements-cuda.txt")
        topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8")
    else:
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("XLA's TPU compiler is absent: install requirements-tpu.txt")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip])
    return np.asarray(topology.devices)
