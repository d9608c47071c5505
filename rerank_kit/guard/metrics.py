"""The guard's own lines in /metrics."""

import functools
import types


@functools.cache  # a metric's name can be registered once in a process
def _metrics():
    """Metrics in prometheus_client's default registry, which vLLM's /metrics shows; multi-process mode included."""
    from prometheus_client import Counter, Gauge, Histogram

    seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
    pairs = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
    n_bytes = tuple(4**i for i in range(4, 14))  # 256 B ... 64 MiB
    latest = "livemostrecent"  # each process counts for the whole service
    p = "rerank_guard_"
    return types.SimpleNamespace(
        calls=Counter(f"{p}calls", "Calls by route and status class", ["route", "status"]),
        pairs=Counter(f"{p}pairs", "Pairs answered with scores"),
        cut=Counter(f"{p}cut_documents", "Documents of which the model saw a part only"),
        cached=Counter(f"{p}cached_pairs", "Pairs answered by the result cache, by where they were", ["cache"]),
        redis_up=Gauge(f"{p}redis_up", "1 while the shared result cache answers", multiprocess_mode="livemin"),
        redis_failures=Counter(f"{p}redis_failures", "Failures of the shared result cache", ["reason"]),
        refusals=Counter(f"{p}refusals", "Requests refused by the guard", ["reason"]),
        in_flight=Gauge(f"{p}pairs_in_flight", "Pairs taken and not yet scored", multiprocess_mode="livesum"),
        wait=Gauge(f"{p}estimated_wait_seconds", "Seconds before a new pair starts", multiprocess_mode=latest),
        speed=Gauge(f"{p}pairs_per_second", "Pairs served a second while busy", multiprocess_mode=latest),
        restarts=Gauge(f"{p}restarts", "Restarts by the supervisor since start", multiprocess_mode="livemax"),
        started=Gauge(f"{p}start_time_seconds", "When this server began (Unix time)", multiprocess_mode="livemax"),
        version=Gauge(f"{p}version", "1; the label names model and settings", ["version"], multiprocess_mode="livemax"),
        call_s=Histogram(f"{p}call_seconds", "Seconds from request to scores", buckets=seconds),
        call_pairs=Histogram(f"{p}call_pairs", "Pairs of a scored call", buckets=pairs),
        call_bytes=Histogram(f"{p}call_bytes", "Body bytes of a scored call", buckets=n_bytes),
    )
