"""Language models that are asked: conversations in, one reply each out.

A reply is a `Completion`, or a `Failure` that says why there is none.  A server that is down or answers nonsense,
or a conversation that is too long, is a Failure, never an exception.

    openai    any server that speaks OpenAI's chat completions
    local     weights of our own, through a `generate` that the caller built on the rollout engine

The assistant that rewrites, the judge and the source of completions are such models; `name` (assistant, judge or
source) is the section of the config and the stream of random bits.  What is random depends on a request's ids
(seed, step, row, attempt) alone: not on its neighbours, nor on who answers first.  (A server's own sampling is its
affair; it is given a seed.)
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
    """Why there is no reply: `connection`, `timeout`, `http_500`, `nonsense`, `empty`, `too_long`, ..."""

    reason: str

    @property
    def passing(self) -> bool:
        """Whether the same request may well be answered another time."""
        return self.reason in ("connection", "timeout", "http_429") or self.reason.startswith("http_5")

    @property
    def unreachable(self) -> bool:
        """Whether it lies with the server, its address or the key, not with this request."""
        return self.reason in ("connection", "http_401", "http_403", "http_404")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Settings of a language model that is asked: the config's section `assistant`, `judge` or `source`."""

    name: str  # the section's; also the stream of random bits
    kind: str  # openai or local; the assistant's may be corrupt
    url: str  # openai: the server's base address
    model: str  # openai: the model's name there
    key_env: str  # the environment variable that holds the key; "": none
    concurrency: int  # requests at a time
    timeout: float  # seconds a request
    retries: int
    thinking: str  # on, off or ""
    max_prompt_tokens: int  # local: longer conversations are refused; 0: as many as the model was trained for
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
        """Messages for the settings of a server that cannot be asked."""
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
        if not (key.isascii() and key.isprintable()) and key:
            problems.append(f"the environment variable {self.key_env} holds characters that no key has")
        # A server on one's own machine or network mostly has no key; one behind TLS has.
        if not key and self.key_env and self.url.startswith("https://"):
            problems.append(
                f"{self.name}.url={self.url}: the environment variable {self.key_env} holds no key: set it, name "
                f"another with --config.{self.name}.key_env, or say that the server needs none with "
                f'--config.{self.name}.key_env=""'
            )
        return problems

    def _find_url_problems(self) -> list[str]:
        """A message for an address that cannot be asked."""
        where = f"{self.name}.url={self.url!r}"
        if not self.url.startswith(("http://", "https://")):
            return [f"{where}: it must begin with http:// or https://"]
        try:
            address = httpx.URL(self.address)
        except httpx.InvalidURL as error:
            return [f"{where}: {error}"]
        if not address.host:
            return [f"{where}: it names no host"]
        if address.userinfo:  # addresses are printed, and kept in settings
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
    overlaps: bool  # it computes away from our devices, so a thread may ask it while they work

    def ask(self, conversations: Sequence[Messages], ids: Sequence[Ids]) -> list[Reply]:
        """One reply a conversation, in their order."""

    def close(self) -> None: ...


