"""Assistants: they rewrite a verified solution into a plausible wrong one, the negative of a pair.

An assistant takes requests and gives one reply to each: a `Completion` (the rewritten solution and nothing
else), or a `Failure` with the reason.  A server that is down or returns malformed output gives a Failure and
never raises: the pair is masked, and training continues.

    corrupt         changes the number in the answer at random; needs no model, for tests and `tiny`
    openai, local   ask a language model (llm/chat.py)

Random choices depend only on a request's ids (seed, step, row, attempt).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from cooper_jax.data import prompts
from cooper_jax.llm import chat as chats
from cooper_jax.llm.chat import Chat, ChatConfig, Failure, Generate, Ids, Messages, Reply
from cooper_jax.reward import corruption
from cooper_jax.runtime import keys
from cooper_jax.types import Completion, Problem


@dataclasses.dataclass(frozen=True)
class Request:
    """A solution that the assistant is asked to rewrite."""

    problem: Problem
    positive: str  # text of the verified solution
    ids: Ids  # seed, step, row in the data order, attempt


class Assistant(Protocol):
    """The interface of everything that answers rewrite requests."""

    # True if it computes nothing on our devices: a thread may then call it while they are busy.
    overlaps: bool

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in the order of the requests."""

    def close(self) -> None: ...


def make_assistant(cfg: ChatConfig, generate: Generate | None = None) -> Assistant:
    """Make the assistant that the config's `assistant` section describes.

    Args:
      generate: (conversations, ids) -> replies; needed for `local` only.

    Raises what chat.make_chat raises.
    """
    if cfg.kind == "corrupt":
        return CorruptingAssistant()
    return ChatAssistant(chats.make_chat(cfg, generate))


def parse_reply(completion: Completion) -> Reply:
    """Extract the solution from a model's reply; a truncated reply is returned unchanged.

    Truncated replies are refused later, by find_text_refusal in pairs/pair_checks.py.
    """
    if completion.truncated:
        return completion
    if not completion.text.strip():
        return Failure("empty")

    # Thinking, a preface, a heading or a code fence around the solution is removed.
    solution = prompts.parse_negative(completion.text)
    if solution is None:
        return Failure("malformed")
    return dataclasses.replace(completion, text=solution)


def make_rewrite_messages(request: Request) -> Messages:
    """The conversation that asks a language model for a rewrite."""
    problem = request.problem
    return prompts.make_negative_messages(problem.question, problem.reference, request.positive)


# --- corrupt -----------------------------------------------------------------------------------------------


class CorruptingAssistant:
    """An assistant that changes the answer's number, by the rules of `corruption.corrupt_answer`."""

    overlaps = True

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in the order of the requests."""
        return [self._corrupt(request) for request in requests]

    def _corrupt(self, request: Request) -> Reply:
        # A stream of its own for each request: the result depends on no other request.
        seed, *ids = request.ids
        rng = keys.make_generator(seed, "corruption", *ids)
        try:
            text = corruption.corrupt_answer(request.positive, rng)
        except ValueError:
            # Python parses no integer of more than 4,300 digits, and the policy may write one.
            text = None
        if text is None:
            return Failure("nothing to change")
        return Completion(text)

    def close(self) -> None:
        pass


# --- openai, local -----------------------------------------------------------------------------------------


class ChatAssistant:
    """An assistant that asks a language model."""

    def __init__(self, chat: Chat):
        self._chat = chat
        self.overlaps = chat.overlaps

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in the order of the requests."""
        # All requests of a round are sent at once, so that a server can batch them.
        conversations = [make_rewrite_messages(request) for request in requests]
        replies = self._chat.ask(conversations, [request.ids for request in requests])
        return [reply if isinstance(reply, Failure) else parse_reply(reply) for reply in replies]

    def close(self) -> None:
        self._chat.close()
