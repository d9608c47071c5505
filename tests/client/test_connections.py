"""resources: connections, event loops and processes, over real sockets, sync and async."""

# ruff: noqa: F401, F811 (a fixture is imported, then named as an argument)

import asyncio
import gc
import json
import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from fault_server import (
    DOCS,
    RIGHT,
    answer,
    client,
    config,
    http,
    open_sockets,
    score_of,
    send,
    serve,
    slow,
    status,
)

import resources
from rerank_kit import settings
from rerank_kit.client import exchange
from rerank_kit.client.calls import arerank, rerank
from rerank_kit.client.errors import RerankConnectionError, RerankError, RerankTimeout
from rerank_kit.client.sessions import SharedResources
from rerank_kit.settings import ConfigError

pytestmark = [pytest.mark.timing, pytest.mark.timeout(90), pytest.mark.filterwarnings("error")]

KIT = Path(resources.__file__).parent


# --- connections ----------------------------------------------------------------------------------------------


def test_connection_is_reused(client, serve):
    server = serve()
    for _ in range(20):
        client.rerank("q", DOCS, base_url=server.url)
        client.score("q", DOCS, base_url=server.url)
    assert server.accepts == 1


@pytest.mark.parametrize("end", ["close", "reset"])
def test_stale_connection_is_not_seen_by_the_caller(client, serve, config, end):
    config(retries=0)
    server = serve(answer, send(None, 0.0, end))
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    assert [(r.connection, r.nth) for r in server.requests] == [(1, 0), (1, 1), (2, 0)]


def test_stale_connection_is_not_replaced_by_another_stale_one(client, serve, config):
    """After a restart of the server all idle connections are dead: the second try must open one."""
    config(retries=0)
    server = serve(slow(0.2), slow(0.2), send(None, 0.0), answer)
    if client.mode == "sync":
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: rerank("q", DOCS, base_url=server.url), range(2)))
    else:

        async def two():
            await asyncio.gather(*(arerank("q", DOCS, base_url=server.url) for _ in range(2)))

        client.runner.run(two())
    assert server.accepts == 2
    assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT
    assert server.requests[2].nth == 1 and server.requests[3].connection == 3


def test_fresh_step_opens_a_connection_though_another_is_idle(serve, config):
    server = serve()
    rerank("q", DOCS, base_url=server.url)
    step = exchange.Step(f"{server.url}/rerank", server.url, server.requests[0].body, 5, 5, math.inf, fresh=True)
    assert exchange.exchange(SharedResources.get_local_rerank_client(server.url), step).status == 200
    assert [(r.connection, r.nth) for r in server.requests] == [(1, 0), (2, 0)]
    SharedResources.close_local_rerank_client()


def test_reused_connection_that_breaks_off_inside_the_answer_is_not_sent_again(client, serve):
    for share in (0.02, 0.2, 0.7):
        server = serve(answer, send(None, share))
        client.rerank("q", DOCS, base_url=server.url)
        with pytest.raises(RerankConnectionError):
            client.rerank("q", DOCS, base_url=server.url)
        assert len(server.requests) == 2


def test_server_that_always_hangs_up_is_an_error_not_a_loop(client, serve):
    server = serve(answer, default=send(None, 0.0))
    client.rerank("q", DOCS, base_url=server.url)
    with pytest.raises(RerankConnectionError):
        client.rerank("q", DOCS, base_url=server.url)
    assert len(server.requests) == 3


def test_race_with_the_servers_idle_timeout_is_never_an_error(client, serve, config):
    """Calls at just the moment when the server closes idle connections."""
    config(retries=0)
    server = serve(idle_s=0.02)
    rng = random.Random(3)
    for _ in range(50):
        assert client.rerank("q", DOCS, base_url=server.url)[1] == RIGHT
        time.sleep(0.02 + rng.uniform(-0.0008, 0.0008))
    assert server.accepts > 5


def test_a_call_that_was_worked_on_is_not_sent_again(client, serve, config, monkeypatch):
    """A connection that breaks later than a closed one would show it: the call may be what broke the server."""
    monkeypatch.setattr("rerank_kit.client.exchange.STALE_S", 0.1)
    config(retries=2)
    second = serve()
    first = serve(answer, send(None, 0.0), answer, default=slow(0.3, send(None, 0.0)))
    client.rerank("q", DOCS, base_url=first.url)
    client.rerank("q", DOCS, base_url=first.url)  # closed at once: sent again, and answered by nobody but the first
    with pytest.raises(RerankConnectionError, match="broke off"):
        client.rerank("q", DOCS, base_url=f"{first.url},{second.url}")
    assert (len(first.requests), len(second.requests)) == (4, 0)


