"""Parser of compiled programs' text: computations, instructions, arrays, groups of devices.

`parse_program(compiled.as_text())` reads the text that XLA prints for CPUs, GPUs and TPUs.  hlo.py computes
its cost.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Array:
    """Element type, dimensions and memory of an instruction's result."""

    kind: str  # f32, bf16, ..
    dims: tuple[int, ...]
    on_chip: bool = False  # in a TPU's on-chip memory

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    def bytes_moved(self, elements: float) -> float:
        """Bytes of device memory that are moved by reading or writing this number of the array's elements."""
        return 0.0 if self.on_chip else elements * item_bytes(self.kind)

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.dims))}]"


@functools.cache
def item_bytes(kind: str) -> float:
    """Bytes of an element of a type such as f32."""
    bits = re.search(r"\d+", kind)
    return {"pred": 1.0}.get(kind, int(bits.group()) / 8 if bits else 0.0)


@dataclass(eq=False)
class Instruction:
    """An instruction: NAME = RESULT OP(INSIDE), REST."""

    # From the instruction's own text.
    name: str
    op: str
    result: list[Array]  # the leaves, if it is a tuple
    inside: str  # the text between the parentheses
    rest: str  # the text after them: attributes and metadata
    # Links to the other instructions of its computation.
    operands: list[Instruction] = field(default_factory=list, repr=False)
    users: list[tuple[Instruction, int]] = field(default_factory=list, repr=False)  # (user, operand's index)

    @property
    def inputs(self) -> list[Array]:
        """The arrays of all operands."""
        return list(itertools.chain.from_iterable(operand.result for operand in self.operands))

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression's match in the attributes; "" without a match."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else ""

    def computation(self, name: str) -> str:
        """The name of the computation that an attribute refers to; "" without such an attribute."""
        return self.attribute(rf"\b{name}=%?([\w.\-$]+)")

    @property
    def target(self) -> str:
        """The target of a custom call; "" for other instructions."""
        return self.attribute(r'custom_call_target="([^"]*)"') if self.op == "custom-call" else ""


