"""The guard while the service stops or its engine dies: no call hangs, each gets an answer."""

import asyncio
import json
import time

import pytest
from guard_app import RERANK, SCOPE, Answer, Inner, ask, documents, metric, one, run_admission, started

from rerank_kit.guard import middleware
from rerank_kit.guard.middleware import Guard

pytestmark = pytest.mark.timing


class Engine:
    """Stands for vLLM's engine client."""

    def __init__(self, guard):
        self.guard, self.calls = guard, []  # calls: (pairs in flight, timeout)

    def shutdown(self, timeout=None):
        self.calls.append((self.guard.load.in_flight, timeout))


async def with_lifespan(guard):
    """Give the guard the app's state as vLLM does; returns the engine client."""
    engine = Engine(guard)
    state = type("State", (), {"engine_client": engine})
    scope = {"type": "lifespan", "app": type("App", (), {"state": state})}
    guard.app, inner = lifespan_app, guard.app
    await guard(scope, None, None)
    guard.app = inner
    return engine


async def lifespan_app(scope, receive, send):
    assert scope["type"] == "lifespan"


class Dying(Inner):
    """vLLM whose engine dies during the call: 500 in its own words, headers first."""

    errored = True

    async def __call__(self, scope, receive, send):
        scope["app"].state.engine_client.errored = self.errored
        await super().__call__(scope, receive, send)


@pytest.mark.parametrize("errored", [True, False])
def test_calls_that_a_dying_engine_takes_along_may_go_elsewhere(errored):
    """503 tells a balancer and the client to ask another server; an error of the call itself stays 500."""
    inner = Dying(500)
    inner.errored = errored
    guard = Guard(inner)
    app = type("App", (), {"state": type("State", (), {"engine_client": Engine(guard)})})

    async def ask_in_app(scope, receive, send):
        await guard({**scope, "app": app}, receive, send)

    before = metric("refusals_total", reason="dead")
    answer = one(ask_in_app, RERANK, documents(3))
    assert guard.load.in_flight == 0
    if errored:
        assert answer.status == 503 and "another server" in answer.message and answer.headers["retry-after"] == "5"
        assert metric("refusals_total", reason="dead") == before + 1
    else:
        assert answer.status == 500 and answer.body == b"{}"


def test_answers_name_the_version(monkeypatch):
    assert "x-rerank-version" not in one(Guard(Inner()), RERANK, documents()).headers
    monkeypatch.setenv("GUARD_VERSION", "0123456789ab")
    monkeypatch.setenv("GUARD_RESTARTS", "3")
    guard = Guard(Inner())
    for path, method in ((RERANK, "POST"), ("/live", "GET"), ("/nothing", "GET")):
        assert one(guard, path, documents(), method=method).headers["x-rerank-version"] == "0123456789ab"
    assert metric("restarts") == 3 and metric("version", version="0123456789ab") == 1
    assert abs(metric("start_time_seconds") - time.time()) < 60


def test_stop_waits_for_calls_and_refuses_new_ones(monkeypatch):
    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call = await started(guard, 5)
        stop = asyncio.create_task(asyncio.to_thread(engine.shutdown, timeout=30))
        await asyncio.sleep(0.15)
        assert not engine.calls
        refused = await ask(guard, RERANK, documents())
        assert refused.status == 503 and refused.headers["retry-after"] == str(middleware.DRAIN_RETRY_S)
        ready = await ask(guard, "/ready", method="GET")
        assert ready.status == 503 and "stopping" in ready.message
        assert (await ask(guard, "/live", method="GET")).status == 200
        gate.set()
        assert (await call).status == 200
        await stop
        [(in_flight, timeout)] = engine.calls
        assert in_flight == 0 and 25 < timeout <= 30

    run_admission(case, monkeypatch)


def test_stop_takes_calls_for_stop_delay_while_ready_says_no(monkeypatch):
    """A balancer that has just left another replica out still finds this one; the others hear it from /ready."""

    async def case(guard, gate, inner):
        engine, began = await with_lifespan(guard), time.monotonic()
        stop = asyncio.create_task(asyncio.to_thread(engine.shutdown, timeout=20))
        gate.set()
        while (await ask(guard, "/ready", method="GET")).status != 503:
            await asyncio.sleep(0.01)
        answers = []
        while not answers or answers[-1].status == 200:
            assert (await ask(guard, "/live", method="GET")).status == 200
            answers.append(await ask(guard, RERANK, documents()))
            await asyncio.sleep(0.01)
        assert 0.5 <= time.monotonic() - began < 0.8 and len(answers) > 5
        assert answers[-1].status == 503 and "stopping" in answers[-1].message
        await stop
        assert 19 < engine.calls[0][1] < 19.6, "what is left of the timeout"

    run_admission(case, monkeypatch, STOP_DELAY_S=0.5)


def test_stop_ends_what_is_left_at_the_deadline(monkeypatch):
    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call = await started(guard, 5)  # its gate never opens
        await asyncio.to_thread(engine.shutdown, timeout=0.2)
        assert engine.calls == [(5, 1.0)]
        answer = await call
        assert answer.status == 503 and "stopping" in answer.message
        assert guard.load.in_flight == 0 and not guard.tasks

    run_admission(case, monkeypatch)


