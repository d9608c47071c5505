"""A loopback HTTP server that answers like vLLM's /v1/rerank and /v1/score, or fails on purpose, and the fixtures.

    with FaultServer(status(503), close(), answer) as server:
        rerank("q", ["a"], base_url=server.url)

Each request takes the next behaviour of the script; after the last one the default gives correct answers. Every
request is checked. Anything that vLLM would refuse or silently ignore goes to server.problems, and the fixture fails.
"""

import asyncio
import json
import os
import socket
import ssl
import struct
import threading
import time
import zlib
from dataclasses import dataclass, field

import pytest

import model_utils
from rerank_kit import settings
from rerank_kit.client.sessions import SharedResources

KEYS = {
    "/v1/rerank": ({"model": str, "query": str, "documents": list}, {"top_n": int}),
    "/v1/score": ({"model": str, "text_1": str, "text_2": list}, {}),
}
OPTIONAL = {"long_documents": str, "instruction": str, "max_tokens_per_doc": int}


def score_of(query: str, document: str) -> float:
    """A score unique to this pair, so that a misplaced one is noticed."""
    return zlib.crc32(f"{query}\0{document}".encode()) / 2**32


DOCS = ["one", "two", "three"]
RIGHT = [score_of("q", doc) for doc in DOCS]


@dataclass
class Request:
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    json: dict
    connection: int  # number of the accepted connection
    nth: int  # of this connection, from 0
    received: float = field(default_factory=time.monotonic)

    def results(self) -> dict:
        """What vLLM 0.32 answers, with score_of() as the model."""
        data, n = self.json, zlib.crc32(self.body)
        if self.path == "/v1/score":
            rows = [
                {"index": i, "object": "score", "score": score_of(data["text_1"], doc)}
                for i, doc in enumerate(data["text_2"])
            ]
            usage = {"prompt_tokens": len(rows), "total_tokens": len(rows), "completion_tokens": 0}
            return {"id": f"score-{n}", "object": "list", "model": data["model"], "data": rows, "usage": usage}
        rows = [
            {"index": i, "document": {"text": doc}, "relevance_score": score_of(data["query"], doc)}
            for i, doc in enumerate(data["documents"])
        ]
        rows.sort(key=lambda row: row["relevance_score"], reverse=True)
        usage = {"prompt_tokens": len(rows), "total_tokens": len(rows)}
        rows = rows[: data.get("top_n") or len(rows)]  # 0 = all, as in vLLM
        return {"id": f"score-{n}", "model": data["model"], "usage": usage, "results": rows}


# --- behaviours: f(server, connection, request) -> True to keep the connection open ---------------------------


def http(status: int, body: bytes, headers: dict | None = None) -> bytes:
    headers = {"Content-Type": "application/json", "Content-Length": len(body)} | (headers or {})
    lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in headers.items() if v is not None), "", ""]
    return "\r\n".join(lines).encode() + body


def answer(server, connection, request) -> bool:
    connection.sendall(http(200, json.dumps(request.results()).encode()))
    return True


def reply(body, headers: dict | None = None, status: int = 200):
    """Any JSON value, bytes, or a function of the request."""

    def behave(server, connection, request) -> bool:
        value = body(request) if callable(body) else body
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        connection.sendall(http(status, data, headers))
        return True

    return behave


def status(code: int, body=None, headers: dict | None = None):
    body = {"error": {"message": f"told to say {code}", "type": "x", "code": code}} if body is None else body
    return reply(body, headers, code)


def send(data: bytes | None = None, share: float = 1.0, end: str = "close"):
    """Send a part of data (None: of the right answer), then "close", "reset" or "stall"."""

    def behave(server, connection, request) -> bool:
        whole = http(200, json.dumps(request.results()).encode()) if data is None else data
        connection.sendall(whole[: int(len(whole) * share)])
        if end == "stall":
            server.ended.wait(30)
        if end == "reset":
            time.sleep(0.02)  # otherwise the reset overtakes the bytes
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    return behave


def drip(start: int = 0, every_s: float = 0.05):
    """The correct answer: the first bytes at once, then one byte at a time, very slowly."""

    def behave(server, connection, request) -> bool:
        whole = http(200, json.dumps(request.results()).encode() + b" " * 2000, {"Content-Length": 99999})
        connection.sendall(whole[:start])
        for byte in whole[start:]:
            if server.ended.wait(every_s):
                break
            connection.sendall(bytes([byte]))
        return False

    return behave


def slow(delay_s: float, then=answer):
    def behave(server, connection, request) -> bool:
        server.ended.wait(delay_s)
        return then(server, connection, request)

    return behave


