"""Replicas share scores through a real Redis; one that is dead, stopped, full or refuses costs no call."""

import asyncio
import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from cached_replica import score
from conftest import free_port, http, kit_environment, self_signed, until
from guard_app import metric
from redis_server import PASSWORD, QUOTED, RedisServer

from rerank_kit.guard import shared_cache
from rerank_kit.guard.cache import Known
from rerank_kit.guard.metrics import _metrics
from rerank_kit.guard.middleware import Guard
from rerank_kit.guard.shared_cache import SharedCache, code_id
from rerank_kit.redis_url import redis_arguments

pytest.importorskip("redis", reason="pip install -r requirements-redis.txt")
REPLICA = Path(__file__).parents[1] / "stand_ins" / "cached_replica.py"
PAIRS = {bytes([i]) * 16: Known(i / 7, i % 2 == 1, i + 1) for i in range(9)}


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    options = ("--maxmemory", "20mb", "--maxmemory-policy", "allkeys-lru")
    server = RedisServer(tmp_path_factory.mktemp("redis"), free_port(), *options).start()
    yield server
    server.kill()


class Replica:
    """A process of its own, on a port of its own."""

    def __init__(self, folder: Path, url: str, seed: str):
        self.log = folder / f"replica-{seed}.log"
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        env = {**kit_environment(), "GUARD_RESULT_CACHE_MIB": "1", "GUARD_RESULT_CACHE_URL": url}
        command = [sys.executable, str(REPLICA), str(listener.fileno()), seed]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=env | {"GUARD_VERSION": "v1"}, stderr=log, pass_fds=[listener.fileno()]
            )
        listener.close()

    def rerank(self, query: str, documents: list[str]) -> dict:
        status, answer = http("POST", f"{self.url}/v1/rerank", {"query": query, "documents": documents})
        assert status == 200, answer
        return answer

    def scores(self, query: str, documents: list[str]) -> list[float]:
        rows = self.rerank(query, documents)["results"]
        return [row["relevance_score"] for row in sorted(rows, key=lambda row: row["index"])]

    def metric(self, name: str) -> float:
        text = http("GET", f"{self.url}/metrics")[1]
        found = re.search(rf"(?m)^rerank_guard_{re.escape(name)} (\S+)$", text)
        return float(found[1]) if found else 0.0

    def lines(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "result cache" in line]


