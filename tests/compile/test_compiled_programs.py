"""The paper configs' rollout and scoring programs compile for TPUs and GPUs, in place and without logits.

Fast: one model on one slice of each kind.  `-m slow`: both models, tensor 1 and 2, every chip, and a rollout whose
slots are half its requests with an int8 cache, sampled with top-p.
"""

import functools
import itertools
import math
import re

import programs
import pytest
from programs import Case

FAST = {("qwen_1p5b", "v5e", 2), ("llama3p2_1b", "h100", 2)}
CASES = [
    pytest.param(Case(*case), id="-".join(map(str, case)), marks=[] if case in FAST else [pytest.mark.slow])
    for case in itertools.product(programs.MODELS, ("v5e", "v5p", "v6e", "h100"), (1, 2))
]
OTHERS = [
    pytest.param(Case("llama3p2_1b", "v5e", 2, aligned=False, kv_dtype="int8"), id="llama-v5e-slots-int8"),
    pytest.param(Case("qwen_1p5b", "v6e", 1, aligned=False, top_p=0.9), id="qwen-v6e-slots-top_p"),
    pytest.param(Case("qwen_1p5b", "h100", 1, aligned=False, kv_dtype="int8"), id="qwen-h100-slots-int8"),
]

made = functools.cache(programs.made)


def sizes(text: str) -> dict[str, int]:
    """Elements of every array shape that a compiled program's text names."""
    shapes = set(re.findall(r"(?:f32|bf16|f16|s32|u32|s8|u8|pred)\[([\d,]+)\]", text))
    return {shape: functools.reduce(lambda a, b: a * int(b), shape.split(","), 1) for shape in shapes}


def copies(text: str, ends: set[str]) -> list[str]:
    """Instructions that copy or transpose an array whose shape ends so."""
    found = re.findall(r" = (\w+\[([\d,]+)\])\S* (copy|transpose|copy-start)\(", text)
    return [f"{op} of {array}" for array, dims, op in found if dims.endswith(tuple(ends))]


def check_segment(case: Case) -> None:
    setting = case.job.rollout
    config, spec = setting.config, setting.spec
    rollout = made(case, "rollout")
    segment, opened = rollout["segment"], rollout["open_slots"].output_arrays[0]
    rows = opened.request.shape[1]
    layer = config.width * config.ffn * 2 // case.tensor  # bytes of a layer's largest matrix, bfloat16
    # A row's activations in f32, all of a layer's side by side; a matrix on its way in, twice.
    bound = rows * 4 * (8 * config.width + 6 * config.ffn + 8 * config.heads * config.head_dim) + 2 * layer
    # Once a segment the compiler may lay a stack of projections out anew.
    bound += 2 * config.layers * config.width * config.heads * config.head_dim // case.tensor
    if spec.top_p < 1:
        bound += 4 * rows * 4 * config.padded_vocab // case.tensor
    assert segment.temporaries < bound, f"{segment.temporaries} bytes of temporaries, expected under {bound}"
    caches = [x for kv in (*opened.suffix, *rollout["prefill"].output_arrays.kv) for x in kv.data]
    # Heads, tokens and both halves of a cache, as a device has them.
    ends = {",".join(map(str, (x.shape[2] // case.tensor, *x.shape[3:]))) for x in caches}
    assert copies(segment.text, ends) == [], "the caches should be read and written in place"
    vocab = config.padded_vocab // case.tensor
    seen = sizes(segment.text)
    whole = max(math.prod(x.shape) for x in caches) // (setting.shards * case.tensor)
    assert max(seen.values()) <= max(whole, config.padded_vocab * config.width)  # the cache, or the head
    assert rows * vocab * spec.max_new_tokens > 2 * whole, "else the line above says nothing of logits"
    if spec.full_softmax:  # the head is fused with the draw: not even one token's logits are there
        logits = (f"{rows},{vocab}", f"{vocab},{rows}")
        assert not [shape for shape in seen if shape.endswith(logits)]


@pytest.mark.parametrize("case", CASES)
def test_rollout_compiles(case):
    check_segment(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_rollouts_of_other_kinds_compile(case):
    check_segment(case)


@pytest.mark.parametrize("case", CASES)
def test_scoring_compiles(case):
    config, cfg = case.job.policy, case.job.cfg
    scoring = made(case, "logprobs")["logprobs"]
    shards = case.job.layout.batch_shards
    rows, tokens = cfg.policy.microbatch // shards, cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    vocab = config.padded_vocab // case.tensor
    seen = sizes(scoring.text)
    assert max(seen.values()) <= config.width * vocab  # nothing is larger than the head: no logits
    # In the compute type's 2 bytes: a microbatch's activations, a layer's side by side; a layer's weights, twice;
    # the head, as gathered and as the kernel wants it laid out.
    heads = 4 * config.heads * config.head_dim
    layer = config.width * (3 * config.ffn + 2 * (config.heads + config.kv_heads) * config.head_dim)
    bound = rows * tokens * 2 * (8 * config.width + 4 * config.ffn // case.tensor + heads)
    bound += 2 * 2 * layer + 2 * 2 * config.width * vocab
    assert scoring.temporaries < bound, f"{scoring.temporaries} bytes of temporaries, expected under {bound}"
