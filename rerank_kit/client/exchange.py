"""One HTTP exchange with requests or aiohttp: a Step in, an Answer or a Failure out, never an exception of theirs.

What the two libraries do not do by themselves, and a client in production needs:
- one timer for the whole answer, so that a server that drips bytes cannot hold a caller for ever;
- to know how far a failed exchange got, since that decides whether it may be sent again;
- connections that the server is about to close are not used again.
"""

import asyncio
import http.client
import io
import ipaddress
import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError
from urllib3.poolmanager import ProxyManager
from urllib3.util import Timeout

from ..settings import ConfigError

IDLE_S = 4.0  # uvicorn closes a connection that was idle for 5 s: we drop it first
STALE_S = 1.0  # a connection that the server had closed already shows it within a round trip
ERROR_BYTES = 65536  # read of an error's body


class NoProxy(OSError):
    """The proxy that the environment names cannot be used."""


@dataclass(slots=True)
class Step:
    """Send this once."""

    url: str
    base_url: str
    body: bytes
    connect_s: float
    answer_s: float  # from the first byte sent to the last received
    until: float  # time.monotonic() of the deadline; inf = none
    fresh: bool  # over a new connection
    method: str = "POST"
    trace: dict[str, str] = field(default_factory=dict)  # headers that name the caller's span

    def limit(self, status: int) -> int:
        """Most bytes of an answer that are read; /v1/rerank echoes the documents."""
        return (1 << 20) + 4 * len(self.body) if status < 300 else ERROR_BYTES


@dataclass(slots=True)
class Answer:
    """Status, headers and body; whole is False if there was more than limit bytes."""

    status: int
    headers: Mapping[str, str]
    limit: int
    body: bytearray = field(default_factory=bytearray)
    whole: bool = True

    def add(self, chunk: bytes) -> bool:
        self.body += chunk
        self.whole = len(self.body) <= self.limit
        return self.whole


@dataclass(slots=True)
class Failure:
    """No answer. connect, tls, pool (no free connection): nothing was sent; stale: the server had closed; timeout,
    lost: it may be at work."""

    kind: str
    exc: Exception
    timed_out: bool
    cause: str


class _Wire:
    """How far an exchange got."""

    def __init__(self, step: Step):
        self.step, self.reused, self.n_bytes, self.timer = step, True, 0, None
        self.start()

    def connecting(self) -> float:
        """The time.monotonic() at which the connection must stand."""
        self.reused = self.connected = self.waits = False
        # Also for what a proxy answers before the connection stands.
        self.answer_by = min(time.monotonic() + self.step.connect_s, self.step.until)
        return self.answer_by

    def start(self) -> float:
        """The time.monotonic() at which the whole answer must be there."""
        self.connected, self.began = True, time.monotonic()
        self.waits = False  # for a free connection
        self.answer_by = min(self.began + self.step.answer_s, self.step.until)
        return self.answer_by

    def left_s(self) -> float:
        left = self.answer_by - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for this answer is over")
        return left

    def failure(self, answer: Answer | None, exc: Exception) -> Answer | Failure:
        """Sort an exception: did the server see the request, and may it be sent again?"""
        if answer and answer.status >= 300:
            return answer  # the status says enough, its text may be cut
        chain = [exc]
        while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper not in chain:
            chain.append(deeper)
        timed_out = any(isinstance(one, TimeoutError) for one in chain)
        cause = next((_reason(one) for one in reversed(chain) if getattr(one, "strerror", None)), None)
        if not self.connected:
            kind = "tls" if any(isinstance(one, ssl.SSLError) for one in chain) else "connect"
        elif timed_out:
            kind = "pool" if self.waits else "timeout"
        else:
            worked = answer or self.n_bytes or time.monotonic() - self.began > STALE_S
            kind = "lost" if worked or not self.reused else "stale"
        if hasattr(exc, "request_info"):  # aiohttp shows the request's headers, and so the key, in this one's repr
            exc = http.client.HTTPException(exc.message)
        return Failure(kind, exc, timed_out, str(cause or exc) or type(exc).__name__)


def _reason(exc: OSError) -> str:
    """ "Connection refused" and the like; asyncio has other words in strerror, TLS and DNS have their own numbers."""
    own = isinstance(exc, ssl.SSLError | socket.gaierror) or not exc.errno or exc.errno < 0
    return exc.strerror if own else os.strerror(exc.errno)


# --- requests -------------------------------------------------------------------------------------------------

_local = threading.local()  # .wire: the exchange that runs in this thread


