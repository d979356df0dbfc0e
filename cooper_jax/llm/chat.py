"""Chat with language models: conversations in, one reply each out.

A reply is a `Completion`, or a `Failure` with the reason why there is none.  A server that is down or answers
nonsense, or a conversation that is too long, is a Failure, never an exception.

    openai    any server with OpenAI's chat completions API
    local     our own weights, through a `generate` that the caller built on the rollout engine

The assistant that rewrites, the judge and the source of completions are such models; `name` (assistant, judge
or source) is the section of the config and the stream of random bits.  Random choices depend on a request's
ids (seed, step, row, attempt) alone: not on its neighbours, nor on the order of replies.  (A server samples
by itself; it is sent a seed.)
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import email.utils
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import httpx
from ml_collections import ConfigDict

from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.runtime import keys
from cooper_jax.settings import typed_config
from cooper_jax.types import Completion

log = logging.getLogger(__name__)

Ids = tuple[int, int, int, int]  # seed, step, row, attempt
Messages = Sequence[tuple[str, str]]  # (role, text)


@dataclasses.dataclass(frozen=True)
class Failure:
    """The absence of a reply."""

    reason: str  # connection, timeout, http_500, nonsense, empty, too_long, ...

    @property
    def transient(self) -> bool:
        """True where the same request may succeed at another time."""
        return self.reason in ("connection", "timeout", "http_429") or self.reason.startswith("http_5")

    @property
    def unreachable(self) -> bool:
        """True where the cause is the server, its address or the key, not this request."""
        return self.reason in ("connection", "http_401", "http_403", "http_404")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Settings of a chat model: the config's section `assistant`, `judge` or `source`."""

    name: str  # of the section; also of the stream of random bits
    kind: str  # openai or local; the assistant's may be corrupt
    url: str  # openai: the server's base address
    model: str  # openai: the model's name there
    key_env: str  # the environment variable that holds the API key; "": no key
    concurrency: int  # openai: requests at a time
    timeout: float  # openai: seconds a request
    retries: int  # openai: further tries of a request
    thinking: str  # on, off, or "" for the chat template's default
    max_prompt_tokens: int  # local: longer conversations are refused; 0: the model's own limit
    max_new_tokens: int
    temperature: float
    top_p: float

    def __post_init__(self) -> None:
        kinds = ("corrupt", "openai", "local") if self.name == "assistant" else ("openai", "local")
        problems = []
        if self.kind not in kinds:
            problems.append(f"{self.name}.kind={self.kind!r}: it must be one of {', '.join(kinds)}")
        if self.thinking not in _THINKING:
            problems.append(f"{self.name}.thinking={self.thinking!r}: it must be on, off or empty")
        if self.kind == "openai":
            problems += self._find_server_problems()
        typed_config.raise_problems(problems)

    @classmethod
    def from_config(cls, section: ConfigDict, name: str) -> ChatConfig:
        """Read a section; name: assistant, judge or source.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, name, name=name)

    @property
    def address(self) -> str:
        """The server's address for chat completions."""
        return self.url.rstrip("/") + "/chat/completions"

    @property
    def template_variables(self) -> dict[str, bool]:
        """Variables of the chat template: whether to think, where the section says so."""
        return _THINKING[self.thinking]

    def read_key(self) -> str:
        """The key in the environment variable `key_env`; "" where there is none."""
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    def _find_server_problems(self) -> list[str]:
        """Messages for settings with which no server can be asked."""
        problems = [
            f"{self.name}.kind=openai: set --config.{self.name}.{field}"
            for field, value in (("url", self.url), ("model", self.model))
            if not value
        ]
        problems += typed_config.find_small(self, self.name, 1, ("concurrency",))
        problems += typed_config.find_small(self, self.name, 0, ("retries",))
        if not self.timeout > 0:
            problems.append(f"{self.name}.timeout={self.timeout}: it must be positive")
        if self.url:
            problems += self._find_url_problems()

        key = self.read_key()
        if key and not (key.isascii() and key.isprintable()):
            problems.append(f"the environment variable {self.key_env} holds characters that no key has")
        # A server on the local machine or network mostly needs no key; one behind TLS does.
        if not key and self.key_env and self.url.startswith("https://"):
            problems.append(
                f"{self.name}.url={self.url}: the environment variable {self.key_env} holds no key: set it, "
                f"name another with --config.{self.name}.key_env, or say that the server needs none with "
                f'--config.{self.name}.key_env=""'
            )
        return problems

    def _find_url_problems(self) -> list[str]:
        """A message for an address that is not one of a server."""
        where = f"{self.name}.url={self.url!r}"
        if not self.url.startswith(("http://", "https://")):
            return [f"{where}: it must begin with http:// or https://"]
        try:
            address = httpx.URL(self.address)
        except httpx.InvalidURL as error:
            return [f"{where}: {error}"]
        if not address.host:
            return [f"{where}: it names no host"]
        if address.userinfo:  # addresses are printed, and written into settings files
            return [
                f"{self.name}.url holds a name or a password: give the key in the environment variable that "
                f"--config.{self.name}.key_env names"
            ]
        return []


