"""Requests for chat completions, in the form of OpenAI's API.

`parse_chat_request` checks every field.  Fields that would change the reply and that this server does not have are
refused unless their value asks for nothing; fields that only label a request are ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cooper_jax.data.row_reader import replace_surrogates
from cooper_jax.kernels.sampling_rows import RowSettings, make_row_settings
from cooper_jax.serving import request_reader
from cooper_jax.serving.api_errors import ApiError, refuse_field

LOWEST_TEMPERATURE = 1e-4  # below it the most likely token is taken
MOST_STOPS = 16  # stop texts of a request
# `developer` is the newer name of `system`, which chat templates know.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Fields without an effect on the reply.
_LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that this server does not have -> the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_KNOWN = {
    "model", "messages", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stream", "stream_options", "logprobs", "chat_template_kwargs",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request for replies to one conversation."""

    messages: list[tuple[str, str]]  # (role, text)
    template_variables: Mapping[str, Any]
    # The replies.
    n: int
    limit: int  # maximum number of tokens of each
    seed: int | None  # 0 <= seed < 2^32; None: any
    settings: RowSettings
    stops: tuple[str, ...]  # a reply ends before the first of these texts
    # The form of the response.
    logprobs: bool
    stream: bool
    include_usage: bool  # of a stream: in a last chunk


def parse_chat_request(body: Mapping[str, Any], max_new_tokens: int, max_samples: int) -> ChatRequest:
    """Read a request's JSON.  Raises ApiError (400), which names the field, for what this server cannot do.

    max_new_tokens: limit of a reply.  max_samples: limit of n.
    """
    for field, neutral in _UNSUPPORTED.items():
        value = body.get(field)
        if value is not None and value not in neutral:
            raise refuse_field(
                field, "this server does not support it: leave it out", "unsupported_parameter"
            )
    request_reader.refuse_other_fields(body, _KNOWN | _LABELS | set(_UNSUPPORTED))

    n = request_reader.read_integer(body, "n", 1, 1, max_samples)
    seed = request_reader.read_integer(body, "seed", None, -(2**63), 2**63 - 1)
    stream = request_reader.read_boolean(body, "stream")
    stream_options = request_reader.read_object(body, "stream_options")
    if stream_options and not stream:
        raise refuse_field("stream_options", "it belongs to stream=true")
    request_reader.refuse_other_fields(stream_options, {"include_usage", "include_obfuscation"})
    assert n is not None
    return ChatRequest(
        messages=_read_messages(body),
        template_variables=_read_template_variables(body),
        n=n,
        limit=_read_limit(body, max_new_tokens),
        seed=None if seed is None else seed % 2**32,
        settings=_read_settings(body),
        stops=_read_stops(body),
        logprobs=request_reader.read_boolean(body, "logprobs"),
        stream=stream,
        include_usage=request_reader.read_boolean(stream_options, "include_usage"),
    )


def _read_messages(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read the conversation.  Contents are texts, or lists of parts that are texts."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refuse_field("messages", "give a list of messages, at least one")
    read = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise refuse_field(where, "give an object with a role and a content")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise refuse_field(f"{where}.role", f"{str(role)[:40]!r} is none of {', '.join(_ROLES)}")
        request_reader.refuse_other_fields(message, {"role", "content", "name", "refusal"})
        read.append((_ROLES[role], replace_surrogates(_join_parts(message.get("content"), where))))
    return read


def _join_parts(content: Any, where: str) -> str:
    """Join the parts of a message's content."""
    if isinstance(content, str):
        return content
    texts = [_read_part(part) for part in content] if isinstance(content, list) else [None]
    if None in texts:
        raise refuse_field(f"{where}.content", "give a text, or a list of parts of the type text")
    return "".join(text for text in texts if text is not None)


def _read_part(part: Any) -> str | None:
    """The text of a part of a message's content; None if it is no text."""
    if not isinstance(part, dict) or part.get("type") != "text":
        return None
    text = part.get("text")
    return text if isinstance(text, str) else None


def _read_template_variables(body: Mapping[str, Any]) -> dict[str, bool]:
    """Read the variables of the chat template; others than these could change how it is rendered."""
    variables = request_reader.read_object(body, "chat_template_kwargs")
    request_reader.refuse_other_fields(variables, {"enable_thinking"})
    if variables.get("enable_thinking") is None:
        return {}
    return {"enable_thinking": request_reader.read_boolean(variables, "enable_thinking")}


def _read_limit(body: Mapping[str, Any], max_new_tokens: int) -> int:
    """Read the maximum number of tokens, by its old name or its new one."""
    given = [field for field in ("max_tokens", "max_completion_tokens") if body.get(field) is not None]
    if len(given) > 1:
        raise refuse_field("max_tokens", "max_completion_tokens says the same: leave one of them out")
    if not given:
        return max_new_tokens
    limit = request_reader.read_integer(body, given[0], None, 1, 2**31)
    assert limit is not None
    if limit > max_new_tokens:
        raise refuse_field(
            given[0],
            f"{limit} is above this server's limit of {max_new_tokens} tokens: lower it, or start the server "
            f"with a larger --config.serve.max_new_tokens",
        )
    return limit


def _read_settings(body: Mapping[str, Any]) -> RowSettings:
    """Read the sampling settings."""
    top_k = request_reader.read_integer(body, "top_k", 0, -1, 2**31 - 1)
    top_p = request_reader.read_number(body, "top_p", 1.0, 0.0, 1.0)
    assert top_k is not None
    if top_p == 0.0:
        raise refuse_field("top_p", "0 keeps no token: give a number above 0")
    temperature = request_reader.read_number(body, "temperature", 1.0, 0.0, 2.0)
    # Logits divided by less would not be finite in float32; such a distribution is greedy.
    if temperature < LOWEST_TEMPERATURE:
        temperature = 0.0
    return make_row_settings(
        temperature=temperature,
        top_k=max(top_k, 0),  # some clients write -1 for none
        top_p=top_p,
        min_p=request_reader.read_number(body, "min_p", 0.0, 0.0, 1.0),
    )


def _read_stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the texts before which a reply ends: one, or a list."""
    value = body.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise refuse_field("stop", "give a text or a list of texts, none of them empty")
    if len(stops) > MOST_STOPS:
        raise refuse_field("stop", f"{len(stops)} texts are more than {MOST_STOPS}")
    return tuple(stops)


def check_prompt_length(tokens: int, limit: int, max_new_tokens: int) -> None:
    """Raise ApiError (400) for a conversation that does not fit.

    limit: the server's, of a conversation.
    """
    if tokens > limit:
        raise ApiError(
            400,
            f"messages: the conversation has {tokens} tokens, but this server takes {limit} (and "
            f"{max_new_tokens} of a reply): shorten it, or start the server with a larger "
            "--config.serve.max_prompt_tokens",
            param="messages",
            code="context_length_exceeded",
        )
