"""The HTTP side of a server: routes, the API key, limits of body and time, and clients that go.

POST /v1/chat/completions   OpenAI's API: whole or streamed
POST /v1/score              scores of the reward model
POST /v1/rerank             the same as a ranking; also /rerank, as clients of Cohere, Jina and vLLM ask for it
GET  /v1/models             the names that requests give as `model`
GET  /health, /metrics      for probes and Prometheus, without a key
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cooper_jax.serving import chat_requests, chat_responses, score_service, server_metrics
from cooper_jax.serving.api_errors import ApiError
from cooper_jax.serving.chat_service import ChatCall, ChatService
from cooper_jax.serving.score_service import ScoreService
from cooper_jax.serving.serve_config import ServeConfig
from cooper_jax.serving.server_metrics import ServerMetrics

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
MOST_BODIES = 32  # bodies of the largest size that may arrive at the same time; of smaller ones, more
CLIENT_GONE = 499  # status in the metrics; nobody receives it


class HttpApp:
    """The routes of a server and what they share."""

    def __init__(
        self,
        config: ServeConfig,
        chat: ChatService | None,
        scores: ScoreService | None,
        metrics: ServerMetrics,
    ):
        """chat, scores: None for a model that is not served."""
        self._config, self._chat, self._scores, self._metrics = config, chat, scores, metrics
        self._key = config.read_key().encode()
        self._started = int(time.time())
        # Requests whose body is read, or whose texts are encoded: the engine and the scorer do not know them yet.
        self._preparing = {"chat": 0, "scores": 0}
        self._body_bytes = 0  # of all of them
        self.stopping = False  # new requests are refused
        self.failed = False  # the devices' thread has ended

    def make_app(self) -> Starlette:
        """Make the ASGI application."""
        routes = [
            self._make_route("/v1/chat/completions", self._complete_chat),
            self._make_route("/v1/score", self._score),
            self._make_route("/v1/rerank", self._rerank),
            self._make_route("/rerank", self._rerank),
            self._make_route("/v1/models", self._list_models, "GET"),
            self._make_route("/v1/models/{name:path}", self._describe_model, "GET"),
            Route("/health", self._report_health, methods=["GET"]),
            Route("/metrics", self._report_metrics, methods=["GET"]),
        ]
        handlers = {HTTPException: _answer_http_error, Exception: _answer_failure}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _make_route(self, path: str, handler: Handler, method: str = "POST") -> Route:
        """Make a route that asks for the key, turns errors into responses, and counts."""

        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            try:
                self._check_key(request)
                if self.stopping and method == "POST":
                    raise ApiError(503, "the server is stopping")
                response = await handler(request)
            except ApiError as error:
                response = JSONResponse(error.make_body(), error.status, error.headers)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_GONE)
            self._metrics.requests.labels(path, response.status_code).inc()
            if not isinstance(response, StreamingResponse):
                self._metrics.seconds.labels(path).observe(time.perf_counter() - started)
            return response

        return Route(path, endpoint, methods=[method])

    # --- routes ---

    async def _complete_chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        arrived = time.perf_counter()
        most = self._config.slots + self._config.max_waiting
        with self._prepare("chat", most):
            body = await self._read_body(request)
            if self._chat is None or body.get("model") != self._config.policy_name:
                raise self._refuse_model(body)
            chat_request = chat_requests.parse_chat_request(body, self._config.max_new_tokens, most)
            call = await self._chat.start(chat_request)
        name = self._config.policy_name

        def on_end() -> None:
            call.close()
            seconds = self._metrics.seconds.labels("/v1/chat/completions")
            seconds.observe(time.perf_counter() - arrived)

        if chat_request.stream:
            chunks = chat_responses.make_chunks(call, chat_request, name)
            return EventStream(self._stream(chunks, call, arrived), on_end)
        try:
            completion = chat_responses.make_completion(call, chat_request, name)
            return JSONResponse(await self._run_while_connected(request, completion))
        finally:
            call.close()

    async def _stream(
        self, chunks: AsyncIterator[bytes], call: ChatCall, arrived: float
    ) -> AsyncIterator[bytes]:
        """Pass on the chunks of a stream within the time limit."""
        deadline = asyncio.get_running_loop().time() + self._config.timeout
        number = 0
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(chunks, None)
            except TimeoutError:
                chunk = chat_responses.encode_event(self._make_timeout().make_body())
                yield chunk
                return
            if chunk is None:
                return
            # The first chunks carry the roles of the samples, before anything is sampled.
            number += 1
            if number == len(call.texts) + 1:
                self._metrics.first_token.observe(time.perf_counter() - arrived)
            yield chunk

    async def _score(self, request: Request) -> Response:
        """POST /v1/score."""
        with self._prepare("scores", self._config.max_waiting_scores):
            body = await self._read_body(request)
            service = self._get_scores(body)
            triples = score_service.parse_score_request(body, self._config.max_waiting_scores)
            await service.check_references(triples)
        scores = await self._run_while_connected(request, service.score(triples))
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        return JSONResponse({"object": "list", "model": self._config.reward_name, "data": data})

    async def _rerank(self, request: Request) -> Response:
        """POST /v1/rerank."""
        with self._prepare("scores", self._config.max_waiting_scores):
            body = await self._read_body(request)
            service = self._get_scores(body)
            rerank = score_service.parse_rerank_request(body, self._config.max_waiting_scores)
            await service.check_references(rerank.triples)
        scores = await self._run_while_connected(request, service.score(rerank.triples))
        ranked = sorted(range(len(scores)), key=lambda i: -scores[i])[: rerank.top_n]
        results = []
        for i in ranked:
            result: dict[str, Any] = {"index": i, "relevance_score": scores[i]}
            if rerank.return_documents:
                result["document"] = {"text": rerank.triples[i].completion}
            results.append(result)
        return JSONResponse({"model": self._config.reward_name, "results": results})

    async def _list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        models = [self._make_model(name) for name in self._list_names()]
        return JSONResponse({"object": "list", "data": models})

    async def _describe_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name not in self._list_names():
            raise self._refuse_model({"model": name})
        return JSONResponse(self._make_model(name))

    async def _report_health(self, request: Request) -> Response:
        """GET /health."""
        state = "failed" if self.failed else "stopping" if self.stopping else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def _report_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.format_metrics(), headers={"Content-Type": server_metrics.CONTENT_TYPE})

    # --- what routes share ---

    def _check_key(self, request: Request) -> None:
        """Raise ApiError (401) unless the request has the key, or none is asked for."""
        if not self._key:
            return
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        # The time of the comparison tells nothing about the key.
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )

    def _list_names(self) -> list[str]:
        """List the names of the models that are served."""
        served = (self._config.policy_name, self._chat), (self._config.reward_name, self._scores)
        return [name for name, service in served if service is not None]

    def _make_model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "cooper-jax"}

    def _get_scores(self, body: dict[str, Any]) -> ScoreService:
        """The reward model's service.  Raises ApiError (404) for another model's name."""
        if self._scores is None or body.get("model", self._config.reward_name) != self._config.reward_name:
            raise self._refuse_model(body)
        return self._scores

    def _refuse_model(self, body: dict[str, Any]) -> ApiError:
        """Make the error for a model that is not there, or not for this route."""
        names = ", ".join(self._list_names())
        return ApiError(
            404,
            f"model: {str(body.get('model'))[:100]!r} is not what this route serves; the models are {names}",
            param="model",
            code="model_not_found",
        )

    def _make_timeout(self) -> ApiError:
        return ApiError(504, f"the request took longer than {self._config.timeout:g} seconds", code="timeout")

    @contextlib.contextmanager
    def _prepare(self, service: str, most: int) -> Iterator[None]:
        """Count a request until it waits for its model.  Raises ApiError (429) if `most` are counted.

        service: chat or scores.
        """
        if self._preparing[service] >= most:
            raise _make_busy()
        self._preparing[service] += 1
        try:
            yield
        finally:
            self._preparing[service] -= 1

    async def _read_body(self, request: Request) -> dict[str, Any]:
        """Read a request's JSON.  Raises ApiError (400, 408, 413)."""
        limit = self._config.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {self._config.max_body_mb:g} MB")
        length = request.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self._config.body_timeout):
                async for part in request.stream():
                    content += part
                    self._body_bytes += len(part)
                    if len(content) > limit:
                        raise too_large
                    if self._body_bytes > MOST_BODIES * limit:
                        raise _make_busy()
            body = json.loads(content)
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self._config.body_timeout:g} seconds") from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from error
        finally:
            self._body_bytes -= len(content)
        if not isinstance(body, dict):
            raise ApiError(400, "the body is not a JSON object")
        return body

    async def _run_while_connected(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work` within the time limit, and cancel it if the client goes.

        Raises ApiError (504) after the time limit, and ClientDisconnect.
        """
        task = asyncio.create_task(work)
        watcher = asyncio.create_task(_wait_for_disconnect(request))
        try:
            await asyncio.wait(
                {task, watcher}, timeout=self._config.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return task.result()
            if watcher.done():
                raise ClientDisconnect
            raise self._make_timeout()
        finally:
            task.cancel()
            watcher.cancel()
            # The work frees its slots before the next request is looked at.
            await asyncio.wait({task, watcher})


def _make_busy() -> ApiError:
    return ApiError(429, "too many requests arrive at once: try again later", code="queue_full")


async def _wait_for_disconnect(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A stream of server-sent events that calls `on_end` whether it ends, fails or the client goes."""

    def __init__(self, content: AsyncIterator[bytes], on_end: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _answer_failure(request: Request, error: Exception) -> Response:
    """Answer an error of this program; Starlette raises it again for the log."""
    return JSONResponse(ApiError(500, "the server has failed; its log says why").make_body(), 500)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method in the API's form."""
    assert isinstance(error, HTTPException)
    refusal = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(refusal.make_body(), error.status_code, error.headers)
