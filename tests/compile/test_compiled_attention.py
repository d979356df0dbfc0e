"""Training attention with sliding windows through XLA's TPU and GPU compilers, with the memory that it takes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
import topologies
from jax.sharding import SingleDeviceSharding

from cooper_jax.kernels import attention

TOKENS, WINDOW = 8192, 512  # Gemma 3 1B's window
GEMMA3, QWEN3 = (4, 1, 256), (16, 8, 128)  # query heads, key/value heads, head_dim


@functools.cache
def temporaries(chip: str, heads: tuple[int, int, int], window: int | None, packed: bool = False) -> int:
    """Bytes of temporaries of one row's attention and its gradient, on one device of the chip.

    packed: the row holds several sequences.
    """
    queries, keys, h = heads
    device = topologies.devices(chip).reshape(-1)[0]
    platform = "cuda" if chip == "h100" else "tpu"
    implementation = attention.default_implementation(jnp.dtype(jnp.bfloat16), h, platform)

    def loss(q, k, v, segments):
        out = attention.causal_attention(
            q, k, v, window=window, segments=segments if packed else None, implementation=implementation
        )
        return out.astype(jnp.float32).sum()

    arguments = [
        jax.ShapeDtypeStruct((1, TOKENS, n, h), jnp.bfloat16, sharding=SingleDeviceSharding(device))
        for n in (queries, keys, keys)
    ]
    arguments.append(jax.ShapeDtypeStruct((1, TOKENS), jnp.int32, sharding=SingleDeviceSharding(device)))
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_gemma_3s_window_in_training(chip):
    """On GPUs heads of 256 run as blocks in plain XLA: 1,024 queries read 1,535 keys instead of up to 8,192.

    Splash, on TPUs, never holds scores: a window saves it work, not memory.
    """
    with_window, without = (temporaries(chip, GEMMA3, w) for w in (WINDOW, None))
    print(
        f"{chip}: {with_window / 2**20:.0f} MiB of temporaries with a window, {without / 2**20:.0f} without"
    )
    if chip == "h100":
        assert with_window < 0.4 * without
    else:
        assert with_window <= without + 2**20


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_windows_in_library_kernels(chip):
    """Heads of 128: cuDNN on GPUs, splash on TPUs."""
    assert temporaries(chip, QWEN3, WINDOW) <= temporaries(chip, QWEN3, None) + 2**20


@pytest.mark.parametrize("chip", ["v5e", pytest.param("h100", marks=pytest.mark.slow)])
def test_packed_rows_in_training(chip):
    """Splash, on TPUs, takes segments; on GPUs blocks in plain XLA hold the scores of an eighth of the queries."""
    packed, without = temporaries(chip, QWEN3, None, packed=True), temporaries(chip, QWEN3, None)
    print(f"{chip}: {packed / 2**20:.0f} MiB of temporaries with segments, {without / 2**20:.0f} without")
    all_scores = QWEN3[0] * TOKENS * TOKENS * 4
    assert packed <= (without + 2**23 if chip == "v5e" else all_scores / 2)
