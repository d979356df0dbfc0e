"""Budgets of memory and bytes, beside sums made by hand from the shapes of a small run.

A device of eight has 2 rows of 64 + 24 tokens in each of 2 microbatches.  The model: 2 layers, width 64, 4 query
heads and 2 key/value heads of 16, feed-forward 192, vocabulary 640.
"""

from __future__ import annotations

import dataclasses

import pytest
from test_compile import SMALL, config, job_of

from cooper_jax.perf import aot_programs, aot_search, budget_report, bytes_budget, large_arrays, memory_budget
from cooper_jax.perf.bytes_budget import Traffic
from cooper_jax.perf.memory_budget import Item, MemoryBudget

LAYER = 64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 192  # a layer's matrices
HEAD, NORMS = 640 * 64, 5 * 64
SHARD = (2 * LAYER + HEAD) // 8 + NORMS  # parameters of a device
X, ROWS = 2 * 88, 2 * 24  # tokens of a microbatch, and those that the head reads
# Adapters are trained beside weights that exist, without supervised phases.
ADAPTERS = dict(
    policy__lora__rank=4, reward__lora__rank=4, supervised__policy_steps=0, supervised__reward_steps=0
)


def small(**changes):
    """The small run, whose layers are recomputed in the backward pass, with a row for each response."""
    plain = dict(policy__remat=True, reward__remat=True, policy__packing="off", reward__packing="off")
    return config(**plain | changes)


def program_of(job, name):
    return next(p for p in aot_programs.list_programs(job) if p.name == name)


def memory_of(job, name) -> MemoryBudget:
    budget = memory_budget.plan_program(job, program_of(job, name))
    assert budget is not None
    return budget


