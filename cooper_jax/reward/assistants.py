"""Assistants: they rewrite a verified solution into a plausible wrong one, the negative of a pair.

An assistant takes requests and gives one reply to each: a `Completion` (the rewritten solution and nothing
else), or a `Failure` with the reason.  A server that is down or returns malformed output gives a Failure and
never raises: the pair is masked, and training continues.

    corrupt         changes the number in the answer at random; needs no model, for tests and `tiny`
    openai, local   ask a language model (llm/chat.py)
    PATH.py:NAME    a class of the user's own

A class of the user's own is made without arguments and has one method, and `close()` if it needs one:

    class Rewriter:
        concurrency = 8                      # optional: up to 8 threads call rewrite, each with one request
        def rewrite(self, requests): ...     # -> one text per request, or None; `Request` lists its fields

Without `concurrency` one call has all requests of a round.
Random choices depend only on a request's ids (seed, step, row, attempt).
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from cooper_jax.data import prompts
from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.llm import chat as chats
from cooper_jax.llm.chat import Chat, ChatConfig, Failure, Generate, Ids, Messages, Reply
from cooper_jax.reward import corruption
from cooper_jax.runtime import keys
from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.user_code import (
    UserCode,
    describe_error,
    find_missing_arguments,
    is_user_code,
    load_function,
    read_user_code,
)
from cooper_jax.types import Completion, Problem


@dataclasses.dataclass(frozen=True)
class Request:
    """A solution that the assistant is asked to rewrite."""

    problem: Problem
    positive: str  # text of the verified solution
    ids: Ids  # seed, step, row in the data order, attempt

    @property
    def question(self) -> str:
        return self.problem.question

    @property
    def reference(self) -> str:
        return self.problem.reference

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of the problem's data row."""
        return self.problem.columns

    @property
    def seed(self) -> int:
        """A number that is the same for the same request in a repeated or resumed run, and else another."""
        seed, *ids = self.ids
        return int(keys.make_generator(seed, "corruption", *ids).integers(1 << 62))


class Assistant(Protocol):
    """The interface of everything that answers rewrite requests."""

    # True if it computes nothing on our devices: threads may then call it while they are busy.
    overlaps: bool

    @property
    def concurrency(self) -> int | None:
        """The number of threads that may call `rewrite` at the same time, each with one request.

        None: one call at a time, with all requests of a round.
        """

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in the order of the requests."""

    def report_failures(self) -> None:
        """Print a line about requests that failed since the last call, if there are any."""

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class RewriteConfig:
    """Settings of the requests for rewrites: fields of the config's `assistant` section beside ChatConfig's."""

    prompt: str  # one of prompts.REWRITE_PROMPTS
    probe: bool  # ask a server one question at the start, and end the run if it does not answer
    start_timeout: float = 0.0  # seconds in which a server that is starting is asked again

    def __post_init__(self) -> None:
        errors = typed_config.find_unknown(self.prompt, "assistant.prompt", tuple(prompts.REWRITE_PROMPTS))
        errors += bounds.find_out_of_bounds(self, "assistant")
        typed_config.raise_errors(errors)

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

    Raises what chat.make_chat raises, and SetupError for a class of the user's that cannot be used.
    """
    if cfg.kind == "corrupt":
        return CorruptingAssistant()
    if is_user_code(cfg.kind):
        return UserAssistant(read_user_code(cfg.kind, "assistant.kind"), cfg.timeout)
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
    concurrency = 8  # so that the rule checks several texts at a time

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

    def report_failures(self) -> None:
        pass

    def close(self) -> None:
        pass


# --- a class of the user's own -----------------------------------------------------------------------------


