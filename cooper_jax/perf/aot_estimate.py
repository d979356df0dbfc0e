"""Memory and time of a step, estimated from its compiled programs without the devices that it would run on.

    CompileJob --compile_programs--> a CompiledProgram for each program
               --estimate_step-----> StepEstimate: whether the step fits, and its seconds;
                                     it has a ProgramEstimate for each program (estimate_program)

The compiler gives the bytes of a program's arguments, outputs and temporaries, and its optimised text.
`perf/hlo.py` counts FLOPs, bytes of device memory and bytes sent in that text.  This module estimates:

    seconds     the largest of the times for computing, memory traffic and communication, each at the chip's
                public peak.  A lower bound (roofline), not a forecast: it assumes peak rates, perfect overlap
                and no time on the host.  step_forecast.py makes a forecast beside it.
    attention   FLOPs and bytes of kernels that the compiled text does not show (kernel_costs.py)
    total       a program's own bytes, and the bytes of everything else that is in memory while it runs
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cooper_jax.perf import aot_programs, hlo, step_forecast
from cooper_jax.perf.aot_compile import CompiledProgram, TooLarge, compile_program
from cooper_jax.perf.aot_job import CompileJob
from cooper_jax.perf.aot_programs import StepProgram
from cooper_jax.perf.budget_report import ProgramBudget, make_budget
from cooper_jax.perf.chips import GIB, Topology
from cooper_jax.perf.step_forecast import StepForecast
from cooper_jax.runtime.mesh import Layout

RESOURCES = ("compute", "memory", "network")
# Kernels that declare the cost of reading full caches, but read only a part of them.  Their declaration is
# removed from the text, so that the cost of kernel_costs.py counts instead.
READ_IN_PART = ("decode_attention",)


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """Collectives of one kind and shape, summed over all iterations of a program's loops."""

    kind: str
    shape: str
    group: int  # devices
    times: float  # runs in one run of the program
    bytes: float  # sent by one device in all these runs
    seconds: float


