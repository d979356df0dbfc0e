"""FLOPs, memory traffic and collectives of a compiled program on one device: `analyse_program(compiled.as_text())`.

XLA's own `cost_analysis()` counts the body of a loop once; here it is counted once per iteration.

FLOPs are those of dots and convolutions (a multiplication with its addition is 2), and those that kernels declare
(`pl.CostEstimate`; XLA:GPU drops it, and some kernels have none: see `declared`).  Elementwise work is left out.
Bytes are those of device memory: the operands and results of everything that is not fused away.  A slice counts as
the slice, an update in place as the update.  A TPU's on-chip memory is not counted.
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
from cooper_jax.perf.hlo_loops import ELEMENTWISE_COPIES, RESHAPES
from cooper_jax.perf.hlo_text import (
    Array,
    Computation,
    HloProgram,
    Instruction,
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
# Instructions and custom calls that neither read nor write memory.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain",
        "opt-barrier", "partition-id", "replica-id"}  # fmt: skip
FREE_CALLS = {"AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding",
              "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "ConcatBitcast"}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """A collective operation between devices."""

    kind: str
    shape: str  # of the result
    bytes: int  # of a group's whole array in one run: gathered, or not yet reduced
    group: int  # devices in a group; in a permutation, those that take part
    groups: tuple[tuple[int, ...], ...] | None  # their ids; in a permutation, (source, target)
    times: float  # runs
    name: str = ""  # its place in the source: jit(..)/..

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs, by ring algorithms."""
        whole = self.kind in ("collective-permute", "collective-broadcast")
        share = 1.0 if whole else (self.group - 1) / self.group
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class ProgramCost:
    """The cost of one run of a program on one device."""

    flops: float
    bytes: float  # read from and written to device memory
    collectives: tuple[Collective, ...]
    unknown_loops: int  # loops that were counted `unknown_trips` times
    kernels: dict[str, float]  # runs, by a Pallas kernel's name or a custom call's target


def analyse_program(
    text: str, *, unknown_trips: int = 1, declared: Mapping[str, tuple[float, float]] | None = None
) -> ProgramCost:
    """The cost of one run, on one device, of an optimised program given as text.

    Args:
      unknown_trips: iterations of the loops whose trip count is not in the text.
      declared: (FLOPs, bytes) of one run of a kernel, by its name in `ProgramCost.kernels`, for kernels whose cost
        is not in the text; without it they count as no FLOPs and the bytes of all their operands and results.

    Raises ValueError for text that is not a program.
    """
    program = parse_program(text)
    total = _CostCounter(program, unknown_trips, declared or {}).count_computation(program.entry, ())
    return ProgramCost(
        total.flops, total.bytes, tuple(total.collectives), len(total.unknown_loops), dict(total.kernels)
    )


@dataclass
class _CostSum:
    """A cost that instructions are added to."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    kernels: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    unknown_loops: set[str] = field(default_factory=set)

    def add(self, other: _CostSum, times: float = 1) -> None:
        """Add the cost of `times` runs."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        if times:
            self.collectives += [dataclasses.replace(c, times=times * c.times) for c in other.collectives]
        for name, runs in other.kernels.items():
            self.kernels[name] += times * runs
        self.unknown_loops |= other.unknown_loops


