"""Checks that every negative passes, whatever its source.

1. `find_text_refusal` looks at a rewrite's text: truncation, refusals, length.  It needs no verdict.
2. The rule verifier decides the rest.  `REFUSAL_BY_VERDICT` names the verdicts that refuse a negative: all
   but WRONG.

Departures from the released code: there, a negative from which nothing can be parsed passes as wrong, and
neither length nor truncation nor refusals are checked, so a reward model can learn style in place of
correctness.
"""

from __future__ import annotations

import re

from cooper_jax.llm.chat import Failure, Reply
from cooper_jax.types import Verdict

# Refusals, and talk about the task.  A solution contains neither, and a reward model would learn the phrase.
_REFUSAL_PHRASES = re.compile(
    r"\bsorry\b|\bi(?:'m| am) (?:un)?able to\b|\bi(?:'m| am) not able to\b|\bas an ai\b|\b(?:language|ai) model\b"
    r"|\bi (?:can ?not|can't|won't|will not|must decline)\b"
    r"|\b(?:intentional|deliberate)(?:ly)?\b|\b(?:incorrect|wrong|flawed) (?:solution|answer|version)\b"
    r"|\b(?:rewritten|modified) (?:solution|version)\b",
    re.IGNORECASE,
)

# Verdict on a negative against its reference -> why it is refused.  Only WRONG passes.
REFUSAL_BY_VERDICT = {
    Verdict.CORRECT: "not_wrong",
    Verdict.NO_ANSWER: "unparseable",
    Verdict.UNRECOGNISED: "unrecognised",
    Verdict.TIMEOUT: "rule_timeout",
}


def find_text_refusal(positive: str, reply: Reply, length_ratio: float) -> str:
    """Why a reply cannot be a negative, judged by its text alone; "" where the rule is to decide.

    Args:
      positive: the solution that was to be rewritten.
      reply: the assistant's.
      length_ratio: the longer of the two has at most this many times the characters of the other.
    """
    if isinstance(reply, Failure):
        return "assistant_" + reply.reason.replace(" ", "_")
    if reply.truncated:
        return "truncated"

    negative, positive = reply.text.strip(), positive.strip()
    if not negative:
        return "unparseable"
    if negative == positive:
        return "unchanged"
    # A phrase that the positive contains too tells no member apart.
    if _find_refusal_phrases(negative) - _find_refusal_phrases(positive):
        return "refusal"
    shorter, longer = sorted((len(negative), len(positive)))
    if longer > length_ratio * shorter:
        return "length"
    return ""


def _find_refusal_phrases(text: str) -> set[str]:
    return {phrase.lower() for phrase in _REFUSAL_PHRASES.findall(text)}