_THINKING: dict[str, dict[str, bool]] = {
    "": {},
    "on": {"enable_thinking": True},
    "off": {"enable_thinking": False},
}
Reply = Completion | Failure
Generate = Callable[[Sequence[Messages], Sequence[Ids]], list[Reply]]


class Chat(Protocol):
    """A language model that answers conversations."""

    overlaps: bool  # True where it uses none of our devices, so that a thread may ask it while they work

    def ask(self, conversations: Sequence[Messages], ids: Sequence[Ids]) -> list[Reply]:
        """One reply a conversation, in their order."""

    def close(self) -> None: ...


def make_chat(cfg: ChatConfig, generate: Generate | None = None) -> Chat:
    """The chat model that a section of the config describes.

    Args:
      generate: for `local`: conversations and their ids -> replies.

    Raises ValueError for a local model without `generate`, and for a key that no server takes.
    """
    if cfg.kind == "openai":
        return OpenAIChat(cfg)
    if cfg.kind == "local":
        if generate is None:
            raise ValueError(f"{cfg.name}.kind=local: this program has no rollout engine to run it on")
        return LocalChat(generate, cfg.name)
    raise ValueError(f"{cfg.name}.kind={cfg.kind!r} is not a language model: set it to openai or local")


# --- local -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LocalChat:
    """Our own weights on our own devices."""

    generate: Generate
    name: str  # of the section, for messages
    overlaps = False

    def ask(self, conversations: Sequence[Messages], ids: Sequence[Ids]) -> list[Reply]:
        """One reply a conversation, in their order.  Raises ValueError where their number differs."""
        if not conversations:
            return []
        replies = self.generate(conversations, ids)
        if len(replies) != len(conversations):
            raise ValueError(
                f"the local {self.name} gave {len(replies)} completions to {len(conversations)} requests"
            )
        return replies

    def close(self) -> None:
        pass


# --- openai ------------------------------------------------------------------------------------------------

BACK_OFF = 0.5  # seconds before the first retry; doubles with each retry
MAX_WAIT = 60.0  # seconds between two tries, whatever Retry-After asks for
MAX_BODY = 8 << 20  # bytes of a response


