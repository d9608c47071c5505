"""Admission: refuses calls (429) by the pairs in flight and the measured speed of the service.

Few imports, since every API process loads this module. docs/guard.md lists every refusal.
"""

import math
import time
from pathlib import Path

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.counts import Counts

FIRST_PAIRS = 1024  # limit on pairs in flight until the speed is known, if only MAX_WAIT_S is set (GUARD_FIRST_PAIRS)
LOADED_PAIRS = 64  # average pairs in flight that a first sample needs; fewer do not show the engine's speed
TRUSTED_SAMPLES = 3  # MAX_WAIT_S applies after that many; the first ones include compilation
SAMPLE_S = 1.0  # busy seconds behind one sample of the speed
FASTER_WEIGHT, SLOWER_WEIGHT = 0.7, 0.3  # of a new sample


class Load:
    """Pairs in flight and the speed at which they are served. No locks: all calls come from one event loop.

    All numbers are totals of the service, over all its API processes (Counts). The speed is an average
    over busy time, so idle time does not lower it. After idle time a sample is complete
    when as many pairs were served as were in flight on average: when a burst's first call is answered, most of the
    others' work is done too. A few small calls, or a first call with its compilation, do not show the engine's
    capacity. So a first sample counts only under load (LOADED_PAIRS in flight on average), and a slower one only if
    calls waited (MAX_WAIT_S / 4 or more). A faster sample has more weight than a slower one, since it proves that
    the speed is possible.
    """

    def __init__(
        self,
        max_pairs: int,
        max_wait_s: float,
        first_pairs: int = FIRST_PAIRS,
        clock=time.monotonic,
        trusted_samples: int = TRUSTED_SAMPLES,
        counts: Counts | None = None,
    ):
        self.max_pairs, self.max_wait_s, self.first_pairs = max_pairs, max_wait_s, first_pairs
        self._missing_samples = trusted_samples
        self.counts = counts or Counts(None, 1, clock)
        self.pairs_per_s = 0.0  # 0 = not known yet
        self._clock, self._last = clock, clock()
        self._busy_s = self._pair_seconds = 0.0
        self._least_busy_s = self._seen_pair_s = 0.0
        self._seen_busy_s: dict[Path, float] = {}  # by file of a process
        self._served_before = 0
        self._from_idle = True

    @property
    def in_flight(self) -> int:
        """Pairs that this process holds."""
        return self.counts.own_in_flight

    @property
    def wait_s(self) -> float:
        """Seconds until a new pair would start, estimated from the pairs in flight; 0 while the speed is unknown."""
        return self.counts.in_flight() / self.pairs_per_s if self.pairs_per_s else 0.0

    @property
    def _limits_by_wait(self) -> bool:
        return bool(self.max_wait_s and self.pairs_per_s and self._missing_samples <= 0)

    def check(self, n_pairs: int) -> None:
        """Raise Refusal (429) if a call of n_pairs does not fit now. An idle service admits any call."""
        self._compare(self.counts.in_flight(), n_pairs)

    def _compare(self, in_flight: int, n_pairs: int) -> None:
        if not in_flight:
            return
        limit = self.max_pairs or (self.first_pairs if self.max_wait_s and not self._limits_by_wait else 0)
        wait_s = in_flight / self.pairs_per_s if self.pairs_per_s else 0.0
        work = f"{in_flight} pairs are in flight"
        if self.pairs_per_s:
            work += f", about {wait_s:.1f} s of work"
        advice = "send the call again after Retry-After seconds, or send fewer documents at a time"
        if limit and in_flight + n_pairs > limit:
            over_s = (in_flight + n_pairs - limit) / self.pairs_per_s if self.pairs_per_s else 1
            message = f"the server is busy: {work}, and {n_pairs} more exceed the limit of {limit} pairs; {advice}"
            raise Refusal(429, "pairs", message, retry_s=over_s)
        if self._limits_by_wait and wait_s > self.max_wait_s:
            message = f"the server is busy: {work}, and calls wait {self.max_wait_s:g} s at most; {advice}"
            raise Refusal(429, "wait", message, retry_s=wait_s - self.max_wait_s)

    def check_deadline(self, n_pairs: int, left_s: float) -> None:
        """Raise Refusal (429) if n_pairs, behind those in flight, would be scored later than the caller waits."""
        in_flight = self.counts.in_flight() if left_s < math.inf and self.pairs_per_s else 0
        if in_flight and (needed_s := (in_flight + n_pairs) / self.pairs_per_s) > left_s:
            message = (
                f"the call gives {max(left_s, 0):.2f} s, but with {in_flight} pairs in flight it would take about "
            )
            message += f"{needed_s:.1f} s: give it more time, or send it to another server"
            raise Refusal(429, "deadline", message, retry_s=max(0.1, needed_s - left_s))

    def take(self, n_pairs: int) -> None:
        """Count a whole call in, or raise Refusal."""
        in_flight, _ = self._advance()
        self.reserve(n_pairs)
        self._from_idle = self._from_idle or not in_flight

    def reserve(self, n_pairs: int, instead_of: int = 0) -> None:
        """Count pairs in, replacing instead_of earlier pairs of the same call, or raise Refusal.

        Pairs are counted before they are compared. Two processes that do so at the same instant may both refuse, but
        together they never exceed a limit.
        """
        self.counts.change(n_pairs - instead_of)
        try:
            self._compare(self.counts.in_flight() - n_pairs, n_pairs)
        except Refusal:
            self.counts.change(instead_of - n_pairs)
            raise

    def release(self, n_pairs: int, served: bool) -> None:
        """Count a whole call out; served = it was answered with scores."""
        self.counts.change(-n_pairs, n_pairs * served)
        _, total_served = self._advance()
        done = total_served - self._served_before
        whole = not self._from_idle or done * self._busy_s >= self._pair_seconds
        if done and self._busy_s >= SAMPLE_S and whole:
            # Whether the processes were busy in turn or together is unknown between two readings far apart.
            if self._busy_s > 1.2 * self._least_busy_s:
                return self._begin_sample(total_served)
            sample = done / self._busy_s
            waited_s = self._pair_seconds / done  # Little's law
            loaded = self._pair_seconds >= LOADED_PAIRS * self._busy_s
            self._missing_samples -= loaded
            if not self.pairs_per_s:
                self.pairs_per_s = sample if loaded else 0.0
            elif sample > self.pairs_per_s:
                self.pairs_per_s += FASTER_WEIGHT * (sample - self.pairs_per_s)
            elif waited_s >= self.max_wait_s / 4:
                self.pairs_per_s += SLOWER_WEIGHT * (sample - self.pairs_per_s)
            self._begin_sample(total_served)

    def _begin_sample(self, total_served: int) -> None:
        self._busy_s = self._least_busy_s = self._pair_seconds = 0.0
        self._served_before, self._from_idle = total_served, False

    def _advance(self) -> tuple[int, int]:
        """Add the time since the last reading; returns (pairs in flight, pairs served) of all processes."""
        now = self._clock()
        in_flight, served, pair_s, busy_s = self.counts.totals()
        grown = [seconds - self._seen_busy_s.get(file, 0.0) for file, seconds in busy_s.items()]
        self._busy_s += min(now - self._last, max(0.0, sum(grown)))
        self._least_busy_s += min(now - self._last, max(0.0, max(grown)))
        self._pair_seconds += max(0.0, pair_s - self._seen_pair_s)
        self._last, self._seen_pair_s, self._seen_busy_s = now, pair_s, busy_s
        return in_flight, served