@dataclasses.dataclass(frozen=True)
class ProgramEstimate:
    """One run of a program on one device: bytes in memory, work, and seconds at the chip's peaks."""

    name: str
    phase: str
    times: float  # runs per step
    compile_seconds: float
    # Bytes of device memory.  The first four are the compiler's figures.
    arguments: int
    temporaries: int
    outputs: int  # without the outputs that are written over donated arguments
    code: int
    others: int  # other arrays of the run that are in memory at the same time
    # Work, counted in the compiled text (perf/hlo.py).
    flops: float
    bytes: float  # of device memory, read and written
    sent: tuple[CollectiveTotal, ...]  # most seconds first
    seconds: dict[str, float]  # for each of RESOURCES
    # Notes on the count.
    unknown_loops: int  # loops counted with the program's own `trips`, because the text has no trip count
    kernels: dict[str, float]  # runs by kernel

    @property
    def total(self) -> int:
        """Bytes in memory while the program runs."""
        return self.arguments + self.temporaries + self.outputs + self.code + self.others

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(RESOURCES, key=lambda resource: self.seconds[resource])

    @property
    def roofline_seconds(self) -> float:
        """Seconds of the resource that takes longest."""
        return self.seconds[self.bound]


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """A step's programs, and the memory of the device that they run on."""

    programs: tuple[ProgramEstimate, ...]
    memory: int  # bytes of a device
    reserve: float  # share of that memory that must stay free
    tokens: int  # sampled in a step, at the longest response length
    ahead: bool = False  # the rollout of the next step runs beside the other phases, on devices of its own
    forecast: StepForecast | None = None  # None: not made
    budgets: tuple[ProgramBudget, ...] = ()  # of programs that compute

    @property
    def limit(self) -> int:
        """Bytes that may be used."""
        return int(self.memory * (1 - self.reserve))

    @property
    def largest(self) -> ProgramEstimate:
        """The program that needs most memory."""
        return max(self.programs, key=lambda program: program.total)

    @property
    def fits(self) -> bool:
        return self.largest.total <= self.limit

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase, in the order of a step."""
        seconds: dict[str, float] = {}
        for program in self.programs:
            program_seconds = program.times * program.roofline_seconds
            seconds[program.phase] = seconds.get(program.phase, 0.0) + program_seconds
        return seconds

    @property
    def seconds(self) -> float:
        """Seconds of the step: of all phases or, with a rollout ahead, of the slower side."""
        if not self.ahead:
            return sum(self.phases.values())
        rollout = self.phases["rollout"]
        return max(rollout, sum(self.phases.values()) - rollout)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def describe_excess(self) -> str:
        """Write the error message for a step that does not fit, with both numbers and flags that may help."""
        p = self.largest
        return (
            f"{p.name} needs {p.total / GIB:.2f} GiB of a device (arguments {p.arguments / GIB:.2f}, "
            f"temporaries {p.temporaries / GIB:.2f}, outputs {p.outputs / GIB:.2f}, rest of the run "
            f"{p.others / GIB:.2f}), but {self.limit / GIB:.2f} of its {self.memory / GIB:.2f} GiB may be "
            f"used: {suggest_flags(p.phase)}"
        )


def suggest_flags(phase: str) -> str:
    """Name the flags that reduce the memory of a phase."""
    # More chips and a larger tensor axis help in every phase; these flags shrink the phase's own batches.
    own = {
        "rollout": "a smaller --config.rollout.max_rows, --config.rollout.kv_dtype=int8",
        "score": "a smaller --config.reward.microbatch",
        "logprobs": "a smaller --config.policy.microbatch",
        "policy": "a smaller --config.policy.microbatch",
        "reward": "a smaller --config.reward.microbatch",
    }
    return f"try more chips, a larger --config.mesh.tensor, {own[phase]}, or --search"


# --- from programs to estimates --------------------------------------------------------------------------


def compile_programs(
    job: CompileJob,
    cache: Path | None = None,
    on_compiled: Callable[[StepProgram, CompiledProgram], None] | None = None,
) -> list[tuple[StepProgram, CompiledProgram]]:
    """Compile every program of a job, each with the outputs of those before it.

    cache: a folder for the compiler's reports.  on_compiled: called after each program.
    Raises TooLarge and SetupError like `compile_program`.
    """
    compiled: list[tuple[StepProgram, CompiledProgram]] = []
    # A program is lowered with the output layouts that the compiler chose for the programs before it.
    outputs: aot_programs.Outputs = {}
    for program in aot_programs.list_programs(job):
        try:
            result = compile_program(
                program.name, program.lower(outputs), job.layout_of(program.phase), cache
            )
        except TooLarge as error:
            raise TooLarge(f"{error}: {suggest_flags(program.phase)}") from error
        outputs[program.name] = result.output_arrays
        compiled.append((program, result))
        if on_compiled is not None:
            on_compiled(program, result)
    return compiled


def estimate_step(
    job: CompileJob, topology: Topology, compiled: list[tuple[StepProgram, CompiledProgram]], reserve: float
) -> StepEstimate:
    """Estimate memory and time of a step.  reserve: the share of a device's memory that must stay free."""
    sizes = list_sizes(aot_programs.resident_bytes(job), compiled)
    programs = tuple(
        estimate_program(program, result, sizes, job.layout_of(program.phase), topology)
        for program, result in compiled
    )
    # The sizes of a job are a full step's, so that every response has its full length.
    data, rollout = job.cfg.data, job.cfg.rollout
    tokens = data.prompts_per_step * rollout.group_size * rollout.max_new_tokens
    budgets = []
    for (program, result), figures in zip(compiled, programs, strict=True):
        budget = make_budget(job, program, result.text, result.most_memory, figures.bytes)
        budgets += [] if budget is None else [budget]
    return StepEstimate(
        programs,
        topology.chip.memory,
        reserve,
        tokens,
        ahead=job.ahead is not None,
        budgets=tuple(budgets),
    )


def list_sizes(
    resident: dict[str, int], compiled: list[tuple[StepProgram, CompiledProgram]]
) -> dict[str, int]:
    """List the bytes of each tree of arrays in memory by its name (aot_programs.ALWAYS and ROLLOUT).

    A tree that is a program's output has the compiler's figure, which includes padding.

    resident: bytes, from the arrays' shapes, of the trees that are in memory during the whole run.
    """
    sizes = resident | {p.makes: result.outputs for p, result in compiled if p.makes}
    # The reference is no program's output.  The compiler pads it as it pads the policy.
    if "reference" in resident:
        sizes["reference"] = resident["reference"] * sizes["policy"] // resident["policy"]
    return sizes


