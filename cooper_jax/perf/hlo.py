"""What a compiled program does on one device: `analyse(compiled.as_text())`.

XLA's own `cost_analysis()` counts the body of a loop once; here it counts as often as it runs.

FLOPs are those of dots and convolutions (a multiplication and an addition are 2), and what kernels declare of
themselves (`pl.CostEstimate`; XLA:GPU drops it, and some kernels have none: see `declared`).  Elementwise work is
left out.  Bytes are those of device memory: operands and results of whatever is not fused away, slices as slices,
updates in place as updates.  A TPU's on-chip memory is not counted.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cooper_jax.perf import hlo_loops
from cooper_jax.perf.hlo_loops import SAME, THROUGH
from cooper_jax.perf.hlo_text import (
    Array,
    Computation,
    Instruction,
    Program,
    item_bytes,
    parse_groups,
    parse_program,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
# Neither reads nor writes memory; what a loop, a call or a branch does is its computations'.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain",
        "opt-barrier", "partition-id", "replica-id"}  # fmt: skip
FREE_CALLS = {"AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding",
              "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "ConcatBitcast"}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """What devices send each other; bytes of one run, of a group's whole array: gathered, or not yet reduced."""

    kind: str
    shape: str  # of the result
    bytes: int
    group: int  # devices in a group; of a permutation, those that take part
    groups: tuple[tuple[int, ...], ...] | None  # their ids; of a permutation, (source, target)
    times: float
    name: str = ""  # where in the source it stems from: jit(..)/..

    @property
    def sent(self) -> float:
        """Bytes that a device sends over all runs, by rings."""
        whole = self.kind in ("collective-permute", "collective-broadcast")
        share = 1.0 if whole else (self.group - 1) / self.group
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: int  # loops that were counted `unknown_trips` times
    kernels: dict[str, float]  # a Pallas kernel's name, or a custom call's target -> times


def analyse_program(
    text: str, *, unknown_trips: int = 1, declared: Mapping[str, tuple[float, float]] | None = None
) -> Cost:
    """The cost of one run on one device of an optimised program.

    unknown_trips: how often loops run of which it cannot be told.
    declared: a kernel's name in `Cost.kernels` to (FLOPs, bytes) of a run, for kernels of which the text says
    nothing; without it they cost no FLOPs, and the bytes of all their operands and results.

    Raises ValueError for text that is no program.
    """
    program = parse_program(text)
    found = _Counter(program, unknown_trips, declared or {}).computation(program.entry, ())
    return Cost(found.flops, found.bytes, tuple(found.collectives), len(found.unknown), dict(found.kernels))


@dataclass
class _Sum:
    flops: float = 0.0
    bytes: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    kernels: collections.Counter = field(default_factory=collections.Counter)
    unknown: set[str] = field(default_factory=set)

    def add(self, other: _Sum, times: float = 1) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.collectives += [
            dataclasses.replace(c, times=times * c.times) for c in other.collectives if times
        ]
        self.kernels.update({name: times * n for name, n in other.kernels.items()})
        self.unknown |= other.unknown


