"""One HTTP exchange over requests or aiohttp. It takes a Step and returns an Answer or a Failure; it raises nothing.

It adds three things that a client in production needs and neither library has:
- one timer for the whole answer, so that a server that drips bytes cannot hold a caller for ever;
- a record of how far a failed exchange got, which decides whether it may be sent again;
- no reuse of a connection that the server is about to close.
"""

import asyncio
import http.client
import io
import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError
from urllib3.poolmanager import ProxyManager
from urllib3.util import Timeout

from ..settings import ConfigError
from .net import _http_proxy, _need, _net, _tls_context

if TYPE_CHECKING:
    import aiohttp  # type: ignore[import-not-found,unused-ignore]  # a program with sync calls only may lack it
    from urllib3.connection import HTTPConnection as _Connection
    from urllib3.connectionpool import HTTPConnectionPool as _ConnectionPool
else:
    _Connection = _ConnectionPool = object  # the two mixins below have no base of their own

IDLE_S = 4.0  # uvicorn closes a connection after 5 idle seconds; the client drops it before that
STALE_S = 1.0  # a connection that the server has closed fails within a round trip
ERROR_BYTES = 65536  # limit on the bytes that are read of an error's body


@dataclass(slots=True)
class Step:
    """One request, to be sent once."""

    url: str
    base_url: str
    body: bytes
    connect_s: float
    answer_s: float  # from the first byte sent to the last received
    until: float  # time.monotonic() of the deadline; inf = none
    fresh: bool  # True = use a new connection
    method: str = "POST"
    trace: dict[str, str] = field(default_factory=dict)  # headers that name the caller's span

    def limit(self, status: int) -> int:
        """Limit on the bytes that are read of an answer. It grows with the request: /v1/rerank echoes the documents."""
        return (1 << 20) + 4 * len(self.body) if status < 300 else ERROR_BYTES


@dataclass(slots=True)
class Answer:
    """Status, headers and body of an answer; whole is False if the body is longer than limit bytes."""

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
    """No answer. kind says how far the exchange got.

    connect, tls, pool: nothing was sent (pool: no connection became free).
    stale: the server had closed the connection before the request arrived.
    timeout, lost: the server may be working on the request.
    """

    kind: str
    exc: Exception
    timed_out: bool
    cause: str


class _Wire:
    """How far an exchange got."""

    def __init__(self, step: Step):
        self.step, self.reused, self.n_bytes = step, True, 0
        self.timer: asyncio.Timeout | None = None
        self.start()

    def connecting(self) -> float:
        """Start the connect timer; return its deadline (time.monotonic())."""
        self.reused = self.connected = self.waits = False
        # A proxy's answer to CONNECT is read under this timer too.
        self.answer_by = min(time.monotonic() + self.step.connect_s, self.step.until)
        return self.answer_by

    def start(self) -> float:
        """Start the answer timer; return its deadline (time.monotonic())."""
        self.connected, self.began = True, time.monotonic()
        self.waits = False  # True = waits for a free connection of the pool
        self.answer_by = min(self.began + self.step.answer_s, self.step.until)
        return self.answer_by

    def left_s(self) -> float:
        left = self.answer_by - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer timer has expired")
        return left

    def failure(self, answer: Answer | None, exc: Exception) -> Answer | Failure:
        """Classify an exception by whether the server saw the request, which decides whether it may be sent again."""
        if answer and answer.status >= 300:
            return answer  # the status is enough; the body may be incomplete
        chain: list[BaseException] = [exc]
        while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper not in chain:
            chain.append(deeper)
        timed_out = any(isinstance(one, TimeoutError | requests.Timeout) for one in chain)
        cause = next((_reason(one) for one in reversed(chain) if isinstance(one, OSError) and one.strerror), None)
        if not self.connected:
            kind = "tls" if any(isinstance(one, ssl.SSLError) for one in chain) else "connect"
        elif timed_out:
            kind = "pool" if self.waits else "timeout"
        else:
            worked = answer or self.n_bytes or time.monotonic() - self.began > STALE_S
            kind = "lost" if worked or not self.reused else "stale"
        if hasattr(exc, "request_info"):  # aiohttp: the repr shows the request's headers, and so the API key
            exc = http.client.HTTPException(getattr(exc, "message", ""))
        return Failure(kind, exc, timed_out, str(cause or exc) or type(exc).__name__)


