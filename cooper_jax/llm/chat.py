"""Chat with language models: one reply per conversation.

A reply is a `Completion`, or a `Failure` with the reason why there is none.  A server that is down or returns
malformed output, or a conversation that is too long, gives a Failure and never raises.

    openai    any server with OpenAI's chat completions API
    local     our own weights, through a `generate` function that the caller builds on the rollout engine

Three parts of the project use a chat model: the assistant that rewrites solutions, the judge, and the
source of completions.  `name` (assistant, judge or source) is the model's section in the config and its
random stream.  Random choices depend only on a request's ids (seed, step, row, attempt), not on the other
requests or on the order of replies.  (A server draws its own random numbers; it is sent a seed.)
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import email.utils
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import httpx
from ml_collections import ConfigDict

from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.llm.chat_replies import Failure, Reply, describe_refusal, parse_server_reply
from cooper_jax.llm.circuit_breaker import CircuitBreaker
from cooper_jax.llm.deadline_transport import DeadlineTransport, limit_time
from cooper_jax.llm.request_fields import change_fields, parse_field_changes, suggest_changes
from cooper_jax.runtime import keys
from cooper_jax.settings import bounds, typed_config
from cooper_jax.settings.secrets import find_secrets
from cooper_jax.settings.user_code import is_user_code

log = logging.getLogger(__name__)

# Tokens that a reply may have beyond the number of words of the text that it rewrites (released code).
EXTRA_TOKENS = 500

Ids = tuple[int, int, int, int]  # seed, step, row, attempt
Messages = Sequence[tuple[str, str]]  # (role, text)


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Settings of a chat model: the config's section `assistant`, `judge` or `source`."""

    name: str  # of the section and of the random stream
    kind: str  # openai or local; for the assistant also corrupt, or PATH.py:NAME

    # kind=openai: the server.
    url: str  # base address
    model: str  # the model's name on the server
    key_env: str  # environment variable that contains the API key; "": no key
    concurrency: int  # maximum number of requests in flight
    timeout: float  # seconds per request
    retries: int  # tries after the first one
    fields: str  # request fields that are renamed or dropped; see request_fields.py

    # The prompt.
    thinking: str  # on, off, or "" for the chat template's default
    max_prompt_tokens: int  # local: longer conversations are refused; 0: the model's context length

    # Sampling.
    max_new_tokens: int  # 0, for the assistant only: each request has a limit of its own
    temperature: float
    top_p: float

    def __post_init__(self) -> None:
        # Only the assistant has kinds without a language model.
        kinds: tuple[str, ...] = ("openai", "local")
        own = False
        if self.name == "assistant":
            kinds, own = ("corrupt", "openai", "local"), is_user_code(self.kind)
        errors = []
        if self.kind not in kinds and not own:
            errors.append(f"{self.name}.kind={self.kind!r}: it must be one of {', '.join(kinds)}")
        errors += bounds.find_out_of_bounds(self, self.name)
        secrets = find_secrets(self.name, self.url, self.key_env)
        errors += secrets
        # Messages about a server's settings repeat them.
        if self.kind == "openai" and not secrets:
            errors += self._find_server_problems()
        elif self.kind != "openai" and self.fields:
            errors.append(
                f"{self.name}.fields={self.fields!r} has no effect with {self.name}.kind={self.kind}: "
                "leave it empty"
            )
        typed_config.raise_errors(errors)

    @classmethod
    def from_config(cls, section: ConfigDict, name: str) -> ChatConfig:
        """Read the section `name`: assistant, judge or source.  Raises SetupError for values out of range."""
        return typed_config.read_section(cls, section, name, name=name)

    @property
    def address(self) -> str:
        """The URL of the server's chat completions."""
        return self.url.rstrip("/") + "/chat/completions"

    @property
    def template_variables(self) -> dict[str, bool]:
        """Variables of the chat template: enable_thinking if `thinking` is set, else none."""
        return _THINKING[self.thinking]

    def read_key(self) -> str:
        """The API key from the environment variable `key_env`; "" if there is none."""
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    def _find_server_problems(self) -> list[str]:
        """Messages for settings that make requests to a server impossible."""
        errors = []
        for field, value in (("url", self.url), ("model", self.model)):
            if not value:
                errors.append(f"{self.name}.kind=openai: set --config.{self.name}.{field}")
        if self.url:
            errors += self._find_url_problems()
        try:
            parse_field_changes(self.fields)
        except ValueError as error:
            errors.append(f"{self.name}.fields={self.fields!r}: {error}")

        # A key with a line break or another control character would fail in httpx, far from its cause.
        key = self.read_key()
        if key and not (key.isascii() and key.isprintable()):
            errors.append(f"the environment variable {self.key_env} contains characters that no key has")

        # A server on the local machine or network usually needs no key; one that is reached by https does.
        if not key and self.key_env and self.url.startswith("https://"):
            errors.append(
                f"{self.name}.url={self.url}: the environment variable {self.key_env} contains no key: "
                f"set it, name another with --config.{self.name}.key_env, or declare that the server needs "
                f'none with --config.{self.name}.key_env=""'
            )
        return errors

    def _find_url_problems(self) -> list[str]:
        """At most one message, for a URL that cannot be the address of a server."""
        setting = f"{self.name}.url={self.url!r}"
        if not self.url.startswith(("http://", "https://")):
            return [f"{setting}: it must begin with http:// or https://"]
        try:
            address = httpx.URL(self.address)
        except httpx.InvalidURL as error:
            return [f"{setting}: {error}"]
        if not address.host:
            return [f"{setting}: it names no host"]

        return []