@pytest.fixture(scope="module")
def replicas(redis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    made = [Replica(folder, redis.url, seed) for seed in "AB"]
    try:
        for one in made:
            until(lambda one=one: one.process.poll() is not None or one.metric("redis_up") == 1)
        yield made
    finally:
        for one in made:
            one.process.terminate()
            one.process.wait(20)
    for one in made:
        assert one.process.returncode in (0, -signal.SIGTERM), one.log.read_text()
        text = one.log.read_text()
        assert PASSWORD not in text and QUOTED not in text and "Traceback" not in text, text


def shared_by(redis, replica: Replica, query: str, documents: list[str]) -> list[float]:
    """The scores of a replica, once Redis has all of them; none may have been asked before."""
    before = redis.n_keys()
    scores = replica.scores(query, documents)
    until(lambda: redis.n_keys() == before + len({*documents}))
    return scores


def test_a_call_that_one_replica_saw_is_a_hit_on_the_other(redis, replicas):
    first, second = replicas
    documents = ["a", "é\0", "", "a"]
    scores = shared_by(redis, first, "q", documents)
    assert scores == [score("A", "q", text) for text in documents] and scores[1] != score("B", "q", "é\0")
    assert second.scores("q", ["a"]) == [scores[0]]
    before = [second.metric(f'cached_pairs_total{{cache="{where}"}}') for where in ("process", "redis")]
    answer = second.rerank("q", ["é\0", "a", "", "new"])
    rows = {row["index"]: row["relevance_score"] for row in answer["results"]}
    assert rows == {0: scores[1], 1: scores[0], 2: scores[2], 3: score("B", "q", "new")}, "the same bits"
    assert answer["meta"]["cached"] == 3 and answer["usage"]["prompt_tokens"] == 1
    assert answer["meta"]["cached_shared"] == 2, "one of them was asked here before"
    after = [second.metric(f'cached_pairs_total{{cache="{where}"}}') for where in ("process", "redis")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 2]
    again = second.rerank("q", ["a", "é\0", "", "new"])["meta"]
    assert (again["cached"], again["cached_shared"]) == (4, 0), "what Redis knew is kept here too"
    assert second.rerank("r", ["a"])["meta"]["cached"] == 0


@pytest.mark.timing
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_dead_redis_costs_no_call_and_is_used_again(redis, replicas, how):
    replica, lines = replicas[0], len(replicas[0].lines())
    if how == "stopped":
        redis.signal(signal.SIGSTOP)
    else:
        redis.kill()
    try:
        taken = []
        for i in range(12):
            began = time.perf_counter()
            assert replica.scores(how, [f"d{i}"]) == [score("A", how, f"d{i}")]
            taken.append(time.perf_counter() - began)
        assert max(taken) < 0.5, "50 ms, and what a busy machine takes"
        assert replica.metric("redis_up") == 0
        seen = replica.lines()[lines:]
        assert len(seen) == 1 and f"Redis at 127.0.0.1:{redis.port} fails, calls go on without it" in seen[0]
        time.sleep(1.2)  # attempts fail meanwhile
        assert len(replica.lines()) == lines + 1
    finally:
        if how == "stopped":
            redis.signal(signal.SIGCONT)
        else:
            redis.start()
    until(lambda: replica.metric("redis_up") == 1)
    assert "answers" in replica.lines()[-1] and len(replica.lines()) == lines + 2
    until(lambda: replicas[1].metric("redis_up") == 1)
    assert shared_by(redis, replica, f"after {how}", ["x", "y"]) == replicas[1].scores(f"after {how}", ["x", "y"])


# ---- one SharedCache in this process ----


def with_cache(url: str, case):
    """Run case(cache) and close the cache."""

    async def main():
        cache = SharedCache(url, _metrics())
        try:
            return await asyncio.wait_for(case(cache), 30)
        finally:
            await cache.close()

    return asyncio.run(main())


async def soon(what):
    while not (value := what()):
        await asyncio.sleep(0.01)
    return value


async def answering(cache: SharedCache) -> SharedCache:
    cache.begin()
    await soon(lambda: cache.works)
    return cache


async def written(cache: SharedCache, scores: dict) -> None:
    cache.put(scores)
    await soon(lambda: not cache._waiting)


def lines_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vllm.rerank_guard"]


def test_bits_cuts_and_windows_come_back(redis):
    scores = {
        b"k" * 16: Known(0.1 + 0.2, True, 3),
        b"l" * 16: Known(5e-324, False, 1),
        b"m" * 16: Known(-0.0, False, 1),
    }

    async def case(cache):
        assert await cache.get([*scores]) == {}, "not connected yet: no call waits for that"
        await written(await answering(cache), scores)
        return await cache.get([*scores, b"n" * 16])

    assert str(with_cache(redis.url, case)) == str(scores)


def test_what_else_lies_in_redis_is_no_score(redis):
    """A value has the key of its own pair: an answer that belongs to another call is not taken."""
    junk = [b"", b"x" * 29, b"x" * 28, shared_cache.VALUE.pack(b"z" * 16, 0.5, 1, False)]
    keys = [bytes([65 + i]) * 16 for i in range(6)]
    junk += [shared_cache.VALUE.pack(keys[4], float("nan"), 1, False), shared_cache.VALUE.pack(keys[5], 0.5, 0, False)]

    async def case(cache):
        await answering(cache)
        await cache._redis.mset({shared_cache.PREFIX + key: value for key, value in zip(keys, junk, strict=True)})
        before = metric("redis_failures_total", reason="value")
        assert await cache.get(keys) == {} and cache.works
        assert metric("redis_failures_total", reason="value") == before + 1
        await cache._redis.delete(shared_cache.PREFIX + keys[0])
        await cache._redis.lpush(shared_cache.PREFIX + keys[0], "a list")
        return await cache.get(keys[:1])

    assert with_cache(redis.url, case) == {}


def test_calls_that_leave_give_no_other_call_their_answer(redis):
    keys = [i.to_bytes(16, "big") for i in range(300)]
    rng = random.Random(3)

    async def case(cache):
        await written(await answering(cache), {key: Known(i / 3, False, 1) for i, key in enumerate(keys)})
        before = metric("redis_failures_total", reason="value")

        async def call(i):
            if i % 2:
                return await cache.get(keys[i : i + 20])
            task = asyncio.create_task(cache.get(keys[i : i + 20]))
            await asyncio.sleep(rng.random() * 0.002)
            task.cancel()
            return (await asyncio.gather(task, return_exceptions=True))[0]

        for at in range(0, 280, 28):
            answers = await asyncio.gather(*(call(i) for i in range(at, at + 28)))
            for i, found in enumerate(answers, at):
                assert isinstance(found, asyncio.CancelledError) or all(
                    known.score == int.from_bytes(key, "big") / 3 for key, known in found.items()
                )
                assert i % 2 == 0 or found.keys() <= {*keys[i : i + 20]}
        await soon(lambda: cache.works)
        assert len(await cache.get(keys)) == 300
        return metric("redis_failures_total", reason="value") - before

    assert with_cache(redis.url, case) == 0


def test_one_late_answer_is_no_outage(redis, monkeypatch):
    async def case(cache):
        await answering(cache)
        monkeypatch.setattr(shared_cache, "WAIT_S", -1.0)
        for n in range(shared_cache.LATE_IN_A_ROW):
            assert cache.works, n
            assert await cache.get([b"k" * 16]) == {}
        return cache.works

    assert with_cache(redis.url, case) is False


def test_a_wrong_password_is_one_line_without_it(redis, caplog):
    caplog.set_level(logging.INFO, "vllm.rerank_guard")
    before = metric("redis_failures_total", reason="refused")

    async def case(cache):
        cache.begin()
        await soon(lambda: metric("redis_failures_total", reason="refused") >= before + 2)
        cache.put(PAIRS)
        return await cache.get([*PAIRS]), len(cache._waiting)

    assert with_cache(redis.url.replace(QUOTED, "wr0ng%40"), case) == ({}, 0)
    (line,) = lines_of(caplog)
    assert "fails, calls go on without it: AuthenticationError" in line and "wr0ng" not in line


def test_a_server_that_repeats_the_password_is_not_quoted(caplog):
    """Redis names the arguments of a command that it does not know, and some proxies know no AUTH."""

    async def case():
        async def serve(reader, writer):
            while data := await reader.read(1000):
                arguments = b" ".join(re.findall(rb"[^\r\n*$]+", data))
                short = arguments[:-4]  # as Redis itself shortens them
                writer.write(b"-ERR no such thing as %b, with args beginning with: %b\r\n" % (arguments, short))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        cache = SharedCache(f"redis://user:{QUOTED}@127.0.0.1:{port}", _metrics())
        cache.begin()
        await soon(lambda: lines_of(caplog))
        await cache.close()
        server.close()

    asyncio.run(case())
    (line,) = lines_of(caplog)
    assert "ResponseError: no such thing as" in line and "***" in line and PASSWORD[:4] not in line


def test_a_full_redis_is_still_read(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vllm.rerank_guard")
    full = RedisServer(tmp_path, free_port()).start()

    async def case(cache):
        await written(await answering(cache), PAIRS)
        assert await cache.get([*PAIRS]) == PAIRS
        await cache._redis.config_set("maxmemory", 1)
        for _ in range(3):
            cache.put({b"x" * 16: Known(1.0, False, 1)})
            await soon(lambda: not cache._waiting)
        assert cache.works and await cache.get([b"x" * 16, *PAIRS]) == PAIRS

    try:
        with_cache(full.url, case)
    finally:
        full.kill()
    lines = lines_of(caplog)
    assert [line.partition(str(full.port))[2].split(":")[0] for line in lines] == [
        " answers",
        " has maxmemory 0 and maxmemory-policy noeviction, so scores are never removed there",
        " takes no scores",
    ], lines


def test_tls(tmp_path, caplog):
    files = self_signed(tmp_path)
    port, tls_port = free_port(), free_port()
    options = ["--tls-port", str(tls_port), "--tls-cert-file", files["SSL_CERTFILE"], "--tls-auth-clients", "no"]
    server = RedisServer(tmp_path, port, *options, "--tls-key-file", files["SSL_KEYFILE"]).start()
    url = server.url.replace("redis://", "rediss://").replace(f"127.0.0.1:{port}", f"localhost:{tls_port}")

    async def case(cache):
        await written(await answering(cache), PAIRS)
        return await cache.get([*PAIRS])

    async def fails(cache):
        cache.begin()
        await soon(lambda: any("fails" in line for line in lines_of(caplog)))
        return cache.works

    try:
        assert with_cache(f"{url}?ssl_ca_certs={files['SSL_CERTFILE']}", case) == PAIRS
        assert with_cache(url, fails) is False, "a certificate that nobody vouches for"
    finally:
        server.kill()
    assert "CERTIFICATE_VERIFY_FAILED" in lines_of(caplog)[-1]


def test_what_waits_to_be_written_is_bounded(redis):
    async def case(cache):
        await answering(cache)
        for start in range(0, 2 * shared_cache.MOST_WAITING, 1000):
            cache.put({(start + i).to_bytes(16, "big"): Known(0.5, False, 1) for i in range(1000)})
        most = len(cache._waiting)
        cache._waiting.clear()
        return most

    assert with_cache(redis.url, case) == shared_cache.MOST_WAITING


def test_what_waits_is_written_at_the_end(redis):
    scores = {b"end" + bytes(13): Known(0.5, False, 1)}

    async def put(cache):
        (await answering(cache)).put(scores)  # and the service ends

    async def get(cache):
        return await (await answering(cache)).get([*scores])

    with_cache(redis.url, put)
    assert with_cache(redis.url, get) == scores


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("redis://cache", {"host": "cache", "port": 6379, "db": 0}),
        ("redis://10.0.0.1:7000/3", {"host": "10.0.0.1", "port": 7000, "db": 3}),
        ("redis://[::1]:7000/", {"host": "::1", "port": 7000, "db": 0}),
        (f"redis://:{QUOTED}@h", {"host": "h", "port": 6379, "db": 0, "password": PASSWORD}),
        ("redis://u%3A:p@h", {"host": "h", "port": 6379, "db": 0, "username": "u:", "password": "p"}),
        (
            "rediss://h?ssl_ca_certs=/a/b.pem",
            {"host": "h", "port": 6379, "db": 0, "ssl": True, "ssl_ca_certs": "/a/b.pem"},
        ),
    ],
)
def test_the_parts_of_a_url(url, found):
    assert redis_arguments(url) == found


