"""Chat completions between the HTTP side and the engine: conversations in, pieces of replies out.

`ChatService.start` encodes a conversation and queues its samples; iterating over the `ChatCall` gives the pieces of
their texts as they are sampled.  `ChatCall.close` frees what is left, and must be called in any case.

All methods are coroutines or run in the event loop's thread; `receive` may be called by any thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import secrets
from collections.abc import AsyncIterator, Callable, Sequence

from cooper_jax.model.tokenizer import Tokenizer
from cooper_jax.serving.api_errors import ApiError
from cooper_jax.serving.chat_engine import ChatEngine, NewTokens, QueueFull, SampleRequest
from cooper_jax.serving.chat_requests import ChatRequest, check_prompt_length
from cooper_jax.serving.reply_text import ReplyText

STOPPED = "the server is stopping or has failed"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one sample's reply."""

    index: int  # of the sample
    text: str  # may be empty
    tokens: list[tuple[str, float]]  # with logprobs: each token's text and log-probability
    finish: str  # stop, length, or "": more follow


class ChatService:
    """Answers conversations with the engine's samples."""

    def __init__(
        self, tokenizer: Tokenizer, engine: ChatEngine, max_new_tokens: int, wake: Callable[[], None]
    ):
        """wake: tells the devices' thread that there is work."""
        self.tokenizer, self.engine, self.max_new_tokens = tokenizer, engine, max_new_tokens
        self._wake = wake
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: dict[SampleRequest, ChatCall] = {}
        # Encoding a long conversation takes a while; the event loop goes on meanwhile.
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="encoder")

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Choose the event loop that receives the engine's tokens."""
        self._loop = loop

    def receive(self, events: list[NewTokens]) -> None:
        """Take new tokens from the engine, in any thread."""
        if events and self._loop is not None:
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[NewTokens]) -> None:
        for event in events:
            # The client may have gone since.
            if (call := self._calls.get(event.request)) is not None:
                call.events.put_nowait(event)

    async def start(self, request: ChatRequest) -> ChatCall:
        """Queue a request's samples.

        Raises ApiError for a conversation that is too long or that the template rejects (400), and if too many
        requests wait (429) or the engine has stopped (503).
        """
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._encoder, self._encode, request)
        check_prompt_length(len(prompt), self.engine.sizes.max_prompt_tokens, self.max_new_tokens)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        samples = [
            SampleRequest(prompt, request.limit, seed, sample, request.settings)
            for sample in range(request.n)
        ]
        call = ChatCall(self, request, samples)
        self._calls.update(dict.fromkeys(samples, call))
        try:
            self.engine.submit(samples)
        except QueueFull:
            call.close()
            raise ApiError(429, "too many requests wait: try again later", code="queue_full") from None
        except RuntimeError:
            call.close()
            raise ApiError(503, STOPPED) from None
        self._wake()
        return call

    def _encode(self, request: ChatRequest) -> list[int]:
        """Render and encode a conversation, as a local assistant of a run does."""
        try:
            ids = self.tokenizer.chat(request.messages, fallback=True, variables=request.template_variables)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        if not ids:
            raise ApiError(400, "messages: the conversation has no token", param="messages")
        return ids

    def forget(self, samples: Sequence[SampleRequest]) -> None:
        """Cancel samples that have not ended, and stop listening for their tokens."""
        for sample in samples:
            if self._calls.pop(sample, None) is not None:
                self.engine.cancel(sample)
        self._wake()


class ChatCall:
    """The samples of one client's request, while they are decoded."""

    def __init__(self, service: ChatService, request: ChatRequest, samples: Sequence[SampleRequest]):
        self.prompt_tokens = len(samples[0].prompt)
        self.events: asyncio.Queue[NewTokens] = asyncio.Queue()
        self._service, self._request = service, request
        self._samples = samples
        decode = service.tokenizer.decode
        self.texts = [ReplyText(decode, request.stops, in_pieces=request.stream) for _ in samples]
        self._unfinished = set(samples)

    @property
    def completion_tokens(self) -> int:
        """Number of tokens of all samples so far."""
        return sum(text.num_tokens for text in self.texts)

    async def iterate(self) -> AsyncIterator[Piece]:
        """Yield pieces of the samples' replies as they arrive, until all have ended.

        Raises ApiError (503) if the engine stops before.
        """
        while self._unfinished:
            event = await self.events.get()
            if event.finish == "error":
                raise ApiError(503, STOPPED)
            # Tokens that were sampled behind a stop text.
            if event.request in self._unfinished:
                yield self._read_event(event)

    def _read_event(self, event: NewTokens) -> Piece:
        """Add new tokens to their reply; a stop text ends it."""
        sample = event.request.sample
        reply = self.texts[sample]
        ends_with_eos = event.finish == "stop"
        before = reply.num_tokens
        text = reply.add(event.tokens, is_last=event.finish != "", ends_with_eos=ends_with_eos)
        kept = reply.num_tokens - before - (ends_with_eos and not reply.stopped)
        finish = "stop" if reply.stopped else event.finish
        if finish:
            self._unfinished.discard(event.request)
            self._service.forget([event.request])

        tokens = []
        if self._request.logprobs:
            decode = self._service.tokenizer.decode
            tokens = [
                (decode([token]), logprob)
                for token, logprob in zip(event.tokens[:kept], event.logprobs[:kept], strict=True)
            ]
        return Piece(sample, text, tokens, finish)

    def close(self) -> None:
        """Cancel the samples that have not ended."""
        self._service.forget(self._samples)