def _reason(exc: OSError) -> str:
    """The system's text for an error, such as "Connection refused".

    asyncio writes a text of its own into strerror. The numbers of TLS and DNS errors are not the system's.
    """
    number = exc.errno or 0
    own = isinstance(exc, ssl.SSLError | socket.gaierror) or number <= 0
    return exc.strerror or "" if own else os.strerror(number)


# --- requests -------------------------------------------------------------------------------------------------

_local = threading.local()  # .wire: the _Wire of the exchange that runs in this thread


class _TimedReader(io.RawIOBase):
    """Reads a socket under the timer of the exchange, from the first byte of the head to the last of the body."""

    def __init__(self, sock: socket.socket):
        self._sock, self._raw = sock, sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        wire: _Wire | None = getattr(_local, "wire", None)
        if wire:
            self._sock.settimeout(wire.left_s())
        n = self._raw.readinto(buffer)
        if wire and n:
            wire.n_bytes += n
        return n

    def makefile(self, mode: str) -> io.BufferedReader:  # http.client calls this on its socket
        return io.BufferedReader(self, 65536)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any):
        # All that HTTPResponse does with its socket is sock.makefile("rb").
        super().__init__(_TimedReader(sock), *args, **kwargs)  # type: ignore[arg-type]

    def _read_status(self) -> tuple[str, int, str]:
        """Version, status and reason of the final answer.

        http.client takes 102 and 103 for the final answer, so the next call would read the answer of this one.
        """
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]  # private: typeshed leaves it out
            if status == 101:
                raise http.client.BadStatusLine("101 Switching Protocols, which was not requested")
            if status == 100 or not 100 < status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)


class _Tracked(_Connection):
    """Mixin of both connection classes. Outside an exchange of the client it behaves as plain urllib3."""

    response_class = _Response
    idle_since = 0.0

    def connect(self) -> None:
        wire: _Wire | None = getattr(_local, "wire", None)
        if wire:
            wire.connecting()
        super().connect()
        if wire:
            wire.start()

    def _new_conn(self) -> socket.socket:
        """urllib3 allows the connect timeout for each address of a name; here all addresses share it."""
        wire: _Wire | None = getattr(_local, "wire", None)
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM) if wire else []
        except (OSError, UnicodeError):
            found = []  # urllib3 fails in the same way and raises its own error
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not wire or not addresses:
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

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        wire: _Wire | None = getattr(_local, "wire", None)
        if wire and self.sock is not None:
            self.sock.settimeout(wire.left_s())
        super().send(data)

    @property
    def is_connected(self) -> bool:
        wire: _Wire | None = getattr(_local, "wire", None)
        if (wire and wire.step.fresh) or time.monotonic() - self.idle_since > IDLE_S:
            return False  # the pool then closes this connection and opens another
        still = super().is_connected
        if wire and still:
            wire.reused = True
        return still


class _HTTP(_Tracked, HTTPConnection):
    pass


class _HTTPS(_Tracked, HTTPSConnection):
    pass


class _Pool(_ConnectionPool):
    def _put_conn(self, conn: Any) -> None:
        if conn:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)


