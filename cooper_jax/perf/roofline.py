"""The least work that a step's programs can do, and so the least time that they can take on a machine.

A bound for comparison, no estimate: it counts matrix products, the traffic of weights and of keys and values, and
that of the optimiser.  Softmaxes, norms, draws, activations and whatever small shapes cost are free.

1. `rollout`, `score`, `update` and `pair_update` count a model's work -> {part: Work}; parts run one after the
   other.
2. `seconds` of a part at a machine's rates (perf/machine.py): the longer of its products and its traffic.

Assumed: a prompt is computed once for all its samples; a slot whose row has ended is refilled at once; a causal
query meets only the keys before it; the head runs only where a logit is needed; nothing is computed twice.  In
decoding each row reads its own and its prompt's keys, although samples could share one read of the latter: that is
how the peers' benchmark counts, with which these numbers are meant to agree.

B prompts   N rows   P prompt tokens   L layers   D width   H query heads
K key/value heads   h head_dim   F feed-forward width   V vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from cooper_jax.model.config import ModelConfig
from cooper_jax.perf.machine import Rates

MASTER_BYTES = 4  # parameters, gradients and both moments are float32
ADAM_ACCESSES = 7  # reads parameter, gradient and two moments; writes all but the gradient


@dataclasses.dataclass(frozen=True)
class Work:
    flops: float = 0.0  # a multiplication with its addition is two
    bytes: float = 0.0

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth)


def roofline_seconds(parts: dict[str, Work], rates: Rates) -> float:
    return sum(part.seconds(rates) for part in parts.values())


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights that a token is multiplied with: those of the layers, and the head's."""
    c = config
    layer = 2 * c.width * c.heads * c.head_dim + 2 * c.width * c.kv_heads * c.head_dim + 3 * c.width * c.ffn
    return c.layers * layer, c.width * c.vocab_size


def rollout_work(
    config: ModelConfig,
    prompts: int,
    prompt_tokens: int,
    lengths: Sequence[int],
    slots: int,
    *,
    weight_bytes: int,
    cache_bytes: int,
) -> dict[str, Work]:
    """Prefill of B prompts, then `lengths` [N] tokens a row, at most `slots` rows at a time.

    A row's first token comes from the prefill, so its i-th decode step reads P + i keys.
    weight_bytes, cache_bytes: of a weight, and of an element of the cache.
    """
    body, head = count_weights(config)
    decoded = np.asarray(lengths, np.float64) - 1
    prefill = prompts * (2 * body * prompt_tokens + 2 * head + _causal(config, prompt_tokens))
    tokens = float(decoded.sum())
    keys = float((decoded * prompt_tokens + decoded * (decoded + 1) / 2).sum())
    steps = max(decoded.max(), np.ceil(tokens / slots))  # each reads every weight once
    cached = 2 * config.layers * config.kv_heads * config.head_dim  # a token's keys and values
    traffic = float(steps * (body + head) * weight_bytes + keys * cached * cache_bytes)
    return {
        "prefill": Work(flops=prefill),
        "decode": Work(2 * (body + head) * tokens + _attention(config) * keys, traffic),
    }


def score_work(config: ModelConfig, prompt_tokens: int, lengths: Sequence[int]) -> dict[str, Work]:
    """One forward pass over N rows of P + `lengths` [N] tokens, with a logit at each of the latter."""
    return {"forward": Work(flops=_forward(config, prompt_tokens, lengths))}


def update_work(
    config: ModelConfig, prompt_tokens: int, lengths: Sequence[int], epochs: int = 1, updates: int = 1
) -> dict[str, Work]:
    """`epochs` forward and backward passes (twice the forward's work) over such rows, `updates` of AdamW."""
    flops = 3 * epochs * _forward(config, prompt_tokens, lengths)
    return {"passes": Work(flops=flops), "optimiser": _adam(config, updates)}


def pair_update_work(config: ModelConfig, lengths: Sequence[int]) -> dict[str, Work]:
    """The reward model's update over rows of `lengths` tokens; its head is one vector, and free."""
    flops = 3 * _forward(config, 0, lengths, scored=False)
    return {"passes": Work(flops=flops), "optimiser": _adam(config, 1)}


def _forward(config: ModelConfig, prompt_tokens: int, lengths: Sequence[int], scored: bool = True) -> float:
    body, head = count_weights(config)
    response = np.asarray(lengths, np.float64)
    tokens = prompt_tokens + response
    flops = 2 * body * tokens + _causal(config, tokens) + scored * 2 * head * response
    return float(flops.sum())


def _attention(config: ModelConfig) -> float:
    """Of one query with one key, in every layer and head: a product with the key, one with the value."""
    return 4 * config.layers * config.heads * config.head_dim


def _causal(config: ModelConfig, tokens):
    return _attention(config) * tokens * (tokens + 1) / 2


def _adam(config: ModelConfig, updates: int) -> Work:
    return Work(bytes=float(updates * ADAM_ACCESSES * sum(count_weights(config)) * MASTER_BYTES))
