"""Sessions that all calls of a process share: one for each address; for asyncio, one for each event loop too."""

import asyncio
import os
import re
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from .. import settings
from .exchange import PooledSession, new_async_session

if TYPE_CHECKING:
    import aiohttp  # type: ignore[import-not-found,unused-ignore]  # a program with sync calls only may lack it

# Retry budget, a token bucket for each address: tokens a call adds, level up to which time refills it, capacity.
RETRY_SHARE, RETRY_FLOOR, RETRY_CEIL = 0.1, 10.0, 100.0


@lru_cache
def _base_urls(text: str) -> tuple[str, ...]:
    """ "http://a:1, http://b:2/v1/rerank" -> ("http://a:1/v1", "http://b:2/v1"). ValueError names the bad address."""
    urls = []
    for url in (part.strip() for part in text.split(",") if part.strip()):
        try:
            parts = urlsplit(url)
            (parts.hostname or "").encode("idna")
            ok = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # also a bad port and UnicodeError
            ok = False
        if "@" in url:  # the message does not quote it: it may hold a password
            raise ValueError("base_url holds a user name or a password: set RERANK_API_KEY instead")
        if not ok or parts.query or parts.fragment or re.search(r"\s", url):
            raise ValueError(f"base_url={url!r} is not like http://127.0.0.1:11438/v1")
        # Many take the whole path of a call for the address.
        path = re.sub(r"(/+v1)?(/+(rerank|score)|/+v2/+rerank)?/*$", "", parts.path)
        urls.append(f"{parts.scheme}://{parts.netloc}{path}/v1")
    if not urls:
        raise ValueError(f"base_url={text!r} holds no address")
    return tuple(dict.fromkeys(urls))


def base_urls(base_url: str | None = None) -> tuple[str, ...]:
    """Addresses of the service in order of preference, each ending in /v1; None = BASE_URL of the config."""
    if base_url is None:
        try:
            return _base_urls(settings.CLIENT.local_base_url)
        except ValueError as exc:
            raise settings.ConfigError(f"BASE_URL cannot be used: {exc}") from None
    if not isinstance(base_url, str):
        raise ValueError(f"base_url={base_url!r} is not a str")
    return _base_urls(base_url)


def _headers() -> dict[str, str]:
    # identity: answers are small, and an uncompressed body cannot be a decompression bomb.
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    key = settings.CLIENT.api_key
    if key and not (key.isascii() and key.isprintable()):
        raise settings.ConfigError("API_KEY=*** holds characters that no HTTP header can carry")
    return headers | {"Authorization": f"Bearer {key}"} if key else headers


@dataclass
class _Endpoint:
    """One address: its sessions, whether it is known to be down, and its retry budget."""

    url: str
    session: PooledSession | None = None
    # event loop -> (session, the generator that closes it when the loop ends)
    loops: "dict[asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, AsyncGenerator[None, None]]]" = field(
        default_factory=dict
    )
    down_until: float = 0.0
    tokens: float = RETRY_FLOOR
    seen: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def earn(self) -> None:
        """Token bucket: each call adds RETRY_SHARE tokens; below RETRY_FLOOR one token a second is added too."""
        with self.lock:
            now = time.monotonic()
            if self.tokens < RETRY_FLOOR:
                self.tokens = min(RETRY_FLOOR, self.tokens + now - self.seen)
            self.tokens, self.seen = min(RETRY_CEIL, self.tokens + RETRY_SHARE), now

    def spend(self) -> bool:
        """Take one token for a retry; False = none is left. The limit keeps retries from multiplying an overload."""
        with self.lock:
            paid = self.tokens >= 1
            self.tokens -= paid
            return paid


class SharedResources:
    """Sessions that all calls of this process share: one for each base_url; for asyncio, one for each event loop too.

    They are safe with threads, with several event loops (closed ones too) and after a fork, as a child opens its own
    connections. A session keeps POOL_SIZE connections. Threads beyond that number work, but open new connections.
    """

    _lock = threading.RLock()
    _endpoints: ClassVar[dict[str, _Endpoint]] = {}
    _inherited: ClassVar[list[dict[str, _Endpoint]]] = []
    _fork_hook = False

    @classmethod
    def _after_fork(cls) -> None:
        # The sessions are kept, not closed: parent and child share the event loop's selector, and closing changes it.
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
        """The requests.Session for base_url, with the API key in its headers.

        Args:
            base_url: an address; of several separated by commas, the first is used. None = config.

        Raises:
            ValueError: base_url is not an address, or no header can carry the key.
        """
        endpoint = cls._endpoint(base_urls(base_url)[0])
        if endpoint.session is None:
            with cls._lock:
                if endpoint.session is None:
                    endpoint.session = PooledSession(endpoint.url, _headers(), settings.CLIENT.pool_size)
        return endpoint.session

    @classmethod
    async def get_async_rerank_client(cls, base_url: str | None = None) -> "aiohttp.ClientSession":
        """The aiohttp.ClientSession for base_url and the running event loop. It is closed when the loop ends."""
        endpoint = cls._endpoint(base_urls(base_url)[0])
        loop = asyncio.get_running_loop()
        session, _ = endpoint.loops.get(loop, (None, None))
        if session is None or session.closed:
            for other in [known for known in list(endpoint.loops) if known.is_closed()]:
                with suppress(KeyError, StopIteration):  # its loop is closed: close() cannot wait for anything
                    endpoint.loops.pop(other)[0].close().send(None)
            session = new_async_session(endpoint.url, _headers(), settings.CLIENT.pool_size)
            owner = cls._close_with_loop(session, endpoint.loops, loop)
            await anext(owner)
            endpoint.loops[loop] = session, owner
        return session

    @staticmethod
    async def _close_with_loop(
        session: "aiohttp.ClientSession",
        loops: "dict[asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, AsyncGenerator[None, None]]]",
        loop: asyncio.AbstractEventLoop,
    ) -> AsyncGenerator[None, None]:
        """A generator that closes the session when it is closed: asyncio.run() closes open generators at its end."""
        try:
            yield
        finally:
            if loops.get(loop, (None,))[0] is session:  # a newer session stays
                loops.pop(loop)
            await session.close()

    @classmethod
    def close_local_rerank_client(cls) -> None:
        """Close all sync sessions. The next call opens new ones. Async sessions are closed with their event loop."""
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
