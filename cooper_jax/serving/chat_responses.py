"""Responses to chat completions, in the form of OpenAI's API: whole ones, and chunks of a stream."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cooper_jax.serving.api_errors import ApiError
from cooper_jax.serving.chat_requests import ChatRequest
from cooper_jax.serving.chat_service import ChatCall, Piece

DONE = b"data: [DONE]\n\n"  # the end of a stream


@dataclasses.dataclass(frozen=True)
class ResponseHead:
    """The fields that all parts of a response share."""

    model: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def make_body(self, kind: str, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """The JSON of a response or a chunk.  kind: the value of `object`."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices} | fields


async def make_completion(call: ChatCall, request: ChatRequest, model: str) -> dict[str, Any]:
    """Wait for all samples; the JSON of the whole response.  Raises ApiError if the engine stops."""
    finishes = [""] * request.n
    tokens: list[list[tuple[str, float]]] = [[] for _ in range(request.n)]
    async for piece in call.iterate():
        tokens[piece.index] += piece.tokens
        finishes[piece.index] = piece.finish

    choices = []
    for index, (text, finish) in enumerate(zip(call.texts, finishes, strict=True)):
        choices.append(
            {
                "index": index,
                "message": {"role": "assistant", "content": text.text, "refusal": None},
                "logprobs": make_logprobs(tokens[index]) if request.logprobs else None,
                "finish_reason": finish,
            }
        )
    return ResponseHead(model).make_body("chat.completion", choices, usage=make_usage(call))


async def make_chunks(call: ChatCall, request: ChatRequest, model: str) -> AsyncIterator[bytes]:
    """Yield the events of a stream.  If the engine stops, the last one is an error."""
    head = ResponseHead(model)

    def make_chunk(choices: list[dict[str, Any]], **fields: Any) -> bytes:
        return encode_event(head.make_body("chat.completion.chunk", choices, **fields))

    for index in range(request.n):
        delta = {"role": "assistant", "content": "", "refusal": None}
        yield make_chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
    try:
        async for piece in call.iterate():
            if piece.text or piece.tokens or piece.finish:
                yield make_chunk([_make_choice(piece, request)])
    except ApiError as error:
        yield encode_event(error.make_body())
        return
    if request.include_usage:
        yield make_chunk([], usage=make_usage(call))
    yield DONE


def _make_choice(piece: Piece, request: ChatRequest) -> dict[str, Any]:
    """The choice of a chunk."""
    return {
        "index": piece.index,
        "delta": {"content": piece.text} if piece.text else {},
        "logprobs": make_logprobs(piece.tokens) if request.logprobs else None,
        "finish_reason": piece.finish or None,
    }


def encode_event(body: dict[str, Any]) -> bytes:
    """Encode JSON as a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def make_usage(call: ChatCall) -> dict[str, int]:
    """Numbers of tokens; the prompt counts once."""
    prompt, completion = call.prompt_tokens, call.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def make_logprobs(tokens: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The tokens of a reply with their log-probabilities."""
    content = []
    for text, logprob in tokens:
        # A token that is a part of a character has no text of its own.
        bytes_ = None if "\ufffd" in text else list(text.encode())
        content.append({"token": text, "logprob": logprob, "bytes": bytes_, "top_logprobs": []})
    return {"content": content, "refusal": None}
