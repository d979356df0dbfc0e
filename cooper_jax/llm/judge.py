"""The LLM judge: (question, reference, completion) triples in, one `Judgement` each out.

1. A triple becomes a conversation (`prompts.judge_messages`); a language model replies once.
2. Thinking blocks are stripped, and the reply must hold exactly one line that is a verdict.
3. A reply that fails, is cut off or states no verdict is None with a reason, and never a guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cooper_jax.data import prompts
from cooper_jax.llm.chat import Chat, Failure, Ids, Messages, Reply
from cooper_jax.types import Triple


@dataclasses.dataclass(frozen=True)
class Judgement:
    """`correct`: None where the judge did not decide, and `reason` says why: truncated, unparsed, or a Failure's.

    `reply`: the model's text, whole.
    """

    correct: bool | None
    reply: str = ""
    reason: str = ""


def judge_triples(chat: Chat, triples: Sequence[Triple], ids: Sequence[Ids]) -> list[Judgement]:
    """One judgement a triple, in their order."""
    return [parse_judgement_reply(reply) for reply in chat.ask([judge_messages_of(t) for t in triples], ids)]


def judge_messages_of(triple: Triple) -> Messages:
    return prompts.judge_messages(triple.question, triple.reference, triple.completion)


def parse_judgement_reply(reply: Reply) -> Judgement:
    """What a reply says.  One that was cut off may have been about to take its verdict back."""
    if isinstance(reply, Failure):
        return Judgement(None, "", reply.reason)
    if reply.truncated:
        return Judgement(None, reply.text, "truncated")
    correct = prompts.parse_judgement(reply.text)
    return Judgement(correct, reply.text, "" if correct is not None else "unparsed")