class FaultServer:
    """See the module. url ends in /v1; accepts counts connections, requests keeps all that were read."""

    def __init__(self, *script, default=answer, port=0, idle_s=30.0, tls=None, pause_reading_s=0.0):
        self.script, self.default, self.idle_s, self.tls = list(script), default, idle_s, tls
        self.pause_reading_s = pause_reading_s  # before the body of every request but the first of a connection
        self.accepts, self.requests, self.problems = 0, [], []
        self.models, self.models_asked = None, 0  # the answer to GET /v1/models; None = 404
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.connections, self.threads = set(), []
        self.listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/v1"
        self._spawn(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    def stop(self, reset: bool = False) -> None:
        """Close everything; optionally with a reset, as a killed process does. Idempotent."""
        self.ended.set()
        with self.lock:
            connections = list(self.connections)
        for connection in [self.listener, *connections]:
            try:
                if reset and connection is not self.listener:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self.threads:
            thread.join(10)
        self.listener.close()

    def _spawn(self, target, *args) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="fault-server")
        self.threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.ended.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepts += 1
            with self.lock:
                self.connections.add(connection)
            self._spawn(self._serve, connection, self.accepts)

    def _serve(self, connection, number: int) -> None:
        plain = connection
        try:
            connection.settimeout(self.idle_s)
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            stream = connection.makefile("rb")
            nth = 0
            while not self.ended.is_set() and (request := self._read(stream, number, nth)):
                nth += 1
                if request.path == "/v1/models":
                    self.models_asked += 1
                    connection.sendall(http(200 if self.models else 404, json.dumps(self.models).encode()))
                    continue
                with self.lock:
                    self.requests.append(request)
                    behave = self.script.pop(0) if self.script else self.default
                if not behave(self, connection, request):
                    return
        except (OSError, ValueError):
            pass  # the client went away, or was idle for too long
        finally:
            for end in {connection, plain}:
                end.close()
            if "stream" in locals():
                stream.close()
            with self.lock:
                self.connections.discard(plain)

    def _read(self, stream, number: int, nth: int) -> Request | None:
        line = stream.readline()
        if not line:
            return None
        headers = {}
        while (text := stream.readline().decode("latin-1").strip()) != "":
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        if nth:
            self.ended.wait(self.pause_reading_s)
        method, path, version = line.decode("latin-1").split()
        if (method, path) == ("GET", "/v1/models"):
            if int(headers.get("content-length", 0)):
                self.problems.append("a GET with a body")
            return Request(path, headers, b"", {}, number, nth)
        body = stream.read(int(headers["content-length"]))
        if len(body) < int(headers["content-length"]):
            return None  # one side gave up
        try:
            data = json.loads(body.decode("utf-8", "strict"))
        except ValueError as exc:
            data = {}
            self.problems.append(f"body: {exc}")
        request = Request(path, headers, body, data, number, nth)
        if (method, version) != ("POST", "HTTP/1.1"):
            self.problems.append(f"request line {line!r}")
        if headers.get("content-type") != "application/json" or "transfer-encoding" in headers or "cookie" in headers:
            self.problems.append(f"headers {headers}")
        self._check(request)
        return request

    def _check(self, request: Request) -> None:
        """The exact keys and types of vLLM 0.32; it ignores unknown keys, so only a strict reader finds a typo."""
        if request.path not in KEYS:
            self.problems.append(f"path {request.path}")
            return
        required, optional = KEYS[request.path]
        allowed = required | optional | OPTIONAL
        for key in required.keys() - request.json.keys():
            self.problems.append(f"{key} is missing in {request.json}")
        for key, value in request.json.items():
            if key not in allowed or type(value) is not allowed[key]:
                self.problems.append(f"{key}={value!r}")
        documents = request.json.get("documents", request.json.get("text_2"))
        if not documents or not all(type(doc) is str for doc in documents):
            self.problems.append(f"documents {documents!r}")
        if request.json.get("top_n") == 0:
            self.problems.append("top_n=0 asks vLLM for all")


# --- fixtures, imported by the test modules ---------------------------------------------------------------------


def open_sockets() -> set[str]:
    """This process's sockets by inode."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.fixture
def config(monkeypatch, tmp_path):
    """config(retries=0, ...) replaces the configuration; the machine's environment and .env are ignored."""
    for key in settings.FIELDS:
        monkeypatch.delenv(key, raising=False)

    def use(**values):
        cfg = settings.get_config(tmp_path / "no.env", **values)
        monkeypatch.setitem(settings._cache, "CFG", cfg)
        monkeypatch.setitem(settings._cache, "CLIENT", cfg)
        return cfg

    use()
    return use


@pytest.fixture
def serve():
    """serve(*script, **options) starts a FaultServer; at the end none may have seen a bad request."""
    servers = []

    def start(*script, **options) -> FaultServer:
        servers.append(FaultServer(*script, **options))
        return servers[-1]

    start.servers = servers
    yield start
    for server in servers:
        server.stop()
    assert [problem for server in servers for problem in server.problems] == []


class Caller:
    """The four client functions behind one sync interface; async ones share one event loop per test."""

    def __init__(self, mode: str):
        self.mode = mode
        self.runner = asyncio.Runner() if mode == "async" else None

    def __getattr__(self, name: str):
        if self.mode == "sync":
            return getattr(model_utils, name)
        function = getattr(model_utils, f"a{name}")

        def call(*args, **kwargs):
            async def run():
                try:
                    return await function(*args, **kwargs)
                finally:
                    await asyncio.sleep(0)  # aiohttp's own writer task ends one turn after its cancellation
                    left = asyncio.all_tasks() - {asyncio.current_task()}
                    assert not left, f"tasks left behind: {left}"

            return self.runner.run(run())

        return call


@pytest.fixture(params=["sync", "async"])
def client(request, config, serve, monkeypatch):
    """A Caller. Short back-offs; at the end no socket and no thread of the client may be left."""
    monkeypatch.setattr("rerank_kit.client.sending.BACKOFF_S", 0.02)
    SharedResources._endpoints.clear()
    sockets, threads = open_sockets(), set(threading.enumerate())
    caller = Caller(request.param)
    yield caller
    if caller.runner:
        caller.runner.close()
        assert all(not endpoint.loops for endpoint in SharedResources._endpoints.values())
    SharedResources.close_local_rerank_client()
    SharedResources._endpoints.clear()
    left = {t for t in set(threading.enumerate()) - threads if t.name != "fault-server"}
    assert not left, f"threads left behind: {left}"
    for server in serve.servers:
        server.stop()
    assert open_sockets() - sockets == set(), "sockets left behind"


def self_signed(folder) -> tuple[ssl.SSLContext, str]:
    """(server side context, file to trust) of a certificate for 127.0.0.1; None where openssl is missing."""
    import shutil
    import subprocess

    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command to make a certificate")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run(command.split() + more, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    return context, str(cert)