def test_every_item_of_an_updates_memory():
    """In float32: no copy in the compute type."""
    budget = memory_of(job_of(small()), "policy update")
    assert {item.name: item.bytes for item in budget.items} == {
        "parameters": 4 * SHARD,
        "optimiser's moments": 2 * 4 * SHARD + 2 * 4,  # with AdamW's and the schedule's counters
        "batch": int(2 * X * (3 + 4 * 24 / 88) * 4),
        "sum of the gradients": 4 * SHARD,
        "gathered matrices of 2 layers": 2 * LAYER * 4,
        "activations kept for the backward pass": 2 * X * 64 * 4,
        "one layer's activations": X * (2 * 64 + 3 * 192) * 4,
        "one layer's activations and their gradients": X * (4 * 64 + 2 * (64 + 32) + 4 * 192) * 4,
        # Of one block of 64 queries: scores and probabilities of 2 rows and 4 heads.
        "scores of attention": 2 * 2 * 4 * 64 * 88 * 4,
        "one layer's gradients, before they are scattered": LAYER * 4,
        "the microbatch's gradients of the layers": (2 * LAYER // 8 + NORMS) * 4,
        "head in the compute type": HEAD * 4,
        "hidden states that the head reads": ROWS * 64 * 4,
        "logits of one chunk": ROWS * 640 * 4,
        "their gradient": ROWS * 640 * 4,
        "one chunk's gradient of the head": 640 * 64 * 4,
        "gradient of the hidden states": ROWS * 64 * 4,
        "the microbatch's gradient of the head": HEAD // 8 * 4,
    }


def test_a_budget_is_that_of_the_stage_that_needs_most():
    items = Item("always", 10), Item("a", 5, ("forward",)), Item("b", 7, ("head", "backward"))
    budget = MemoryBudget((*items, Item("c", 2, ("backward",))))
    assert [budget.count(stage) for stage in memory_budget.STAGES] == [15, 17, 19, 10]
    assert (budget.stage, budget.bytes) == ("backward", 19)
    lines = memory_budget.format_budget("x", budget, 38)
    assert "2.00 times" in lines[0] and len(lines) == 4 and not any(line.endswith("  a") for line in lines)


def test_memory_follows_the_settings():
    """The compute type, one microbatch, remat, a first moment in bfloat16, adapters."""
    plain = memory_of(job_of(small()), "policy update")

    def items(**changes):
        budget = memory_of(job_of(small(**changes)), "policy update")
        return {item.name: item.bytes for item in budget.items}

    half = items(policy__dtype="bfloat16")
    assert half["layers in the compute type"] == (2 * LAYER // 8 + NORMS - 64) * 2  # without the last norm
    assert half["gathered matrices of 2 layers"] == 2 * LAYER * 2

    one = memory_of(job_of(small(policy__microbatch=32)), "policy update")
    summed = next(item for item in one.items if item.name == "sum of the gradients")
    assert summed.stages == ("optimiser",)  # no running sum beside a microbatch's own gradients
    assert one.bytes > plain.bytes - 4 * SHARD

    kept = items(policy__remat=False)["activations kept for the backward pass"]
    assert kept == 2 * X * (4 * 64 + 2 * (64 + 32) + 3 * 192) * 4

    moments = items(policy__optimiser__first_moment="bfloat16")["optimiser's moments"]
    assert moments == (2 + 4) * SHARD + 2 * 4

    # Frozen weights have neither gradients nor moments.
    adapted = items(**ADAPTERS)
    trained = 2 * 4 * sum(sides for sides in (128, 96, 96, 128, 256, 256, 256))
    assert adapted["sum of the gradients"] <= 4 * trained < 4 * SHARD
    assert "the microbatch's gradient of the head" not in adapted
    assert "one layer's gradients, before they are scattered" not in adapted


def test_a_score_head_and_a_forward_pass_need_less():
    job = job_of(small())
    scores = {item.name: item.bytes for item in memory_of(job, "score").items}
    assert scores["parameters"] == 4 * (SHARD + 64) and "optimiser's moments" not in scores
    assert scores["one layer's activations"] == 2 * 112 * (2 * 64 + 3 * 192) * 4
    assert not any("head" in name for name in scores)
    pairs = memory_of(job, "pair update")
    shape = program_of(job, "pair update").microbatches[0]
    assert shape == (2, 112, 1, 1)  # both members of a device's pair
    assert pairs.resident == 3 * 4 * (SHARD + 64) + 2 * 4


def test_packed_rows_are_as_large_as_they_are_computed():
    job = job_of(small(policy__packing="on"))
    (shape,) = program_of(job, "policy update").microbatches
    (rows,) = {x.name: x for x in aot_programs.list_updates(job)}["policy update"].microbatches
    assert shape == rows and shape.positions == shape.rows * shape.tokens
    budget = {item.name: item.bytes for item in memory_of(job, "policy update").items}
    assert budget["activations kept for the backward pass"] == 2 * shape.positions * 64 * 4


def test_every_item_of_a_scores_bytes():
    """In float32, 2 microbatches of 176 tokens over 2 layers; plain XLA's head writes and reads its logits."""
    job = job_of(small())
    found = {x.name: x.bytes for x in bytes_budget.plan_program(job, program_of(job, "logprobs"))}
    tokens = 2 * 2 * X * 4  # of all layers and microbatches, in bytes of a channel
    D, Q, K, F = 64, 64, 32, 192
    assert found == {
        "layers gathered": 2 * (2 * LAYER // 8 + 2 * LAYER) * 4,
        "matrices multiplied": 2 * 2 * LAYER * 4,
        "layers forward: norms": tokens * 4 * D,
        "layers forward: products": tokens
        * ((3 * D + Q + 2 * K) + (Q + 2 * D) + (2 * D + 2 * F) + (F + 2 * D)),
        "layers forward: rotation and gate": tokens * (2 * (Q + K) + 3 * F),
        "layers forward: attention": tokens * (2 * Q + 2 * K),
        "embedding and last hidden states": 2 * X * 4 * (8 * D + 2 * D * 24 / 88),
        "head cast and gathered": 2 * (HEAD / 8 + HEAD) * 4,
        "head forward": 2 * (HEAD * 4 + ROWS * D * 4 + 2 * ROWS * 640 * 4),
    }


def test_an_update_moves_what_its_passes_move():
    """Backward twice the products of forward; the optimiser once; adapters leave out the matrices' gradients."""
    job = job_of(small())
    found = {x.name: x.bytes for x in bytes_budget.plan_program(job, program_of(job, "policy update"))}
    tokens = 2 * 2 * X * 4
    assert found["matrices multiplied"] == 3 * 2 * 2 * LAYER * 4
    forward = sum(size for name, size in found.items() if name.startswith("layers forward: "))
    assert found["layers forward again"] == forward - tokens * (2 * 64 + 192)
    assert found["layers backward: products for matrices"] == tokens * (7 * 64 + 2 * 64 + 2 * 32 + 3 * 192)
    assert found["sum of the gradients"] == SHARD * (4 + 2 * (2 * 4 + 4))
    assert found["optimiser"] == SHARD * 16 + 2 * (2 * 4 * SHARD + 8)
    adapted = job_of(small(**ADAPTERS))
    names = {x.name for x in bytes_budget.plan_program(adapted, program_of(adapted, "policy update"))}
    assert set(found) - names == {"layers backward: products for matrices", "gradients of matrices"}


def test_a_decode_segment_reads_weights_and_caches_once_a_token():
    job = job_of(small())
    program = program_of(job, "segment")
    found = {x.name: x.bytes for x in bytes_budget.plan_program(job, program)}
    assert found[bytes_budget.WEIGHTS] == program.trips * (2 * LAYER + HEAD) * 4
    # A prompt's 64 keys once for its 4 samples, and half of 24 own ones each; keys and values of 2 heads.
    assert found[bytes_budget.CACHES] == program.trips * 2 * (64 + 4 * 12) * 2 * 2 * 16 * 4
    assert found["cache written"] == program.trips * 2 * 4 * 2 * 2 * 16 * 4
    read = found[bytes_budget.WEIGHTS] + found[bytes_budget.CACHES]
    line = bytes_budget.format_budget("segment", tuple(Traffic(*x) for x in found.items()), 3 * read)[0]
    assert line.endswith("3.00 times weights and caches alone")
    assert not bytes_budget.plan_program(job, program_of(job, "open_slots"))


def test_arrays_that_should_not_be_there():
    text = """
      %a = f32[48,640]{1,0} dot(%x, %y)
      %b = f32[2,24,640]{2,1,0} bitcast(%a)
      %head = f32[640,64]{1,0} parameter(0), %shard = f32[640,8]{1,0} parameter(1), f32[640,8,8] reshape(%head)
      %scores = bf16[2,4,88,88]{3,2,1,0} dot(%q, %k)
    """
    assert large_arrays.find_logits(text, 640, 64, 48 * 256) == ["f32[2,24,640]", "f32[48,640]"]
    assert large_arrays.find_logits(text, 640, 64, 48 * 640) == []  # one chunk has the whole vocabulary
    assert large_arrays.find_scores(text, 88) == ["bf16[2,4,88,88]"]
    job = job_of(small())
    program = program_of(job, "policy update")
    assert budget_report.find_large_arrays(job, program, text) == ("bf16[2,4,88,88]",)
    made = budget_report.make_budget(job, program, text, 10**6, 10.0**9)
    assert made is not None and "policy update has bf16[2,4,88,88]" in budget_report.format_budgets((made,))
    clean = dataclasses.replace(made, too_large=())
    assert "in no program" in budget_report.format_budgets((clean,))


@pytest.mark.parametrize("packing", ["off", "on"])
def test_the_search_follows_the_budget(packing):
    """Frozen weights have no gradients, so that adapters leave room; packed rows count as they are computed."""
    job = job_of(small(policy__packing=packing))
    adapted = job_of(small(policy__packing=packing, **ADAPTERS))
    whole, less = aot_search._estimate_update_bytes(job), aot_search._estimate_update_bytes(adapted)
    budgets = [memory_of(job, name) for name in ("policy update", "pair update")]
    assert whole == aot_search.MEMORY_SLACK * max(b.bytes - b.resident for b in budgets)
    assert less < whole - 4 * SHARD
    assert SMALL["policy.microbatch"] == 16
