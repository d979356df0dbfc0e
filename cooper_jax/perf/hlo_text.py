"""The text of a compiled program: computations, instructions, arrays, groups of devices.

`parse(compiled.as_text())` reads what XLA prints for CPUs, GPUs and TPUs; hlo.py says what it costs to run.
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
    """A shape, as an instruction's result has it."""

    kind: str  # f32, bf16, ..
    dims: tuple[int, ...]
    chip: bool = False  # in a TPU's on-chip memory

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    def moved(self, elements: float) -> float:
        """Bytes of device memory that so many of its elements take."""
        return 0.0 if self.chip else elements * item_bytes(self.kind)

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.dims))}]"


@functools.cache
def item_bytes(kind: str) -> float:
    """Bytes of an element."""
    bits = re.search(r"\d+", kind)
    return {"pred": 1.0}.get(kind, int(bits.group()) / 8 if bits else 0.0)


@dataclass(eq=False)
class Instruction:
    name: str
    op: str
    result: list[Array]  # of a tuple, its leaves
    inside: str  # what stands between the parentheses
    rest: str  # what stands after them
    operands: list[Instruction] = field(default_factory=list, repr=False)
    users: list[tuple[Instruction, int]] = field(default_factory=list, repr=False)  # and which operand it is

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression where it is found in the attributes, or nothing."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else ""

    def computation(self, name: str) -> str:
        """The computation that an attribute names, or nothing."""
        return self.attribute(rf"\b{name}=%?([\w.\-$]+)")

    @property
    def target(self) -> str:
        """Of a custom call."""
        return self.attribute(r'custom_call_target="([^"]*)"') if self.op == "custom-call" else ""


@dataclass(eq=False)
class Computation:
    name: str
    instructions: list[Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(x.inside): x for x in self.instructions if x.op == "parameter"}


@dataclass
class Program:
    computations: dict[str, Computation]
    entry: str
    devices: int

    def __getitem__(self, name: str) -> Computation:
        if name not in self.computations:
            raise ValueError(f"a computation {name!r} is called, but there is none")
        return self.computations[name]


# --- parsing -------------------------------------------------------------------------------------------

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-$]+) (?:\(.*\) -> .*)?\{$")
_START = re.compile(r"\s+(ROOT )?%?([\w.\-$]+) = (.*)", re.S)
_END = re.compile(r"\}(, execution_thread=.*)?$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


def parse_program(text: str) -> Program:
    """Raises ValueError for text that is no compiled program, or not all of one."""
    computations, entry, name = {}, "", ""
    statements: list[list[str]] = []  # of one computation: (whether it is the root, a name, the rest)
    for line in text.splitlines():
        if not name:
            if header := _HEADER.match(line):
                name, statements = header.group(2), []
                entry = name if header.group(1) else entry
        elif start := _START.match(line):
            statements.append(list(start.groups()))
        elif _END.match(line):
            computations[name], name = _computation(name, statements), ""
        elif statements and statements[-1][2].count("{") > statements[-1][2].count("}"):
            statements[-1][2] += "\n" + line  # attributes of kernels may run over several lines
        elif line.strip():
            raise ValueError(f"not an instruction of HLO: {line[:120]}")
    if name or not entry:
        raise ValueError(f"the computation {name} does not end" if name else "no ENTRY computation")
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.lstrip().split("\n", 1)[0])
    return Program(computations, entry, math.prod(map(int, counts)))


def _computation(name: str, statements: list[list[str]]) -> Computation:
    made = {x: _instruction(x, body) for _, x, body in statements}
    for x in made.values():
        for i, operand in enumerate(_names(x)):
            if operand not in made:
                raise ValueError(f"{name}: {x.name} reads {operand}, which is not there")
            x.operands.append(made[operand])
            made[operand].users.append((x, i))
    roots = [made[x] for root, x, _ in statements if root]
    if len(roots) != 1:
        raise ValueError(f"the computation {name} has {len(roots)} roots")
    return Computation(name, list(made.values()), roots[0])


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    head = re.compile(r"\s*([\w\-]+)\(").match(text, max(end, 0))
    if end < 0 or not head:
        raise ValueError(f"not an instruction of HLO: {name} = {text[:120]}")
    close = _closing(text, head.end() - 1)
    return Instruction(
        name, head.group(1), _arrays(text[:end]), text[head.end() : close].strip(), text[close + 1 :]
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is not closed: {text[:120]}")


def _arrays(text: str) -> list[Array]:
    out = []
    for kind, dims, layout in _SHAPE.findall(text):
        # S(1) is a GPU's device memory too, but a TPU's layouts have tiles.
        chip = "S(" in layout and "T(" in layout
        out.append(Array(kind, tuple(int(d) for d in re.findall(r"\d+", dims)), chip))
    return out


def _names(x: Instruction) -> list[str]:
    """Of the operands, with or without their shapes before them."""
    if x.op in ("constant", "parameter"):
        return []
    if "%" in x.inside:
        return re.findall(r"%([\w.\-$]+)", x.inside)
    plain = _SHAPE.sub("", re.sub(r"/\*[^*]*\*/", "", x.inside))
    return [part.split()[-1] for part in plain.split(",") if part.strip()]


# --- groups of devices ---------------------------------------------------------------------------------

Groups = tuple[tuple[int, ...], ...]


def parse_groups(x: Instruction, devices: int) -> tuple[int, Groups | None]:
    """Of a collective: devices in a group, and the groups' ids in whatever notation, or None.

    Of a permutation: the devices that take part, and (source, target) pairs.
    """
    if pairs := x.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
        return len(set(itertools.chain(*_listed(pairs)))), _listed(pairs)
    if listed := x.attribute(r"replica_groups=\{(\{.*?\})\}"):
        return len(_listed(listed)[0]), _listed(listed)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", x.rest):
        ids = _iota(iota.group(2)).reshape(_numbers(iota.group(1)))
        return ids.shape[-1], tuple(map(tuple, ids.tolist()))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", x.rest)
    if not mesh:
        return devices, (tuple(range(devices)),)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
    used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(3))
    size = math.prod(int(part) if part else sizes[name] for name, part in used)
    if any(part for _, part in used):
        return size, None  # a part of an axis
    shape, axes = list(sizes.values()), list(sizes)
    ids = _iota(mesh.group(2) or str(shape)).reshape(shape)
    ids = np.moveaxis(ids, [axes.index(name) for name, _ in used], range(-len(used), 0))
    return size, tuple(map(tuple, ids.reshape(-1, size).tolist()))


def _numbers(text: str) -> list[int]:
    return [int(i) for i in re.findall(r"\d+", text)]


def _listed(text: str) -> Groups:
    return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text))


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 on as 4 x 2, transposed."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids
