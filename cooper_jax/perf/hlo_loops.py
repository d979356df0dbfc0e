"""Trip counts of a compiled program's loops.

On CPUs and GPUs XLA writes them into the program's text.  Its TPU compiler does not.  There the trip count
follows from the counter that the loop's condition compares with a number: from its start, its step and that
number.
"""

from __future__ import annotations

import dataclasses

from cooper_jax.perf.hlo_text import Computation, HloProgram, Instruction

RESHAPES = {"bitcast", "reshape"}  # the same bytes in another shape
ELEMENTWISE_COPIES = RESHAPES | {"convert", "copy", "transpose"}
MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}  # a < b is b > a

# A loop's state is one tuple.  Element (i, n) stands for the value of the tuple's i-th entry, plus n.
Element = tuple[int, int]
Known = tuple[Element, ...]  # (i, number): entries of a tuple whose values are known
LOOP = "loop"  # a loop's whole tuple, whose i-th entry is the Element (i, 0)
# An instruction's value as far as known: a number, an Element, {i: number} for a tuple, LOOP, or None.
Value = int | Element | dict[int, int] | str | None
Parameters = dict[int, Value]  # values of a computation's parameters, by their numbers


@dataclasses.dataclass(frozen=True)
class _Loop:
    """A loop's body, and the numbers in its tuple by their index."""

    body: Computation
    start: dict[int, int]  # before the first iteration
    fixed: dict[int, int]  # the same in every iteration


def follow_loop(program: HloProgram, instruction: Instruction, known: Known) -> tuple[int | None, Known]:
    """Find a loop's trip count (None if unknown), and the numbers in its tuple that no iteration changes.

    known: such numbers of the enclosing loop, from which an inner loop's bound may come.
    """
    body, condition = (program[instruction.computation(name)] for name in ("body", "condition"))
    loop = _Loop(body, start={}, fixed={})

    # A number is fixed if the body returns it unchanged at the same index.
    if instruction.operands[0].op == "tuple":
        for i, operand in enumerate(instruction.operands[0].operands):
            number = _evaluate(program, operand, {0: dict(known)})
            if isinstance(number, int):
                loop.start[i] = number
                if _evaluate_next(program, body, i) == (i, 0):
                    loop.fixed[i] = number

    # XLA's own trip count is exact, so it takes precedence.
    fixed = tuple(loop.fixed.items())
    if noted := instruction.attribute(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}'):
        return int(noted), fixed
    return _count_trips(program, condition.root, {0: LOOP}, loop), fixed


def _evaluate_next(program: HloProgram, body: Computation, i: int) -> Value:
    """Evaluate the i-th entry of a loop's tuple after an iteration, in terms of the tuple before it."""
    if body.root.op != "tuple":
        return None
    return _evaluate(program, body.root.operands[i], {0: LOOP})


def _count_trips(
    program: HloProgram, condition: Instruction, parameters: Parameters, loop: _Loop
) -> int | None:
    """Count the iterations for which a loop's condition is true; None if that cannot be derived."""
    if condition.op in ELEMENTWISE_COPIES:
        return _count_trips(program, condition.operands[0], parameters, loop)
    if condition.op in ("fusion", "call"):
        inner, inner_parameters = _enter_computation(program, condition, parameters)
        return _count_trips(program, inner, inner_parameters, loop)

    # Both conditions must be known: the loop ends at the first that is false.
    if condition.op == "and":
        both = [_count_trips(program, operand, parameters, loop) for operand in condition.operands]
        counts = [count for count in both if count is not None]
        return min(counts) if len(counts) == len(both) else None
    if condition.op == "compare":
        return _count_trips_of_comparison(program, condition, parameters, loop)
    return None


def _count_trips_of_comparison(
    program: HloProgram, comparison: Instruction, parameters: Parameters, loop: _Loop
) -> int | None:
    """Count the iterations for which a counter's comparison with a number is true; None for others."""
    # Bring the comparison into the form: counter DIRECTION number.
    counter, end = (
        _resolve_fixed(_evaluate(program, operand, parameters), loop) for operand in comparison.operands
    )
    direction = comparison.attribute(r"direction=(\w+)")
    if isinstance(counter, int):
        counter, end, direction = end, counter, MIRRORED.get(direction, direction)
    if not isinstance(counter, tuple) or not isinstance(end, int) or counter[0] not in loop.start:
        return None

    # The counter's step: the body returns it as itself plus a number.
    following = _evaluate_next(program, loop.body, counter[0])
    if not isinstance(following, tuple) or following[0] != counter[0]:
        return None
    first, step = loop.start[counter[0]] + counter[1], following[1]
    return _count_steps(first, end, step, direction)


def _count_steps(first: int, end: int, step: int, direction: str) -> int | None:
    """Count the values first, first + step, .. up to the first for which `value DIRECTION end` is false.

    Returns None if that never happens, and for a direction of EQ.
    """
    # Counting down is counting up with the opposite signs.
    if direction in ("GT", "GE"):
        first, end, step = -first, -end, -step
    if step <= 0 or direction == "EQ":
        return None
    if direction == "NE" and (end < first or (end - first) % step):
        return None  # the counter never equals `end`
    last = end + 1 if direction in ("LE", "GE") else end
    return max(0, -(-(last - first) // step))


def _resolve_fixed(value: Value, loop: _Loop) -> Value:
    """Replace an entry of the tuple that is fixed by its number; return other values unchanged."""
    if isinstance(value, tuple) and value[1] == 0:
        return loop.fixed.get(value[0], value)
    return value


def _evaluate(program: HloProgram, instruction: Instruction, parameters: Parameters) -> Value:
    """Evaluate an instruction given its computation's parameters; None if it is more than copies and sums."""
    if instruction.op == "constant":
        return int(instruction.inside) if instruction.inside.lstrip("-").isdigit() else None
    if instruction.op == "parameter":
        return parameters.get(int(instruction.inside))
    if instruction.op == "get-tuple-element":
        i = int(instruction.attribute(r"\bindex=(\d+)"))
        whole = _evaluate(program, instruction.operands[0], parameters)
        if whole == LOOP:
            return i, 0
        return whole.get(i) if isinstance(whole, dict) else None

    # Copies and calls have the value of what they copy or call.
    if instruction.op in ELEMENTWISE_COPIES or instruction.op in ("copy-start", "copy-done"):
        return _evaluate(program, instruction.operands[0], parameters)
    if instruction.op in ("fusion", "call"):
        return _evaluate(program, *_enter_computation(program, instruction, parameters))
    if instruction.op in ("add", "subtract"):
        left, right = (_evaluate(program, operand, parameters) for operand in instruction.operands)
        return _add_values(left, right, subtract=instruction.op == "subtract")
    return None


def _add_values(left: Value, right: Value, subtract: bool) -> Value:
    """Add or subtract two values; None unless the sum is a number or an entry of the tuple plus a number."""
    # Only a sum may have its number on the left: 1 - counter is no counter.
    if isinstance(left, int) and not subtract:
        left, right = right, left
    if not isinstance(right, int) or not isinstance(left, int | tuple):
        return None
    added = -right if subtract else right
    return left + added if isinstance(left, int) else (left[0], left[1] + added)


def _enter_computation(
    program: HloProgram, call: Instruction, parameters: Parameters
) -> tuple[Instruction, Parameters]:
    """Find the root of the computation that `call` runs, and evaluate that computation's parameters."""
    inner = program[call.computation("(?:calls|to_apply)")]
    return inner.root, {i: _evaluate(program, operand, parameters) for i, operand in enumerate(call.operands)}