class _HTTPPool(_Pool, HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _HTTPS


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def close(self) -> None:
        # urllib3 leaves idle connections to the garbage collector. A stored exception keeps them alive.
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in list(manager.pools.keys()):
                if pool := manager.pools.get(key):
                    pool.close()
        super().close()

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        if isinstance(manager, ProxyManager):  # not a SOCKS manager: its own pools speak the SOCKS protocol
            manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return manager


class PooledSession(requests.Session):
    """A requests.Session that keeps up to pool_size connections to base_url. Further threads open extra ones."""

    def __init__(self, base_url: str, headers: dict[str, str], pool_size: int):
        _need("requests", requests.__version__, 2, 32)  # type: ignore[attr-defined,unused-ignore]  # not in its __all__
        _need("urllib3", urllib3.__version__, 2, 0)  # type: ignore[attr-defined,unused-ignore]  # not in its __all__
        super().__init__()
        self.headers.update(headers)
        self.trust_env = False  # otherwise .netrc replaces the key and every call looks up the proxies
        self.proxies, ca = _net(base_url)
        self.verify = ca or True
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # threads would share the jar
        adapter = _Adapter(pool_connections=1, pool_maxsize=pool_size)
        self.mount("http://", adapter)
        self.mount("https://", adapter)
        self._pools: dict[str, tuple[HTTPConnectionPool, str]] = {}

    def close(self) -> None:
        super().close()
        self._pools.clear()  # a closed requests.Session can be used again, and so can this one

    def pool_of(self, url: str) -> tuple[HTTPConnectionPool, str]:
        """The connection pool for url, and the target of the request line (the whole url for a forwarding proxy)."""
        if url not in self._pools:
            request = self.prepare_request(requests.Request("POST", url))
            adapter: Any = self.get_adapter(url)  # the stubs give the base class, which lacks the methods below
            pool = adapter.get_connection_with_tls_context(request, self.verify, proxies=self.proxies)
            adapter.cert_verify(pool, url, self.verify, None)
            self._pools[url] = pool, adapter.request_url(request, self.proxies)
        return self._pools[url]


def _is_plain(session: PooledSession, url: str) -> bool:
    """False if a mock or a tracer has put itself into requests: in place of its functions, or as an adapter."""
    for function, module in (
        (requests.Session.send, requests.sessions),
        (requests.Session.get_adapter, requests.sessions),
        (HTTPAdapter.send, requests.adapters),
    ):
        if getattr(function, "__globals__", None) is not vars(module) or hasattr(function, "__wrapped__"):
            return False
    own = vars(session)
    return "send" not in own and "get_adapter" not in own and isinstance(session.get_adapter(url), _Adapter)


def _through_requests(session: PooledSession, step: Step, wire: _Wire) -> Answer:
    """The exchange as requests itself makes it, so that mocks and tracers see it."""
    wire.reused = False  # unless the pool has a connection
    times = (step.connect_s, step.answer_s)
    sent = session.request(
        step.method, step.url, data=step.body, headers=step.trace, timeout=times, allow_redirects=False, stream=True
    )
    with sent as response:
        answer = Answer(response.status_code, response.headers, step.limit(response.status_code))
        for chunk in response.iter_content(65536):
            if not answer.add(chunk):
                break
    return answer


def exchange(session: PooledSession, step: Step) -> Answer | Failure:
    """Send a Step. Redirects are not followed.

    The request goes straight to the session's pool. The cookies, redirects and hooks of Session.post() are not needed
    and cost more than the rest of the client (measurements/client_overhead.py). Where a mock or a tracer replaces parts
    of requests, the request goes through these parts.
    """
    wire, answer = _Wire(step), None
    _local.wire = wire
    # The stubs allow bytes as values of a session's headers; the client sets str only.
    headers: Any = {**session.headers, **step.trace} if step.trace else session.headers
    times = Timeout(connect=step.connect_s, read=step.answer_s)
    try:
        if not _is_plain(session, step.url):
            return _through_requests(session, step, wire)
        wire.connected = False  # an unusable proxy or CA file raises here
        pool, target = session.pool_of(step.url)
        wire.connected = True
        response = pool.urlopen(
            step.method,
            target,
            step.body,
            headers,
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


# --- aiohttp: imported where it is used, so sync programs need not install it ------------------------------------


def new_async_session(
    base_url: str, headers: dict[str, str], pool_size: int, *, reuse: bool = True
) -> "aiohttp.ClientSession":
    """An aiohttp.ClientSession with at most pool_size connections. Further calls wait until one is free."""
    try:
        import aiohttp  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as exc:
        raise ConfigError('arerank and ascore need aiohttp: pip install "rerank-kit[async]"') from exc
    _need("aiohttp", aiohttp.__version__, 3, 11)
    # Any callable will do; aiohttp's annotation wants a class of SimpleNamespace.
    trace = aiohttp.TraceConfig(trace_config_ctx_factory=_same_context)  # type: ignore[arg-type,unused-ignore]
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


async def aexchange(session: "aiohttp.ClientSession", step: Step) -> Answer | Failure:
    """exchange() over aiohttp."""
    import aiohttp  # type: ignore[import-not-found,unused-ignore]

    wire, answer = _Wire(step), None
    wire.waits = True
    left_s = None if step.until == math.inf else step.until - time.monotonic()
    try:
        # While the call waits for a free connection, the deadline applies. The trace then sets the connect timer and
        # the answer timer.
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
            wire.n_bytes = 1  # ServerDisconnectedError.message holds the part of the head that arrived
        return wire.failure(answer, exc)


def _same_context(trace_request_ctx: Any) -> Any:
    return trace_request_ctx


async def _on_connect(session: "aiohttp.ClientSession", wire: Any, params: Any) -> None:
    if wire:  # None: the request is not an exchange of the client
        wire.timer.reschedule(asyncio.get_running_loop().time() + wire.connecting() - time.monotonic())


async def _on_connected(session: "aiohttp.ClientSession", wire: Any, params: Any) -> None:
    if wire:
        wire.timer.reschedule(asyncio.get_running_loop().time() + wire.start() - time.monotonic())
