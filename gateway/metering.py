"""What /metrics shows: Prometheus counters and histograms of one server, and the backend's own gauges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from inference import Backend, Usage

disable_created_metrics()  # a second time series for every histogram, which nobody reads

LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120)


class Metrics:
    """Label values come from our own routes and status codes only, so their number is bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, open files
        self.requests = Counter(
            "refdesk_http_requests", "Responses", ["method", "route", "status"], registry=self.registry
        )
        self.durations = Histogram(
            "refdesk_http_request_duration_seconds",
            "From the request to the last byte of its response",
            ["route"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "refdesk_time_to_first_token_seconds",
            "From the request to the first generated token, retrieval included",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.retrieval = Histogram(
            "refdesk_retrieval_duration_seconds", "One search", buckets=LATENCY_BUCKETS, registry=self.registry
        )
        self.prompt_tokens = Counter("refdesk_prompt_tokens", "Tokens of all prompts", registry=self.registry)
        self.cached_tokens = Counter(
            "refdesk_cached_tokens", "Prompt tokens that were read from the cache", registry=self.registry
        )
        self.completion_tokens = Counter("refdesk_completion_tokens", "Generated tokens", registry=self.registry)
        self.warmed_tokens = Counter(
            "refdesk_warmed_tokens", "Prompt tokens computed for nobody yet, after a start", registry=self.registry
        )
        self.warming = Gauge(
            "refdesk_warming", "1 while popular passages are read into the cache", registry=self.registry
        )
        self.answers = Counter("refdesk_answers", "Questions answered or refused", ["outcome"], registry=self.registry)
        self.aborted = Counter(
            "refdesk_aborted", "Requests ended before their time: client gone, too slow, shut down",
            registry=self.registry,
        )  # fmt: skip

    def count_usage(self, usage: Usage) -> None:
        self.prompt_tokens.inc(usage.prompt_tokens or 0)
        self.cached_tokens.inc(usage.cached_tokens or 0)
        self.completion_tokens.inc(usage.completion_tokens)

    def render(self, backend: Backend | None) -> bytes:
        """All metrics in Prometheus' text format."""
        if backend is None:
            return generate_latest(self.registry)
        return generate_latest(self.registry) + generate_latest(_Snapshot(backend.metrics()))


class _Snapshot:
    """A backend's numbers as a registry of their own, for one scrape.  A name may end in `{replica="…"}`."""

    def __init__(self, values: dict[str, float]):
        self._values = values

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Any] = {}
        for name, value in sorted(self._values.items()):
            name, _, label = name.partition("{replica=")
            replica = [msgspec.json.decode(label.removesuffix("}"))] if label else []
            full = f"refdesk_{name}" if name.startswith("engine_") else f"refdesk_backend_{name}"
            if full not in families:
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                labels = ["replica"] if label else []
                families[full] = kind(full.removesuffix("_total"), "Reported by the backend", labels=labels)
            families[full].add_metric(replica, value)
        yield from families.values()
