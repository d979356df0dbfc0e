"""Replies of chat models: a `Completion`, or a `Failure` with the reason why there is none.

1. `parse_server_reply` reads a chat completion as servers write it.  Servers differ: `usage` may be null or
   missing, `finish_reason` may be missing, and `content` may be a list of parts.
2. `describe_refusal` finds a server's own words in the body of an error.

Servers are not trusted: whatever the bytes are, these functions raise nothing.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.types import Completion

MAX_WORDS = 400  # characters of a server's error message that are shown

# Types of content parts that are text for the reader.  Others (thinking, images) are not part of the reply.
_TEXT_PARTS = ("text", "output_text")


@dataclasses.dataclass(frozen=True)
class Failure:
    """The reason why a request has no reply."""

    reason: str  # connection, timeout, http_500, nonsense (malformed output), empty, too_long, ...

    @property
    def transient(self) -> bool:
        """True if the same request may succeed at another time."""
        passing = ("connection", "timeout", "unavailable", "http_429")
        return self.reason in passing or self.reason.startswith("http_5")

    @property
    def costs_time(self) -> bool:
        """True if the server did not answer at all, so that asking again in the same step would only wait."""
        return self.reason in ("timeout", "unavailable")

    @property
    def unreachable(self) -> bool:
        """True if the cause is the server, its address or the key, and not this request."""
        return self.reason in ("connection", "unavailable", "http_401", "http_403", "http_404")


Reply = Completion | Failure


def parse_server_reply(content: bytes, limit: int) -> Reply:
    """The first choice of a chat completion in JSON; Failure("nonsense") if the JSON is malformed.

    limit: the maximum number of tokens that was asked for; 0 if there was none.
    """
    # Any missing key, wrong type or too deep nesting is a Failure.
    try:
        chat = json.loads(content)
        choice = chat["choices"][0]
        text = _join_text(choice["message"].get("content"))
        tokens = _read_token_count(chat.get("usage"))
        finish = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Failure("nonsense")
    if text is None:
        return Failure("empty")

    # Without a finish_reason, a reply that used its whole limit counts as truncated.
    truncated = finish == "length" or (finish is None and 0 < limit <= tokens)
    # A server that truncates a reply inside an emoji may send half of a surrogate pair.
    return Completion(replace_surrogates(text), truncated, tokens)


def _join_text(content: Any) -> str | None:
    """The text of a message's content; None for null and for a list without text.

    Raises TypeError for content that is neither text nor a list of parts.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError(f"content of type {type(content).__name__}")

    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type", "text") in _TEXT_PARTS:
            texts.append(part["text"])
    return "".join(texts) if texts else None


def _read_token_count(usage: Any) -> int:
    """The number of generated tokens in a completion's `usage`; 0 if the server does not tell.

    Raises ValueError for a value that is no number of tokens.
    """
    tokens = usage.get("completion_tokens") if usage else None
    if tokens is None:
        return 0
    # bool is a subclass of int; a count beyond 2^31 is no number of tokens.
    if type(tokens) is not int or not 0 <= tokens < 2**31:
        raise ValueError(f"completion_tokens={tokens!r}")
    return tokens


def describe_refusal(content: bytes, secret: str) -> str:
    """A server's own words in the body of an error, in one line of at most MAX_WORDS characters.

    secret: the API key, which the words may repeat; it is replaced by asterisks.  "" if there is none.
    """
    text = content.decode(errors="replace")
    try:
        words = _find_message(json.loads(text)) or text
    except (ValueError, RecursionError):
        words = text

    # Servers of strangers must not move the cursor of the user's terminal.
    words = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    if secret:
        words = words.replace(secret, "***")
    return words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]}..."


def _find_message(body: Any) -> str:
    """The message in an error's JSON, in the forms that servers use; "" if there is none."""
    # OpenAI: {"error": {"message": ..}}; vLLM: {"message": ..}; FastAPI: {"detail": text or a list}.
    while isinstance(body, dict):
        body = body.get("error") or body.get("message") or body.get("detail")
    if isinstance(body, str):
        return body
    return json.dumps(body) if body else ""
