"""What the guard refuses and when: the reason with its HTTP status, admission by load, strict JSON.

Imported by server_guard.py inside the server; standard library only. docs/guard.md lists every refusal.
"""

import json
import math
import time

MAX_DEPTH = 32  # JSON levels; a rerank body needs 5
FIRST_PAIRS = 1024  # pairs taken before the first speed is known, where only MAX_WAIT_S limits (GUARD_FIRST_PAIRS)
LOADED_PAIRS = 64  # pairs in flight on average, below which a first sample is no measure of the engine
TRUSTED_SAMPLES = 3  # before that many, only the number of pairs limits: the first ones hold compilation on first use
SAMPLE_S = 1.0  # busy seconds behind one sample of the speed
FASTER_WEIGHT, SLOWER_WEIGHT = 0.7, 0.3  # of a new sample


class Refusal(Exception):
    """A request that is not passed on. reason labels the metric, param names the field at fault."""

    def __init__(self, status: int, reason: str, message: str, *, param: str | None = None, retry_s: float = 0):
        super().__init__(message)
        self.status, self.reason, self.param, self.retry_s = status, reason, param, retry_s


class Load:
    """Pairs in flight and the speed at which they are served. No locks: all calls come from one event loop.

    The speed is an average over busy time, so idle time does not lower it. After idle time a sample is complete
    when as many pairs were served as were in flight on average: when a burst's first call is answered, most of the
    others' work is done too. A first sample counts only under load (LOADED_PAIRS in flight on average), a slower
    one only where calls waited (MAX_WAIT_S / 4 or more): a few small calls, or the first one with its compilation,
    say nothing about what the engine can do. A faster sample has more weight than a slower one: what was just done
    can be done.
    """

    def __init__(
        self,
        max_pairs: int,
        max_wait_s: float,
        first_pairs: int = FIRST_PAIRS,
        clock=time.monotonic,
        trusted_samples: int = TRUSTED_SAMPLES,
    ):
        self.max_pairs, self.max_wait_s, self.first_pairs = max_pairs, max_wait_s, first_pairs
        self._missing_samples = trusted_samples
        self.in_flight = 0
        self.pairs_per_s = 0.0  # 0 = not known yet
        self._clock, self._last = clock, clock()
        self._busy_s = self._pair_seconds = 0.0
        self._served, self._from_idle = 0, True

    @property
    def wait_s(self) -> float:
        """Seconds until a pair that comes now would start, by what is in flight; 0 while the speed is unknown."""
        return self.in_flight / self.pairs_per_s if self.pairs_per_s else 0.0

    @property
    def _limits_by_wait(self) -> bool:
        return bool(self.max_wait_s and self.pairs_per_s and self._missing_samples <= 0)

    def check(self, n_pairs: int) -> None:
        """Raise Refusal (429) if a call of n_pairs does not fit now. Into an idle process every call fits."""
        if not self.in_flight:
            return
        limit = self.max_pairs or (self.first_pairs if self.max_wait_s and not self._limits_by_wait else 0)
        work = f"{self.in_flight} pairs are in flight, about {self.wait_s:.1f} s of work"
        advice = "send the call again after Retry-After seconds, or send fewer documents at a time"
        if limit and self.in_flight + n_pairs > limit:
            over_s = (self.in_flight + n_pairs - limit) / self.pairs_per_s if self.pairs_per_s else 1
            message = f"the server is busy: {work}, and {n_pairs} more exceed the limit of {limit} pairs: {advice}"
            raise Refusal(429, "pairs", message, retry_s=over_s)
        if self._limits_by_wait and self.wait_s > self.max_wait_s:
            message = f"the server is busy: {work}, and calls wait {self.max_wait_s:g} s at most: {advice}"
            raise Refusal(429, "wait", message, retry_s=self.wait_s - self.max_wait_s)

    def take(self, n_pairs: int) -> None:
        """Count a whole call in, or raise Refusal."""
        self.check(n_pairs)
        self._advance()
        self._from_idle = self._from_idle or not self.in_flight
        self.in_flight += n_pairs

    def add(self, n_pairs: int) -> None:
        """Count in more pairs of a call that was taken."""
        self._advance()
        self.in_flight += n_pairs

    def release(self, n_pairs: int, served: bool) -> None:
        """Count a whole call out; served = it was answered with scores."""
        self._advance()
        self.in_flight -= n_pairs
        self._served += n_pairs * served
        whole = not self._from_idle or self._served * self._busy_s >= self._pair_seconds
        if self._served and self._busy_s >= SAMPLE_S and whole:
            sample = self._served / self._busy_s
            waited_s = self._pair_seconds / self._served  # Little's law
            loaded = self._pair_seconds >= LOADED_PAIRS * self._busy_s
            self._missing_samples -= loaded
            if not self.pairs_per_s:
                self.pairs_per_s = sample if loaded else 0.0
            elif sample > self.pairs_per_s:
                self.pairs_per_s += FASTER_WEIGHT * (sample - self.pairs_per_s)
            elif waited_s >= self.max_wait_s / 4:
                self.pairs_per_s += SLOWER_WEIGHT * (sample - self.pairs_per_s)
            self._busy_s = self._pair_seconds = 0.0
            self._served, self._from_idle = 0, False

    def _advance(self) -> None:
        now = self._clock()
        if self.in_flight:
            self._busy_s += now - self._last
            self._pair_seconds += self.in_flight * (now - self._last)
        self._last = now


def parse(body: bytes) -> dict:
    """Strict JSON: one UTF-8 object, no repeated key, no NaN or infinity. Raises Refusal (400)."""
    try:
        payload = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise Refusal(400, "json", f"the body is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc
    except RecursionError as exc:
        raise Refusal(400, "json", f"the body is nested deeper than {MAX_DEPTH} levels") from exc
    except ValueError as exc:
        raise Refusal(400, "json", f"the body is not valid JSON: {exc}") from exc
    if not isinstance(payload, dict):
        raise Refusal(400, "json", 'the body is not a JSON object: send {"query": ..., "documents": [...]}')
    return payload


def _unique(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):  # parsers differ in which of two equal keys they take
        raise ValueError(f"a key stands there twice: {ascii([name for name, _ in pairs])[:200]}")
    return fields


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):  # NaN, Infinity, 1e999
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
