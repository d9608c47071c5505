"""Asks a running server for scores, and tells busy from hung."""

import threading
import time

from rerank_kit.serving.health import BUSY, PROBE_PAIRS, listens, probe, progress, warm_up
from rerank_kit.settings import EnvConfig

PROBE_EVERY_S = 10.0


class Watch(threading.Thread):
    """Asks the server for a score every PROBE_EVERY_S, so that the loop below never waits for an answer.

    Alive is a server that scores, or that refuses or is slow because it is busy: then its counters grow. One whose API
    answers while an engine hangs is not. Each engine is judged by its own counter: it is suspect while that stands
    still although a probe got no answer, or although the engine holds pairs.
    """

    def __init__(self, cfg: EnvConfig, warm: bool, n_engines: int = 1):
        super().__init__(daemon=True)
        self.cfg, self.warm = cfg, warm
        # vLLM deals the pairs of a call out to its engines: each gets some.
        self.n_docs = 1 if n_engines == 1 else PROBE_PAIRS * n_engines
        limit = cfg.health_timeout_s or 10 * PROBE_EVERY_S
        self.every_s = min(PROBE_EVERY_S, limit / 4)
        self.warming = self.ready = False
        self.suspect_since: dict[str, float] = {}  # by engine; monotonic
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        seen: dict[str, float] = {}
        while not self.stopped.wait(self.every_s if self.ready else 0.5):
            if not self.ready and not listens(self.cfg):
                continue
            try:
                seen = self._look(seen)
            except Exception as exc:  # no thread to be had, say; without this thread no hang would ever be seen
                print(f"[kit] the probe failed: {type(exc).__name__}: {exc}", flush=True)

    def _look(self, seen: dict[str, float]) -> dict[str, float]:
        asked_at = time.monotonic()
        wrong = probe(self.cfg, self.every_s if self.ready else 60.0, self.n_docs)
        if self.ready:
            return self._judge(progress(self.cfg), seen, wrong is None, asked_at)
        if self.warm and wrong is None:
            self.warming = True
            warm_up(self.cfg)
        self.ready = wrong in (None, BUSY)
        return seen

    def _judge(self, now: dict, seen: dict[str, float], answered: bool, asked_at: float) -> dict[str, float]:
        """Bring suspect_since up to date; returns the counters for the next time.

        now: progress(). Without any counter, an answered probe is all the progress there is.
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
        """Which engine hangs, in words; empty = none."""
        limit, now = self.cfg.health_timeout_s, time.monotonic()
        hung = sorted(engine for engine, since in dict(self.suspect_since).items() if now - since > limit)
        if not limit or not hung:
            return ""
        return f"it hung: engine {', '.join(hung)} scored nothing" if any(hung) else "it hung: no answer"