@dataclass
class _Counter:
    program: Program
    unknown_trips: int
    declared: Mapping[str, tuple[float, float]]
    memo: dict = field(default_factory=dict)

    def computation(self, name: str, known: hlo_loops.Known, fused: bool = False) -> _Sum:
        """known: numbers in its parameter, where it is a loop's body."""
        key = name, known, fused
        if key not in self.memo:
            self.memo[key] = _Sum()
            for x in self.program[name].instructions:
                self.instruction(self.memo[key], x, known, fused)
        return self.memo[key]

    def instruction(self, total: _Sum, x: Instruction, known: hlo_loops.Known, fused: bool) -> None:
        if x.op in FREE or x.op.endswith(("-done", "-update")):
            return
        called = x.computation("calls")
        if x.op.removesuffix("-start") in COLLECTIVES:
            self.collective(total, x, fused)
        elif x.op == "while":
            trips, fixed = hlo_loops.follow_loop(self.program, x, known)
            if trips is None:
                trips = self.unknown_trips
                total.unknown.add(x.name)
            total.add(self.computation(x.computation("body"), fixed), trips)
            total.add(self.computation(x.computation("condition"), fixed), trips + 1)
        elif x.op == "conditional":
            names = re.findall(r"%([\w.\-$]+)", x.attribute(r"branch_computations=\{([^}]*)\}"))
            names = names or [x.computation(f"{n}_computation") for n in ("true", "false")]
            branches = [self.computation(name, ()) for name in names]
            total.add(max(branches, key=lambda b: (b.flops, b.bytes, sum(c.sent for c in b.collectives))))
        elif x.op in ("call", "async-start"):
            total.add(self.computation(called or x.computation("to_apply"), ()))
        elif x.op == "fusion":
            inner, name = self.computation(called, (), fused=True), _source(x)
            found = [dataclasses.replace(c, name=c.name or name) for c in inner.collectives]
            total.add(dataclasses.replace(inner, collectives=found))
            total.bytes += 0 if fused else self.fusion(x, self.program[called])
        elif x.op == "custom-call":
            self.custom_call(total, x, fused)
        else:
            total.flops += _dot(x) if x.op == "dot" else _convolution(x) if x.op == "convolution" else 0
            total.bytes += 0 if fused else _moved(x)

    def fusion(self, x: Instruction, inner: Computation) -> float:
        """Bytes that a fusion reads and writes."""
        total, placed = 0.0, set()  # updates that are written in place
        outs = inner.root.operands if inner.root.op == "tuple" else [inner.root]
        for out, leaf in zip(map(_origin, outs), x.result, strict=False):
            if out.op == "dynamic-update-slice" and _origin(out.operands[0]).op == "parameter":
                placed.add(out)
                total += leaf.moved(out.operands[1].result[0].elements)
            elif out.op not in ("parameter", *COLLECTIVES) and out.target not in FREE_CALLS:
                total += leaf.moved(leaf.elements)
        for i, operand in enumerate(x.operands):
            read = self.read(inner.parameters[i], placed) if i in inner.parameters else math.inf
            total += sum(leaf.moved(min(leaf.elements, read)) for leaf in operand.result)
        return total

    def read(self, x: Instruction, placed: set[Instruction]) -> float:
        """Elements of `x` that a fusion reads."""
        total = 0.0
        for user, position in x.users:
            if user.op in THROUGH:
                total += self.read(user, placed)
            elif user.op in SLICES and position == 0:
                total += user.result[0].elements
            elif user.op == "fusion":
                total += self.read(self.program[user.computation("calls")].parameters[position], set())
            elif user.op in ("tuple", *COLLECTIVES) or user.target in FREE_CALLS:
                continue  # handed on, or counted by itself
            elif not (user in placed and position == 0):
                return math.inf
        return total

    def collective(self, total: _Sum, x: Instruction, fused: bool) -> None:
        kind = x.op.removesuffix("-start")
        if "async_collective_fusion_config" in x.rest:
            # A TPU's collective beside compute: the fusions that start, carry on and end it each name it.
            if not any(user.target == "AsyncCollectiveStart" for user, _ in x.users):
                return
        operands, result = [a for y in x.operands for a in y.result], x.result
        if x.op != kind and kind != "all-reduce":
            result = result[len(operands) : 2 * len(operands)]  # (operands, results, ..)
        total.bytes += sum(a.moved(a.elements) for a in operands)
        if fused and kind == "all-reduce" and (slices := _slices(x)):
            kind, result = "reduce-scatter", slices  # as XLA:TPU writes it
        else:
            total.bytes += sum(a.moved(a.elements) for a in result)
        full = sum(a.elements * item_bytes(a.kind) for a in (result if kind == "all-gather" else operands))
        size, ids = parse_groups(x, self.program.devices)
        if size > 1:
            shape = ", ".join(map(str, result))
            shape, name = shape if len(result) == 1 else f"({shape})", _source(x)
            total.collectives.append(Collective(kind, shape, int(full), size, ids, 1.0, name))

    def custom_call(self, total: _Sum, x: Instruction, fused: bool) -> None:
        if x.target in FREE_CALLS:
            return
        name = x.attribute(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call') or x.target
        total.kernels[name] += 1
        flops, moved = self.declared.get(name, (0.0, None))
        arrays = [*x.result, *(a for y in x.operands for a in y.result)]
        moved = sum(a.moved(a.elements) for a in arrays) if moved is None else moved
        contracted = x.attribute(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')
        if noted := re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', x.rest):
            flops, moved = map(float, noted.groups())
        elif "fmha" in x.target and (scores := x.attribute(r'"dimensions":\s*\[([^\]]*)\]')):
            # cuDNN's attention over scores [.., S, S]: two products forward, five backward; causal, half of each.
            products = (5 if "Backward" in x.target else 2) * (0.5 if "CAUSAL" in x.rest else 1.0)
            flops = 2 * products * math.prod(_numbers(scores)) * x.operands[0].result[0].dims[-1]
        elif contracted and x.operands:
            left = x.operands[0].result[0].dims
            flops = 2.0 * x.result[0].elements * math.prod(left[d] for d in _numbers(contracted))
        total.flops += flops
        total.bytes += 0 if fused else moved


# --- single instructions -------------------------------------------------------------------------------


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _source(x: Instruction) -> str:
    return x.attribute(r'op_name="([^"]*)"')


def _origin(x: Instruction) -> Instruction:
    """What it is another shape of."""
    return _origin(x.operands[0]) if x.op in SAME else x


def _slices(x: Instruction) -> list[Array]:
    """If each device takes but a slice of every result of an all-reduce: the slices."""
    out: list[Array | None] = []
    for user, position in x.users:
        if user.op in THROUGH or user.op == "get-tuple-element":
            out += _slices(user) or [None]
        else:
            out.append(user.result[0] if user.op == "dynamic-slice" and position == 0 else None)
    return [] if None in out else out


def _moved(x: Instruction) -> float:
    """Bytes that an instruction by itself reads and writes."""
    base, sources = x.op.removesuffix("-start"), [a for y in x.operands for a in y.result]
    result = x.result
    if base != x.op:  # copy-start: (target, source, ..); others: (operands, results, ..)
        result = result[:1] if base == "copy" else result[len(sources) : len(sources) + 1]
    written = sum(a.moved(a.elements) for a in result)
    if base in SLICES:
        return written + sources[0].moved(sum(a.elements for a in result))
    if base == "dynamic-update-slice":
        return sources[1].moved(sources[1].elements) + sources[0].moved(sources[1].elements)
    if base == "scatter":  # adds to what is there
        return sum(a.moved(a.elements) for a in sources[1:]) + 2 * sources[0].moved(sources[-1].elements)
    return written + sum(a.moved(a.elements) for a in sources)


def _dot(x: Instruction) -> float:
    left = x.operands[0].result[0].dims
    contracted = _numbers(x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    return 2.0 * x.result[0].elements * math.prod(left[d] for d in contracted)


def _convolution(x: Instruction) -> float:
    """Without multiplications by padding and by the gaps of a dilation: XLA:TPU writes batched dots so."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest)
    if not labels:
        raise ValueError(f"a convolution without dim_labels: {x.name}")
    left, right, out = labels.groups()
    sizes = [y.result[0].dims for y in (*x.operands, x)]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", x.attribute(r"window=\{([^}]*)\}")))
    total = 2.0 * sizes[1][right.index("i")]  # input features of a group
    for label, size in zip(out, sizes[2], strict=True):
        if not label.isdigit():
            total *= size
            continue
        d, entries = int(label), np.arange(sizes[1][right.index(label)])
        stride, gaps, spread = (
            int(window.get(n, "x".join("1" * 9)).split("x")[d])
            for n in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pad = int(window.get("pad", "x".join("0" * 9)).split("x")[d].split("_")[0])
        at = np.arange(size)[:, None] * stride + entries * spread - pad
        end = (sizes[0][left.index(label)] - 1) * gaps
        total *= np.count_nonzero((at >= 0) & (at <= end) & (at % gaps == 0))
    return float(total)
