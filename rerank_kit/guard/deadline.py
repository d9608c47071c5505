"""How long a caller waits: X-Request-Timeout-Ms, or timeout_ms in the body."""

import math

from rerank_kit.guard.answers import Refusal


def late() -> Refusal:
    """The answer when the time is over."""
    return Refusal(504, "deadline", "the time that the call gave (X-Request-Timeout-Ms, timeout_ms) is over")


def deadline_s(start_s: float, header: bytes, timeout_ms: float | None) -> float:
    """time.perf_counter() at which the caller stops waiting; infinity = never. Raises Refusal (422) for no time."""
    text = header.decode("latin-1")
    try:
        sent_ms = float(text) if text else math.inf
    except ValueError:
        sent_ms = 0.0
    if not sent_ms > 0:
        name = "X-Request-Timeout-Ms"
        raise Refusal(422, "field", f"{name}: {ascii(text)[:40]} is not a number of milliseconds above 0", param=name)
    return start_s + min(sent_ms, math.inf if timeout_ms is None else timeout_ms) / 1000