@dataclass
class _CostCounter:
    """Walk over a program's computations; each is counted once for each set of known loop numbers."""

    program: HloProgram
    unknown_trips: int
    declared: Mapping[str, tuple[float, float]]
    memo: dict[tuple[str, hlo_loops.Known, bool], _CostSum] = field(default_factory=dict)

    def count_computation(self, name: str, known: hlo_loops.Known, fused: bool = False) -> _CostSum:
        """The cost of one run of a computation.

        known: numbers in its parameter, if it is a loop's body.  fused: its instructions do not touch memory.
        """
        key = name, known, fused
        if key not in self.memo:
            self.memo[key] = _CostSum()
            for x in self.program[name].instructions:
                self.count_instruction(self.memo[key], x, known, fused)
        return self.memo[key]

    def count_instruction(self, total: _CostSum, x: Instruction, known: hlo_loops.Known, fused: bool) -> None:
        """Add an instruction's cost to `total`."""
        # An asynchronous operation is counted where it starts.
        if x.op in FREE or x.op.endswith(("-done", "-update")):
            return

        called = x.computation("calls")
        if x.op.removesuffix("-start") in COLLECTIVES:
            self.count_collective(total, x, fused)
        elif x.op == "while":
            self.count_loop(total, x, known)
        elif x.op == "conditional":
            total.add(self.find_costliest_branch(x))
        elif x.op in ("call", "async-start"):
            total.add(self.count_computation(called or x.computation("to_apply"), ()))
        elif x.op == "fusion":
            inner, name = self.count_computation(called, (), fused=True), _get_source(x)
            named = [dataclasses.replace(c, name=c.name or name) for c in inner.collectives]
            total.add(dataclasses.replace(inner, collectives=named))
            if not fused:
                total.bytes += self.count_fusion_bytes(x, self.program[called])
        elif x.op == "custom-call":
            self.count_custom_call(total, x, fused)
        else:
            if x.op == "dot":
                total.flops += _count_dot_flops(x)
            elif x.op == "convolution":
                total.flops += _count_convolution_flops(x)
            if not fused:
                total.bytes += _count_bytes(x)

    def count_loop(self, total: _CostSum, x: Instruction, known: hlo_loops.Known) -> None:
        """Add a loop's cost: its body once per iteration, its condition once more."""
        trips, fixed = hlo_loops.follow_loop(self.program, x, known)
        if trips is None:
            trips = self.unknown_trips
            total.unknown_loops.add(x.name)
        total.add(self.count_computation(x.computation("body"), fixed), trips)
        total.add(self.count_computation(x.computation("condition"), fixed), trips + 1)

    def find_costliest_branch(self, x: Instruction) -> _CostSum:
        """The cost of a conditional's most expensive branch."""
        names = re.findall(r"%([\w.\-$]+)", x.attribute(r"branch_computations=\{([^}]*)\}"))
        names = names or [x.computation(f"{n}_computation") for n in ("true", "false")]
        branches = [self.count_computation(name, ()) for name in names]
        return max(branches, key=lambda b: (b.flops, b.bytes, sum(c.sent for c in b.collectives)))

    def count_fusion_bytes(self, x: Instruction, inner: Computation) -> float:
        """Bytes that a fusion reads and writes."""
        total = 0.0
        in_place = set()  # updates of a parameter, which write only the updated elements
        outputs = inner.root.operands if inner.root.op == "tuple" else [inner.root]
        for output, leaf in zip(map(_skip_reshapes, outputs), x.result, strict=False):
            is_update = output.op == "dynamic-update-slice"
            if is_update and _skip_reshapes(output.operands[0]).op == "parameter":
                in_place.add(output)
                total += leaf.bytes_moved(output.operands[1].result[0].elements)
            elif output.op not in ("parameter", *COLLECTIVES) and output.target not in FREE_CALLS:
                total += leaf.bytes_moved(leaf.elements)

        for i, operand in enumerate(x.operands):
            read = math.inf
            if i in inner.parameters:
                read = self.count_elements_read(inner.parameters[i], in_place)
            total += sum(leaf.bytes_moved(min(leaf.elements, read)) for leaf in operand.result)
        return total

    def count_elements_read(self, x: Instruction, in_place: set[Instruction]) -> float:
        """Elements of `x` that a fusion reads; infinity for all of them."""
        total = 0.0
        for user, position in x.users:
            if user.op in ELEMENTWISE_COPIES:
                total += self.count_elements_read(user, in_place)
            elif user.op in SLICES and position == 0:
                total += user.result[0].elements
            elif user.op == "fusion":
                inner = self.program[user.computation("calls")]
                total += self.count_elements_read(inner.parameters[position], set())
            elif user.op in ("tuple", *COLLECTIVES) or user.target in FREE_CALLS:
                continue  # handed on, or counted by itself
            elif not (user in in_place and position == 0):
                return math.inf
        return total

    def count_collective(self, total: _CostSum, x: Instruction, fused: bool) -> None:
        """Add a collective, with the memory that it reads and writes."""
        kind = x.op.removesuffix("-start")
        if "async_collective_fusion_config" in x.rest:
            # On a TPU the fusions that start, continue and end a collective beside compute all name it.
            if not any(user.target == "AsyncCollectiveStart" for user, _ in x.users):
                return

        operands, result = x.inputs, x.result
        if x.op != kind and kind != "all-reduce":
            result = result[len(operands) : 2 * len(operands)]  # of (operands, results, ..)
        total.bytes += sum(a.bytes_moved(a.elements) for a in operands)
        slices = _find_slices(x) if fused and kind == "all-reduce" else []
        if slices:
            # XLA:TPU writes a reduce-scatter as an all-reduce whose result is sliced.
            kind, result = "reduce-scatter", slices
        else:
            total.bytes += sum(a.bytes_moved(a.elements) for a in result)

        whole = result if kind == "all-gather" else operands
        whole_bytes = sum(a.elements * item_bytes(a.kind) for a in whole)
        size, ids = parse_groups(x, self.program.devices)
        if size > 1:
            shape = ", ".join(map(str, result))
            if len(result) != 1:
                shape = f"({shape})"
            total.collectives.append(
                Collective(kind, shape, int(whole_bytes), size, ids, 1.0, _get_source(x))
            )

    def count_custom_call(self, total: _CostSum, x: Instruction, fused: bool) -> None:
        """Add a kernel's cost: that in the text, or the one in `declared`."""
        if x.target in FREE_CALLS:
            return
        name = x.attribute(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call') or x.target
        total.kernels[name] += 1

        if name in self.declared:
            flops, moved = self.declared[name]
        else:
            flops, moved = 0.0, sum(a.bytes_moved(a.elements) for a in (*x.result, *x.inputs))

        # Costs in the text go before declared ones: Pallas's own, cuDNN's attention, and library matrix products.
        contracted = x.attribute(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')
        if noted := re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', x.rest):
            flops, moved = map(float, noted.groups())
        elif "fmha" in x.target and (scores := x.attribute(r'"dimensions":\s*\[([^\]]*)\]')):
            # Over scores [.., S, S]: two products forward, five backward; causal attention does half of each.
            products = (5 if "Backward" in x.target else 2) * (0.5 if "CAUSAL" in x.rest else 1.0)
            flops = 2 * products * math.prod(_parse_numbers(scores)) * x.operands[0].result[0].dims[-1]
        elif contracted and x.operands:
            left = x.operands[0].result[0].dims
            flops = 2.0 * x.result[0].elements * math.prod(left[d] for d in _parse_numbers(contracted))
        total.flops += flops
        if not fused:
            total.bytes += moved


# --- single instructions -------------------------------------------------------------------------------


def _parse_numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _get_source(x: Instruction) -> str:
    """The instruction's place in the source, as JAX notes it: jit(..)/.."""
    return x.attribute(r'op_name="([^"]*)"')


def _skip_reshapes(x: Instruction) -> Instruction:
    """The instruction whose bytes `x` gives another shape; `x` itself if it is no reshape."""
    return _skip_reshapes(x.operands[0]) if x.op in RESHAPES else x


def _find_slices(x: Instruction) -> list[Array]:
    """The slices that each device takes of an all-reduce's results; none if it needs more than slices."""
    slices: list[Array] = []
    for user, position in x.users:
        if user.op in ELEMENTWISE_COPIES or user.op == "get-tuple-element":
            inner = _find_slices(user)
            if not inner:
                return []
            slices += inner
        elif user.op == "dynamic-slice" and position == 0:
            slices.append(user.result[0])
        else:
            return []
    return slices


def _count_bytes(x: Instruction) -> float:
    """Bytes that an unfused instruction reads and writes."""
    base, sources = x.op.removesuffix("-start"), x.inputs
    result = x.result
    if (
        base != x.op
    ):  # an asynchronous one: copy-start gives (target, source, ..), others (operands, results, ..)
        result = result[:1] if base == "copy" else result[len(sources) : len(sources) + 1]

    written = sum(a.bytes_moved(a.elements) for a in result)
    if base in SLICES:
        return written + sources[0].bytes_moved(sum(a.elements for a in result))
    if base == "dynamic-update-slice":
        update = sources[1]
        return update.bytes_moved(update.elements) + sources[0].bytes_moved(update.elements)
    if base == "scatter":  # reads and writes the elements that it adds to
        read = sum(a.bytes_moved(a.elements) for a in sources[1:])
        return read + 2 * sources[0].bytes_moved(sources[-1].elements)
    return written + sum(a.bytes_moved(a.elements) for a in sources)


def _count_dot_flops(x: Instruction) -> float:
    left = x.operands[0].result[0].dims
    contracted = _parse_numbers(x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    return 2.0 * x.result[0].elements * math.prod(left[d] for d in contracted)


def _count_convolution_flops(x: Instruction) -> float:
    """FLOPs of a convolution without products with padding or with the gaps of a dilation.

    XLA:TPU writes batched dots as convolutions in which most products are such.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest)
    if not labels:
        raise ValueError(f"a convolution without dim_labels: {x.name}")
    left, right, out = labels.groups()
    left_dims, right_dims, out_dims = (y.result[0].dims for y in (*x.operands, x))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", x.attribute(r"window=\{([^}]*)\}")))

    total = 2.0 * right_dims[right.index("i")]  # input features of a group
    for label, size in zip(out, out_dims, strict=True):
        if not label.isdigit():  # batch or output features
            total *= size
            continue
        # A spatial axis: count the (output, kernel entry) pairs that meet an element of the input.
        axis, kernel_entries = int(label), np.arange(right_dims[right.index(label)])
        stride, input_dilation, kernel_dilation = (
            int(_get_window_field(window, name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        padding = int(_get_window_field(window, "pad", axis, "0").split("_")[0])
        places = np.arange(size)[:, None] * stride + kernel_entries * kernel_dilation - padding
        end = (left_dims[left.index(label)] - 1) * input_dilation
        total *= np.count_nonzero((places >= 0) & (places <= end) & (places % input_dilation == 0))
    return float(total)


def _get_window_field(window: Mapping[str, str], name: str, axis: int, default: str) -> str:
    """The entry of a convolution's window (`stride=1x2`) for a spatial axis."""
    return window[name].split("x")[axis] if name in window else default
