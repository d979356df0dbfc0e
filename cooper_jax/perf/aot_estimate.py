"""What a run costs on devices that need not be there: of each program, and of a whole step.

    Job --compile_all--> Compiled of each program --figures--> Figures --step--> Step: fits or not, seconds

From the compiler: bytes of a program's arguments, outputs and temporaries, and its optimised text.  From that text,
by `perf/hlo.py`: FLOPs, bytes of device memory, what is sent.  Estimates of ours, as far as the words go:

    seconds     the longest of FLOPs, bytes and sent bytes, each at the chip's public peak: nothing is slower than
                its peak, each hides behind the longest, the host takes no time.  A bound, then, not a forecast.
    attention   FLOPs and bytes of kernels whose text tells nothing of them (costs.py)
    total       a program's own bytes with those of all else that a run holds at that time
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cooper_jax.perf import aot_programs, hlo
from cooper_jax.perf.aot_compile import Compiled, TooLarge, compile_program
from cooper_jax.perf.aot_programs import Job, Program
from cooper_jax.perf.chips import GIB, Topology
from cooper_jax.runtime.mesh import Layout

SIDES = ("compute", "memory", "network")
# Their cost in the text is that of full caches: what is read is known only as they run.
READ_IN_PART = ("decode_attention",)


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one kind and shape, in all runs of a program's loops."""

    kind: str
    shape: str
    group: int
    times: float
    bytes: float  # that a device sends, in all
    seconds: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """A program on one device; bytes and seconds of one run."""

    name: str
    phase: str
    times: float  # a step
    compile_seconds: float
    arguments: int  # the compiler's, like the next three
    temporaries: int
    outputs: int  # but those in the place of arguments
    code: int
    others: int  # what else of the run is in memory
    flops: float
    bytes: float
    sent: tuple[Sent, ...]  # most seconds first
    seconds: dict[str, float]  # of each of SIDES
    unknown_loops: int
    kernels: dict[str, float]

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code + self.others

    @property
    def bound(self) -> str:
        return max(SIDES, key=lambda side: self.seconds[side])

    @property
    def longest(self) -> float:
        return self.seconds[self.bound]


