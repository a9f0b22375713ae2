"""The metrics of a server, for Prometheus. Only this file of the room imports prometheus_client."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from trainer.serve.engine import Engine

disable_created_metrics()  # a second series for each counter, which nobody reads

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class ServerMetrics:
    """The metrics of a server.

    Attributes:
        requests: Responses by route and HTTP status.
        prompt_tokens: Tokens of prompts.
        new_tokens: Tokens that were computed.
        first: Time until the first text of a request.
        whole: Time until the last text of a request.
    """

    def __init__(self, engine: Engine):
        own = self._registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter("unipool_serve_requests", "Responses.", ["route", "status"], registry=own)
        self.prompt_tokens = Counter("unipool_serve_prompt_tokens", "Tokens of prompts.", registry=own)
        self.new_tokens = Counter("unipool_serve_new_tokens", "Tokens of answers.", registry=own)
        text = "Time from a request to its first text."
        self.first = Histogram("unipool_serve_first_text_seconds", text, buckets=_SECONDS, registry=own)
        text = "Time from a request to the end of its answers."
        self.whole = Histogram("unipool_serve_request_seconds", text, buckets=_SECONDS, registry=own)
        for name, text, read in (
            ("running", "Answers that are computed.", lambda: engine.running),
            ("waiting", "Answers that wait.", lambda: engine.waiting),
            (
                "cache_used_ratio",
                "Share of the KV cache that holds tokens, also those kept for prompts that begin alike.",
                lambda: engine.cache_used,
            ),
        ):
            Gauge(f"unipool_serve_{name}", text, registry=own).set_function(read)

    def page(self) -> bytes:
        """Render the page."""
        return generate_latest(self._registry)
