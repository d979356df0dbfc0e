"""The choice of kernels by platform."""

import subprocess
import sys
from pathlib import Path

from cooper_jax.kernels import platform

PROGRAM = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None  # an import of it fails
from cooper_jax.kernels import decode_attention, head, platform, sampling
print(*(platform.default_implementation(name) for name in ("gpu", "cuda", "tpu", "cpu")))
try:
    platform.is_pallas("triton")
    from cooper_jax.kernels import head_triton
except ImportError as error:
    print(error)
"""


def test_defaults():
    found = [platform.default_implementation(name) for name in ("gpu", "cuda", "tpu", "cpu", "rocm")]
    assert found == ["triton", "triton", "tpu", "xla", "xla"]


def test_gpus_use_plain_xla_where_jax_has_no_triton_backend():
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    chosen, message = ran.stdout.splitlines()
    assert chosen == "xla xla tpu xla"
    assert "has no Pallas backend for Triton" in message and "--config.rollout.kernels=xla" in message
    assert ran.stderr.count("warning:") == 1 and ran.stderr.endswith("; GPUs use plain XLA\n")
