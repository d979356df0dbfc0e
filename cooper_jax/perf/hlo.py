"""FLOPs, memory traffic and collectives of a compiled program on one device.

Use: `analyse_program(compiled.as_text())`.

XLA's own `cost_analysis()` counts the body of a loop once; this module counts it once per iteration.

FLOPs: dots and convolutions (a multiplication with its addition is 2), and the FLOPs that kernels declare by
`pl.CostEstimate`.  XLA:GPU drops that estimate and some kernels have none; their costs are given in
`declared`.  Elementwise operations are not counted.

Bytes: device memory read and written by the operands and results of every instruction outside a fusion.  A
slice counts only the elements that it reads, an update in place only the elements that it writes.  A TPU's
on-chip memory is not counted.
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
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain",
    "opt-barrier", "partition-id", "replica-id",
}  # fmt: skip
FREE_CALLS = {
    "AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding",
    "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "ConcatBitcast",
}  # fmt: skip
# Instructions that read only a part of their first operand.
SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """A collective operation between devices."""

    # The operation.
    kind: str  # one of COLLECTIVES
    shape: str  # of the result
    bytes: int  # of a group's whole array in one run: after an all-gather, before a reduction
    # The devices.
    group: int  # number of devices in a group; in a permutation, of those that send or receive
    groups: tuple[tuple[int, ...], ...] | None  # device ids of each group; in a permutation, (source, target)
    # The program around it.
    times: float  # runs of the operation in one run of the program
    name: str = ""  # its place in the JAX source: jit(..)/..

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs, by ring algorithms."""
        # In a ring of n devices each sends (n - 1) / n of the array, in an all-reduce twice.
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
    """Count the cost of one run, on one device, of an optimised program given as text.

    Args:
      unknown_trips: iterations of the loops whose trip count is not in the text.
      declared: (FLOPs, bytes) of one run of a kernel, by its name in `ProgramCost.kernels`, for kernels whose
        cost is not in the text.  A kernel without any cost counts as no FLOPs and the bytes of all its
        operands and results.

    Raises ValueError for text that is not a program.
    """
    program = parse_program(text)
    total = _CostCounter(program, unknown_trips, declared or {}).count_computation(program.entry, ())
    return ProgramCost(
        total.flops, total.bytes, tuple(total.collectives), len(total.unknown_loops), dict(total.kernels)
    )