@dataclasses.dataclass(frozen=True)
class Step:
    programs: tuple[Figures, ...]
    memory: int  # bytes of a device
    reserve: float  # share of them that is left alone
    tokens: int  # sampled in a step

    @property
    def limit(self) -> int:
        return int(self.memory * (1 - self.reserve))

    @property
    def largest(self) -> Figures:
        return max(self.programs, key=lambda f: f.total)

    @property
    def fits(self) -> bool:
        return self.largest.total <= self.limit

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase, in the order of a step."""
        out: dict[str, float] = {}
        for f in self.programs:
            out[f.phase] = out.get(f.phase, 0.0) + f.times * f.longest
        return out

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def refusal(self) -> str:
        """Why it does not fit, with both numbers and what would help."""
        f = self.largest
        return (
            f"{f.name} needs {f.total / GIB:.2f} GiB of a device (arguments {f.arguments / GIB:.2f}, temporaries "
            f"{f.temporaries / GIB:.2f}, outputs {f.outputs / GIB:.2f}, else of the run {f.others / GIB:.2f}), but "
            f"{self.limit / GIB:.2f} of its {self.memory / GIB:.2f} GiB may be used: {suggest_flags(f.phase)}"
        )


def suggest_flags(phase: str) -> str:
    """Flags that make a phase smaller."""
    own = {
        "rollout": "a smaller --config.rollout.max_rows, --config.rollout.kv_dtype=int8",
        "score": "a smaller --config.reward.microbatch",
        "logprobs": "a smaller --config.policy.microbatch",
        "policy": "a smaller --config.policy.microbatch",
        "reward": "a smaller --config.reward.microbatch",
    }
    return f"try more chips, a larger --config.mesh.tensor, {own[phase]}, or --search"


# --- from programs to figures ----------------------------------------------------------------------------


def compile_programs(
    job: Job, keep: Path | None = None, said: Callable[[Program, Compiled], None] | None = None
) -> list[tuple[Program, Compiled]]:
    """Every program of a job; said: is given each as soon as it is there.  Raises as `compile_`."""
    out, made = [], {}
    for program in aot_programs.list_programs(job):
        try:
            compiled = compile_program(program.name, program.lower(made), job.layout, keep)
        except TooLarge as error:
            raise TooLarge(f"{error}: {suggest_flags(program.phase)}") from error
        made[program.name] = compiled.outputs
        out.append((program, compiled))
        if said is not None:
            said(program, compiled)
    return out


def estimate_step(
    job: Job, topology: Topology, compiled: list[tuple[Program, Compiled]], reserve: float
) -> Step:
    held = list_sizes(aot_programs.resident_bytes(job), compiled)
    found = tuple(program_figures(p, c, held, job.layout, topology) for p, c in compiled)
    data, rollout = job.cfg.data, job.cfg.rollout
    tokens = data.prompts_per_step * rollout.group_size * rollout.max_new_tokens
    return Step(found, topology.chip.memory, reserve, tokens)


def list_sizes(held: dict[str, int], compiled: list[tuple[Program, Compiled]]) -> dict[str, int]:
    """Bytes of whatever lies in memory, by its name: the compiler's figure where a program makes it.

    The reference is padded as the policy is.
    """
    out = held | {p.makes: c.made for p, c in compiled if p.makes}
    out["reference"] = held["reference"] * out["policy"] // held["policy"]
    return out


def program_figures(
    program: Program, compiled: Compiled, held: dict[str, int], layout: Layout, topology: Topology
) -> Figures:
    cost = hlo.analyse_program(
        strip_cost_notes(compiled.text, READ_IN_PART), unknown_trips=program.trips, declared=program.declared
    )
    chip, devices = topology.chip, layout.mesh.devices.reshape(-1)
    sent: dict[tuple, Sent] = {}
    for c in cost.collectives:
        seconds = topology.seconds(c.kind, c.sent, tuple(devices[i] for i in _group(c)))
        key = c.kind, c.shape, c.group
        one = sent.get(key, Sent(*key, 0, 0.0, 0.0))
        sent[key] = dataclasses.replace(
            one, times=one.times + c.times, bytes=one.bytes + c.sent, seconds=one.seconds + seconds
        )
    network = sum(s.seconds for s in sent.values())
    sides = cost.flops / chip.flops, cost.bytes / chip.bandwidth, network
    live = sum(held[name] for name in program.live if name in held)
    return Figures(
        name=program.name,
        phase=program.phase,
        times=program.times,
        compile_seconds=compiled.seconds,
        arguments=compiled.arguments,
        temporaries=compiled.temporaries,
        outputs=compiled.made - compiled.aliased,
        code=compiled.code,
        others=max(live - compiled.arguments, 0),
        flops=cost.flops,
        bytes=cost.bytes,
        sent=tuple(sorted(sent.values(), key=lambda s: -s.seconds)),
        seconds=dict(zip(SIDES, sides, strict=True)),
        unknown_loops=cost.unknown_loops,
        kernels=cost.kernels,
    )


def strip_cost_notes(text: str, kernels: tuple[str, ...]) -> str:
    """A program's text without what these kernels say that they cost."""

    def quiet(line: str) -> str:
        named = any(f"{kernel}/pallas_call" in line for kernel in kernels)
        return re.sub(r'"cost_estimate":\{[^{}]*\},?', "", line) if named else line

    return "\n".join(map(quiet, text.split("\n")))


def _group(c: hlo.Collective) -> list[int]:
    """Places on the mesh of the devices of one of a collective's groups; neighbours where it does not tell."""
    if c.groups is None:
        return list(range(c.group))
    if c.kind != "collective-permute":
        return list(c.groups[0])
    joined, links = {c.groups[0][0]}, list(c.groups)
    while more := [link for link in links if joined & set(link)]:
        joined |= {i for link in more for i in link}
        links = [link for link in links if link not in more]
    return sorted(joined)


def step_to_json(step: Step) -> dict[str, Any]:
    """For JSON."""
    programs_ = [
        dataclasses.asdict(f) | {"total": f.total, "bound": f.bound, "roofline_seconds": f.longest}
        for f in step.programs
    ]
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
        "jax": jax.__version__,
        "programs": programs_,
    }
