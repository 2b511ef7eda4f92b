"""Prometheus metrics of the server, exposed at /metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Meters:
    """Thread-safe counters and histograms."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        args: Any = {"registry": self._registry}
        self.requests = Counter("nanogpt_requests", "Responses by status.", ["path", "status"], **args)
        self.read = Counter("nanogpt_prompt_tokens", "Prompt tokens processed.", **args)
        self.wrote = Counter("nanogpt_generated_tokens", "Generated tokens.", **args)
        self.cancelled = Counter("nanogpt_cancelled", "Requests cancelled by clients.", **args)
        self.first = Histogram("nanogpt_first_token_seconds", "Time to first token.", buckets=SECONDS, **args)
        self.step = Histogram("nanogpt_step_seconds", "Duration of a decoding step.", buckets=SECONDS, **args)
        self.active = Gauge("nanogpt_active", "Completions being generated.", **args)
        self.waiting = Gauge("nanogpt_waiting", "Completions waiting for a slot.", **args)

    def text(self) -> bytes:
        return generate_latest(self._registry)
