"""Countdown's verifier: is an expression of the given numbers equal to the target?  (examples/countdown.py)"""

import ast
import operator

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def judge(reference, completion, numbers):
    """True if the completion is an expression that uses each number once and has the reference's value."""
    used = []
    try:
        # Parsed, never executed.
        value = compute(ast.parse(completion.strip(), mode="eval").body, used)
    except (ValueError, SyntaxError):
        return False
    return value == int(reference) and sorted(used) == sorted(numbers)


def compute(node, used):
    """The value of an expression of +, - and *; appends its numbers to `used`.  ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](compute(node.left, used), compute(node.right, used))
    if not isinstance(node, ast.Constant) or type(node.value) is not int:
        raise ValueError("not an expression of +, - and *")
    used.append(node.value)
    return node.value
