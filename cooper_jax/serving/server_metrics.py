"""Metrics of a server, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cooper_jax.serving.chat_engine import ChatEngine
from cooper_jax.serving.scorer import Scorer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class ServerMetrics:
    """Counts requests, and reads what the models count."""

    def __init__(self, engine: ChatEngine | None, scorer: Scorer | None):
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "cooper_requests",
            "Requests that were answered, by path and status (499: the client had gone).",
            ("path", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "cooper_request_seconds",
            "Seconds from a request's arrival to the end of its response.",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "cooper_first_token_seconds",
            "Seconds from the arrival of a streamed request to its first piece of text.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_ModelCollector(engine, scorer))

    def format_metrics(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self._registry)


class _ModelCollector(Collector):
    """Reads the numbers that the engine and the scorer keep."""

    def __init__(self, engine: ChatEngine | None, scorer: Scorer | None):
        self._engine, self._scorer = engine, scorer

    def collect(self) -> Iterator[Metric]:
        """The metrics of the models that are served."""
        if (engine := self._engine) is not None:
            yield GaugeMetricFamily(
                "cooper_slots", "Replies that can be decoded at a time.", engine.num_slots
            )
            yield GaugeMetricFamily("cooper_slots_busy", "Replies that are being decoded.", engine.busy_slots)
            waiting = engine.waiting_requests
            yield GaugeMetricFamily("cooper_replies_waiting", "Replies that wait for a slot.", waiting)
            yield CounterMetricFamily(
                "cooper_prompt_tokens", "Prompt tokens that were prefilled.", engine.prompt_tokens
            )
            yield CounterMetricFamily(
                "cooper_sampled_tokens", "Tokens that were sampled.", engine.sampled_tokens
            )
            yield CounterMetricFamily("cooper_segments", "Segments that were decoded.", engine.segments)
        if (scorer := self._scorer) is not None:
            waiting = scorer.waiting_completions
            yield GaugeMetricFamily("cooper_scores_waiting", "Completions that wait for a score.", waiting)
            yield CounterMetricFamily("cooper_scores", "Completions that were scored.", scorer.scored)
