"""Prometheus metrics of the server, exposed at /metrics."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Meters:
    """Thread-safe counters and histograms."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]):
        """`gauges`: {name: (help, function that returns the current value)}."""
        self._registry = CollectorRegistry()
        of: Any = {"registry": self._registry}
        self._requests = Counter("nanogpt_requests", "Responses by status.", ["path", "status"], **of)
        self._read = Counter("nanogpt_prompt_tokens", "Prompt tokens processed.", **of)
        self._wrote = Counter("nanogpt_generated_tokens", "Generated tokens.", **of)
        self._cancelled = Counter("nanogpt_cancelled", "Requests cancelled by clients.", **of)
        self._first = Histogram("nanogpt_first_token_seconds", "Time to first token.", buckets=SECONDS, **of)
        self._step = Histogram("nanogpt_step_seconds", "Duration of a decoding step.", buckets=SECONDS, **of)
        for name, (help, reading) in gauges.items():
            Gauge(f"nanogpt_{name}", help, **of).set_function(reading)

    def read(self, tokens: int) -> None:
        self._read.inc(tokens)

    def wrote(self, tokens: int, seconds: float) -> None:
        self._wrote.inc(tokens)
        self._step.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def answered(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def cancelled(self) -> None:
        self._cancelled.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