@dataclass(eq=False)
class Computation:
    """A named list of instructions: the entry, a loop's body or condition, a fusion."""

    name: str
    instructions: list[Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The instructions of the parameters, by the parameters' numbers."""
        return {int(x.inside): x for x in self.instructions if x.op == "parameter"}


@dataclass
class HloProgram:
    """All computations of a compiled program."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def __getitem__(self, name: str) -> Computation:
        if name not in self.computations:
            raise ValueError(f"the program calls a computation {name!r}, which it does not have")
        return self.computations[name]


# --- parsing -------------------------------------------------------------------------------------------

# A computation's first line, an instruction's first line, a computation's last line, and one array's type.
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-$]+) (?:\(.*\) -> .*)?\{$")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-$]+) = (.*)", re.S)
_END = re.compile(r"\}(, execution_thread=.*)?$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


def parse_program(text: str) -> HloProgram:
    """Parse a compiled program.  Raises ValueError for other text, and for an incomplete program."""
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    # The current computation's instructions: [ROOT or None, name, text].
    statements: list[list[str]] = []
    for line in text.splitlines():
        # Lines between computations that are no header, such as the module's own, are skipped.
        if not name:
            if header := _HEADER.match(line):
                name, statements = header.group(2), []
                entry = name if header.group(1) else entry
        elif start := _START.match(line):
            statements.append(list(start.groups()))
        elif _END.match(line):
            computations[name], name = _make_computation(name, statements), ""
        elif statements and statements[-1][2].count("{") > statements[-1][2].count("}"):
            # A kernel's attributes may have several lines: the braces of the last instruction are still open.
            statements[-1][2] += "\n" + line
        elif line.strip():
            raise ValueError(f"not an instruction of HLO: {line[:120]}")

    if name or not entry:
        raise ValueError(f"the computation {name} does not end" if name else "no ENTRY computation")

    # The first line gives the numbers of partitions and replicas.
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.lstrip().split("\n", 1)[0])
    return HloProgram(computations, entry, math.prod(map(int, counts)))


def _make_computation(name: str, statements: list[list[str]]) -> Computation:
    """A computation with its instructions linked to their operands and users."""
    instructions = {own_name: _parse_instruction(own_name, body) for _, own_name, body in statements}
    # All instructions are parsed before they are linked, so that their order in the text does not matter.
    for reader in instructions.values():
        for i, operand in enumerate(_list_operands(reader)):
            if operand not in instructions:
                raise ValueError(f"{name}: {reader.name} reads {operand}, which is not there")
            reader.operands.append(instructions[operand])
            instructions[operand].users.append((reader, i))

    roots = [instructions[own_name] for root, own_name, _ in statements if root]
    if len(roots) != 1:
        raise ValueError(f"the computation {name} has {len(roots)} roots")
    return Computation(name, list(instructions.values()), roots[0])


def _parse_instruction(name: str, text: str) -> Instruction:
    """Parse `RESULT OP(INSIDE), REST`; RESULT may be a tuple in parentheses."""
    # `end` is the end of RESULT, `head` is OP with its opening parenthesis.
    end = _find_closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    head = re.compile(r"\s*([\w\-]+)\(").match(text, max(end, 0))
    if end < 0 or not head:
        raise ValueError(f"not an instruction of HLO: {name} = {text[:120]}")
    close = _find_closing(text, head.end() - 1)
    return Instruction(
        name, head.group(1), _parse_arrays(text[:end]), text[head.end() : close].strip(), text[close + 1 :]
    )


def _find_closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for parenthesis in re.compile(r"[()]").finditer(text, start):
        depth += 1 if parenthesis.group() == "(" else -1
        if depth == 0:
            return parenthesis.start()
    raise ValueError(f"a parenthesis is not closed: {text[:120]}")


def _parse_arrays(text: str) -> list[Array]:
    arrays = []
    for kind, dims, layout in _SHAPE.findall(text):
        # S(1) marks a TPU's on-chip memory, but also a GPU's device memory; only a TPU's layouts have tiles.
        on_chip = "S(" in layout and "T(" in layout
        arrays.append(Array(kind, tuple(_parse_numbers(dims)), on_chip))
    return arrays


def _list_operands(instruction: Instruction) -> list[str]:
    """List the names of the operands, which the text may give with or without their types."""
    if instruction.op in ("constant", "parameter"):
        return []
    # With %, names cannot be confused with types.
    if "%" in instruction.inside:
        return re.findall(r"%([\w.\-$]+)", instruction.inside)
    # Otherwise remove comments such as /*index=5*/ and types; a name is the last word of its part.
    plain = _SHAPE.sub("", re.sub(r"/\*[^*]*\*/", "", instruction.inside))
    return [part.split()[-1] for part in plain.split(",") if part.strip()]


# --- groups of devices ---------------------------------------------------------------------------------

Groups = tuple[tuple[int, ...], ...]


def parse_groups(instruction: Instruction, devices: int) -> tuple[int, Groups | None]:
    """Parse the number of devices in a collective's group, and all groups' device ids (None if unknown).

    For a permutation they are the number of devices that send or receive, and the (source, target) pairs.

    devices: the number of all devices.  They form one group if the collective does not name its groups.
    """
    # Lists of ids: {{0,1},{2,3}}.
    if pairs := instruction.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
        return len(set(itertools.chain(*_parse_lists(pairs)))), _parse_lists(pairs)
    if listed := instruction.attribute(r"replica_groups=\{(\{.*?\})\}"):
        return len(_parse_lists(listed)[0]), _parse_lists(listed)

    # Iota notation, groups x devices of a group: [2,4]<=[4,2]T(1,0).
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", instruction.rest):
        ids = _parse_iota(iota.group(2)).reshape(_parse_numbers(iota.group(1)))
        return ids.shape[-1], tuple(map(tuple, ids.tolist()))

    # A mesh and the axes that a group spans: mesh['data'=2,'fsdp'=4] {'fsdp'}.  An axis may be split:
    # 'fsdp':(1)2 spans 2 of its devices; the ids of such groups are not worked out.
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", instruction.rest
    )
    if not mesh:
        return devices, (tuple(range(devices)),)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(3))
    size = math.prod(int(part) if part else sizes[name] for name, part in used)
    if any(part for _, part in used):
        return size, None

    # Bring the spanned axes to the end, so that each row of the reshaped ids is a group.
    shape, axes = list(sizes.values()), list(sizes)
    ids = _parse_iota(mesh.group(2) or str(shape)).reshape(shape)
    ids = np.moveaxis(ids, [axes.index(name) for name, _ in used], range(-len(used), 0))
    return size, tuple(map(tuple, ids.reshape(-1, size).tolist()))


def _parse_numbers(text: str) -> list[int]:
    return [int(i) for i in re.findall(r"\d+", text)]


def _parse_lists(text: str) -> Groups:
    return tuple(tuple(_parse_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text))


def _parse_iota(text: str) -> np.ndarray:
    """An array in XLA's iota notation; [4,2]T(1,0) is arange(8) reshaped to 4 x 2 and transposed."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_parse_numbers(shape))).reshape(_parse_numbers(shape))
    return ids.transpose(_parse_numbers(order)) if order else ids
