"""Assistants: who rewrites a verified solution into a plausible wrong one.

Requests in, one reply each out: a `Completion` (the rewritten solution, bare), or a `Failure` that says why there
is none.  A server that is down or answers nonsense is a Failure, never an exception: its pair is masked, the run
goes on.

    corrupt   edits the answer's number, seeded; no model, for tests and `tiny`
    openai    asks any OpenAI-compatible server
    local     asks weights of our own through a `generate` that the caller built on the rollout engine

What is random depends on a request's ids (seed, step, row, attempt) alone: not on its neighbours, nor on who
answers first.  (A server's own sampling is its affair; it is given a seed.)
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
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import httpx
from ml_collections import ConfigDict

from cooper_jax.data import prompts
from cooper_jax.reward import corruption
from cooper_jax.runtime import keys
from cooper_jax.types import Completion, Problem

log = logging.getLogger(__name__)

Ids = tuple[int, int, int, int]  # seed, step, row, attempt
Messages = Sequence[tuple[str, str]]  # (role, text)
Generate = Callable[[Sequence[Messages], Sequence[Ids]], list[Completion]]


@dataclasses.dataclass(frozen=True)
class Request:
    """A solution to be rewritten.  `ids`: seed, step, row in the data order, attempt."""

    problem: Problem
    positive: str
    ids: Ids


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no rewritten solution: `connection`, `timeout`, `http_500`, `nonsense`, `empty`, ..."""

    reason: str


Reply = Completion | Failure


class Assistant(Protocol):
    overlaps: bool  # it computes away from our devices, so a thread may ask it while they work

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply a request, in their order."""

    def close(self) -> None: ...


def make(cfg: ConfigDict, generate: Generate | None = None) -> Assistant:
    """The assistant of a config's `assistant` section.

    Args:
      generate: for `local`: conversations and their ids -> completions.

    Raises ValueError, with the flag to set, for an unknown kind or a missing address, model or generate.
    """
    if cfg.kind == "corrupt":
        return Corrupt()
    if cfg.kind == "openai":
        return OpenAI(cfg)
    if cfg.kind == "local":
        if generate is None:
            raise ValueError("--config.assistant.kind=local: this program has no rollout engine to run it on")
        return Local(generate)
    raise ValueError(f"--config.assistant.kind={cfg.kind!r}: must be corrupt, openai or local")


def read_reply(completion: Completion) -> Reply:
    """The solution inside a model's reply.  A truncated one stays as it is, for the caller to refuse."""
    if completion.truncated:
        return completion
    if not completion.text.strip():
        return Failure("empty")
    solution = prompts.parse_negative(completion.text)
    return Failure("malformed") if solution is None else dataclasses.replace(completion, text=solution)


def messages_of(request: Request) -> Messages:
    problem = request.problem
    return prompts.negative_messages(problem.question, problem.reference, request.positive)


# --- corrupt -----------------------------------------------------------------------------------------------


class Corrupt:
    """Changes the answer's number; `corruption.corrupt` has the rules."""

    overlaps = True

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Reply:
        seed, *ids = request.ids
        text = corruption.corrupt(request.positive, keys.numpy_stream(seed, "corruption", *ids))
        return Failure("nothing to change") if text is None else Completion(text)

    def close(self) -> None:
        pass


# --- local -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Local:
    """Weights of our own, on the devices that train."""

    generate: Generate
    overlaps = False

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        if not requests:
            return []
        completions = self.generate([messages_of(r) for r in requests], [r.ids for r in requests])
        if len(completions) != len(requests):
            raise ValueError(
                f"the local assistant gave {len(completions)} completions to {len(requests)} requests"
            )
        return [read_reply(completion) for completion in completions]

    def close(self) -> None:
        pass


# --- openai ------------------------------------------------------------------------------------------------

BACK_OFF = 0.5  # seconds before the first retry; doubles each time
LONGEST_WAIT = 60.0  # seconds between two tries at most, whatever Retry-After asks for
LARGEST_BODY = 8 << 20  # bytes of a response


class OpenAI:
    """A server that speaks OpenAI's chat completions; `cfg` is the config's `assistant` section.

    At most `concurrency` requests are under way at a time.  Connection errors, 429 and 5xx are tried again up to
    `retries` times, after the server's Retry-After or an exponential back-off with jitter; a request that takes
    longer than `timeout` seconds is not, for the step waits for it.  The key is read from the environment variable
    `key_env` and goes nowhere but into the Authorization header; a local server may need none.
    """

    overlaps = True

    def __init__(self, cfg: ConfigDict):
        for field in ("url", "model"):
            if not cfg[field]:
                raise ValueError(f"--config.assistant.kind=openai: set --config.assistant.{field}")
        if not cfg.url.startswith(("http://", "https://")):
            raise ValueError(f"--config.assistant.url={cfg.url!r}: must begin with http:// or https://")
        for field, least in (("concurrency", 1), ("retries", 0)):
            if cfg[field] < least:
                raise ValueError(f"--config.assistant.{field}={cfg[field]}: must be at least {least}")
        if cfg.timeout <= 0:
            raise ValueError(f"--config.assistant.timeout={cfg.timeout}: must be positive")
        self._cfg = cfg
        self._address = cfg.url.rstrip("/") + "/chat/completions"
        try:
            named = httpx.URL(self._address).host
        except httpx.InvalidURL as error:
            raise ValueError(f"--config.assistant.url={cfg.url!r}: {error}") from error
        if not named:
            raise ValueError(f"--config.assistant.url={cfg.url!r}: names no host")
        key = os.environ[cfg.key_env].strip() if cfg.key_env and cfg.key_env in os.environ else ""
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"the environment variable {cfg.key_env} holds characters that no key has")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=cfg.timeout,
            limits=httpx.Limits(max_connections=cfg.concurrency),
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(cfg.concurrency, thread_name_prefix="assistant")
        self._closing = threading.Event()

    def rewrite(self, requests: Sequence[Request]) -> list[Reply]:
        replies = list(self._threads.map(self._one, requests))
        reasons = sorted({reply.reason for reply in replies if isinstance(reply, Failure)})
        if reasons:
            failed = sum(isinstance(reply, Failure) for reply in replies)
            log.warning(
                "%s: %d of %d requests failed (%s)", self._address, failed, len(replies), ", ".join(reasons)
            )
        return replies

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _one(self, request: Request) -> Reply:
        seed, *ids = request.ids
        rng = keys.numpy_stream(seed, "assistant", *ids)
        body = {
            "model": self._cfg.model,
            "messages": [{"role": role, "content": _sendable(text)} for role, text in messages_of(request)],
            "max_tokens": self._cfg.max_new_tokens,
            "temperature": self._cfg.temperature,
            "top_p": self._cfg.top_p,
            "seed": int(rng.integers(2**31)),
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
            with self._client.stream("POST", self._address, json=body) as response:
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


def _sendable(text: str) -> str:
    """Lone surrogates cannot be sent."""
    return text.encode(errors="replace").decode()


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
    return read_reply(Completion(text, truncated, tokens))


def _retry_after(header: str) -> float | None:
    """Seconds from now, of a Retry-After in seconds or as a date."""
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
