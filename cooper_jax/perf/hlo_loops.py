"""How often a loop of a compiled program runs.

XLA notes it on CPUs and GPUs.  Its TPU compiler does not: there it follows from the counter that the condition
compares with a number, from its start and from its step.
"""

from __future__ import annotations

from cooper_jax.perf.hlo_text import Computation, Instruction, Program

SAME = {"bitcast", "reshape"}  # the same bytes under another shape
THROUGH = SAME | {"convert", "copy", "transpose"}  # element by element
MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}

Element = tuple[int, int]  # (i, n): the i-th element of a loop's tuple, plus n
# What a parameter holds: a number, an element, a whole tuple of which some numbers are known, or LOOP: the tuple
# itself, whose i-th element is (i, 0).
LOOP = "loop"
Known = tuple[Element, ...]  # (i, number) of a tuple's elements
Value = int | Element | dict[int, int] | str | None


def follow_loop(program: Program, x: Instruction, known: Known) -> tuple[int | None, Known]:
    """(how often the loop `x` runs, or None; what its body finds in its tuple in every turn).

    known: the same of the loop that `x` stands in.
    """
    body, condition = (program[x.computation(name)] for name in ("body", "condition"))
    start, fixed = {}, {}
    if x.operands[0].op == "tuple":
        for i, operand in enumerate(x.operands[0].operands):
            number = _value(program, operand, {0: dict(known)})
            if isinstance(number, int):
                start[i] = number
                if _after(program, body, i) == (i, 0):
                    fixed[i] = number
    if noted := x.attribute(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}'):
        return int(noted), tuple(fixed.items())
    trips = _limit(program, condition.root, {0: LOOP}, body, start, fixed)
    return trips, tuple(fixed.items())


def _after(program: Program, body: Computation, i: int) -> Value:
    """The i-th element of a loop's tuple after a turn."""
    if body.root.op != "tuple":
        return None
    return _value(program, body.root.operands[i], {0: LOOP})


def _limit(program: Program, x: Instruction, env: dict[int, Value], body, start, fixed) -> int | None:
    """How often the condition `x` holds, if it compares a counter with a number."""
    if x.op in THROUGH:
        return _limit(program, x.operands[0], env, body, start, fixed)
    if x.op in ("fusion", "call"):
        inner, env = _enter(program, x, env)
        return _limit(program, inner, env, body, start, fixed)
    if x.op == "and":
        both = [_limit(program, y, env, body, start, fixed) for y in x.operands]
        return None if None in both else min(both)
    if x.op != "compare":
        return None
    a, b = (_value(program, y, env) for y in x.operands)
    a, b = (fixed.get(v[0], v) if isinstance(v, tuple) and v[1] == 0 else v for v in (a, b))
    direction = x.attribute(r"direction=(\w+)")
    if isinstance(a, int):
        a, b, direction = b, a, MIRRORED.get(direction, direction)
    if not isinstance(a, tuple) or not isinstance(b, int) or a[0] not in start:
        return None
    after = _after(program, body, a[0])
    first, step = start[a[0]] + a[1], after[1] if isinstance(after, tuple) and after[0] == a[0] else 0
    if direction in ("GT", "GE"):
        first, b, step = -first, -b, -step
    if step <= 0 or direction == "EQ" or (direction == "NE" and (b < first or (b - first) % step)):
        return None
    return max(0, -(-(b + (direction in ("LE", "GE")) - first) // step))


def _value(program: Program, x: Instruction, env: dict[int, Value]) -> Value:
    """What `x` is where the computation's parameters are `env`, if that is simple enough."""
    if x.op == "constant":
        return int(x.inside) if x.inside.lstrip("-").isdigit() else None
    if x.op == "parameter":
        return env.get(int(x.inside))
    if x.op == "get-tuple-element":
        i, held = int(x.attribute(r"\bindex=(\d+)")), _value(program, x.operands[0], env)
        return (i, 0) if held == LOOP else held.get(i) if isinstance(held, dict) else None
    if x.op in THROUGH or x.op in ("copy-start", "copy-done"):
        return _value(program, x.operands[0], env)
    if x.op in ("fusion", "call"):
        return _value(program, *_enter(program, x, env))
    if x.op in ("add", "subtract"):
        a, b = (_value(program, y, env) for y in x.operands)
        if isinstance(a, int) and x.op == "add":
            a, b = b, a
        if isinstance(b, int) and isinstance(a, int | tuple):
            b = b if x.op == "add" else -b
            return a + b if isinstance(a, int) else (a[0], a[1] + b)
    return None


def _enter(program: Program, x: Instruction, env: dict[int, Value]) -> tuple[Instruction, dict[int, Value]]:
    inner = program[x.computation("(?:calls|to_apply)")]
    return inner.root, {i: _value(program, y, env) for i, y in enumerate(x.operands)}