@pytest.mark.timeout(20)
def test_stop_ends_calls_that_are_still_sent_or_never_read():
    """Else the HTTP server waits for them without end, and KILL ends it."""

    async def main():
        guard = Guard(Inner())
        engine = await with_lifespan(guard)
        sent, never = [], asyncio.Event()
        pieces = [{"type": "http.request", "body": b'{"query', "more_body": True}]

        async def half_a_body():
            return pieces.pop() if pieces else await never.wait()

        async def whole_body():
            return {"type": "http.request", "body": json.dumps(documents()).encode()}

        async def note(message):
            sent.append(message)

        async def nobody_reads(message):
            if message["type"] == "http.response.body":
                await never.wait()

        sends = asyncio.create_task(guard(SCOPE, half_a_body, note))
        reads = asyncio.create_task(guard(SCOPE, whole_body, nobody_reads))
        while pieces or len(guard.tasks) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert guard.load.in_flight == 0, "neither holds pairs"
        await asyncio.to_thread(engine.shutdown, timeout=0.2)
        _, waits = await asyncio.wait((sends, reads), timeout=2)
        assert not waits and not guard.tasks
        assert sent[0]["status"] == 503 and sends.exception() is None and reads.cancelled()

    asyncio.run(main())


def test_an_unexpected_error_is_answered_with_our_headers(monkeypatch):
    """vLLM's handler for it stands outside all middleware; the error itself goes on to its log."""
    monkeypatch.setenv("GUARD_VERSION", "0123456789ab")
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps(documents()).encode()}

    async def note(message):
        sent.append(message)

    with pytest.raises(RuntimeError, match="boom"):
        asyncio.run(Guard(Inner(error=RuntimeError("boom")))(SCOPE, receive, note))
    answer = Answer(sent)
    assert answer.status == 500 and answer.headers["x-rerank-version"] == "0123456789ab"
    assert answer.headers["x-request-id"] in answer.message and "boom" not in answer.message


def test_a_client_that_reads_slowly_is_no_slow_call():
    before = metric("call_seconds_sum")

    async def main():
        async def receive():
            return {"type": "http.request", "body": json.dumps(documents()).encode()}

        async def reads_slowly(message):
            await asyncio.sleep(0.5 if message["type"] == "http.response.body" else 0)

        await Guard(Inner())(SCOPE, receive, reads_slowly)

    asyncio.run(main())
    assert 0 < metric("call_seconds_sum") - before < 0.3


def test_stop_of_several_processes_ends_before_the_parent_kills_them(monkeypatch):
    monkeypatch.setenv("GUARD_API_SERVERS", "4")

    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call, began = await started(guard, 5), time.monotonic()
        await asyncio.to_thread(engine.shutdown, timeout=2.2)
        assert (await call).status == 503 and time.monotonic() - began < 1.5

    run_admission(case, monkeypatch)


@pytest.mark.parametrize(("path", "n_sent"), [("/metrics", 2), (RERANK, 2)])
def test_stop_does_not_answer_twice(path, n_sent):
    """An answer that has begun is not answered again. A scoring one is held until it is whole, so it gets its 503."""

    begun = []

    async def starts_and_hangs(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if path != RERANK:
            await send({"type": "http.response.body", "body": b"{", "more_body": True})
        begun.append(1)
        await asyncio.Event().wait()

    async def main():
        guard = Guard(starts_and_hangs)
        sent = []

        async def receive():
            return {"type": "http.request", "body": json.dumps(documents()).encode()}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        call = asyncio.create_task(guard(scope, receive, send))
        while not begun:
            await asyncio.sleep(0)
        guard.draining = True
        call.cancel()
        if path == RERANK:
            await call
            assert sent[0]["status"] == 503
        else:
            with pytest.raises(asyncio.CancelledError):
                await call
        assert len(sent) == n_sent

    asyncio.run(main())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("timeout", [0, None])
def test_stop_without_timeout_does_not_wait(monkeypatch, timeout):
    monkeypatch.setenv("GUARD_STOP_DELAY_S", "30")

    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call = await started(guard, 5)
        await asyncio.to_thread(engine.shutdown, timeout=timeout)
        assert engine.calls == [(5, timeout)]
        assert (await call).status == 503

    run_admission(case, monkeypatch)


def test_stop_from_the_loop_does_not_block_it(monkeypatch):
    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call = await started(guard, 5)
        start = time.perf_counter()
        engine.shutdown(timeout=10)
        assert time.perf_counter() - start < 5
        gate.set()
        await call

    run_admission(case, monkeypatch)


def test_stop_refuses_calls_whose_body_is_still_read():
    def last_piece():
        guard.draining = True
        return body[5:]

    body = json.dumps(documents()).encode()
    inner = Inner()
    guard = Guard(inner)
    assert one(guard, RERANK, chunks=[body[:5], last_piece]).status == 503
    assert not inner.calls and not guard.load.in_flight


def test_guard_runs_without_engine_client():
    async def main():
        guard = Guard(lifespan_app)
        await guard({"type": "lifespan"}, None, None)

    asyncio.run(main())