@pytest.mark.parametrize(
    "url",
    [
        "s3cret",
        "http://s3cret",
        "unix:///s3cret",
        "redis://",
        "redis://:s3cret/x@h",
        "redis://:123#s3cret@h",
        "redis://:s3cret?x@h",
        "redis://h?x=s3cret@h",
        "redis://:s3@cret@h",
        "redis://h:s3cret",
        "redis://h:99999",
        "redis://h:0",
        "redis://h/s3cret",
        "redis://h/999999",
        "redis://h s3cret",
        "redis://h\ns3cret",
        "redis://h?db=1",
        "rediss://h?ssl_cert_reqs=none&s3cret=1",
        "redis://h?ssl_ca_certs=/s3cret",
        "redis://[s3cret",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_it(url, monkeypatch):
    with pytest.raises(ValueError, match=r"^(is not redis://|may have ssl_ca_certs)") as caught:
        redis_arguments(url)
    monkeypatch.setenv("GUARD_RESULT_CACHE_URL", url)
    monkeypatch.setenv("GUARD_VERSION", "v1")
    with pytest.raises(ValueError, match=r"^GUARD_RESULT_CACHE_URL=\*\*\* ") as at_start:
        Guard(None)
    for error in (caught, at_start):
        assert "s3" not in "".join(traceback.format_exception(error.value))


def test_scores_are_those_of_a_version_and_a_code(monkeypatch):
    monkeypatch.setenv("GUARD_RESULT_CACHE_URL", "redis://127.0.0.1:1")
    with pytest.raises(ValueError, match="needs GUARD_VERSION"):
        Guard(None)
    monkeypatch.setenv("GUARD_VERSION", "v1")
    guard = Guard(None)
    assert guard.cache.version == b"v1" + code_id() and guard.cache.most == 0
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"another release")
    assert code_id() not in guard.cache.version


def test_redis_is_not_imported_without_the_setting():
    code = "import sys; from rerank_kit.guard.middleware import Guard; Guard(None); sys.exit('redis' in sys.modules)"
    env = kit_environment(PYTHONPATH=str(Path(__file__).parents[2]), GUARD_RESULT_CACHE_MIB="1")
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_the_answer_names_redis_only_where_it_is_used(monkeypatch):
    """RESULT_CACHE_MIB=0 with a Redis that is down: calls are scored, and say so."""
    from test_dialects import Vllm

    monkeypatch.setenv("GUARD_RESULT_CACHE_URL", f"redis://127.0.0.1:{free_port()}")
    monkeypatch.setenv("GUARD_VERSION", "v1")
    from guard_app import ask

    async def main():
        guard = Guard(Vllm())
        answers = [await ask(guard, body={"query": "q", "documents": ["a"]}) for _ in range(2)]
        await guard.shared.close()
        return [json.loads(answer.body)["meta"] for answer in answers]

    assert asyncio.run(main()) == [{"cached": 0, "cached_shared": 0}] * 2
