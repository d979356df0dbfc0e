"""Speeds that others published, and our own measurements, with the facts that a bound on each needs.

speed_calibration.py compares the estimator with them.  A row is usable if its source states model, chip, number of
devices, batch, lengths and type.  `seconds` is written as the arithmetic that leads from the source's figure to
seconds, so that the figure can be found there.

Sources that state too little, and are left out:

    Open-Athena/MarinFold#99           1.5B on v5p-8, 17.2k tokens/s: neither batch nor prompts' lengths
    vllm-project/tpu-inference#3165    a DAPO step of Qwen3-0.6B on v7x: no lengths of the answers
    MaxText, 16B on v5e, 32B on v5p    MFU alone; the models' shapes depend on the version of the scripts
    NeMo-RL, Qwen3-30B-A3B on H100     a mixture of experts, which this estimator does not count
    NVIDIA NeMo, training in FP8       no type that this project trains in
    torchtitan, Llama 3.1 8B           an H100 with other memory and less power than the data sheet's
    tpu-recipes, JetStream Llama 2 7B  the same figures under v5e and v6e, without the number of chips
    vllm-project/vllm#10241            Qwen2.5-1.5B on v5e with ShareGPT's lengths
    arXiv 2604.15464                   86 % of the bandwidth in one kernel, not in a whole model

Of our own, the reward model's update is left out: its share of the roofline in docs/performance.md is that of a
larger batch than the command beside it has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cooper_jax.model.config import ModelConfig

# What is timed: a rollout (prefill and decoding), forward passes alone, or an update of all weights.
KINDS = ("rollout", "score", "update")


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """A measured time, with the facts that the roofline of the same work needs."""

    name: str
    kind: str  # one of KINDS
    source: str
    # The model and the machine.
    model: str  # a key of SHAPES
    chip: str  # a key of chips.CHIPS
    devices: int  # as JAX counts them
    # The work.
    rows: int  # sequences in all
    prompt_tokens: int  # of each
    response_tokens: int  # of each; 0: prompts alone, with logits for the last token
    seconds: float
    # Options.
    group: int = 1  # rows that share one prompt
    slots: int = 0  # rows decoded at a time; 0: all
    ragged: bool = False  # response lengths as `launch/bench.py --ragged` draws them
    decode_only: bool = False  # the time leaves the prefill out
    weight_bytes: int = 2  # of one weight
    cache_bytes: int = 2  # of one element of the KV cache
    peak_factor: float = 1.0  # of the chip's FLOP/s in bfloat16; 2 for FP8 on an H100 (NVIDIA's data sheet)
    own: bool = False  # measured by us (docs/performance.md), not published by others
    note: str = ""


def _shape(layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab_size: int, head_dim=128):
    """Make the config of a Llama-like model.  What its norms and rotary embeddings are makes no difference here."""
    return ModelConfig(
        family="llama", vocab_size=vocab_size, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, ffn=ffn, rope_theta=1e4, rope_scaling=None, norm_eps=1e-6, qkv_bias=False, tied=False,
        max_len=None,
    )  # fmt: skip


# From the models' config.json.  MPT's feed-forward layer has two matrices of 4 times the width, so `ffn` is that of
# three matrices with as many weights.
SHAPES = {
    "Qwen2.5-1.5B": _shape(28, 1536, 12, 2, 8960, 151936),
    "Llama-3.2-1B": _shape(16, 2048, 32, 8, 8192, 128256, head_dim=64),
    "Llama-3.1-8B": _shape(32, 4096, 32, 8, 14336, 128256),
    "Llama-3.1-70B": _shape(80, 8192, 64, 8, 28672, 128256),
    "Llama-2-7B": _shape(32, 4096, 32, 32, 11008, 32000),
    "Llama-2-70B": _shape(80, 8192, 64, 8, 28672, 32000),
    "Mistral-7B": _shape(32, 4096, 32, 8, 14336, 32000),
    "Qwen3-8B": _shape(36, 4096, 32, 8, 12288, 151936),
    "MPT-1B": _shape(24, 2048, 16, 16, 5461, 50368),
    "MPT-3B": _shape(32, 2560, 20, 20, 6827, 50368),
    "MPT-7B": _shape(32, 4096, 32, 32, 10923, 50368),
}

# --- published by others -----------------------------------------------------------------------------------

# Sources on GitHub: OWNER/REPOSITORY#NUMBER is an issue or a pull request, OWNER/REPOSITORY/PATH a file.
_MARIN = "marin-community/marin"
_TRT = "NVIDIA/TensorRT-LLM/docs/source/performance.md (v0.6.1)"
_TRT_LATENCY = "NVIDIA/TensorRT-LLM/docs/source/performance.md (first token, v0.5)"
_JAX_EXAMPLES = "jax-ml/jax-llm-examples/llama3/README.md"
_FP8: dict[str, Any] = dict(weight_bytes=1, cache_bytes=1, peak_factor=2.0)
_KEYS_LEFT_OUT = (
    "decode steps a second; the keys are left out, since the README does not say how many a row has"
)
_V6E_RECIPES = "AI-Hypercomputer/tpu-recipes/training/trillium"
_MOSAIC = "mosaicml/llm-foundry/scripts/train/benchmarking"

_ROLLOUTS = (
    SpeedRow("vLLM", "rollout", f"{_MARIN}#6214", "Qwen3-8B", "v6e", 8, 8, 2048, 128, 8 * 128 / 1264.03),
    SpeedRow("Levanter", "rollout", f"{_MARIN}#6214", "Qwen3-8B", "v6e", 8, 8, 2048, 128, 8 * 128 / 957.72),
    SpeedRow("vLLM", "rollout", f"{_MARIN}#6185", "Qwen3-8B", "v6e", 8, 32, 512, 512, 32 * 512 / 4880.32),
    SpeedRow(
        "vLLM", "rollout", "vllm-project/vllm#16458", "Llama-3.1-8B", "v6e", 1, 987, 1800, 120,
        987 / 8.37, slots=512, note="at most max_num_seqs rows at a time; the memory holds fewer",
    ),
    SpeedRow(
        "vLLM", "rollout", "vllm-project/vllm#9471", "Llama-3.1-8B", "h100", 1, 64, 1024, 1024,
        10.92, weight_bytes=1, peak_factor=2.0, note="weights in FP8",
    ),
    SpeedRow(
        "jax-llm-examples", "rollout", _JAX_EXAMPLES, "Llama-3.1-70B", "v5e", 16, 8, 0, 2, 1 / 159,
        decode_only=True, weight_bytes=1, note=_KEYS_LEFT_OUT,
    ),
    SpeedRow(
        "jax-llm-examples", "rollout", _JAX_EXAMPLES, "Llama-3.1-70B", "v5e", 16, 16, 0, 2, 1 / 135,
        decode_only=True, weight_bytes=1, note=_KEYS_LEFT_OUT,
    ),
    SpeedRow(
        "TensorRT-LLM", "rollout", _TRT, "Llama-2-7B", "h100", 1, 112, 128, 2048, 112 * 2048 / 6818,
        **_FP8, note="FP8",
    ),
    SpeedRow(
        "TensorRT-LLM", "rollout", _TRT, "Llama-2-7B", "h100", 1, 48, 2048, 2048, 48 * 2048 / 2740,
        **_FP8, note="FP8",
    ),
    SpeedRow(
        "TensorRT-LLM", "rollout", _TRT, "Llama-2-70B", "h100", 4, 480, 128, 2048, 480 * 2048 / (1486 * 4),
        **_FP8, note="FP8",
    ),
)  # fmt: skip
_SCORES = (
    SpeedRow(
        "TensorRT-LLM", "score", _TRT_LATENCY, "Llama-2-7B", "h100", 1, 1, 2048, 0, 0.036, **_FP8, note="FP8"
    ),
    SpeedRow(
        "TensorRT-LLM", "score", _TRT_LATENCY, "Llama-2-70B", "h100", 4, 1, 2048, 0, 0.109, **_FP8, note="FP8"
    ),
    SpeedRow(
        "Levanter", "score", f"{_MARIN}#6229", "Qwen3-8B", "v6e", 8, 2, 2048, 0, 0.055,
        note="a prefill of 4,096 tokens",
    ),
)  # fmt: skip
_UPDATES = (
    SpeedRow(
        "MaxText", "update", f"{_V6E_RECIPES}/Llama3.1-8B-MaxText/v6e-8", "Llama-3.1-8B", "v6e", 8, 3 * 8, 0, 8192,
        3.443,
    ),
    SpeedRow(
        "MaxText", "update", f"{_V6E_RECIPES}/Llama3.1-8B-MaxText/v6e-256", "Llama-3.1-8B", "v6e", 256, 4 * 256, 0,
        8192, 4.546,
    ),
    SpeedRow(
        "MaxText", "update", f"{_V6E_RECIPES}/Llama3.1-70B-MaxText/v6e-32", "Llama-3.1-70B", "v6e", 32, 2 * 32, 0,
        8192, 17.790,
    ),
    SpeedRow(
        "MaxText", "update", f"{_V6E_RECIPES}/Mistral-7B-MaxText", "Mistral-7B", "v6e", 8, 6 * 8, 0, 8192, 6.320
    ),
    SpeedRow(
        "MaxText", "update", "AI-Hypercomputer/tpu-recipes/training/ironwood", "Llama-3.1-70B", "tpu7x",
        128, 256, 0, 8192, 12.20, note="64 chips of two devices",
    ),
    SpeedRow(
        "MaxText", "update", "AI-Hypercomputer/maxtext/docs/reference/models/tiering.md", "Llama-2-70B", "v5p", 512,
        4 * 512, 0, 4096, 4 * 4096 / 692,
        note="the batch is ours: only the optimiser's share, below 1 %, depends on it",
    ),
    SpeedRow(
        "llm-foundry", "update", _MOSAIC, "MPT-1B", "h100", 8, 112, 0, 2048, 112 * 2048 / (45455 * 8)
    ),
    SpeedRow(
        "llm-foundry", "update", _MOSAIC, "MPT-3B", "h100", 16, 480, 0, 2048, 480 * 2048 / (24142 * 16)
    ),
    SpeedRow("llm-foundry", "update", _MOSAIC, "MPT-7B", "h100", 8, 48, 0, 2048, 48 * 2048 / (10643 * 8)),
)  # fmt: skip
PUBLISHED = (*_ROLLOUTS, *_SCORES, *_UPDATES)

# --- measured by us ----------------------------------------------------------------------------------------

_OURS = "docs/performance.md"
OWN = (
    SpeedRow(
        "cooper_jax", "rollout", _OURS, "Qwen2.5-1.5B", "h100", 1, 256, 512, 512, 256 * 512 / 29756, group=16,
        own=True,
    ),
    SpeedRow(
        "cooper_jax", "rollout", _OURS, "Qwen2.5-1.5B", "h100", 1, 1024, 512, 512, 1024 * 512 / 59271, group=16,
        own=True,
    ),
    SpeedRow(
        "cooper_jax", "rollout", _OURS, "Qwen2.5-1.5B", "h100", 1, 256, 512, 512, 31129 / 10967, group=16,
        slots=128, ragged=True, own=True, note="31,129 tokens of uneven responses",
    ),
    SpeedRow(
        "cooper_jax", "rollout", _OURS, "Llama-3.2-1B", "h100", 1, 256, 512, 512, 256 * 512 / 42323, group=16,
        own=True,
    ),
    SpeedRow("cooper_jax", "score", _OURS, "Qwen2.5-1.5B", "h100", 1, 64, 512, 512, 64 * 1024 / 184527, own=True),
    SpeedRow(
        "cooper_jax", "update", _OURS, "Qwen2.5-1.5B", "h100", 1, 64, 512, 512,
        64 * 1024 / (41610 * 44553) ** 0.5, own=True, note="41,610 and 44,553 tokens/s in two runs",
    ),
)  # fmt: skip
ROWS = (*PUBLISHED, *OWN)