class _TimedReader(io.RawIOBase):
    """A socket's bytes under the timer of the exchange, from the first byte of the head to the last of the body."""

    def __init__(self, sock):
        self._sock, self._raw = sock, sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        wire = getattr(_local, "wire", None)
        if wire:
            self._sock.settimeout(wire.left_s())
        n = self._raw.readinto(buffer)
        if wire and n:
            wire.n_bytes += n
        return n

    def makefile(self, mode: str) -> io.BufferedReader:  # http.client asks its socket for a file
        return io.BufferedReader(self, 65536)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock, *args, **kwargs):
        super().__init__(_TimedReader(sock), *args, **kwargs)

    def _read_status(self) -> tuple[str, int, str]:
        """The final answer's: http.client takes 102 and 103 for it, and the next call would read this one's answer."""
        while True:
            version, status, reason = super()._read_status()
            if status == 101:
                raise http.client.BadStatusLine("101, a change of the protocol that nobody asked for")
            if status == 100 or not 100 < status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)


class _Tracked:
    """What both connection classes add; plain urllib3 while no exchange of ours runs in the thread."""

    response_class = _Response
    idle_since = 0.0

    def connect(self) -> None:
        wire = getattr(_local, "wire", None)
        if wire:
            wire.connecting()
        super().connect()
        if wire:
            wire.start()

    def _new_conn(self) -> socket.socket:
        """urllib3 gives every address of a name the whole time; here all of them share it."""
        wire = getattr(_local, "wire", None)
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM) if wire else ()
        except (OSError, UnicodeError):
            found = ()  # urllib3 says it in its own words
        addresses = list(dict.fromkeys(info[4][0] for info in found))
        if not addresses:
            return super()._new_conn()
        name = self._dns_host
        try:
            while True:
                self._dns_host, self.timeout = addresses.pop(0), wire.left_s()
                try:
                    return super()._new_conn()
                except (ConnectTimeoutError, NewConnectionError):
                    if not addresses:
                        raise
        finally:
            self._dns_host = name

    def send(self, data) -> None:
        if self.sock is None:
            self.connect()
        if wire := getattr(_local, "wire", None):
            self.sock.settimeout(wire.left_s())
        super().send(data)

    @property
    def is_connected(self) -> bool:
        wire = getattr(_local, "wire", None)
        if (wire and wire.step.fresh) or time.monotonic() - self.idle_since > IDLE_S:
            return False  # the pool closes it and opens another
        return super().is_connected


class _HTTP(_Tracked, HTTPConnection):
    pass


class _HTTPS(_Tracked, HTTPSConnection):
    pass


class _Pool:
    def _put_conn(self, conn) -> None:
        if conn:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)


class _HTTPPool(_Pool, HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _HTTPS


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args, **kwargs) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def close(self) -> None:
        # urllib3 leaves idle connections to the garbage collector, and any stored exception keeps them from it.
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in list(manager.pools.keys()):
                if pool := manager.pools.get(key):
                    pool.close()
        super().close()

    def proxy_manager_for(self, *args, **kwargs):
        manager = super().proxy_manager_for(*args, **kwargs)
        if isinstance(manager, ProxyManager):  # one for SOCKS has pools of its own, which know how to get through
            manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return manager


class PooledSession(requests.Session):
    """Keeps up to pool_size connections to base_url; more threads than that open new ones."""

    def __init__(self, base_url: str, headers: dict[str, str], pool_size: int):
        _need("requests", requests.__version__, 2, 32)
        _need("urllib3", urllib3.__version__, 2, 0)
        super().__init__()
        self.headers.update(headers)
        self.trust_env = False  # else .netrc would replace the key, and proxies be looked up for every call
        self.proxies, ca = _net(base_url)
        self.verify = ca or True
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # a jar that threads share, for nothing
        adapter = _Adapter(pool_connections=1, pool_maxsize=pool_size)
        self.mount("http://", adapter)
        self.mount("https://", adapter)
        self._pools: dict[str, tuple[HTTPConnectionPool, str]] = {}

    def close(self) -> None:
        super().close()
        self._pools.clear()  # a closed session works again, as any of requests does

    def pool_of(self, url: str) -> tuple[HTTPConnectionPool, str]:
        """The connection pool for url, and the target of the request line (all of url if a proxy forwards it)."""
        if url not in self._pools:
            request, adapter = self.prepare_request(requests.Request("POST", url)), self.get_adapter(url)
            pool = adapter.get_connection_with_tls_context(request, self.verify, proxies=self.proxies)
            adapter.cert_verify(pool, url, self.verify, None)
            self._pools[url] = pool, adapter.request_url(request, self.proxies)
        return self._pools[url]


def exchange(session: PooledSession, step: Step) -> Answer | Failure:
    """Send step, redirects not followed.

    Goes straight to the session's pool: the cookies, redirects and hooks of Session.post() are not wanted here, and
    cost more than all that the kit does itself (measurements/client_overhead.py).
    """
    wire, answer = _Wire(step), None
    _local.wire = wire
    times = Timeout(connect=step.connect_s, read=step.answer_s)
    try:
        wire.connected = False  # a proxy or CA file that cannot be used fails here
        pool, target = session.pool_of(step.url)
        wire.connected = True
        response = pool.urlopen(
            step.method,
            target,
            step.body,
            {**session.headers, **step.trace} if step.trace else session.headers,
            timeout=times,
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
            assert_same_host=False,
        )
        with response:
            answer = Answer(response.status, response.headers, step.limit(response.status))
            while (chunk := response.read(65536)) and answer.add(chunk):
                pass
        return answer
    except (HTTPError, http.client.HTTPException, OSError) as exc:
        return wire.failure(answer, exc)
    finally:
        _local.wire = None


