"""Costs of kernels that a compiled program's text does not show.

A cost is {kernel: (FLOPs, bytes)} of one run on one device.
XLA:GPU drops the cost that a Pallas kernel declares, and the TPU's flash attention declares none.  Decode
attention declares the cost of reading full caches, because the part that is read is known only at run time.
"""

from __future__ import annotations

import jax.numpy as jnp

from cooper_jax.model.config import ModelConfig
from cooper_jax.perf.aot_job import CompileJob

Costs = dict[str, tuple[float, float]]

# JAX's flash attention on a TPU.  Its backward kernel computes all three gradients.
FORWARD = ("splash_mha_fwd_no_residuals", "splash_mha_fwd_residuals")
BACKWARD = "splash_mha_dkv_no_residuals"


def attention_cost(job: CompileJob, config: ModelConfig, rows: int, tokens: int, dtype: str) -> Costs:
    """Estimate causal attention in one layer, with half of the scores in each product.

    Where layers differ in their windows, the estimate is the mean over the layers.  The forward pass has two
    products, the backward pass five.
    rows: the number of rows on one device, each of `tokens` tokens.
    """
    # Heads are sharded; a device with fewer than one key/value head holds a copy of a whole one.
    ways = job.layout.ways(job.layout.spec(("heads",), (config.heads,))[0])
    heads, kv_heads = config.heads // ways, max(config.kv_heads // ways, 1)
    # 2 h per score; of S^2 scores a causal mask leaves half, a window w about w S - w^2 / 2.
    windows = [min(kind.window or tokens, tokens) for kind in config.layer_kinds]
    scores = sum(w * (2 * tokens - w) for w in windows) / len(windows)  # twice their number
    product = float(rows * heads * scores * config.head_dim)

    element_bytes = jnp.dtype(dtype).itemsize
    queries = rows * tokens * heads * config.head_dim * element_bytes
    keys = rows * tokens * kv_heads * config.head_dim * element_bytes
    forward = 2 * product, 2.0 * (queries + keys)  # reads q, k, v; writes o
    backward = 5 * product, 4.0 * (queries + keys)  # reads q, k, v, o, do; writes dq, dk, dv
    return dict.fromkeys(FORWARD, forward) | {BACKWARD: backward}


def head_cost(job: CompileJob, config: ModelConfig, rows: int, name: str) -> Costs:
    """Estimate the head's product with `rows` hidden states, both read once, two bytes per element."""
    vocab_ways = job.layout.ways(job.layout.spec(("vocab",), (config.padded_vocab,))[0])
    columns = config.padded_vocab // vocab_ways
    return {name: (2.0 * rows * columns * config.width, 2.0 * (rows + columns) * config.width)}


def decode_cost(job: CompileJob, keys: tuple[float, float]) -> Costs:
    """Estimate one layer's decode attention.

    keys: the average numbers of keys that a row has: (its prompt's, its own).  Layers with a window read the
    last of them, and the estimate is the mean over the layers.  A prompt's keys are read once for all its
    samples.
    """
    config, kv_format = job.policy, job.rollout.kv_format
    ways = job.layout.ways(job.layout.spec(("kv_heads",), (config.kv_heads,))[0])
    token_bytes = kv_format.bytes_per_token(1, config.kv_heads // ways, config.head_dim)
    # 2 FLOPs per multiplication with its addition, for the product with the key and for that with the value.
    flops_per_key = 4.0 * job.slots * config.heads // ways * config.head_dim

    read = [_count_keys_read(keys, kind.window) for kind in config.layer_kinds]
    prompt_keys, own_keys = (sum(counts) / len(read) for counts in zip(*read, strict=True))
    prompt_bytes = float(min(job.prompts, job.slots) * prompt_keys * token_bytes)
    prompt = flops_per_key * prompt_keys, prompt_bytes
    suffix = flops_per_key * own_keys, job.slots * own_keys * token_bytes
    # The TPU's kernel reads both parts of the cache in one call, the GPU's has a call for each.
    return {
        "decode_attention": (prompt[0] + suffix[0], prompt[1] + suffix[1]),
        "decode_attention_prompt": prompt,
        "decode_attention_suffix": suffix,
    }


def _count_keys_read(keys: tuple[float, float], window: int | None) -> tuple[float, float]:
    """Count the keys within a window, of (a prompt's, a row's own): the newest, which are the row's own, first."""
    prompt, own = keys
    if window is None:
        return prompt, own
    return min(prompt, max(0.0, window - own)), min(own, window)