@dataclass
class _CostSum:
    """A running total, to which the costs of instructions are added."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    kernels: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    unknown_loops: set[str] = field(default_factory=set)

    def add(self, other: _CostSum, times: float = 1) -> None:
        """Add the cost of `times` runs."""
        # Collectives stay listed one by one: their groups decide which links they use (chips.Topology).
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
    # Computations are shared: without the memo, nested calls would be counted exponentially often.
    memo: dict[tuple[str, hlo_loops.Known, bool], _CostSum] = field(default_factory=dict)

    def count_computation(self, name: str, known: hlo_loops.Known, fused: bool = False) -> _CostSum:
        """Count the cost of one run of a computation.

        Args:
          known: the known numbers in the parameter of a loop's body or condition.
          fused: the computation belongs to a fusion, whose instructions do not access device memory.
        """
        key = name, known, fused
        if key not in self.memo:
            self.memo[key] = _CostSum()
            for instruction in self.program[name].instructions:
                self.count_instruction(self.memo[key], instruction, known, fused)
        return self.memo[key]

    def count_instruction(
        self, total: _CostSum, instruction: Instruction, known: hlo_loops.Known, fused: bool
    ) -> None:
        """Add an instruction's cost to `total`."""
        # An asynchronous operation is counted where it starts.
        op = instruction.op
        if op in FREE or op.endswith(("-done", "-update")):
            return

        if op.removesuffix("-start") in COLLECTIVES:
            self.count_collective(total, instruction, fused)
        elif op == "while":
            self.count_loop(total, instruction, known)
        elif op == "conditional":
            total.add(self.find_costliest_branch(instruction))
        elif op in ("call", "async-start"):
            called = instruction.computation("calls") or instruction.computation("to_apply")
            total.add(self.count_computation(called, ()))
        elif op == "fusion":
            self.count_fusion(total, instruction, fused)
        elif op == "custom-call":
            self.count_custom_call(total, instruction, fused)
        else:
            _count_plain_instruction(total, instruction, fused)

    def count_loop(self, total: _CostSum, instruction: Instruction, known: hlo_loops.Known) -> None:
        """Add a loop's cost: its body once per iteration, its condition once more."""
        trips, fixed = hlo_loops.follow_loop(self.program, instruction, known)
        if trips is None:
            trips = self.unknown_trips
            total.unknown_loops.add(instruction.name)
        total.add(self.count_computation(instruction.computation("body"), fixed), trips)
        total.add(self.count_computation(instruction.computation("condition"), fixed), trips + 1)

    def find_costliest_branch(self, instruction: Instruction) -> _CostSum:
        """Find the cost of a conditional's most expensive branch."""
        names = re.findall(r"%([\w.\-$]+)", instruction.attribute(r"branch_computations=\{([^}]*)\}"))
        # A conditional over a boolean names its two branches in attributes of their own.
        names = names or [instruction.computation(f"{n}_computation") for n in ("true", "false")]
        branches = [self.count_computation(name, ()) for name in names]
        return max(branches, key=lambda b: (b.flops, b.bytes, sum(c.sent for c in b.collectives)))

    def count_fusion(self, total: _CostSum, instruction: Instruction, fused: bool) -> None:
        """Add a fusion's cost: the work inside, and the memory that it reads and writes as a whole."""
        called = instruction.computation("calls")
        inner = self.count_computation(called, (), fused=True)

        # XLA notes the source of some collectives at the fusion only.
        source = _get_source(instruction)
        collectives = [dataclasses.replace(c, name=c.name or source) for c in inner.collectives]
        total.add(dataclasses.replace(inner, collectives=collectives))
        if not fused:
            total.bytes += self.count_fusion_bytes(instruction, self.program[called])

    def count_fusion_bytes(self, instruction: Instruction, inner: Computation) -> float:
        """Count the bytes that a fusion reads and writes."""
        total = 0.0
        in_place = set()  # updates of a parameter, which write only the updated elements
        outputs = inner.root.operands if inner.root.op == "tuple" else [inner.root]

        # Writes.  An output that is a parameter or a collective's result is not written by the fusion itself.
        for output, leaf in zip(map(_skip_reshapes, outputs), instruction.result, strict=False):
            is_update = output.op == "dynamic-update-slice"
            if is_update and _skip_reshapes(output.operands[0]).op == "parameter":
                in_place.add(output)
                total += leaf.bytes_moved(output.operands[1].result[0].elements)
            elif output.op not in ("parameter", *COLLECTIVES) and output.target not in FREE_CALLS:
                total += leaf.bytes_moved(leaf.elements)

        # Reads.  A parameter that is only sliced counts as its slices, but never as more than itself.
        for i, operand in enumerate(instruction.operands):
            read = math.inf
            if i in inner.parameters:
                read = self.count_elements_read(inner.parameters[i], in_place)
            total += sum(leaf.bytes_moved(min(leaf.elements, read)) for leaf in operand.result)
        return total

    def count_elements_read(self, array: Instruction, in_place: set[Instruction]) -> float:
        """Count the elements of `array` that a fusion reads; infinity stands for all of them.

        in_place: the fusion's updates in place, which do not read the array that they update.
        """
        total = 0.0
        for user, position in array.users:
            if user.op in ELEMENTWISE_COPIES:
                total += self.count_elements_read(user, in_place)
            elif user.op in SLICES and position == 0:
                total += user.result[0].elements
            elif user.op == "fusion":
                inner = self.program[user.computation("calls")]
                total += self.count_elements_read(inner.parameters[position], set())
            elif user.op in ("tuple", *COLLECTIVES) or user.target in FREE_CALLS:
                continue  # passed on without a read, or counted as a collective
            elif not (user in in_place and position == 0):
                return math.inf
        return total

    def count_collective(self, total: _CostSum, instruction: Instruction, fused: bool) -> None:
        """Add a collective, with the memory that it reads and writes."""
        kind = instruction.op.removesuffix("-start")
        if "async_collective_fusion_config" in instruction.rest:
            # On a TPU the fusions that start, continue and end a collective during other work all name it.
            if not any(user.target == "AsyncCollectiveStart" for user, _ in instruction.users):
                return

        # The result of an asynchronous start is the tuple (operands, results, ..); an all-reduce's is not.
        operands, result = instruction.inputs, instruction.result
        if instruction.op != kind and kind != "all-reduce":
            result = result[len(operands) : 2 * len(operands)]

        total.bytes += sum(a.bytes_moved(a.elements) for a in operands)
        slices = _find_slices(instruction) if fused and kind == "all-reduce" else []
        if slices:
            # XLA:TPU writes a reduce-scatter as an all-reduce whose result is sliced.
            kind, result = "reduce-scatter", slices
        else:
            total.bytes += sum(a.bytes_moved(a.elements) for a in result)

        # `Collective.bytes` is the array before a reduction, or after an all-gather.
        whole = result if kind == "all-gather" else operands
        whole_bytes = sum(a.elements * item_bytes(a.kind) for a in whole)
        size, ids = parse_groups(instruction, self.program.devices)
        if size > 1:  # a group of one device sends nothing
            shape = ", ".join(map(str, result))
            if len(result) != 1:
                shape = f"({shape})"
            source = _get_source(instruction)
            total.collectives.append(Collective(kind, shape, int(whole_bytes), size, ids, 1.0, source))

    def count_custom_call(self, total: _CostSum, instruction: Instruction, fused: bool) -> None:
        """Add a kernel's cost: the one in the text, else the one in `declared`."""
        if instruction.target in FREE_CALLS:
            return
        name = instruction.attribute(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call') or instruction.target
        total.kernels[name] += 1

        if name in self.declared:
            flops, moved = self.declared[name]
        else:
            arrays = (*instruction.result, *instruction.inputs)
            flops, moved = 0.0, sum(a.bytes_moved(a.elements) for a in arrays)

        # A Pallas kernel's own estimate replaces both numbers.
        noted = re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', instruction.rest)
        if noted:
            flops, moved = map(float, noted.groups())
        else:
            flops = _count_library_flops(instruction, flops)
        total.flops += flops
        if not fused:
            total.bytes += moved


# --- single instructions -------------------------------------------------------------------------------


def _count_plain_instruction(total: _CostSum, instruction: Instruction, fused: bool) -> None:
    """Add the cost of an instruction that calls no other computation."""
    if instruction.op == "dot":
        total.flops += _count_dot_flops(instruction)
    elif instruction.op == "convolution":
        total.flops += _count_convolution_flops(instruction)
    if not fused:
        total.bytes += _count_bytes(instruction)


def _count_library_flops(instruction: Instruction, otherwise: float) -> float:
    """Count the FLOPs of cuDNN's attention or of a library's matrix product; other calls: `otherwise`."""
    scores = instruction.attribute(r'"dimensions":\s*\[([^\]]*)\]')
    if "fmha" in instruction.target and scores:
        # Over scores [.., S, S]: two products forward, five backward; causal attention does half of each.
        head_dim = instruction.operands[0].result[0].dims[-1]
        passes = 5 if "Backward" in instruction.target else 2
        products = passes * (0.5 if "CAUSAL" in instruction.rest else 1.0)
        return 2 * products * math.prod(_parse_numbers(scores)) * head_dim

    contracted = instruction.attribute(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]')
    if contracted and instruction.operands:
        left = instruction.operands[0].result[0].dims
        return 2.0 * instruction.result[0].elements * math.prod(left[d] for d in _parse_numbers(contracted))
    return otherwise


def _parse_numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _get_source(instruction: Instruction) -> str:
    """Get the instruction's place in the JAX source, as JAX notes it: jit(..)/.."""
    return instruction.attribute(r'op_name="([^"]*)"')


def _skip_reshapes(instruction: Instruction) -> Instruction:
    """Follow reshapes back to the first instruction that is no reshape."""
    return _skip_reshapes(instruction.operands[0]) if instruction.op in RESHAPES else instruction


def _find_slices(instruction: Instruction) -> list[Array]:
    """Find the slices that each device reads of an all-reduce's results; none if anything else reads them."""
    slices: list[Array] = []
    for user, position in instruction.users:
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


def _count_bytes(instruction: Instruction) -> float:
    """Count the bytes that an unfused instruction reads and writes."""
    base, sources = instruction.op.removesuffix("-start"), instruction.inputs
    result = instruction.result
    if base != instruction.op:
        # Asynchronous: copy-start returns (target, source, ..), other starts return (operands, results, ..).
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


def _count_dot_flops(instruction: Instruction) -> float:
    left = instruction.operands[0].result[0].dims
    contracted = _parse_numbers(instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    return 2.0 * instruction.result[0].elements * math.prod(left[d] for d in contracted)


def _count_convolution_flops(instruction: Instruction) -> float:
    """Count a convolution's FLOPs, without products with padding or with the gaps of a dilation.

    XLA:TPU writes batched dots as convolutions in which most products are with padding or gaps.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if not labels:
        raise ValueError(f"a convolution without dim_labels: {instruction.name}")
    left, right, out = labels.groups()
    left_dims, right_dims, out_dims = (y.result[0].dims for y in (*instruction.operands, instruction))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute(r"window=\{([^}]*)\}")))

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
        # Positions in the dilated input: i64[outputs, kernel entries].
        places = np.arange(size)[:, None] * stride + kernel_entries * kernel_dilation - padding
        end = (left_dims[left.index(label)] - 1) * input_dilation
        total *= np.count_nonzero((places >= 0) & (places <= end) & (places % input_dilation == 0))
    return float(total)


def _get_window_field(window: Mapping[str, str], name: str, axis: int, default: str) -> str:
    """Get a convolution window's entry (1 or 2 in `stride=1x2`) for a spatial axis."""
    return window[name].split("x")[axis] if name in window else default