class UserAssistant:
    """An assistant of the user's own.  What it does wrong is a Failure, and the first one is printed."""

    # It computes nothing on the devices, as far as the run knows.
    overlaps = True

    def __init__(self, code: UserCode, timeout: float):
        """Make the user's object.

        timeout: seconds for one call, which has all requests of a round, or one with `concurrency`.

        Raises SetupError for a class that cannot be imported or made, that has no method `rewrite`, or whose
        `concurrency` is no positive integer.
        """
        self.code = code
        self._timeout = timeout
        self._has_warned = False
        where = f"assistant.kind={code.label!r}"
        made = load_function(code, "assistant.kind", allows_class=True)
        if missing := find_missing_arguments(made, ()):
            raise SetupError(f"{where}: it is made without arguments, and takes {', '.join(missing)}")
        try:
            self._rewriter = made()
        except Exception as error:
            raise SetupError(f"{where}: it cannot be made: {describe_error(error, code.path)}") from error
        if not callable(getattr(self._rewriter, "rewrite", None)):
            raise SetupError(f"{where}: it has no method rewrite(requests)")
        self.concurrency = getattr(self._rewriter, "concurrency", None)
        if self.concurrency is not None and not (type(self.concurrency) is int and self.concurrency >= 1):
            raise SetupError(
                f"{where}: its concurrency is {self.concurrency!r}; give the number of threads that may call "
                "rewrite at the same time, at least 1, or leave it out"
            )
        self._calls = threading.BoundedSemaphore(self.concurrency or 1)

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in the order of the requests."""
        # The rewrites of two steps may overlap, and the class is promised no more calls than it allows.
        with self._calls:
            return self._rewrite(requests)

    def _rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        if not requests:
            return []

        # In a thread of its own, which is left behind if it does not return.
        outcome: list[list[Reply]] = []
        thread = threading.Thread(target=lambda: outcome.append(self._ask(requests)), daemon=True)
        thread.start()
        thread.join(self._timeout)
        if outcome:
            return outcome[0]
        self._warn(f"no reply within {self._timeout} s (--config.assistant.timeout)")
        return [Failure("timeout")] * len(requests)

    def _ask(self, requests: Sequence[Request]) -> list[Reply]:
        try:
            texts = list(self._rewriter.rewrite(list(requests)))
        except Exception as error:
            self._warn(describe_error(error, self.code.path))
            return [Failure("exception")] * len(requests)
        if len(texts) != len(requests):
            self._warn(f"it returned {len(texts)} texts for {len(requests)} requests")
            return [Failure("malformed")] * len(requests)
        return [self._read_text(text) for text in texts]

    def _read_text(self, text: Any) -> Reply:
        if text is None:
            return Failure("nothing to change")
        if not isinstance(text, str):
            self._warn(f"it returned {type(text).__name__}, not a text")
            return Failure("malformed")
        return Completion(replace_surrogates(text)) if text.strip() else Failure("empty")

    def _warn(self, message: str) -> None:
        # Each host prints its own: the requests are divided over the hosts.
        if not self._has_warned:
            self._has_warned = True
            print(
                f"warning: assistant.kind={self.code.label!r} failed, so its pairs are masked and counted in "
                f"pairs/refused_...; later failures are not printed: {message}",
                file=sys.stderr,
                flush=True,
            )

    def report_failures(self) -> None:
        """Failures are printed where they occur."""

    def close(self) -> None:
        """Call the object's `close`, if it has one."""
        if callable(close := getattr(self._rewriter, "close", None)):
            close()


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
        self.concurrency = chat.concurrency

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request, in the order of the requests."""
        # All requests are sent at once, so that a server can batch them.
        conversations = [make_rewrite_messages(request, self._prompt) for request in requests]
        limits = [count_reply_tokens(request) for request in requests] if self._limit_by_words else None
        replies = self._chat.ask(conversations, [request.ids for request in requests], limits)
        return [reply if isinstance(reply, Failure) else parse_reply(reply) for reply in replies]

    def report_failures(self) -> None:
        """Print a line about requests that failed since the last call, if there are any."""
        self._chat.report_failures()

    def close(self) -> None:
        self._chat.close()
