"""References that the rule verifier can never find correct, and problems that occur twice."""

from __future__ import annotations

from collections.abc import Sequence

from cooper_jax.rule import rule_verdict
from cooper_jax.types import Problem

SHOWN = 3  # examples in the message


def describe_references(name: str, problems: Sequence[Problem]) -> str:
    """One line on problems of a file that are of no use to the rule; "" if there are none.

    Args:
      name: the flag that names the file.
    """
    unusable, repeated = _find_unusable(problems)
    if not unusable and not repeated:
        return ""
    return (
        f"{name}: of {len(problems)} problems, the rule can never verify the references of "
        f"{len(unusable)}{_show_examples(unusable)}; {repeated} are duplicates of others"
    )


def describe_problems(problems: Sequence[Problem], *, verified: bool = True) -> str:
    """The numbers of duplicates and of references that the rule can never verify, as the end of a line.

    verified: the rule judges responses to these problems; otherwise only duplicates are counted.
    """
    unusable, repeated = _find_unusable(problems)
    if not verified:
        return f"{repeated} duplicates of others"
    return (
        f"{repeated} duplicates of others, {len(unusable)} references that the rule can never "
        f"verify{_show_examples(unusable)}"
    )


def _find_unusable(problems: Sequence[Problem]) -> tuple[list[str], int]:
    """The references that the rule can never verify, and the number of duplicates."""
    # Each distinct reference is parsed once: parsing takes about 0.1 ms.
    usable = {reference: can_be_verified(reference) for reference in {p.reference for p in problems}}
    unusable = [p.reference for p in problems if not usable[p.reference]]
    repeated = len(problems) - len({(p.question, p.reference) for p in problems})
    return unusable, repeated


def _show_examples(references: Sequence[str]) -> str:
    examples = ", ".join(repr(reference[:40]) for reference in list(dict.fromkeys(references))[:SHOWN])
    return f" ({examples})" if examples else ""


def can_be_verified(reference: str) -> bool:
    """True unless the rule abstains on all answers; a reference that makes the parser fail counts as such."""
    try:
        return rule_verdict.can_verify(reference)
    except Exception:  # mpmath and math-verify raise many kinds
        return False
