"""Rooflines: lower bounds on the time of a step's programs, from their FLOPs and bytes.

1. `rollout_work`, `score_work`, `reward_score_work`, `update_work` and `pair_update_work` count a model's work as
   {part: Work}.  The parts run one after the other.
2. `Work.seconds` is a part's time at a machine's rates (perf/machine.py): the longer of computing and moving
   data.

A roofline is a bound to compare with, not an estimate.  It counts matrix products and the memory traffic of
weights, of the KV cache and of the optimiser.  Softmaxes, norms, sampling, activations and the inefficiency
of small shapes count as free.

Assumptions: a prompt is prefilled once for all its samples; a slot is refilled as soon as its sequence ends;
a causal query reads only the keys before it, and in a sliding layer those of its window; the head runs only
where a logit is needed; nothing is recomputed.  In decoding each sequence reads its own keys and its prompt's,
although the samples of a prompt could share one read of the prompt's keys.

B prompts   N rows   P prompt tokens   L layers   D width   H query heads
K key/value heads   h head_dim   F feed-forward width   V vocabulary
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.model.config import ModelConfig
from cooper_jax.perf.machine import Rates

# The number of tokens of each row: i32[N].
Lengths = Sequence[int] | np.ndarray

# AdamW in float32: bytes of an element of parameters, gradients and both moments, and accesses per update.
MASTER_BYTES = 4
ADAM_ACCESSES = 7  # reads parameter, gradient and two moments; writes all but the gradient


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and memory traffic of a part of a program."""

    flops: float = 0.0  # a multiplication with its addition is two
    bytes: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Seconds at these rates, if computing and moving data overlap fully."""
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth)


def roofline_seconds(parts: dict[str, Work], rates: Rates) -> float:
    """Compute the roofline of a whole program: the sum over its parts."""
    return sum(part.seconds(rates) for part in parts.values())


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Count the weights that a token is multiplied with: (in all layers, in the head)."""
    # Attention has projections for queries and outputs (width x heads) and for keys and values (width x KV
    # heads); the feed-forward layer has three matrices.
    c = config
    attention = 2 * c.width * c.heads * c.head_dim + 2 * c.width * c.kv_heads * c.head_dim
    return c.layers * (attention + 3 * c.width * c.ffn), c.width * c.vocab_size


def rollout_work(
    config: ModelConfig,
    prompts: int,
    prompt_tokens: int,
    lengths: Lengths,
    slots: int,
    *,
    weight_bytes: int,
    cache_bytes: int,
) -> dict[str, Work]:
    """Count the work of prefilling B prompts and decoding `lengths` [N] tokens in `slots` rows at a time.

    A row's first token comes from the prefill, so its i-th decode step reads P + i keys.

    Args:
      weight_bytes: bytes of one weight.
      cache_bytes: bytes of one element of the KV cache.
    """
    body, head = count_weights(config)
    decoded = np.asarray(lengths, np.float64) - 1  # f64[N]
    tokens = float(decoded.sum())

    # Prefill is taken to be bound by compute: each weight is read once for many tokens.
    prefill = prompts * (2 * body * prompt_tokens + 2 * head + _count_causal_flops(config, prompt_tokens))

    # Every decode step reads all weights once.  There are at least as many steps as the longest row has.
    steps = max(decoded.max(), np.ceil(tokens / slots))
    keys = float(_count_keys(config, prompt_tokens, prompt_tokens + decoded).sum())  # in all layers
    elements_per_key = 2 * config.kv_heads * config.head_dim  # of keys and values
    traffic = float(steps * (body + head) * weight_bytes + keys * elements_per_key * cache_bytes)

    return {
        "prefill": Work(flops=prefill),
        "decode": Work(2 * (body + head) * tokens + _count_flops_per_key(config) * keys, traffic),
    }