def estimate_program(
    program: StepProgram,
    compiled: CompiledProgram,
    sizes: dict[str, int],
    layout: Layout,
    topology: Topology,
) -> ProgramEstimate:
    """Estimate memory, work and seconds of one run of a program.  sizes: the result of `list_sizes`."""
    # Work per device, from the compiled text.
    cost = hlo.analyse_program(
        remove_cost_estimates(compiled.text, READ_IN_PART),
        unknown_trips=program.trips,
        declared=program.declared,
    )

    # Seconds at the chip's peaks.  Collectives run one after the other, so their seconds add up.
    collectives = _sum_collectives(cost.collectives, layout, topology)
    network_seconds = sum(c.seconds for c in collectives)
    chip = topology.chip
    seconds = cost.flops / chip.flops, cost.bytes / chip.bandwidth, network_seconds

    # `program.live` includes the arguments, which the compiler has counted already.
    live = sum(sizes[name] for name in program.live if name in sizes)
    return ProgramEstimate(
        name=program.name,
        phase=program.phase,
        times=program.times,
        compile_seconds=compiled.seconds,
        arguments=compiled.arguments,
        temporaries=compiled.temporaries,
        outputs=compiled.outputs - compiled.aliased,
        code=compiled.code,
        others=max(live - compiled.arguments, 0),
        flops=cost.flops,
        bytes=cost.bytes,
        sent=tuple(sorted(collectives, key=lambda c: -c.seconds)),
        seconds=dict(zip(RESOURCES, seconds, strict=True)),
        unknown_loops=cost.unknown_loops,
        kernels=cost.kernels,
    )


def _sum_collectives(
    collectives: tuple[hlo.Collective, ...], layout: Layout, topology: Topology
) -> list[CollectiveTotal]:
    """Sum collectives of the same kind, shape and group size, with their seconds on the network."""
    # The ids in the compiled text are positions on the mesh, not device ids.
    devices = layout.mesh.devices.reshape(-1)
    totals: dict[tuple[str, str, int], CollectiveTotal] = {}
    for c in collectives:
        group = tuple(devices[i] for i in _find_group(c))
        seconds = topology.seconds(c.kind, c.sent, group)
        key = c.kind, c.shape, c.group
        total = totals.get(key, CollectiveTotal(*key, times=0, bytes=0.0, seconds=0.0))
        totals[key] = dataclasses.replace(
            total,
            times=total.times + c.times,
            bytes=total.bytes + c.sent,
            seconds=total.seconds + seconds,
        )
    return list(totals.values())


def remove_cost_estimates(text: str, kernels: tuple[str, ...]) -> str:
    """Remove from a program's text the costs that these kernels declare."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if any(f"{kernel}/pallas_call" in line for kernel in kernels):
            lines[i] = re.sub(r'"cost_estimate":\{[^{}]*\},?', "", line)
    return "\n".join(lines)


def _find_group(c: hlo.Collective) -> list[int]:
    """Find the mesh positions of the devices in one of a collective's groups.

    One group stands for all, since they have the same shape on the mesh.
    """
    # The text does not always list the groups: then neighbours on the mesh are assumed.
    if c.groups is None:
        return list(range(c.group))
    if c.kind != "collective-permute":
        return list(c.groups[0])

    # A permutation lists (source, target) pairs: collect the devices connected to the first one.
    # Repeat until no further pair touches the set.
    group, links = {c.groups[0][0]}, list(c.groups)
    while connected := [link for link in links if group & set(link)]:
        group.update(*connected)
        links = [link for link in links if link not in connected]
    return sorted(group)


def step_to_json(step: StepEstimate) -> dict[str, Any]:
    """Convert a step to JSON values, with lists of its figures by their source."""
    programs = [
        dataclasses.asdict(p) | {"total": p.total, "bound": p.bound, "roofline_seconds": p.roofline_seconds}
        for p in step.programs
    ]
    # The three lists name the source of every figure: compiler, compiled text, or this module.
    return {
        "fits": step.fits,
        "largest_program": step.largest.name,
        "largest_bytes": step.largest.total,
        "limit_bytes": step.limit,
        "memory_bytes": step.memory,
        "reserve": step.reserve,
        "tokens": step.tokens,
        "seconds": step.seconds,
        "phases": step.phases,
        "tokens_per_second": step.tokens_per_second,
        "from_the_compiler": ["compile_seconds", "arguments", "temporaries", "outputs", "code"],
        "from_its_text": ["flops", "bytes", "sent"],
        "estimates": [
            "others",
            "total",
            "seconds",
            "roofline_seconds",
            "bound",
            "phases",
            "tokens_per_second",
        ],
        "forecast": None if step.forecast is None else step_forecast.forecast_to_json(step.forecast),
        "jax": jax.__version__,
        "programs": programs,
    }
