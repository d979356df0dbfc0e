"""What kernels cost of which a compiled program's text does not tell: name -> (FLOPs, bytes) of a run on a device.

XLA:GPU drops what Pallas kernels declare, the TPU's flash attention declares nothing, and decode attention declares
full caches, for how much of them it reads is known only as it runs.
"""

from __future__ import annotations

import jax.numpy as jnp

from cooper_jax.model.config import ModelConfig
from cooper_jax.perf.aot_job import Job

Costs = dict[str, tuple[float, float]]


# jax's flash attention on a TPU: forward, forward for a backward to come, backward (all three gradients in one).
FORWARD = ("splash_mha_fwd_no_residuals", "splash_mha_fwd_residuals")
BACKWARD = "splash_mha_dkv_no_residuals"


def attention_cost(job: Job, config: ModelConfig, n: int, tokens: int, dtype: str) -> Costs:
    """Causal attention of n rows: two products forward, five backward, each over half of the scores."""
    ways = job.layout.ways(job.layout.spec(("heads",), (config.heads,))[0])
    heads, kv_heads = config.heads // ways, max(config.kv_heads // ways, 1)
    product = float(n * heads * tokens**2 * config.head_dim)  # half of 2 S S h
    queries, keys = (n * tokens * h * config.head_dim * jnp.dtype(dtype).itemsize for h in (heads, kv_heads))
    forward = 2 * product, 2.0 * (queries + keys)  # q, k, v in; o out
    backward = 5 * product, 4.0 * (queries + keys)  # q, k, v, o, do in; their gradients out
    return dict.fromkeys(FORWARD, forward) | {BACKWARD: backward}


def head_cost(job: Job, config: ModelConfig, rows: int, name: str) -> Costs:
    """The head's product with so many rows, both read once, in two bytes."""
    columns = config.padded_vocab // job.layout.ways(job.layout.spec(("vocab",), (config.padded_vocab,))[0])
    return {name: (2.0 * rows * columns * config.width, 2.0 * (rows + columns) * config.width)}


def decode_cost(job: Job, keys: tuple[float, float]) -> Costs:
    """Decode attention of a layer, over so many keys of a prompt and of a row's own.

    A prompt's are read once for all its samples.
    """
    config, kv_format = job.policy, job.setting.kv_format
    ways = job.layout.ways(job.layout.spec(("kv_heads",), (config.kv_heads,))[0])
    token = kv_format.bytes_per_token(1, config.kv_heads // ways, config.head_dim)
    flops = 4.0 * job.slots * config.heads // ways * config.head_dim
    prompt = flops * keys[0], float(min(job.size, job.slots) * keys[0] * token)
    suffix = flops * keys[1], job.slots * keys[1] * token
    return {
        "decode_attention": (prompt[0] + suffix[0], prompt[1] + suffix[1]),
        "decode_attention_prompt": prompt,
        "decode_attention_suffix": suffix,
    }
