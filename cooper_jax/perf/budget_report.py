"""Compiled programs beside their budgets of memory and bytes, and the arrays that they should not have."""

from __future__ import annotations

import dataclasses
from typing import Any

from cooper_jax.perf import bytes_budget, large_arrays, memory_budget
from cooper_jax.perf.aot_job import CompileJob
from cooper_jax.perf.aot_programs import StepProgram
from cooper_jax.perf.bytes_budget import Traffic
from cooper_jax.perf.chips import GIB
from cooper_jax.perf.layer_shapes import shape_layer
from cooper_jax.perf.memory_budget import MemoryBudget


@dataclasses.dataclass(frozen=True)
class ProgramBudget:
    """A program's figures on one device, and what they should be."""

    name: str
    # Bytes in memory: the compiler's at the program's peak (CompiledProgram.most_memory), and the budget.
    compiled: int
    memory: MemoryBudget | None
    # Bytes read and written: of the compiled text, and the budget.
    moved: float
    traffic: tuple[Traffic, ...]
    # Shapes in the compiled text: logits of more than one chunk, scores over all positions.
    too_large: tuple[str, ...]

    @property
    def must_move(self) -> float:
        """Bytes that the program must move."""
        return sum(item.bytes for item in self.traffic)


def make_budget(
    job: CompileJob, program: StepProgram, text: str, compiled: int, moved: float
) -> ProgramBudget | None:
    """Make the budget of a program beside its figures; None for programs that only move arrays about.

    text: the compiled program.  compiled, moved: see ProgramBudget.
    """
    memory, traffic = (plan.plan_program(job, program) for plan in (memory_budget, bytes_budget))
    if not traffic:
        return None
    too_large = find_large_arrays(job, program, text)
    return ProgramBudget(program.name, compiled, memory, moved, traffic, too_large)


def find_large_arrays(job: CompileJob, program: StepProgram, text: str) -> tuple[str, ...]:
    """Find logits of more than one chunk, and scores over all positions of a row, in a program's text."""
    model = job.reward if program.phase in ("score", "reward") else job.policy
    assert model is not None
    layers, found = shape_layer(model, job.layout), []
    for shape in program.microbatches:
        entries = memory_budget.count_chunk(job, layers, shape)
        found += large_arrays.find_logits(
            text, layers.vocabulary, layers.width, shape.rows * shape.read * entries
        )
        # An axis of another kind may have as many elements as a row has tokens: then two such axes say nothing.
        if shape.tokens not in (layers.width, layers.queries, layers.keys, layers.ffn):
            found += large_arrays.find_scores(text, shape.tokens)
    return tuple(dict.fromkeys(found))


def format_budgets(budgets: tuple[ProgramBudget, ...]) -> str:
    """Format the budgets of a step's programs: a table of ratios, and below it every item."""
    lines = [
        "budgets, derived from shapes and settings: GiB in memory, GB moved in one run, and how many times the "
        "budget the compiled program takes",
        f"{'':15}{'compiled':>10}{'budget':>9}{'times':>7}{'moved':>12}{'budget':>10}{'times':>7}",
    ]
    for b in budgets:
        memory = " " * 26
        if b.memory is not None:
            ratio = b.compiled / b.memory.bytes
            memory = f"{b.compiled / GIB:10.2f}{b.memory.bytes / GIB:9.2f}{ratio:7.2f}"
        traffic = f"{b.moved / 1e9:12.2f}{b.must_move / 1e9:10.2f}{b.moved / b.must_move:7.2f}"
        lines.append(f"{b.name:15}{memory}{traffic}")

    large = [f"{b.name} has {', '.join(b.too_large)}" for b in budgets if b.too_large]
    lines.append(
        "logits of more than one chunk, scores over all positions: " + ("; ".join(large) or "in no program")
    )
    for b in budgets:
        if b.memory is not None:
            lines += memory_budget.format_budget(f"memory of {b.name}", b.memory, b.compiled)
        lines += bytes_budget.format_budget(f"bytes of {b.name}", b.traffic, b.moved)
    return "\n".join(lines)


def budgets_to_json(budgets: tuple[ProgramBudget, ...]) -> dict[str, Any]:
    """Convert budgets to JSON values, by program."""
    return {
        b.name: {
            "compiled_bytes": b.compiled,
            "memory_budget_bytes": None if b.memory is None else b.memory.bytes,
            "memory_items": [] if b.memory is None else [dataclasses.asdict(item) for item in b.memory.items],
            "moved_bytes": b.moved,
            "bytes_budget": b.must_move,
            "bytes_items": {item.name: item.bytes for item in b.traffic},
            "too_large": list(b.too_large),
        }
        for b in budgets
    }