@pytest.mark.parametrize("code", [102, 103])
def test_an_interim_answer_is_not_the_answer(client, serve, code):
    def hint(server, connection, request):
        connection.sendall(b"HTTP/1.1 %d Early\r\nLink: </x>\r\n\r\n" % code)
        time.sleep(0.05)
        return answer(server, connection, request)

    server = serve(default=hint)
    for doc in ("first", "second", "third"):
        assert client.score("q", [doc], base_url=server.url)[1] == [score_of("q", doc)]
    assert server.accepts == 1


def test_a_change_of_the_protocol_is_an_error(client, serve):
    server = serve(send(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", 1.0, "stay"), default=answer)
    with pytest.raises(RerankError):
        client.score("q", ["first"], base_url=server.url)
    assert client.score("q", ["second"], base_url=server.url)[1] == [score_of("q", "second")]


@pytest.fixture
def dead_addresses(monkeypatch):
    """(port, name) of a name with four addresses on which nobody ever answers a connection attempt."""
    kept, port = [], 0
    for number in range(2, 6):
        server = socket.socket()
        server.bind((f"127.0.0.{number}", port))
        port = server.getsockname()[1]
        server.listen(0)
        kept.append(server)
        for _ in range(3):  # the queue is full
            kept.append(socket.socket())
            kept[-1].setblocking(False)
            kept[-1].connect_ex((f"127.0.0.{number}", port))
    real = socket.getaddrinfo

    def look_up(host, *args, **kwargs):
        if host in ("dead.example", b"dead.example"):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", port)) for n in range(2, 6)]
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield port
    for one in kept:
        one.close()


def test_all_addresses_of_a_name_share_the_time(client, config, dead_addresses):
    config(retries=0)
    began = time.monotonic()
    with pytest.raises(RerankTimeout):
        client.rerank("q", DOCS, base_url=f"http://dead.example:{dead_addresses}", deadline_s=0.5)
    assert time.monotonic() - began < 1


def test_the_next_address_of_a_name_is_tried(client, serve, monkeypatch):
    server, real = serve(), socket.getaddrinfo
    rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", server.port)) for n in (9, 8, 1)]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: rows if "two.example" in str(host) else real(host, *a, **k)
    )
    assert client.rerank("q", DOCS, base_url=f"http://two.example:{server.port}")[1] == RIGHT
    assert server.requests[0].headers["host"] == f"two.example:{server.port}"


def test_a_proxy_that_never_answers_counts_as_no_connection(client, config, monkeypatch):
    config(retries=0, connect_timeout_s=0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(RerankTimeout, match=r"no connection .* within 0\.4 s"):
            client.rerank("q", DOCS, base_url="https://reranker.example:9", timeout_s=5)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
@pytest.mark.parametrize("name", ["all_proxy", "http_proxy"])
def test_every_form_of_a_proxy_is_used(client, serve, monkeypatch, name, form):
    for other in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(other, raising=False)
    proxy = serve()
    monkeypatch.setenv(name, form.format(proxy.port))
    client.rerank("q", DOCS, base_url="http://reranker.example:9")
    assert [request.path for request in proxy.requests] == ["http://reranker.example:9/v1/rerank"]
    proxy.problems.clear()  # the absolute path, and with it an unknown route, is meant


@pytest.mark.parametrize("proxy", ["user:hunter2@:1", "socks5://user:hunter2@127.0.0.1:1", "user:hunter2@127.0.0.1:1"])
def test_the_password_of_a_proxy_is_never_shown(client, config, monkeypatch, proxy):
    config(retries=0)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(RerankConnectionError) as caught:
        client.rerank("q", DOCS, base_url="http://reranker.example:9", deadline_s=5)
    assert "hunter2" not in str(caught.value) + repr(caught.value.__cause__)


def test_a_session_that_the_caller_closed_works_again(serve, config):
    server = serve()
    for _ in range(2):
        with SharedResources.get_local_rerank_client(server.url):
            assert rerank("q", DOCS, base_url=server.url)[1] == RIGHT

    async def closed_twice():
        for _ in range(3):
            session = await SharedResources.get_async_rerank_client(server.url)
            await session.close()
            gc.collect()
            assert (await arerank("q", DOCS, base_url=server.url))[1] == RIGHT
        assert len(SharedResources._endpoints[f"{server.url}"].loops) == 1

    asyncio.run(closed_twice())
    assert all(not endpoint.loops for endpoint in SharedResources._endpoints.values())


@pytest.mark.parametrize(("library", "old"), [("requests", "2.31.0"), ("urllib3", "1.26.20"), ("aiohttp", "3.10.11")])
def test_an_old_library_is_named(config, monkeypatch, library, old):
    monkeypatch.setattr(f"{library}.__version__", old)
    call = arerank if library == "aiohttp" else rerank
    with pytest.raises(ConfigError, match=f"{library} {old} is too old for the client: pip install"):
        done = call("q", DOCS, base_url="http://127.0.0.1:1")
        asyncio.run(done)


def test_connection_idle_for_long_is_not_used_again(client, serve, monkeypatch):
    monkeypatch.setattr("rerank_kit.client.exchange.IDLE_S", 0.1)
    server = serve()
    for _ in range(2):
        client.rerank("q", DOCS, base_url=server.url)
    assert server.accepts == 1
    time.sleep(0.2)
    client.rerank("q", DOCS, base_url=server.url)
    assert [(r.connection, r.nth) for r in server.requests] == [(1, 0), (1, 1), (2, 0)]


def test_150_threads_open_150_connections_for_all_their_calls(serve, config):
    server = serve(default=slow(0.05))  # so that all are in flight at a time
    gate = threading.Barrier(150)

    def work(i: int) -> None:
        gate.wait(20)
        for n in range(6):
            docs = [f"doc {i} {n} {k}" for k in range(4)]
            assert rerank(f"q{i}", docs, base_url=server.url)[1] == [score_of(f"q{i}", doc) for doc in docs]

    with ThreadPoolExecutor(150) as pool:
        for future in [pool.submit(work, i) for i in range(150)]:
            future.result()
    assert len(server.requests) == 900
    assert 100 < server.accepts <= 150
    SharedResources.close_local_rerank_client()


def test_async_calls_share_pool_size_connections(serve, config):
    config(pool_size=10)
    server = serve(default=slow(0.005))

    async def run():
        return await asyncio.gather(*(arerank(f"q{i}", DOCS, base_url=server.url, timeout_s=5) for i in range(300)))

    results = asyncio.run(run())
    assert [r[1] for r in results] == [[score_of(f"q{i}", doc) for doc in DOCS] for i in range(300)]
    assert server.accepts <= 10


def test_waiting_for_a_connection_is_not_waiting_for_an_answer(serve, config):
    """timeout_s counts from the send: 12 calls of 0.1 s over one connection take longer than one may."""
    config(pool_size=1)
    server = serve(default=slow(0.1))

    async def run():
        await asyncio.gather(*(arerank("q", DOCS, base_url=server.url, timeout_s=1) for _ in range(12)))

    asyncio.run(run())
    assert len(server.requests) == 12


def test_waiting_for_a_connection_ends_at_the_deadline(serve, config):
    config(pool_size=1)
    server = serve(default=slow(1.5))

    async def run():
        first = asyncio.create_task(arerank("q", DOCS, base_url=server.url))
        await asyncio.sleep(0.2)
        t0 = time.monotonic()
        with pytest.raises(RerankTimeout):
            await arerank("q", DOCS, base_url=server.url, deadline_s=0.3)
        assert time.monotonic() - t0 < 1
        assert (await first)[1] == RIGHT

    asyncio.run(run())


def test_sessions_belong_to_base_url_and_survive_close(serve, config):
    first, second = serve(), serve()
    get = SharedResources.get_local_rerank_client
    assert get(first.url) is get(f"http://127.0.0.1:{first.port}/") is not get(second.url)
    assert isinstance(get(first.url), requests.Session)
    assert rerank("q", DOCS, base_url=first.url)[1] == RIGHT
    old = get(first.url)
    SharedResources.close_local_rerank_client()
    assert get(first.url) is not old
    assert rerank("q", DOCS, base_url=first.url)[1] == RIGHT
    SharedResources.close_local_rerank_client()


def test_session_can_be_used_by_itself(serve, config, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    config(api_key="sekret-123")
    server = serve()
    payload = {"model": "m", "query": "q", "documents": DOCS}
    response = SharedResources.get_local_rerank_client(server.url).post(f"{server.url}/rerank", json=payload, timeout=5)
    assert len(response.json()["results"]) == 3

    async def run():
        session = await SharedResources.get_async_rerank_client(server.url)
        async with session.post(f"{server.url}/rerank", json=payload) as response:
            return await response.json()

    assert len(asyncio.run(run())["results"]) == 3
    assert [r.headers["authorization"] for r in server.requests] == ["Bearer sekret-123"] * 2
    SharedResources.close_local_rerank_client()


def test_close_while_calls_run_breaks_none(serve, config):
    server = serve(default=slow(0.002))
    stop = time.monotonic() + 1

    def work() -> int:
        n = 0
        while time.monotonic() < stop:
            assert rerank("q", DOCS, base_url=server.url)[1] == RIGHT
            n += 1
        return n

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work) for _ in range(8)]
        while time.monotonic() < stop:
            SharedResources.close_local_rerank_client()
            time.sleep(0.005)
        assert sum(f.result() for f in futures) > 50
    SharedResources.close_local_rerank_client()


# --- event loops and processes --------------------------------------------------------------------------------


def test_every_event_loop_has_its_own_session_and_closes_it(serve, config):
    server = serve()
    sockets = open_sockets()
    for _ in range(3):
        assert asyncio.run(arerank("q", DOCS, base_url=server.url))[1] == RIGHT
    assert server.accepts == 3

    def in_thread() -> None:
        async def many():
            for _ in range(5):
                assert (await arerank("q", DOCS, base_url=server.url))[1] == RIGHT

        asyncio.run(many())

    threads = [threading.Thread(target=in_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.accepts == 7 and len(server.requests) == 23
    assert SharedResources._endpoint(server.url).loops == {}
    server.stop()
    assert open_sockets() <= sockets


def test_loop_closed_without_farewell_is_forgotten(serve, config):
    server = serve()
    sockets = open_sockets()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Python closes such a loop's sockets, and says so
        for _ in range(4):
            loop = asyncio.new_event_loop()
            assert loop.run_until_complete(arerank("q", DOCS, base_url=server.url))[1] == RIGHT
            loop.close()
            assert len(SharedResources._endpoint(server.url).loops) == 1
        assert asyncio.run(arerank("q", DOCS, base_url=server.url))[1] == RIGHT
        del loop
        gc.collect()
    assert len(SharedResources._endpoint(server.url).loops) == 0
    server.stop()
    assert open_sockets() <= sockets


def test_async_close_and_use_again(serve, config):
    server = serve()

    async def run():
        await arerank("q", DOCS, base_url=server.url)
        await SharedResources.aclose_local_rerank_client()
        await SharedResources.aclose_local_rerank_client()
        assert (await arerank("q", DOCS, base_url=server.url))[1] == RIGHT

    asyncio.run(run())
    assert server.accepts == 2


def test_fork_opens_its_own_connections(serve, config):
    """Run in a process of its own: pytest's has other threads."""
    server = serve()
    code = f"""
import asyncio, os, sys, threading
from model_utils import rerank, arerank
from resources import SharedResources
url = {server.url!r}
def same():
    return len(rerank(str(os.getpid()), ["d"], base_url=url)[1]) == 1
assert same()
stop = threading.Event()
def hold():  # another thread holds the lock at the moment of the fork
    while not stop.is_set():
        with SharedResources._lock:
            stop.wait(0.01)
thread = threading.Thread(target=hold); thread.start()
children = []
for _ in range(5):
    pid = os.fork()
    if not pid:
        ok = all(same() for _ in range(5)) and asyncio.run(arerank(str(os.getpid()), ["d"], base_url=url))
        os._exit(0 if ok else 1)
    children.append(pid)
    assert same()
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
stop.set(); thread.join()
assert same()
print(codes)
"""
    env = {k: v for k, v in os.environ.items() if k not in settings.FIELDS} | {"KIT_ENV_FILE": "/no/such/.env"}
    done = subprocess.run([sys.executable, "-c", code], cwd=KIT, env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("[0, 0, 0, 0, 0]\n", "", 0)
    users = {}
    for request in server.requests:
        users.setdefault(request.connection, set()).add(request.json["query"])
    assert all(len(pids) == 1 for pids in users.values())
    assert len(server.requests) == 7 + 5 * 6 and len(set.union(*users.values())) == 6


def test_server_restart_under_200_concurrent_calls(client, serve, config):
    """Every call ends with the right scores or a RerankConnectionError; afterwards all is as before."""
    config(retries=2)
    first = serve(default=slow(0.02))
    url = first.url
    outcomes = []

    def restart() -> None:
        while len(first.requests) < 500:
            time.sleep(0.001)
        first.stop(reset=True)
        t0 = time.monotonic()
        while "lost" not in outcomes and time.monotonic() < t0 + 5:
            time.sleep(0.001)
        serve(port=first.port)

    def work(i: int) -> None:
        for _ in range(8):
            try:
                scores = rerank(f"q{i}", DOCS, base_url=url, timeout_s=10)[1]
            except RerankConnectionError:
                outcomes.append("lost")
            else:
                outcomes.append(scores == [score_of(f"q{i}", doc) for doc in DOCS])

    async def awork(i: int) -> None:
        for _ in range(8):
            try:
                scores = (await arerank(f"q{i}", DOCS, base_url=url, timeout_s=10))[1]
            except RerankConnectionError:
                outcomes.append("lost")
            else:
                outcomes.append(scores == [score_of(f"q{i}", doc) for doc in DOCS])

    async def all_of_them() -> None:
        await asyncio.gather(*(awork(i) for i in range(200)))

    with ThreadPoolExecutor(201) as pool:
        restarted = pool.submit(restart)
        if client.mode == "sync":
            list(pool.map(work, range(200)))
        else:
            client.runner.run(all_of_them())
        restarted.result()
    assert len(outcomes) == 1600 and False not in outcomes
    assert outcomes.count(True) > 400 and outcomes.count("lost") > 0
    assert client.rerank("q", DOCS, base_url=url)[1] == RIGHT
