"""The LLM judge: one `Judgement` per (question, reference, completion) triple.

1. Each triple becomes a conversation (`prompts.make_judge_messages`), to which a language model replies once.
2. Thinking blocks are removed from the reply, which must then contain exactly one line that is a verdict.
3. A request that failed, or a reply that is truncated or states no verdict, gives None with the reason; the
   judge never guesses.
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

    # Decision and evidence; `reason` is set if and only if `correct` is None.
    correct: bool | None  # None if the judge did not decide
    reply: str = ""  # full text of the model's reply
    reason: str = ""  # why the judge did not decide: truncated, unparsed, or a Failure's reason


def judge_triples(chat: Chat, triples: Sequence[Triple], ids: Sequence[Ids]) -> list[Judgement]:
    """Ask the judge about all triples; one judgement per triple, in order.

    ids: of each request (seed, step, row, attempt), which key its random choices.
    """
    replies = chat.ask([make_triple_messages(triple) for triple in triples], ids)
    chat.report_failures()
    return [parse_judgement_reply(reply) for reply in replies]


def make_triple_messages(triple: Triple) -> Messages:
    """The conversation that asks the judge about a triple."""
    return prompts.make_judge_messages(triple.question, triple.reference, triple.completion)


def parse_judgement_reply(reply: Reply) -> Judgement:
    """The judgement that a reply states."""
    if isinstance(reply, Failure):
        return Judgement(None, "", reply.reason)

    # A truncated reply may contain a verdict that the model would have revised.
    if reply.truncated:
        return Judgement(None, reply.text, "truncated")

    # `correct` is None unless exactly one line is a verdict.
    correct = prompts.parse_judgement(reply.text)
    return Judgement(correct, reply.text, "" if correct is not None else "unparsed")
