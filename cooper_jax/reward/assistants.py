"""Assistants: they rewrite a verified solution into a plausible wrong one.

Requests in, one reply each out: a `Completion` (the rewritten solution and nothing else), or a `Failure` with
the reason.  A server that is down or answers nonsense is a Failure, never an exception: its pair is masked,
and training continues.

    corrupt         changes the number in the answer at random; no model, for tests and `tiny`
    openai, local   asks a language model (llm/chat.py)

Random choices depend on a request's ids (seed, step, row, attempt) alone.
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
    """A solution to be rewritten."""

    problem: Problem
    positive: str  # the solution's text
    ids: Ids  # seed, step, row in the data order, attempt


class Assistant(Protocol):
    """Anything that answers rewrite requests."""

    overlaps: bool  # True where it uses none of our devices, so that a thread may ask it while they work

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in their order."""

    def close(self) -> None: ...


def make_assistant(cfg: ChatConfig, generate: Generate | None = None) -> Assistant:
    """The assistant that the config's `assistant` section describes.

    Args:
      generate: for `local`: conversations and their ids -> replies.

    Raises what chat.make_chat raises.
    """
    if cfg.kind == "corrupt":
        return CorruptingAssistant()
    return ChatAssistant(chats.make_chat(cfg, generate))


def parse_reply(completion: Completion) -> Reply:
    """The solution inside a model's reply.  A truncated reply stays as it is; the caller refuses it."""
    if completion.truncated:
        return completion
    if not completion.text.strip():
        return Failure("empty")
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
    """Changes the answer's number by the rules of `corruption.corrupt_answer`."""

    overlaps = True

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in their order."""
        return [self._corrupt(request) for request in requests]

    def _corrupt(self, request: Request) -> Reply:
        seed, *ids = request.ids
        try:
            text = corruption.corrupt_answer(request.positive, keys.make_generator(seed, "corruption", *ids))
        except ValueError:  # Python parses no integer of over 4,300 digits, and the policy may write one
            text = None
        if text is None:
            return Failure("nothing to change")
        return Completion(text)

    def close(self) -> None:
        pass


# --- openai, local -----------------------------------------------------------------------------------------


class ChatAssistant:
    """Asks a language model."""

    def __init__(self, chat: Chat):
        self._chat = chat
        self.overlaps = chat.overlaps

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in their order."""
        conversations = [make_rewrite_messages(request) for request in requests]
        replies = self._chat.ask(conversations, [request.ids for request in requests])
        return [reply if isinstance(reply, Failure) else parse_reply(reply) for reply in replies]

    def close(self) -> None:
        self._chat.close()
