"""Checks that a negative must pass.

1. `find_text_refusal` checks the text of a rewrite: truncation, refusals, giveaways (giveaways.py), length.
   It needs no verdict.
2. The rule verifier then judges the negative against its reference.  Only WRONG passes; `REFUSAL_BY_VERDICT`
   has the reasons for refusing all other verdicts.

Departures from the released code: there, a negative without a parseable answer counts as wrong, and length,
truncation, refusals and giveaways are not checked, so a reward model can learn style instead of correctness.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from cooper_jax.llm.chat import Failure, Reply
from cooper_jax.reward.pairs.giveaways import find_giveaway
from cooper_jax.types import Verdict

# Phrases of a model that refuses, or that talks about the task of writing a wrong solution.  Solutions of the
# policy do not contain them, so a reward model would learn the phrases.
_REFUSAL_PHRASES = re.compile(
    r"\bsorry\b|\bi(?:'m| am) (?:un)?able to\b|\bi(?:'m| am) not able to\b"
    r"|\bas an ai\b|\b(?:language|ai) model\b"
    r"|\bi (?:can ?not|can't|won't|will not|must decline)\b"
    r"|\b(?:intentional|deliberate)(?:ly)?\b|\b(?:incorrect|wrong|flawed) (?:solution|answer|version)\b"
    r"|\b(?:rewritten|modified) (?:solution|version)\b",
    re.IGNORECASE,
)

# Verdict on a negative against its reference -> the reason for refusing it.  Only WRONG passes.
REFUSAL_BY_VERDICT = {
    Verdict.CORRECT: "not_wrong",
    Verdict.NO_ANSWER: "unparseable",
    Verdict.UNRECOGNISED: "unrecognised",
    Verdict.TIMEOUT: "rule_timeout",
}


def find_text_refusal(
    positive: str,
    reply: Reply,
    length_ratio: float,
    *,
    question: str = "",
    special_tokens: Collection[str] = (),
) -> str:
    """The reason why a reply cannot be a negative, from its text alone; "" if the rule has to decide.

    Args:
      positive: text of the solution that the assistant was asked to rewrite.
      reply: the assistant's reply.
      length_ratio: maximum ratio of the longer text's number of characters to the shorter one's.
      question, special_tokens: see find_giveaway.
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

    # A phrase that occurs in both members does not distinguish them.
    if _find_refusal_phrases(negative) - _find_refusal_phrases(positive):
        return "refusal"

    # So would a comment on the mistake, or markup that only the rewrite has.
    if kind := find_giveaway(negative, positive, question, special_tokens):
        return f"giveaway_{kind}"

    # A systematic difference in length would give the negative away.
    shorter, longer = sorted((len(negative), len(positive)))
    if longer > length_ratio * shorter:
        return "length"
    return ""


def _find_refusal_phrases(text: str) -> set[str]:
    """The refusal phrases in `text`, in lower case."""
    return {phrase.lower() for phrase in _REFUSAL_PHRASES.findall(text)}