class OpenAIChat:
    """A server with OpenAI's chat completions API.

    At most `concurrency` requests are in flight.  Connection errors, 429 and 5xx are tried again up to
    `retries` times, after the server's Retry-After or an exponential back-off with jitter.  A request that
    takes longer than `timeout` seconds is not tried again, because the training step waits for it.  The key
    is read from the environment variable `key_env` and used in the Authorization header only; a local server
    may need none.
    """

    overlaps = True

    def __init__(self, cfg: ChatConfig):
        self.name = cfg.name
        self.address = cfg.address
        self._cfg = cfg

        key = cfg.read_key()

        # Servers that do not know the field may refuse it, so it is sent only where it is needed.
        variables = cfg.template_variables
        self._extra_fields = {"chat_template_kwargs": variables} if variables else {}
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=cfg.timeout,
            limits=httpx.Limits(max_connections=cfg.concurrency),
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(cfg.concurrency, thread_name_prefix=cfg.name)
        self._closing = threading.Event()

    def ask(self, conversations: Sequence[Messages], ids: Sequence[Ids]) -> list[Reply]:
        """One reply a conversation, in their order; failures are logged in one line."""
        replies = list(self._threads.map(self._ask_one, conversations, ids))
        reasons = sorted({reply.reason for reply in replies if isinstance(reply, Failure)})
        if reasons:
            failed = sum(isinstance(reply, Failure) for reply in replies)
            log.warning(
                "%s: %d of %d requests failed (%s)", self.address, failed, len(replies), ", ".join(reasons)
            )
        return replies

    def stream(self, requests: Iterable[tuple[Messages, Ids]]) -> Iterator[tuple[int, Reply]]:
        """(index among the requests, reply) in the order in which replies arrive.

        Requests are taken from the iterable while others are in flight, so it may stop at any time; those
        that it gave are still answered.
        """
        in_flight: dict[concurrent.futures.Future[Reply], int] = {}
        max_in_flight = 2 * self._cfg.concurrency  # so that no thread waits for the caller
        numbered = enumerate(requests)
        exhausted = False
        try:
            while not exhausted or in_flight:
                while not exhausted and len(in_flight) < max_in_flight:
                    following = next(numbered, None)
                    if following is None:
                        exhausted = True
                    else:
                        index, (messages, ids) = following
                        in_flight[self._threads.submit(self._ask_one, messages, ids)] = index
                done, _ = concurrent.futures.wait(in_flight, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield in_flight.pop(future), future.result()
        finally:
            for future in in_flight:
                future.cancel()

    def close(self) -> None:
        """End retries, drop requests that have not started, and close all connections."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _ask_one(self, messages: Messages, ids: Ids) -> Reply:
        """The reply to one conversation, with retries."""
        seed, *rest = ids
        rng = keys.make_generator(seed, self.name, *rest)

        # The seed differs between the tries of a pair (attempt), not between the retries of one request.
        body = {
            "model": self._cfg.model,
            "messages": [{"role": role, "content": replace_surrogates(text)} for role, text in messages],
            "max_tokens": self._cfg.max_new_tokens,
            "temperature": self._cfg.temperature,
            "top_p": self._cfg.top_p,
            "seed": int(rng.integers(2**31)),
            **self._extra_fields,
        }

        for attempt in range(self._cfg.retries + 1):
            reply, may_retry, retry_after = self._post(body)
            if not may_retry or attempt == self._cfg.retries:
                break
            # Jitter, so that requests that failed together are not all sent again together.
            wait = retry_after
            if wait is None:
                wait = BACK_OFF * 2**attempt * (1.0 + rng.random())
            if self._closing.wait(min(wait, MAX_WAIT)):
                break
        return reply

    def _post(self, body: dict[str, Any]) -> tuple[Reply, bool, float | None]:
        """Send one request: (reply, True if it may be tried again, seconds of the server's Retry-After)."""
        # Read in pieces, so that time and size are limited while the body arrives.
        deadline = time.monotonic() + self._cfg.timeout
        try:
            with self._client.stream("POST", self.address, json=body) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    # httpx limits the time of one read: a server that sends byte by byte is never late.
                    if time.monotonic() > deadline:
                        return Failure("timeout"), False, None
                    if len(content) > MAX_BODY:
                        return Failure("nonsense"), False, None
        except httpx.TimeoutException:
            return Failure("timeout"), False, None
        except httpx.TransportError:
            return Failure("connection"), True, None
        except httpx.HTTPError:  # a body that does not decode
            return Failure("nonsense"), False, None

        status = response.status_code
        if status == 200:
            return _parse_chat(bytes(content)), False, None
        retry_after = _parse_retry_after(response.headers.get("Retry-After", ""))
        return Failure(f"http_{status}"), status == 429 or status >= 500, retry_after


def _parse_chat(content: bytes) -> Reply:
    """The first choice of a chat completion's JSON; Failure("nonsense") where it has another shape."""
    try:
        chat = json.loads(content)
        choice = chat["choices"][0]
        text, truncated = choice["message"]["content"], choice["finish_reason"] == "length"
        usage = chat.get("usage")
        tokens = usage["completion_tokens"] if usage else 0
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Failure("nonsense")
    if text is None:
        return Failure("empty")
    if not isinstance(text, str) or not isinstance(tokens, int):
        return Failure("nonsense")
    # A server that cuts a reply inside an emoji may send half of a surrogate pair.
    return Completion(replace_surrogates(text), truncated, tokens)


def _parse_retry_after(header: str) -> float | None:
    """Seconds from now of a Retry-After header, given in seconds or as a date; None for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
