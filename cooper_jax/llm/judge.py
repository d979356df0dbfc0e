"""The LLM judge: (question, reference, completion) triples in, one `Judgement` each out.

1. A triple becomes a conversation (`prompts.make_judge_messages`); a language model replies once.
2. Thinking blocks are removed, and the reply must contain exactly one line that is a verdict.
3. A reply that failed, is truncated or states no verdict gives None with a reason, never a guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cooper_jax.data import prompts
from cooper_jax.llm.chat import Chat, Failure, Ids, Messages, Reply
from cooper_jax.types import Triple


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The judge's decision on one triple."""

    correct: bool | None  # None where the judge did not decide
    reply: str = ""  # the model's whole text
    reason: str = ""  # why it did not decide: truncated, unparsed, or a Failure's reason


def judge_triples(chat: Chat, triples: Sequence[Triple], ids: Sequence[Ids]) -> list[Judgement]:
    """One judgement a triple, in their order."""
    replies = chat.ask([make_triple_messages(triple) for triple in triples], ids)
    return [parse_judgement_reply(reply) for reply in replies]


def make_triple_messages(triple: Triple) -> Messages:
    """The conversation that asks the judge about a triple."""
    return prompts.make_judge_messages(triple.question, triple.reference, triple.completion)


def parse_judgement_reply(reply: Reply) -> Judgement:
    """The judgement that a reply states."""
    if isinstance(reply, Failure):
        return Judgement(None, "", reply.reason)
    if reply.truncated:  # the model might have revised its verdict
        return Judgement(None, reply.text, "truncated")
    correct = prompts.parse_judgement(reply.text)
    return Judgement(correct, reply.text, "" if correct is not None else "unparsed")
