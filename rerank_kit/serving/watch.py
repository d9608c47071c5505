"""Probes a running server and distinguishes busy from hung."""

import threading
import time
from collections.abc import Callable

from rerank_kit.serving.health import (
    API_HANGS,
    BUSY,
    PROBE_PAIRS,
    WRONG_SCORES,
    listens,
    not_ready,
    probe,
    progress,
    warm_up,
)
from rerank_kit.settings import EnvConfig

PROBE_EVERY_S = 10.0
LOOK_EVERY_S = 0.1  # at the port while the server loads: a refused connect costs 0.02 ms
AGAIN_S = 0.5  # after a first score that failed


class Watch(threading.Thread):
    """Probes the server every PROBE_EVERY_S in a thread, so that the supervisor's loop never waits for an answer.

    A server is alive if it answers the probe with a score, or if it refuses or times out while its engines' counters
    grow (busy). Each engine has its own counter, because the API may answer while one engine hangs. An engine is
    suspect while its counter does not grow although a probe got no answer or the engine holds pairs. Of several API
    processes one that hangs is never asked, because they share the port: the guard of another one tells.
    """

    def __init__(
        self,
        cfg: EnvConfig,
        warm: bool,
        n_engines: int = 1,
        tell: Callable[[], None] = lambda: None,
        *,
        list_tokens: int | None = None,
    ):
        """tell() is called when warming, ready or fault have changed; list_tokens is that of warm_up()."""
        super().__init__(daemon=True)
        self.list_tokens = list_tokens
        self.cfg, self.warm, self.tell = cfg, warm, tell
        # vLLM distributes the pairs of a call over its engines, so each gets some.
        self.n_docs = 1 if n_engines == 1 else PROBE_PAIRS * n_engines
        limit = cfg.health_timeout_s or 10 * PROBE_EVERY_S
        self.every_s = min(PROBE_EVERY_S, limit / 4)
        self.warming = self.ready = False
        self.fault = ""  # what is wrong with the first scores after this start
        self.suspect_since: dict[str, float] = {}  # by engine; monotonic
        self.told = ""  # the guard's word that an API process hangs, after HEALTH_TIMEOUT_S
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        seen: dict[str, float] = {}
        pause_s = LOOK_EVERY_S
        while not self.stopped.wait(self.every_s if self.ready else pause_s):
            if not self.ready and not listens(self.cfg):
                continue
            pause_s = AGAIN_S
            try:
                seen = self._look(seen)
            except Exception as exc:  # e.g. no thread can be started; without this loop no hang is detected
                print(f"[kit] the probe failed: {type(exc).__name__}: {exc}", flush=True)

    def _look(self, seen: dict[str, float]) -> dict[str, float]:
        asked_at = time.monotonic()
        wrong = probe(self.cfg, self.every_s if self.ready else 60.0, self.n_docs)
        if self.ready:
            unready = not_ready(self.cfg)
            self.told = unready if API_HANGS in unready else ""
            return self._judge(progress(self.cfg), seen, wrong is None, asked_at)
        if wrong in (None, BUSY) and (unready := not_ready(self.cfg)):
            # The guard scores a few known pairs after each start, so a restart with wrong scores is seen too.
            self.fault = unready if WRONG_SCORES in unready else ""
            if self.fault:
                self.tell()
            return seen
        if self.warm and wrong is None:
            self.warming = True
            self.tell()
            warm_up(self.cfg, list_tokens=self.list_tokens)
        self.ready = wrong in (None, BUSY)
        self.tell()
        return seen

    def _judge(self, now: dict, seen: dict[str, float], answered: bool, asked_at: float) -> dict[str, float]:
        """Update suspect_since. Returns the counters for the next call.

        now: the result of progress(). Without counters, an answered probe is the only sign of progress.
        """
        counters = {engine: count for engine, (count, _) in now.items()} or {"": seen.get("", 0.0) + answered}
        for engine, count in counters.items():
            holds_pairs = engine in now and now[engine][1]
            if count != seen.get(engine) or (answered and not engine):
                self.suspect_since.pop(engine, None)
            elif not answered or holds_pairs:
                self.suspect_since.setdefault(engine, asked_at)
        if "" not in counters:
            self.suspect_since.pop("", None)
        return counters

    def hangs(self) -> str:
        """One line about the engines or the API process that hang; empty = none does."""
        limit, now = self.cfg.health_timeout_s, time.monotonic()
        hung = sorted(engine for engine, since in dict(self.suspect_since).items() if now - since > limit)
        if limit and self.told:
            return "it hung: an API process gave no sign of life"
        if not limit or not hung:
            return ""
        return f"it hung: engine {', '.join(hung)} scored nothing" if any(hung) else "it hung: no answer"
