"""Figures of a server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from edgevlm.engines.runtime.memory import peak_rss_mb
from edgevlm.engines.serving.embedding import EmbeddingQueue
from edgevlm.engines.serving.work import Work

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STAGES = {
    "queue": "Seconds that requests waited for a slot.",
    "time_to_first_token": "Seconds from a request's arrival to its first token.",
    "inter_token_latency": "Mean seconds between the tokens of an answer.",
    "total": "Seconds from a request's arrival to its last token.",
}
_STAGES_OF_EMBEDDINGS = {
    "queue": "Seconds that requests waited until their first image was computed.",
    "total": "Seconds from a request's arrival to its last embedding.",
}


class Metrics:
    """What /metrics says."""

    def __init__(self, work: Work) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(work))
        stages = _STAGES.items()
        if isinstance(work, EmbeddingQueue):
            stages = _STAGES_OF_EMBEDDINGS.items()
        self._stages = {
            name: Histogram(
                f"edgevlm_{name}_seconds", text, buckets=_SECONDS, registry=self._registry
            )
            for name, text in stages
        }
        self._requests = Counter(
            "edgevlm_requests", "Requests by status.", ["status"], registry=self._registry
        )

    def answered(self, timings_ms: Mapping[str, float]) -> None:
        """A request got its whole answer, whose stages took so long."""
        self._requests.labels("200").inc()
        for name, histogram in self._stages.items():
            histogram.observe(timings_ms.get(name, 0.0) / 1000)

    def refused(self, status: int) -> None:
        """A request got an error, or its client left."""
        self._requests.labels(str(status)).inc()

    def text(self) -> tuple[bytes, str]:
        """The figures and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Collector:
    """What the engine's side counts by itself."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def collect(self) -> Iterator[Metric]:
        """The server's figures now, in Prometheus's metrics."""
        work = self._work
        waiting = work.waiting  # first: a request that begins meanwhile is not left out
        gauges: dict[str, float] = {
            "active": work.active,
            "waiting": waiting,
            "slots": work.limits.slots,
            "peak_rss_mb": peak_rss_mb(),
        }
        counters = {item.name: getattr(work.counts, item.name) for item in fields(work.counts)}
        if not isinstance(work, EmbeddingQueue):
            gauges["image_cache_bytes"] = work.images.nbytes
            counters |= {"images_found": work.images.hits, "images_encoded": work.images.misses}
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"edgevlm_{name}", name.replace("_", " "), value)
        for name, value in counters.items():
            yield CounterMetricFamily(f"edgevlm_{name}", name.replace("_", " "), value)