def score_work(
    config: ModelConfig, prompt_tokens: int, lengths: Lengths, shared_prompts: int = 0
) -> dict[str, Work]:
    """Count the work of a forward pass over N rows of P + `lengths` [N] tokens, with response logits.

    shared_prompts: the number of rows that need not compute their prompt, since another row does (packed rows).
    """
    flops = _count_forward_flops(config, prompt_tokens, lengths, shared_prompts=shared_prompts)
    return {"forward": Work(flops=flops)}


def update_work(
    config: ModelConfig,
    prompt_tokens: int,
    lengths: Lengths,
    epochs: int = 1,
    updates: int = 1,
    shared_prompts: int = 0,
) -> dict[str, Work]:
    """Count the work of the policy's updates: `epochs` passes over N rows and `updates` steps of AdamW.

    Rows and shared_prompts are as in `score_work`.
    """
    forward = _count_forward_flops(config, prompt_tokens, lengths, shared_prompts=shared_prompts)
    flops = _count_passes(config) * epochs * forward
    return {"passes": Work(flops=flops), "optimiser": _count_adam_work(config, updates)}


def reward_score_work(config: ModelConfig, lengths: Lengths) -> dict[str, Work]:
    """Count the work of the reward model's scores of rows of `lengths` tokens.  Its head counts as free."""
    return {"forward": Work(flops=_count_forward_flops(config, 0, lengths, with_head=False))}


def pair_update_work(config: ModelConfig, lengths: Lengths) -> dict[str, Work]:
    """Count the work of the reward model's update over rows of `lengths` tokens.

    Its head is one vector and counts as free.
    """
    flops = _count_passes(config) * _count_forward_flops(config, 0, lengths, with_head=False)
    return {"passes": Work(flops=flops), "optimiser": _count_adam_work(config, 1)}


def _count_passes(config: ModelConfig) -> int:
    """The FLOPs of an update's passes, in forward passes."""
    # The backward pass has the gradients of activations and of weights, each as much as the forward pass.  Beside
    # adapters the weights are frozen; the adapters' own work counts as free.
    return 3 if config.lora is None else 2


def _count_forward_flops(
    config: ModelConfig,
    prompt_tokens: int,
    lengths: Lengths,
    with_head: bool = True,
    shared_prompts: int = 0,
) -> float:
    # The head is needed at the response's tokens only.
    body, head = count_weights(config)
    response = np.asarray(lengths, np.float64)  # f64[N]
    tokens = prompt_tokens + response
    flops = 2 * body * tokens + _count_causal_flops(config, tokens)
    if with_head:
        flops = flops + 2 * head * response
    prompt = 2 * body * prompt_tokens + _count_causal_flops(config, prompt_tokens)
    return float(flops.sum() - shared_prompts * prompt)


def _count_flops_per_key(config: ModelConfig) -> float:
    """Count the FLOPs of a query's products with one key and its value, in all heads of one layer."""
    return 4 * config.heads * config.head_dim


def _count_keys(config: ModelConfig, before, after):
    """Count the keys that queries before + 1 to `after` of a row read, over all layers.

    before, after: positions from 1 on, numbers or f64[N].
    """
    windows = collections.Counter(kind.window for kind in config.layer_kinds)
    return sum(
        layers * (_sum_keys(after, window) - _sum_keys(before, window)) for window, layers in windows.items()
    )


def _sum_keys(queries, window: int | None):
    """Sum the keys that the first `queries` queries of a row read in one layer: sum of min(i, window)."""
    if window is None:
        return queries * (queries + 1) / 2
    short = np.minimum(queries, window)
    return short * (short + 1) / 2 + (queries - short) * window


def _count_causal_flops(config: ModelConfig, tokens):
    """Count the FLOPs of causal attention over rows of `tokens` tokens (a number or f64[N])."""
    return _count_flops_per_key(config) * _count_keys(config, 0, tokens)


def _count_adam_work(config: ModelConfig, updates: int) -> Work:
    if config.lora is not None:
        return Work()
    return Work(bytes=float(updates * ADAM_ACCESSES * sum(count_weights(config)) * MASTER_BYTES))
