"""What Prometheus may read: counts and times, never texts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The server's own figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "isthmus", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ["route", "status"], **own)
        self.tokens = Counter("tokens", "Tokens read and written.", ["model", "kind"], **own)
        self.queue = Gauge("queue", "Texts and calls that wait.", **own)
        self.running = Gauge("running", "Texts being written.", ["model"], **own)
        self.cancelled = Counter("cancelled", "Requests stopped because nobody waited any more.", **own)
        self.latency = Histogram(
            "latency_seconds", "From arrival to the answer's end.", ["route"], buckets=_SECONDS, **own
        )
        self.first = Histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", ["model"], buckets=_SECONDS, **own
        )
        self.batch = Histogram(
            "batch_size", "Texts decoded together, per step.", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64), **own
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