# --- aiohttp: imported where it is used, so that sync programs need not have it ---------------------------------


def new_async_session(base_url: str, headers: dict[str, str], pool_size: int, *, reuse: bool = True):
    """An aiohttp.ClientSession with at most pool_size connections; further calls wait for one."""
    try:
        import aiohttp
    except ModuleNotFoundError as exc:
        raise ConfigError('arerank and ascore need aiohttp: pip install "rerank-kit[async]"') from exc
    _need("aiohttp", aiohttp.__version__, 3, 11)
    trace = aiohttp.TraceConfig(trace_config_ctx_factory=lambda trace_request_ctx: trace_request_ctx)
    trace.on_connection_create_start.append(_on_connect)
    trace.on_connection_create_end.append(_on_connected)
    trace.on_connection_reuseconn.append(_on_connected)
    proxies, ca = _net(base_url)
    https = base_url.startswith("https")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=pool_size,
            ssl=_tls_context(ca) if https else True,
            **({"keepalive_timeout": IDLE_S} if reuse else {"force_close": True}),
        ),
        headers=headers,
        proxy=_http_proxy(base_url, proxies),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(),  # aexchange has its own timer
        auto_decompress=False,
        trace_configs=[trace],
    )


async def aexchange(session, step: Step) -> Answer | Failure:
    """The same as exchange() with aiohttp."""
    import aiohttp

    wire, answer = _Wire(step), None
    wire.waits = True
    left_s = None if step.until == math.inf else step.until - time.monotonic()
    try:
        # A call that waits for a free connection waits until the deadline; the trace moves the timer after that.
        async with asyncio.timeout(left_s) as wire.timer:
            body = step.body if len(step.body) < 1 << 20 else io.BytesIO(step.body)  # sent in pieces
            sent = session.request(
                step.method, step.url, data=body, headers=step.trace, allow_redirects=False, trace_request_ctx=wire
            )
            async with sent as response:
                answer = Answer(response.status, response.headers, step.limit(response.status))
                async for chunk in response.content.iter_any():
                    if not answer.add(chunk):
                        break
        return answer
    except (aiohttp.ClientError, OSError) as exc:  # TimeoutError is an OSError
        if not isinstance(getattr(exc, "message", ""), str):
            wire.n_bytes = 1  # ServerDisconnectedError holds the part of the head that had arrived
        return wire.failure(answer, exc)


async def _on_connect(session, wire, params) -> None:
    if wire:  # None: somebody uses the session for a request of his own
        wire.timer.reschedule(asyncio.get_running_loop().time() + wire.connecting() - time.monotonic())


async def _on_connected(session, wire, params) -> None:
    if wire:
        wire.timer.reschedule(asyncio.get_running_loop().time() + wire.start() - time.monotonic())


# --- both -----------------------------------------------------------------------------------------------------


def _net(base_url: str) -> tuple[dict[str, str], str | None]:
    """(proxies by scheme, CA file or folder) that the environment asks for; no proxy for loopback."""
    host = urlsplit(base_url).hostname
    try:
        address = ipaddress.ip_address(host)
        loopback = address.is_loopback or address.is_unspecified
    except ValueError:
        loopback = host == "localhost" or host.endswith(".localhost")
    proxies = {} if loopback else requests.utils.get_environ_proxies(base_url)
    return proxies, os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")


def _http_proxy(base_url: str, proxies: dict[str, str]) -> str | None:
    """The proxy that requests would choose, for aiohttp, which knows neither ALL_PROXY nor one without a scheme."""
    proxy = requests.utils.select_proxy(base_url, proxies)
    if not proxy:
        return None
    proxy = requests.utils.prepend_scheme_if_needed(proxy, "http")
    if not urlsplit(proxy).hostname or urlsplit(proxy).scheme not in ("http", "https"):
        # Not quoted: it may hold a password.
        raise NoProxy("HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is no http proxy: asyncio needs http://HOST:PORT")
    return proxy


def _need(name: str, found: str, *oldest: int) -> None:
    numbers = tuple(int(part) if part.isdigit() else 0 for part in found.split(".")[:2])
    if numbers < oldest:
        raise ConfigError(f"{name} {found} is too old for the client: pip install '{name}>={oldest[0]}.{oldest[1]}'")


@lru_cache
def _tls_context(ca: str | None) -> ssl.SSLContext:
    ca = ca or requests.certs.where()  # what requests trusts
    return ssl.create_default_context(**({"capath": ca} if os.path.isdir(ca) else {"cafile": ca}))
