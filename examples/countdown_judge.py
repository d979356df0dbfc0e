"""Countdown's verifier: do the steps lead from the given numbers to the target?  (examples/countdown.py)"""

import operator
import re

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def judge(reference, completion, numbers):
    """True if each step combines two of the numbers that are left, and the last result is the reference.

    As in "8-3=5 5+2=7" for the numbers 2, 3 and 8 and the reference 7.
    """
    left = list(numbers)
    for step in completion.split():
        match = re.fullmatch(r"([0-9])([-+*])([0-9])=([0-9])", step)
        if not match:
            return False
        a, b, result = (int(match[group]) for group in (1, 3, 4))
        if OPERATORS[match[2]](a, b) != result:
            return False
        for number in (a, b):
            if number not in left:
                return False
            left.remove(number)
        left.append(result)
    return left == [int(reference)]
