"""Scores and rankings between the HTTP side and the scorer.

`parse_score_request` and `parse_rerank_request` read requests; `ScoreService.score` waits for the scores.

    /v1/score    questions, references, completions -> a score each; a single text counts for all completions
    /v1/rerank   query, reference, documents -> documents by falling score, in the form of Cohere, Jina and vLLM
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cooper_jax.serving import request_reader
from cooper_jax.serving.api_errors import ApiError, refuse_field
from cooper_jax.serving.chat_engine import QueueFull
from cooper_jax.serving.scorer import Scorer, ScoreRequest
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.types import Triple


@dataclasses.dataclass(frozen=True)
class RerankRequest:
    """Documents to rank."""

    triples: list[Triple]
    top_n: int
    return_documents: bool


def parse_score_request(body: Mapping[str, Any], max_rows: int) -> list[Triple]:
    """Read the rows of a request.  Raises ApiError (400), which names the field."""
    request_reader.refuse_other_fields(body, {"model", "questions", "references", "completions", "user"})
    completions = request_reader.read_texts(body, "completions")
    _check_count("completions", len(completions), max_rows)
    questions, references = (_repeat(body, field, len(completions)) for field in ("questions", "references"))
    return [Triple(*row) for row in zip(questions, references, completions, strict=True)]


def _repeat(body: Mapping[str, Any], field: str, count: int) -> list[str]:
    """Read a list of `count` texts, or a single text for all rows."""
    if isinstance(body.get(field), str):
        return [request_reader.read_text(body, field)] * count
    texts = request_reader.read_texts(body, field)
    if len(texts) != count:
        raise refuse_field(
            field, f"{len(texts)} texts for {count} completions: give as many, or one text for all"
        )
    return texts


def parse_rerank_request(body: Mapping[str, Any], max_rows: int) -> RerankRequest:
    """Read a request.  Raises ApiError (400), which names the field."""
    known = {"model", "query", "reference", "documents", "top_n", "return_documents", "user"}
    request_reader.refuse_other_fields(body, known)
    query = request_reader.read_text(body, "query")
    if body.get("reference") is None:
        raise refuse_field(
            "reference",
            "this model compares with a reference answer: give it, or an empty text if there is none",
        )
    reference = request_reader.read_text(body, "reference")
    documents = body.get("documents")
    if not isinstance(documents, list):
        raise refuse_field("documents", "give a list of texts")
    _check_count("documents", len(documents), max_rows)

    # Clients write documents as texts or as objects with a text.
    texts = [item.get("text") if isinstance(item, dict) else item for item in documents]
    completions = request_reader.read_texts({"documents": texts}, "documents")
    top_n = request_reader.read_integer(body, "top_n", len(texts), 1, 2**31)
    assert top_n is not None
    return RerankRequest(
        triples=[Triple(query, reference, text) for text in completions],
        top_n=min(top_n, len(texts)),
        return_documents=request_reader.read_boolean(body, "return_documents", default=True),
    )


def _check_count(field: str, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise refuse_field(field, f"{count} texts: give from 1 to {most}")


class ScoreService:
    """Answers requests for scores."""

    def __init__(self, scorer: Scorer, wake: Callable[[], None]):
        """wake: tells the devices' thread that there is work."""
        self.scorer = scorer
        self._wake = wake
        self._loop: asyncio.AbstractEventLoop | None = None
        self._futures: dict[ScoreRequest, asyncio.Future[list[float]]] = {}
        self._checker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="references")

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Choose the event loop that receives the scores."""
        self._loop = loop

    def receive(self, requests: list[ScoreRequest]) -> None:
        """Take requests that have ended from the scorer, in any thread."""
        if requests and self._loop is not None:
            self._loop.call_soon_threadsafe(self._dispatch, requests)

    def _dispatch(self, requests: list[ScoreRequest]) -> None:
        for request in requests:
            future = self._futures.get(request)
            if future is None or future.done():
                continue  # the client has gone
            if request.error:
                future.set_exception(ApiError(500, request.error))
            else:
                future.set_result(request.scores)

    async def check_references(self, triples: Sequence[Triple]) -> None:
        """Raise ApiError (400) for a reference that is too long."""
        loop = asyncio.get_running_loop()
        references = list(dict.fromkeys(triple.reference for triple in triples))
        try:
            await loop.run_in_executor(self._checker, self.scorer.check_references, references)
        except SetupError as error:
            raise ApiError(400, f"references: {error}", code="context_length_exceeded") from error

    async def score(self, triples: list[Triple]) -> list[float]:
        """Score rows whose references were checked.

        Raises ApiError if too many rows wait (429) or the scorer has stopped (503).
        """
        request = ScoreRequest(triples)
        future = self._futures[request] = asyncio.get_running_loop().create_future()
        try:
            self.scorer.submit(request)
            self._wake()
            return await future
        except QueueFull:
            raise ApiError(429, "too many completions wait: try again later", code="queue_full") from None
        except RuntimeError:
            raise ApiError(503, "the server is stopping or has failed") from None
        finally:
            del self._futures[request]
            self.scorer.cancel(request)
