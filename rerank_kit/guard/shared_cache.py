"""Scores of pairs in one Redis that replicas share (RESULT_CACHE_URL; off by default).

A Redis that is dead, slow or refuses fails no call: reading has WAIT_S, writing happens behind the answer, and after a
failure nobody asks Redis until a task in the background has found that it answers again. How long scores stay is left
to Redis (docs/guard.md).

Source: redis-py 8.1.0, redis/asyncio/client.py and connection.py: a command that is cancelled closes its connection.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import struct
import time
from pathlib import Path
from typing import Any

from rerank_kit.guard.cache import Known
from rerank_kit.redis_url import redis_arguments

WAIT_S, WAIT_PER_KEY_S = 0.05, 5e-5  # longest wait of a call; a Redis of the same network answers 32 keys within 1 ms
LATE_IN_A_ROW = 3  # answers; one may be late because this process itself was busy
CONNECT_S = 2.0  # of the background's attempts and of writing, for which no call waits
PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0  # between two attempts
STEADY_S = 60.0  # after so long without a failure the pauses begin at PAUSE_S again
REFUSED_WRITES_S = 30.0  # pause after Redis refused to write, as when it is full; reading goes on
MOST_READERS = 64  # calls that read at a time, and so connections; others are scored without asking
MOST_WAITING = 20_000  # scores that wait to be written; what comes beyond is not written
MOST_AT_ONCE = 500  # scores of one MSET
PREFIX = b"rerank:"
VALUE = struct.Struct("<16sdI?")  # the pair's own key, score, windows, cut

logger = logging.getLogger("vllm.rerank_guard")  # below "vllm": its handler and level


def code_id() -> bytes:
    """A hash of the code that cuts texts and reads fields: scores in Redis outlive an update of the kit."""
    here = Path(__file__).parent
    models = here.parent / "models"
    files = [*sorted(here.glob("*.py")), models / "fitting.py", models / "late.py"]
    return hashlib.blake2b(b"\0".join(file.read_bytes() for file in files), digest_size=8).digest()


class SharedCache:
    """All is called from one event loop. Raises ValueError for a URL that cannot be used, ImportError without redis."""

    def __init__(self, url: str, metrics: Any, clock=time.monotonic):
        import redis.asyncio  # pure Python, about 0.3 s: only where it is wanted
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        try:
            known = redis_arguments(url)
        except ValueError as exc:
            raise ValueError(f"GUARD_RESULT_CACHE_URL=*** {exc}") from None
        self.place = f"Redis at {known['host']}:{known['port']}"
        self._password = known.get("password", "")
        # One retry, at once: a connection that Redis closed for idleness.
        self._redis = redis.asyncio.Redis(
            **known, protocol=2, socket_timeout=CONNECT_S, socket_connect_timeout=CONNECT_S,
            max_connections=2 * MOST_READERS, retry=Retry(NoBackoff(), 1),
        )  # fmt: skip
        self._timeouts = TimeoutError, redis.TimeoutError
        self._refusals = redis.ResponseError
        self._not_allowed = redis.ResponseError, redis.AuthenticationError, redis.exceptions.AuthorizationError
        self._metrics, self._clock = metrics, clock
        self.works = self._told = self._looked = False
        self._since, self._pause_s, self._late = -math.inf, PAUSE_S, 0
        self._readers, self._write_from = 0, -math.inf
        self._waiting: dict[bytes, Known] = {}
        self._wanted = asyncio.Event()
        self._task: asyncio.Task | None = None
        metrics.redis_up.set(0)

    def begin(self) -> None:
        """Connect, in the background."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Write what waits, as far as Redis takes it at once, and close the connections."""
        while self._task is not None and not self._task.done():
            self._task.cancel()  # again, as redis-py 8.1.0 may swallow one where it looks for an open connection
            await asyncio.wait({self._task}, timeout=0.05)
        if self.works:
            await self._write()
        self.works = False
        with contextlib.suppress(Exception):
            await self._redis.aclose()

    async def get(self, keys: list[bytes]) -> dict[bytes, Known]:
        """What Redis has of these, within WAIT_S; nothing where it fails or is known to be down."""
        self.begin()
        if not self.works or self._readers >= MOST_READERS:
            return {}
        self._readers += 1
        # A task of its own, so that the wait ends in time whatever redis-py does when it is cancelled.
        asked = asyncio.ensure_future(self._redis.mget([PREFIX + key for key in keys]))
        asked.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody need look at it
        try:
            await asyncio.wait({asked}, timeout=WAIT_S + WAIT_PER_KEY_S * len(keys))
            if not asked.done():
                raise TimeoutError
            values = asked.result()
            self._late = 0
            found = {key: known for key, value in zip(keys, values, strict=True) if (known := _known(key, value))}
            if sum(value is not None for value in values) > len(found):
                self._metrics.redis_failures.labels("value").inc()
            return found
        except Exception as exc:
            self._late += 1
            if self._late >= LATE_IN_A_ROW or not isinstance(exc, self._timeouts):
                self._failed(exc)
            else:
                self._metrics.redis_failures.labels("timeout").inc()
            return {}
        finally:
            asked.cancel()
            self._readers -= 1

    def put(self, scores: dict[bytes, Known]) -> None:
        """Have them written soon. Nobody waits for it."""
        if not self.works or self._clock() < self._write_from:
            return
        room = MOST_WAITING - len(self._waiting)
        self._waiting |= dict(list(scores.items())[: max(0, room)])
        self._wanted.set()

    async def _keep(self) -> None:
        """Write what is put; after a failure, try until Redis answers."""
        while True:
            if not self.works:
                try:
                    async with asyncio.timeout(CONNECT_S):
                        await self._redis.mget([PREFIX])  # what calls do, with key and rights
                except Exception as exc:
                    self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
                    self._failed(exc)
                    await asyncio.sleep(self._pause_s)
                    continue
                await self._answers()
            await self._wanted.wait()
            self._wanted.clear()
            if self.works:
                await self._write()
            if not self.works:
                await asyncio.sleep(self._pause_s)

    async def _write(self) -> None:
        while self._waiting:
            some = dict(list(self._waiting.items())[:MOST_AT_ONCE])
            values = {PREFIX + key: VALUE.pack(key, *known[::2], known.cut) for key, known in some.items()}
            try:
                async with asyncio.timeout(CONNECT_S):
                    await self._redis.mset(values)
            except self._refusals as exc:  # full, read-only, no right to: what it has can still be read
                if self._clock() - self._write_from > STEADY_S:
                    logger.warning("guard: result cache: %s takes no scores: %s", self.place, self._text(exc))
                self._metrics.redis_failures.labels("write").inc()
                self._write_from = self._clock() + REFUSED_WRITES_S
                self._waiting.clear()
                return
            except Exception as exc:
                return self._failed(exc)
            for key in some:
                self._waiting.pop(key, None)

    async def _answers(self) -> None:
        self.works, self._since, self._late = True, self._clock(), 0
        self._metrics.redis_up.set(1)
        if self._told or not self._looked:
            logger.info("guard: result cache: %s answers", self.place)
        self._told = False
        if not self._looked:
            self._looked = True
            with contextlib.suppress(Exception):  # a right that not every Redis gives
                async with asyncio.timeout(CONNECT_S):
                    said = await self._redis.info("memory")
                if not said["maxmemory"] or not said["maxmemory_policy"].startswith("allkeys-"):
                    logger.warning(
                        "guard: result cache: %s has maxmemory %s and maxmemory-policy %s, so scores are never removed "
                        "there: set maxmemory, and maxmemory-policy allkeys-lru",
                        self.place, said["maxmemory"], said["maxmemory_policy"],
                    )  # fmt: skip

    def _failed(self, exc: Exception) -> None:
        """Ask no more until it answers again; one line in the log for it."""
        is_late = isinstance(exc, self._timeouts)
        kind = "timeout" if is_late else "refused" if isinstance(exc, self._not_allowed) else "connection"
        self._metrics.redis_failures.labels(kind).inc()
        if self.works:  # else another call has seen it before
            steady = self._clock() - self._since > STEADY_S
            self._pause_s = PAUSE_S if steady else min(2 * self._pause_s, LONGEST_PAUSE_S)
        self.works = False
        self._metrics.redis_up.set(0)
        self._waiting.clear()
        self._wanted.set()
        if not self._told:
            self._told = True
            text = "no answer in time" if is_late else self._text(exc)
            logger.warning("guard: result cache: %s fails, calls go on without it: %s", self.place, text)

    def _text(self, exc: Exception) -> str:
        """What an error says, in one line. A server that knows no AUTH repeats its arguments."""
        text = str(exc).partition("args beginning with")[0]
        text = text.replace(self._password, "***") if self._password else text
        return f"{type(exc).__name__}: {' '.join(ascii(text)[1:-1].split())[:200]}"


def _known(key: bytes, value: Any) -> Known | None:
    """What a value says of the pair of this key. None for whatever else is there."""
    if not isinstance(value, bytes) or len(value) != VALUE.size:
        return None
    owner, score, windows, cut = VALUE.unpack(value)
    return Known(score, cut, windows) if owner == key and math.isfinite(score) and windows > 0 else None