# ChatConfig.thinking -> variables of the chat template, by the name that Qwen3's template uses.
_THINKING: dict[str, dict[str, bool]] = {
    "": {},
    "on": {"enable_thinking": True},
    "off": {"enable_thinking": False},
}

Generate = Callable[[Sequence[Messages], Sequence[Ids]], list[Reply]]


class Chat(Protocol):
    """The interface of language models that answer conversations."""

    # True if it computes nothing on our devices: a thread may then call it while they are busy.
    overlaps: bool

    @property
    def concurrency(self) -> int | None:
        """The number of threads that may call `ask` at the same time; None: one."""

    def ask(
        self, conversations: Sequence[Messages], ids: Sequence[Ids], limits: Sequence[int] | None = None
    ) -> list[Reply]:
        """One reply per conversation, in the order of the conversations.

        limits: the maximum number of tokens of each reply; None: `max_new_tokens` for all.
        """

    def report_failures(self) -> None:
        """Print a line about conversations that failed since the last call, if there are any."""

    def close(self) -> None: ...


def make_chat(cfg: ChatConfig, generate: Generate | None = None) -> Chat:
    """Make the chat model that a section of the config describes.

    Args:
      generate: (conversations, ids) -> replies; needed for `local` only.

    Raises ValueError for a local model without `generate`, and for a kind that is not a language model.
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

    generate: Generate  # see local_chat.make_local_generate
    name: str  # of the section, for messages
    overlaps = False
    concurrency = None

    def ask(
        self, conversations: Sequence[Messages], ids: Sequence[Ids], limits: Sequence[int] | None = None
    ) -> list[Reply]:
        """One reply per conversation, in order.  Raises ValueError if `generate` returns another number."""
        if not conversations:
            return []
        replies = self.generate(conversations, ids)
        if len(replies) != len(conversations):
            raise ValueError(
                f"the local {self.name} returned {len(replies)} completions to {len(conversations)} requests"
            )
        if limits is None:
            return replies

        # A batch is sampled with one limit for all its rows.  A longer reply than the row's own limit counts as
        # truncated, as it would be by a server.
        return [_apply_limit(reply, limit) for reply, limit in zip(replies, limits, strict=True)]

    def report_failures(self) -> None:
        """Conversations that do not fit are the only failures, and the metrics count them."""

    def close(self) -> None:
        pass


def _apply_limit(reply: Reply, limit: int) -> Reply:
    """Mark a reply of more than `limit` tokens as truncated."""
    if isinstance(reply, Failure) or reply.tokens <= limit:
        return reply
    return dataclasses.replace(reply, truncated=True)


# --- openai ------------------------------------------------------------------------------------------------

BACK_OFF = 0.5  # seconds before the first retry; doubled with each retry
MAX_WAIT = 60.0  # maximum seconds between two tries, even if Retry-After asks for more
MAX_BODY = 8 << 20  # maximum bytes of a response


class OpenAIChat:
    """A server with OpenAI's chat completions API.

    At most `concurrency` requests are in flight.  After connection errors, 429 and 5xx a request is retried
    up to `retries` times, after the server's Retry-After or an exponential back-off with jitter.  A request
    that takes longer than `timeout` seconds, whatever it consists of, is not retried: the training step is waiting
    for it.  A server that does not answer for several requests in a row gets none for a while (circuit_breaker.py):
    they fail as "unavailable".
    The server's own words about a refusal are printed once for each status code.
    The API key is read from the environment variable `key_env` and used only in the Authorization header.
    """

    overlaps = True

    def __init__(self, cfg: ChatConfig):
        self.name = cfg.name
        self.address = cfg.address
        self.concurrency = cfg.concurrency
        self._cfg = cfg

        # The server's own words about requests that it refused, by the Failure's reason: the first of each.
        self.server_words: dict[str, str] = {}

        # Since the last report; under the lock, since several threads may ask.
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()  # by reason
        self._answered = 0
        self._key = key = cfg.read_key()

        # Some servers refuse requests with fields that they do not know, so this one is sent only if needed.
        variables = cfg.template_variables
        self._extra_fields = {"chat_template_kwargs": variables} if variables else {}
        self._field_changes = parse_field_changes(cfg.fields)
        # Compressed replies are refused: a small one may unpack to any size.
        headers = {"Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.Client(
            headers=headers,
            timeout=cfg.timeout,
            transport=DeadlineTransport(cfg.address, max_connections=cfg.concurrency),
        )
        # Jobs that ask for nothing but replies wait for a server that is slow; training goes on without it.
        self._breaker = CircuitBreaker() if cfg.name == "assistant" else None

        # Each thread has one request in flight and waits for its reply.
        self._threads = concurrent.futures.ThreadPoolExecutor(cfg.concurrency, thread_name_prefix=cfg.name)
        self._closing = threading.Event()

    def ask(
        self, conversations: Sequence[Messages], ids: Sequence[Ids], limits: Sequence[int] | None = None
    ) -> list[Reply]:
        """One reply per conversation, in the order of the conversations."""
        if limits is None:
            limits = [self._cfg.max_new_tokens] * len(conversations)
        replies = list(self._threads.map(self._ask_one, conversations, ids, limits))
        with self._lock:
            self._answered += len(replies)
            self._failures.update(reply.reason for reply in replies if isinstance(reply, Failure))
        return replies

    def report_failures(self) -> None:
        """Print a line about requests that failed since the last call, if there are any."""
        # One line for all: a server that is down fails every request.
        with self._lock:
            failures, answered = self._failures, self._answered
            self._failures, self._answered = Counter(), 0
        if failures:
            log.warning(
                "%s: %d of %d requests failed (%s)",
                self.address,
                failures.total(),
                answered,
                ", ".join(sorted(failures)),
            )

    def stream(self, requests: Iterable[tuple[Messages, Ids]]) -> Iterator[tuple[int, Reply]]:
        """Yield (index of the request, reply) in the order in which replies arrive.

        Requests are taken from the iterable while others are in flight.  It may end at any time; the requests
        that it has yielded are still answered.
        """
        in_flight: dict[concurrent.futures.Future[Reply], int] = {}
        numbered = enumerate(requests)
        exhausted = False

        # Queue twice as many requests as there are threads, so that no thread waits for the caller.
        max_in_flight = 2 * self._cfg.concurrency
        try:
            while not exhausted or in_flight:
                while not exhausted and len(in_flight) < max_in_flight:
                    next_request = next(numbered, None)
                    if next_request is None:
                        exhausted = True
                    else:
                        index, (messages, ids) = next_request
                        limit = self._cfg.max_new_tokens
                        in_flight[self._threads.submit(self._ask_one, messages, ids, limit)] = index

                done, _ = concurrent.futures.wait(in_flight, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield in_flight.pop(future), future.result()
        finally:
            # The caller may stop early: drop the requests that have not been sent.
            for future in in_flight:
                future.cancel()

    def close(self) -> None:
        """Stop retrying, drop requests that have not started, and close all connections."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _ask_one(self, messages: Messages, ids: Ids, limit: int) -> Reply:
        """The reply to one conversation of at most `limit` tokens, with retries."""
        # The seed that is sent and the jitter of the back-off come from the request's own random stream.  All
        # retries send the same seed; a new attempt (part of the ids) sends another one.
        seed, *rest = ids
        rng = keys.make_generator(seed, self.name, *rest)
        body = {
            "model": self._cfg.model,
            "messages": [{"role": role, "content": replace_surrogates(text)} for role, text in messages],
            "max_tokens": limit,
            "temperature": self._cfg.temperature,
            "top_p": self._cfg.top_p,
            "seed": int(rng.integers(2**31)),
            **self._extra_fields,
        }
        body = change_fields(body, self._field_changes)

        for attempt in range(self._cfg.retries + 1):
            if self._breaker is not None and not self._breaker.admit():
                return Failure("unavailable")
            answered = False
            try:
                reply, may_retry, retry_after = self._post(body, limit)
                answered = not (isinstance(reply, Failure) and reply.reason in ("connection", "timeout"))
            finally:
                if self._breaker is not None:
                    self._breaker.report(answered)
            if not may_retry or attempt == self._cfg.retries:
                break

            # The jitter spreads out requests that failed together; `close` ends the wait.
            wait = retry_after
            if wait is None:
                wait = BACK_OFF * 2**attempt * (1.0 + rng.random())
            if self._closing.wait(min(wait, MAX_WAIT)):
                break
        return reply

    def _post(self, body: dict[str, Any], limit: int) -> tuple[Reply, bool, float | None]:
        """Send one request: (reply, True if it may be retried, seconds of its Retry-After or None)."""
        try:
            with (
                limit_time(self._cfg.timeout),
                self._client.stream("POST", self.address, json=body) as response,
            ):
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    return Failure("compressed"), False, None
                content = bytearray()
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) > MAX_BODY:
                        return Failure("nonsense"), False, None
        except httpx.TimeoutException:
            return Failure("timeout"), False, None
        except httpx.TransportError:
            return Failure("connection"), True, None

        status = response.status_code
        if status == 200:
            reply = parse_server_reply(bytes(content), limit)
            # Some proxies answer 200 with an error in the body.
            if isinstance(reply, Failure) and reply.reason == "nonsense":
                self._show_refusal(reply.reason, bytes(content))
            return reply, False, None
        self._show_refusal(f"http_{status}", bytes(content))

        # Other errors, such as a wrong key, would only repeat themselves.
        retry_after = _parse_retry_after(response.headers.get("Retry-After", ""))
        return Failure(f"http_{status}"), status == 429 or status >= 500, retry_after

    def _show_refusal(self, reason: str, content: bytes) -> None:
        """Print the server's own words about a refused request, once for each reason."""
        words = describe_refusal(content, self._key)
        with self._lock:
            if not words or reason in self.server_words:
                return
            self.server_words[reason] = words

        hint = ""
        if changes := suggest_changes(words):
            hint = f' (if it refuses these fields: --config.{self.name}.fields="{changes}")'
        log.warning("%s: %s: the server says: %s%s", self.address, reason, words, hint)


def _parse_retry_after(header: str) -> float | None:
    """Seconds to wait by a Retry-After header, which is a number of seconds or a date; None if neither."""
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
