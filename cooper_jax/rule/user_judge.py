"""A judge of the user's own: a function that decides in place of the rule verifier (rule.judge).

    def judge(question, reference, completion, **columns) -> bool | None

True is `correct`, False is `wrong`, and None is an abstention, `unrecognised`, which labels no response.  The
arguments are passed by name: a judge names those that it needs.  `columns` are the other columns of the
problem's data row.  An exception is an abstention too, and the first one is printed.

This module runs in the worker processes, without jax.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from cooper_jax.settings.user_code import (
    UserCode,
    choose_arguments,
    describe_error,
    find_missing_arguments,
    load_function,
)

ARGUMENTS = ("question", "reference", "completion")
_VERDICTS = {True: "correct", False: "wrong", None: "unrecognised"}


def ask_judge(judge: Callable[..., Any], request: Mapping[str, Any], path: str) -> tuple[str, str]:
    """(the verdict on one item; the exception in one line, or "").

    Args:
      request: `ARGUMENTS` and "columns".
      path: the judge's file.
    """
    # A column cannot take the place of what is judged.
    offered = dict(request["columns"]) | {name: request[name] for name in ARGUMENTS}
    try:
        opinion = judge(**choose_arguments(judge, offered))
        # NumPy's booleans are equal to Python's, and so are 0 and 1; a score between them is no verdict.
        verdict = _VERDICTS.get(opinion)
        if verdict is None:
            raise TypeError(f"a judge returns True, False or None, not {opinion!r:.60}")
        return verdict, ""
    # Memory is reported apart, since a new process may have enough.
    except MemoryError:
        raise
    except Exception as error:
        return "unrecognised", describe_error(error, path)


def find_judge_errors(code: UserCode, columns: Collection[str]) -> list[str]:
    """Write a message if a judge takes an argument that is not offered.

    columns: of a problem's data row.
    """
    offered = [*ARGUMENTS, *(name for name in columns if name not in ARGUMENTS)]
    missing = find_missing_arguments(load_function(code, "rule.judge"), offered)
    if not missing:
        return []
    return [
        f"rule.judge={code.label!r} takes {', '.join(missing)}, which is none of its arguments: "
        f"{', '.join(offered)}"
    ]
