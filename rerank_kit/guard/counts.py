"""Pairs in flight and served, over all API processes of a service."""

import math
import mmap
import os
import time
from pathlib import Path

from rerank_kit.processes import born

TOTALS = 8  # numbers of a process that do not belong to an engine
READY, ALIVE = 6, 7  # the last of them
MISSING_S = 60.0


class Counts:
    """What is in flight and what was served, over all API processes of a service that share a folder.

    They share the engine, so how long a call waits depends on the pairs in all processes, and the kernel may hand one
    process most connections. Each writes eight numbers of its own (a counter that is odd while it writes, pairs in
    flight, pairs served, pair-seconds, seconds with a pair in flight, time of the last change, when it had scored its
    first pairs, when its event loop ran last) and reads those of the others, without locks. Two more for each engine
    show a hang: the time of its last scores, and since when pairs wait for it (0 = none do). CLOCK_MONOTONIC is the
    same in all processes.
    """

    def __init__(self, folder: str | None, n_processes: int, clock=time.monotonic, pid: int = 0, n_engines: int = 1):
        self._clock, self._folder, self._n_others = clock, Path(folder or "."), n_processes - 1 if folder else 0
        # Named after the common parent's PID, since the folder may outlive a server and its files.
        self._prefix = f"guard-{os.getppid()}-{born(os.getppid())}-"
        self._own_file = self._folder / f"{self._prefix}{pid or os.getpid()}.load"
        self._others: dict[Path, memoryview[float]] = {}
        self._looked = -math.inf
        self.n_engines, self._size = n_engines, 8 * (TOTALS + 2 * n_engines)
        if self._n_others > 0:
            unseen = self._own_file.with_suffix(".new")
            unseen.write_bytes(bytes(self._size))
            self._own: memoryview[float] = _mapped(unseen, self._size)
            unseen.rename(self._own_file)
        else:
            self._own = memoryview(bytearray(self._size)).cast("d")
        self._own[5] = clock()

    @property
    def own_in_flight(self) -> int:
        return int(self._own[1])

    def change(self, in_flight: int, served: int = 0) -> None:
        own, now = self._own, self._clock()
        own[0] += 1
        own[3] += own[1] * (now - own[5])
        own[4] += (own[1] > 0) * (now - own[5])
        own[5] = now
        own[1] += in_flight
        own[2] += served
        own[0] += 1

    def in_flight(self) -> int:
        """Pairs in flight now, of all processes."""
        if len(self._others) < self._n_others:
            self._find_others()
        n = self._own[1]
        for view in self._others.values():
            n += view[1]
        return int(n)

    def totals(self) -> tuple[int, int, float, dict]:
        """(pairs in flight now, pairs served, pair-seconds until now) of all; busy seconds of each."""
        if len(self._others) < self._n_others:
            self._find_others()
        now, in_flight, served, pair_s, busy_s = self._clock(), 0.0, 0.0, 0.0, {}
        for file, view in ((self._own_file, self._own), *self._others.items()):
            _, n, done, pair_seconds, seconds, last = _settled(view)[:READY]
            in_flight, served = in_flight + n, served + done
            pair_s += pair_seconds + n * (now - last)
            busy_s[file] = seconds + (n > 0) * (now - last)
        return int(in_flight), int(served), pair_s, busy_s

    def _find_others(self) -> None:
        """Those that have started by now."""
        if self._clock() - self._looked < 1:
            return
        self._looked = self._clock()
        for file in self._folder.glob(f"{self._prefix}*.load"):
            if file != self._own_file and file not in self._others:
                self._others[file] = _mapped(file, self._size)

    def note_ready(self) -> None:
        self._own[READY] = self._clock()

    def others_ready(self) -> bool:
        """Whether all other API processes have scored their first pairs: a connection may reach any of them.

        One that does not appear is waited for until MISSING_S, in case vLLM started fewer than the kit expects.
        """
        if len(self._others) < self._n_others:
            self._find_others()
        missing = len(self._others) < self._n_others and self._clock() - self._own[READY] < MISSING_S
        return not missing and all(view[READY] for view in self._others.values())

    def note_alive(self, alive: bool = True) -> None:
        """Note that the event loop of this process runs; False: that it ends, and nobody waits for its next note."""
        self._own[ALIVE] = self._clock() if alive else 0.0

    def mute_s(self) -> float:
        """Seconds since the last note of the process that is silent longest, of the others; 0 = there is none.

        They share the port: one that hangs accepts nothing, and a probe never reaches it.
        """
        if len(self._others) < self._n_others:
            self._find_others()
        noted = [view[ALIVE] for view in self._others.values() if view[ALIVE]]
        return self._clock() - min(noted) if noted else 0.0

    def engine_scored(self, engine: int) -> None:
        if engine < self.n_engines:
            self._own[TOTALS + 2 * engine] = self._clock()

    def engine_waits(self, engine: int, waits: bool) -> None:
        """Note whether pairs of this process wait for the engine; the time counts from the first note."""
        place = TOTALS + 2 * engine + 1
        self._own[place] = (self._own[place] or self._clock()) if waits else 0.0

    def unanswered(self, engine: int) -> bool:
        """Whether pairs of this process waited for the engine and it has given no scores since."""
        scored, since = self._own[TOTALS + 2 * engine : TOTALS + 2 * engine + 2]
        return scored < since

    def own_wait_s(self, engine: int) -> float:
        """Seconds since this process got scores from an engine for which its pairs wait; 0 = none wait."""
        scored, since = self._own[TOTALS + 2 * engine : TOTALS + 2 * engine + 2]
        return self._clock() - max(scored, since) if since else 0.0

    def silent_s(self) -> dict[int, float]:
        """{engine: seconds since it gave scores to any process}, of the engines for which pairs wait."""
        if len(self._others) < self._n_others:
            self._find_others()
        now, out = self._clock(), {}
        for engine in range(self.n_engines):
            place = TOTALS + 2 * engine
            seen = [view[place : place + 2].tolist() for view in (self._own, *self._others.values())]
            if since := [since for _, since in seen if since]:
                out[engine] = now - max(min(since), *(scored for scored, _ in seen))
        return out


def _mapped(file: Path, size: int) -> "memoryview[float]":
    with file.open("r+b") as opened:
        return memoryview(mmap.mmap(opened.fileno(), size)).cast("d")


def _settled(view: "memoryview[float]") -> list[float]:
    """The numbers of one process, not from the middle of a change."""
    for _ in range(100):
        values: list[float] = view.tolist()  # type: ignore[assignment]  # typeshed knows list[int] only
        if values[0] % 2 == 0 and view[0] == values[0]:
            break
    return values