def make_chat(cfg: ChatConfig, generate: Generate | None = None) -> Chat:
    """The language model of these settings.

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
    raise ValueError(f"{cfg.name}.kind={cfg.kind!r}: it is no language model")


# --- local -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LocalChat:
    """Weights of our own, on our devices."""

    generate: Generate
    name: str
    overlaps = False

    def ask(self, conversations: Sequence[Messages], ids: Sequence[Ids]) -> list[Reply]:
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

BACK_OFF = 0.5  # seconds before the first retry; doubles each time
LONGEST_WAIT = 60.0  # seconds between two tries at most, whatever Retry-After asks for
LARGEST_BODY = 8 << 20  # bytes of a response


class OpenAIChat:
    """A server that speaks OpenAI's chat completions.

    At most `concurrency` requests are under way at a time.  Connection errors, 429 and 5xx are tried again up to
    `retries` times, after the server's Retry-After or an exponential back-off with jitter; a request that takes
    longer than `timeout` seconds is not, for somebody waits for it.  The key is read from the environment variable
    `key_env` and goes nowhere but into the Authorization header; a local server may need none.
    """

    overlaps = True

    def __init__(self, cfg: ChatConfig):
        self.name = cfg.name
        self.address = cfg.address
        self._cfg = cfg

        key = cfg.read_key()

        # Servers that do not know the field may refuse it, so it is sent only where it says something.
        told = cfg.template_variables
        self._extra = {"chat_template_kwargs": told} if told else {}
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=cfg.timeout,
            limits=httpx.Limits(max_connections=cfg.concurrency),
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(cfg.concurrency, thread_name_prefix=cfg.name)
        self._closing = threading.Event()

    def ask(self, conversations: Sequence[Messages], ids: Sequence[Ids]) -> list[Reply]:
        replies = list(self._threads.map(self._one, conversations, ids))
        reasons = sorted({reply.reason for reply in replies if isinstance(reply, Failure)})
        if reasons:
            failed = sum(isinstance(reply, Failure) for reply in replies)
            log.warning(
                "%s: %d of %d requests failed (%s)", self.address, failed, len(replies), ", ".join(reasons)
            )
        return replies

    def stream(self, requests: Iterable[tuple[Messages, Ids]]) -> Iterator[tuple[int, Reply]]:
        """(place among the requests, reply), as they come.

        Requests are taken while others are under way, so the iterable may end them when it likes: those that it
        gave are answered still.
        """
        waiting: dict[concurrent.futures.Future, int] = {}
        ahead = 2 * self._cfg.concurrency  # so that no thread waits for the caller
        requests, place, more = iter(requests), 0, True
        try:
            while more or waiting:
                while more and len(waiting) < ahead:
                    request = next(requests, None)
                    more = request is not None
                    if more:
                        waiting[self._threads.submit(self._one, *request)] = place
                        place += 1
                done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _one(self, messages: Messages, ids: Ids) -> Reply:
        seed, *rest = ids
        rng = keys.make_generator(seed, self.name, *rest)
        body = {
            "model": self._cfg.model,
            "messages": [{"role": role, "content": replace_surrogates(text)} for role, text in messages],
            "max_tokens": self._cfg.max_new_tokens,
            "temperature": self._cfg.temperature,
            "top_p": self._cfg.top_p,
            "seed": int(rng.integers(2**31)),
            **self._extra,
        }
        for attempt in range(self._cfg.retries + 1):
            reply, again, asked = self._post(body)
            if not again or attempt == self._cfg.retries:
                break
            wait = asked if asked is not None else BACK_OFF * 2**attempt * (1.0 + rng.random())
            if self._closing.wait(min(wait, LONGEST_WAIT)):
                break
        return reply

    def _post(self, body: dict[str, Any]) -> tuple[Reply, bool, float | None]:
        """(reply, whether to try again, the seconds that the server asks to be left alone)."""
        deadline = time.monotonic() + self._cfg.timeout
        try:
            with self._client.stream("POST", self.address, json=body) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    # httpx times single reads: a server that trickles would never be late.
                    if time.monotonic() > deadline:
                        return Failure("timeout"), False, None
                    if len(content) > LARGEST_BODY:
                        return Failure("nonsense"), False, None
        except httpx.TimeoutException:
            return Failure("timeout"), False, None
        except httpx.TransportError:
            return Failure("connection"), True, None
        except httpx.HTTPError:  # a body that does not decode
            return Failure("nonsense"), False, None
        status = response.status_code
        if status == 200:
            return _read_chat(bytes(content)), False, None
        asked = _retry_after(response.headers.get("Retry-After", ""))
        return Failure(f"http_{status}"), status == 429 or status >= 500, asked


def _read_chat(content: bytes) -> Reply:
    """The first choice of a chat completion."""
    try:
        chat = json.loads(content)
        choice = chat["choices"][0]
        text, truncated = choice["message"]["content"], choice["finish_reason"] == "length"
        tokens = chat["usage"]["completion_tokens"] if "usage" in chat and chat["usage"] else 0
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Failure("nonsense")
    if text is None:
        return Failure("empty")
    if not isinstance(text, str) or not isinstance(tokens, int):
        return Failure("nonsense")
    # A server that cuts a reply inside an emoji may send half of a surrogate pair.
    return Completion(replace_surrogates(text), truncated, tokens)


def _retry_after(header: str) -> float | None:
    """Seconds from now, of a Retry-After in seconds or as a date."""
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
