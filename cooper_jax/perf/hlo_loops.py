"""Trip counts of a compiled program's loops.

On CPUs and GPUs XLA notes them in the program's text.  Its TPU compiler does not; there the trip count follows from
the counter that the condition compares with a number, from the counter's start and from its step.
"""

from __future__ import annotations

import dataclasses

from cooper_jax.perf.hlo_text import Computation, HloProgram, Instruction

RESHAPES = {"bitcast", "reshape"}  # the same bytes in another shape
ELEMENTWISE_COPIES = RESHAPES | {"convert", "copy", "transpose"}
MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}  # a < b is b > a

Element = tuple[int, int]  # (i, n): the i-th element of a loop's tuple, plus n
Known = tuple[Element, ...]  # (i, number): elements of a tuple whose values are known
LOOP = "loop"  # the whole tuple of a loop, whose i-th element is (i, 0)
# The value of an instruction as far as it is known: a number, an element, a tuple with some known numbers, or LOOP.
Value = int | Element | dict[int, int] | str | None
Parameters = dict[int, Value]  # of a computation, by their numbers


@dataclasses.dataclass(frozen=True)
class _Loop:
    """A loop's body, and the numbers in its tuple."""

    body: Computation
    start: dict[int, int]  # before the first iteration
    fixed: dict[int, int]  # the same in every iteration


def follow_loop(program: HloProgram, x: Instruction, known: Known) -> tuple[int | None, Known]:
    """(the trip count of the loop `x`, or None; the numbers that its tuple holds in every iteration).

    known: such numbers of the loop that `x` is a part of.
    """
    body, condition = (program[x.computation(name)] for name in ("body", "condition"))
    loop = _Loop(body, start={}, fixed={})
    if x.operands[0].op == "tuple":
        for i, operand in enumerate(x.operands[0].operands):
            number = _evaluate(program, operand, {0: dict(known)})
            if isinstance(number, int):
                loop.start[i] = number
                if _evaluate_next(program, body, i) == (i, 0):
                    loop.fixed[i] = number

    fixed = tuple(loop.fixed.items())
    if noted := x.attribute(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}'):
        return int(noted), fixed
    return _count_trips(program, condition.root, {0: LOOP}, loop), fixed


def _evaluate_next(program: HloProgram, body: Computation, i: int) -> Value:
    """The i-th element of a loop's tuple after an iteration."""
    if body.root.op != "tuple":
        return None
    return _evaluate(program, body.root.operands[i], {0: LOOP})


def _count_trips(program: HloProgram, x: Instruction, parameters: Parameters, loop: _Loop) -> int | None:
    """The number of iterations for which the condition `x` holds, if it compares a counter with a number."""
    if x.op in ELEMENTWISE_COPIES:
        return _count_trips(program, x.operands[0], parameters, loop)
    if x.op in ("fusion", "call"):
        inner, inner_parameters = _enter_computation(program, x, parameters)
        return _count_trips(program, inner, inner_parameters, loop)
    if x.op == "and":
        both = [_count_trips(program, y, parameters, loop) for y in x.operands]
        counts = [count for count in both if count is not None]
        return min(counts) if len(counts) == len(both) else None
    if x.op != "compare":
        return None

    # Bring the comparison into the form: counter DIRECTION number.
    counter, end = (_resolve_fixed(_evaluate(program, y, parameters), loop) for y in x.operands)
    direction = x.attribute(r"direction=(\w+)")
    if isinstance(counter, int):
        counter, end, direction = end, counter, MIRRORED.get(direction, direction)
    if not isinstance(counter, tuple) or not isinstance(end, int) or counter[0] not in loop.start:
        return None

    following = _evaluate_next(program, loop.body, counter[0])
    if not isinstance(following, tuple) or following[0] != counter[0]:
        return None
    first, step = loop.start[counter[0]] + counter[1], following[1]
    if direction in ("GT", "GE"):  # counts down
        first, end, step = -first, -end, -step
    if step <= 0 or direction == "EQ":
        return None
    if direction == "NE" and (end < first or (end - first) % step):
        return None
    last = end + 1 if direction in ("LE", "GE") else end
    return max(0, -(-(last - first) // step))


def _resolve_fixed(value: Value, loop: _Loop) -> Value:
    """The number that an element always holds, if there is one; other values as they are."""
    if isinstance(value, tuple) and value[1] == 0:
        return loop.fixed.get(value[0], value)
    return value


def _evaluate(program: HloProgram, x: Instruction, parameters: Parameters) -> Value:
    """The value of `x` given the parameters of its computation; None if it is not simple enough."""
    if x.op == "constant":
        return int(x.inside) if x.inside.lstrip("-").isdigit() else None
    if x.op == "parameter":
        return parameters.get(int(x.inside))
    if x.op == "get-tuple-element":
        i, whole = int(x.attribute(r"\bindex=(\d+)")), _evaluate(program, x.operands[0], parameters)
        if whole == LOOP:
            return i, 0
        return whole.get(i) if isinstance(whole, dict) else None
    if x.op in ELEMENTWISE_COPIES or x.op in ("copy-start", "copy-done"):
        return _evaluate(program, x.operands[0], parameters)
    if x.op in ("fusion", "call"):
        return _evaluate(program, *_enter_computation(program, x, parameters))

    if x.op in ("add", "subtract"):
        a, b = (_evaluate(program, y, parameters) for y in x.operands)
        if isinstance(a, int) and x.op == "add":
            a, b = b, a
        if isinstance(b, int) and isinstance(a, int | tuple):
            b = b if x.op == "add" else -b
            return a + b if isinstance(a, int) else (a[0], a[1] + b)
    return None


def _enter_computation(
    program: HloProgram, x: Instruction, parameters: Parameters
) -> tuple[Instruction, Parameters]:
    """The root of the computation that `x` calls, and that computation's parameters."""
    inner = program[x.computation("(?:calls|to_apply)")]
    return inner.root, {i: _evaluate(program, y, parameters) for i, y in enumerate(x.operands)}
