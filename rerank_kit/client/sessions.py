"""Sessions that all calls of a process share: one for each address, and for asyncio one for each event loop too."""

import asyncio
import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from .. import settings
from .exchange import PooledSession, new_async_session

if TYPE_CHECKING:
    import aiohttp

RETRY_SHARE, RETRY_FLOOR, RETRY_CEIL = 0.1, 10.0, 100.0  # retry budget: share of calls, always free, most saved up


@lru_cache
def _base_urls(text: str) -> tuple[str, ...]:
    """ "http://a:1, http://b:2/v1/" -> ("http://a:1/v1", "http://b:2/v1"); ValueError names the bad one."""
    urls = []
    for url in (part.strip() for part in text.split(",") if part.strip()):
        try:
            parts = urlsplit(url)
            (parts.hostname or "").encode("idna")
            ok = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # also a bad port and UnicodeError
            ok = False
        if "@" in url:  # may hold a password: never shown
            raise ValueError("base_url holds a user name or password: put the key into API_KEY")
        if not ok or parts.query or parts.fragment or re.search(r"\s", url):
            raise ValueError(f"base_url={url!r} is not like http://127.0.0.1:11438/v1")
        urls.append(url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1")
    if not urls:
        raise ValueError(f"base_url={text!r} holds no address")
    return tuple(dict.fromkeys(urls))


def base_urls(base_url: str | None = None) -> tuple[str, ...]:
    """Addresses of the service in order of preference, each ending in /v1; None = BASE_URL of the config."""
    if base_url is None:
        try:
            return _base_urls(settings.CFG.local_base_url)
        except ValueError as exc:
            raise settings.ConfigError(f"BASE_URL cannot be used: {exc}") from None
    if not isinstance(base_url, str):
        raise ValueError(f"base_url={base_url!r} is not a str")
    return _base_urls(base_url)


def _headers() -> dict[str, str]:
    # identity: answers are small, and what is not compressed cannot be a bomb.
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    key = settings.CFG.api_key
    if key and not (key.isascii() and key.isprintable()):
        raise settings.ConfigError("API_KEY=*** holds characters that no HTTP header can carry")
    return headers | {"Authorization": f"Bearer {key}"} if key else headers


@dataclass
class _Endpoint:
    """One address: its sessions, whether it was down, how many retries it may still cost."""

    url: str
    session: PooledSession | None = None
    loops: dict = field(default_factory=dict)  # event loop -> (aiohttp session, the generator that closes it)
    down_until: float = 0.0
    tokens: float = RETRY_FLOOR
    seen: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def earn(self) -> None:
        """A call pays for a share of a retry; below the floor, time does too: 1 a second."""
        with self.lock:
            now = time.monotonic()
            if self.tokens < RETRY_FLOOR:
                self.tokens = min(RETRY_FLOOR, self.tokens + now - self.seen)
            self.tokens, self.seen = min(RETRY_CEIL, self.tokens + RETRY_SHARE), now

    def spend(self) -> bool:
        """Take one retry from the budget, so that retries cannot multiply an overload; False = none left."""
        with self.lock:
            paid = self.tokens >= 1
            self.tokens -= paid
            return paid


class SharedResources:
    """Sessions that all calls of this process share: one per base_url, and for asyncio one per event loop too.

    Safe with threads, with several event loops (also closed ones) and after a fork: a child opens its own
    connections. A session keeps POOL_SIZE connections; more threads than that work, but open new ones.
    """

    _lock = threading.RLock()
    _endpoints: ClassVar[dict[str, _Endpoint]] = {}
    _inherited: ClassVar[list] = []
    _fork_hook = False

    @classmethod
    def _after_fork(cls) -> None:
        # Kept, not closed: closing would change the parent's selector, which an event loop shares with its child.
        cls._inherited.append(cls._endpoints)
        cls._endpoints, cls._lock = {}, threading.RLock()

    @classmethod
    def _endpoint(cls, url: str) -> _Endpoint:
        endpoint = cls._endpoints.get(url)
        if endpoint is None:
            with cls._lock:
                if not cls._fork_hook and hasattr(os, "register_at_fork"):
                    os.register_at_fork(after_in_child=cls._after_fork)
                    cls._fork_hook = True
                endpoint = cls._endpoints.setdefault(url, _Endpoint(url))
        return endpoint

    @classmethod
    def get_local_rerank_client(cls, base_url: str | None = None) -> PooledSession:
        """The requests.Session for base_url (the first, if it lists several; None = config), with the API key.

        Raises:
            ValueError: base_url is no address, or the key fits in no header.
        """
        endpoint = cls._endpoint(base_urls(base_url)[0])
        if endpoint.session is None:
            with cls._lock:
                if endpoint.session is None:
                    endpoint.session = PooledSession(endpoint.url, _headers(), settings.CFG.pool_size)
        return endpoint.session

    @classmethod
    async def get_async_rerank_client(cls, base_url: str | None = None) -> "aiohttp.ClientSession":
        """The same with aiohttp for the running event loop; it closes when that loop ends."""
        endpoint = cls._endpoint(base_urls(base_url)[0])
        loop = asyncio.get_running_loop()
        session, _ = endpoint.loops.get(loop, (None, None))
        if session is None or session.closed:
            for other in [known for known in list(endpoint.loops) if known.is_closed()]:
                with suppress(KeyError, StopIteration):  # closed by loop.close() alone: nothing is left to wait for
                    endpoint.loops.pop(other)[0].close().send(None)
            session = new_async_session(endpoint.url, _headers(), settings.CFG.pool_size)
            owner = cls._close_with_loop(session, endpoint.loops, loop)
            await anext(owner)
            endpoint.loops[loop] = session, owner
        return session

    @staticmethod
    async def _close_with_loop(session, loops: dict, loop):
        """asyncio.run() finishes the async generators that are still open: there the session is closed."""
        try:
            yield
        finally:
            if loops.get(loop, (None,))[0] is session:  # not one that took its place
                loops.pop(loop)
            await session.close()

    @classmethod
    def close_local_rerank_client(cls) -> None:
        """Close all sync sessions; the next call opens new ones. Event loops close theirs when they end."""
        with cls._lock:
            sessions = [endpoint.session for endpoint in cls._endpoints.values() if endpoint.session]
            for endpoint in cls._endpoints.values():
                endpoint.session = None
        for session in sessions:
            session.close()

    @classmethod
    async def aclose_local_rerank_client(cls) -> None:
        """Close the sessions of the running event loop."""
        loop = asyncio.get_running_loop()
        for endpoint in list(cls._endpoints.values()):
            if loop in endpoint.loops:
                await endpoint.loops[loop][1].aclose()
