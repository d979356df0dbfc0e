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

from ml_collections import ConfigDict

from cooper_jax.data import prompts
from cooper_jax.llm import chat as chats
from cooper_jax.llm.chat import Chat, ChatConfig, Failure, Generate, Ids, Messages, Reply
from cooper_jax.reward import corruption
from cooper_jax.runtime import keys
from cooper_jax.settings import typed_config
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


@dataclasses.dataclass(frozen=True)
class RewriteConfig:
    """Settings of the requests for rewrites: fields of the config's `assistant` section beside ChatConfig's."""

    prompt: str  # one of prompts.REWRITE_PROMPTS

    def __post_init__(self) -> None:
        typed_config.raise_errors(
            typed_config.find_unknown(self.prompt, "assistant.prompt", tuple(prompts.REWRITE_PROMPTS))
        )

    @classmethod
    def from_config(cls, section: ConfigDict) -> RewriteConfig:
        """Read the `assistant` section.  Raises SetupError for an unknown prompt."""
        return typed_config.read_section(cls, section, "assistant")


def make_assistant(
    cfg: ChatConfig, generate: Generate | None = None, rewrite: RewriteConfig | None = None
) -> Assistant:
    """Make the assistant that the config's `assistant` section describes.

    Args:
      generate: (conversations, ids) -> replies; needed for `local` only.
      rewrite: the section's other settings; None: those of the `careful` prompt.

    Raises what chat.make_chat raises.
    """
    if cfg.kind == "corrupt":
        return CorruptingAssistant()
    prompt = "careful" if rewrite is None else rewrite.prompt
    return ChatAssistant(chats.make_chat(cfg, generate), prompt, limit_by_words=not cfg.max_new_tokens)


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


def make_rewrite_messages(request: Request, prompt: str) -> Messages:
    """The conversation that asks a language model for a rewrite.  prompt: one of prompts.REWRITE_PROMPTS."""
    problem = request.problem
    return prompts.REWRITE_PROMPTS[prompt](problem.question, problem.reference, request.positive)


def count_reply_tokens(request: Request) -> int:
    """The maximum number of tokens of a rewrite: the positive's number of words + 500 (released code)."""
    return len(request.positive.split()) + chats.EXTRA_TOKENS


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

    def __init__(self, chat: Chat, prompt: str, *, limit_by_words: bool):
        """Wrap a chat model.

        Args:
          prompt: one of prompts.REWRITE_PROMPTS.
          limit_by_words: limit each reply by `count_reply_tokens`, not by the model's max_new_tokens.
        """
        self._chat = chat
        self._prompt = prompt
        self._limit_by_words = limit_by_words
        self.overlaps = chat.overlaps

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in the order of the requests."""
        # All requests of a round are sent at once, so that a server can batch them.
        conversations = [make_rewrite_messages(request, self._prompt) for request in requests]
        limits = [count_reply_tokens(request) for request in requests] if self._limit_by_words else None
        replies = self._chat.ask(conversations, [request.ids for request in requests], limits)
        return [reply if isinstance(reply, Failure) else parse_reply(reply) for reply in replies]

    def close(self) -> None:
        self._chat.close()
