"""Assistants: who rewrites a verified solution into a plausible wrong one.

Requests in, one reply each out: a `Completion` (the rewritten solution, bare), or a `Failure` that says why there
is none.  A server that is down or answers nonsense is a Failure, never an exception: its pair is masked, the run
goes on.

    corrupt         edits the answer's number, seeded; no model, for tests and `tiny`
    openai, local   asks a language model (chat.py)

What is random depends on a request's ids (seed, step, row, attempt) alone.
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
    """A solution to be rewritten.  `ids`: seed, step, row in the data order, attempt."""

    problem: Problem
    positive: str
    ids: Ids


class Assistant(Protocol):
    overlaps: bool  # it computes away from our devices, so a thread may ask it while they work

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in their order."""

    def close(self) -> None: ...


def make_assistant(cfg: ChatConfig, generate: Generate | None = None) -> Assistant:
    """The assistant of these settings.

    Args:
      generate: for `local`: conversations and their ids -> completions.

    Raises what chat.make_chat does.
    """
    return CorruptingAssistant() if cfg.kind == "corrupt" else ChatAssistant(chats.make_chat(cfg, generate))


def parse_reply(completion: Completion) -> Reply:
    """The solution inside a model's reply.  A truncated one stays as it is, for the caller to refuse."""
    if completion.truncated:
        return completion
    if not completion.text.strip():
        return Failure("empty")
    solution = prompts.parse_negative(completion.text)
    return Failure("malformed") if solution is None else dataclasses.replace(completion, text=solution)


def rewrite_messages(request: Request) -> Messages:
    problem = request.problem
    return prompts.negative_messages(problem.question, problem.reference, request.positive)


# --- corrupt -----------------------------------------------------------------------------------------------


class CorruptingAssistant:
    """Changes the answer's number; `corruption.corrupt_answer` has the rules."""

    overlaps = True

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Reply:
        seed, *ids = request.ids
        try:
            text = corruption.corrupt_answer(request.positive, keys.make_generator(seed, "corruption", *ids))
        except ValueError:  # Python reads no integer of over 4,300 digits, and the policy may write one
            text = None
        return Failure("nothing to change") if text is None else Completion(text)

    def close(self) -> None:
        pass


# --- openai, local -----------------------------------------------------------------------------------------


class ChatAssistant:
    """Asks a language model."""

    def __init__(self, chat: Chat):
        self._chat = chat
        self.overlaps = chat.overlaps

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        replies = self._chat.ask([rewrite_messages(r) for r in requests], [r.ids for r in requests])
        return [r if isinstance(r, Failure) else parse_reply(r) for r in replies]

    def close(self) -> None:
        self._chat.close()
