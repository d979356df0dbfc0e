"""The paper config's programs beside their budgets of memory and bytes, which follow from shapes and settings."""

from __future__ import annotations

import functools

import jax
import programs
import pytest
from programs import Case

from cooper_jax.perf import aot_estimate, aot_programs, budget_report, bytes_budget, hlo
from cooper_jax.perf.budget_report import ProgramBudget

MEMORY, BYTES = 1.25, 1.3  # how many times its budget a program may take
made = functools.cache(programs.made)


def budgets(chip: str, phase: str) -> dict[str, ProgramBudget]:
    """The budgets of a phase's programs beside what is compiled, by their names."""
    case = Case("qwen_1p5b", chip, 1)
    compiled, found = made(case, phase), {}
    for program in aot_programs.list_programs(case.job):
        if program.name not in compiled:
            continue
        result = compiled[program.name]
        text = aot_estimate.remove_cost_estimates(result.text, aot_estimate.READ_IN_PART)
        moved = hlo.analyse_program(text, unknown_trips=program.trips, declared=program.declared).bytes
        budget = budget_report.make_budget(case.job, program, result.text, result.most_memory, moved)
        if budget is not None:
            found[program.name] = budget
    return found


def cases(*fast: tuple[str, str]):
    for chip in ("v5e", "v6e", "h100"):
        for phase in ("score", "logprobs", "policy", "reward"):
            marks = [] if (chip, phase) in fast else [pytest.mark.slow]
            yield pytest.param(chip, phase, id=f"{phase}-{chip}", marks=marks)


@pytest.mark.parametrize("chip, phase", cases(("v5e", "logprobs"), ("h100", "policy")))
def test_training_and_scoring_stay_within_their_budgets(chip, phase):
    for name, b in budgets(chip, phase).items():
        assert b.memory is not None
        print(f"{chip}, {name}: memory {b.compiled / b.memory.bytes:.2f}, bytes {b.moved / b.must_move:.2f}")
        assert b.compiled < MEMORY * b.memory.bytes
        assert b.moved < BYTES * b.must_move
        assert b.too_large == ()


@pytest.mark.parametrize(
    "chip", [pytest.param("v5e", marks=pytest.mark.slow), pytest.param("v6e", marks=pytest.mark.slow), "h100"]
)
def test_rollouts_stay_within_their_budgets(chip):
    """On GPUs, too, no layer's matrices are copied out of a stack: that took 2.1 times the budget of a segment."""
    found = budgets(chip, "rollout")
    for name in ("prefill", "segment"):
        b = found[name]
        print(f"{chip}, {name}: bytes {b.moved / b.must_move:.2f}")
        assert b.moved < BYTES * b.must_move
    must_read = bytes_budget.WEIGHTS, bytes_budget.CACHES
    read = sum(x.bytes for x in found["segment"].traffic if x.name in must_read)
    assert found["segment"].moved < 1.7 * read


@pytest.mark.parametrize("chip", ["h100"])
def test_the_copy_of_the_weights_is_made_layer_by_layer(chip):
    """Gathered as one stack and then split, the layers would be there twice."""
    case = Case("qwen_1p5b", chip, 1)
    copied = made(case, "rollout")["reshard"]
    layers = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(copied.output_arrays["layers"]))
    print(f"{copied.temporaries / 2**30:.2f} GiB of temporaries for {layers / 2**30:.2f} GiB of layers")
    assert copied.temporaries < layers / 2
