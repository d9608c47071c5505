"""A call says how long its caller waits: refused if that cannot be met, cancelled when it is over."""

import asyncio
import json

import pytest
from guard_app import RERANK, Inner, ask, documents, metric, one, run_admission, started

from rerank_kit.guard.middleware import Guard


class Vllm(Inner):
    """Waits like vLLM's handler for the scores or for the client to leave; then it answers null."""

    async def __call__(self, scope, receive, send):
        await receive()
        message = await receive()
        self.calls.append(message["type"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"null"})


HEADER = {"X-Request-Timeout-Ms": "60"}


@pytest.mark.parametrize(("headers", "more"), [(HEADER, {}), ({}, {"timeout_ms": 60}), (HEADER, {"timeout_ms": 60000})])
def test_a_call_that_takes_too_long_is_cancelled(headers, more):
    inner = Vllm()
    guard = Guard(inner)
    before = metric("refusals_total", reason="deadline"), metric("calls_total", route=RERANK, status="5xx")
    answer = one(guard, RERANK, documents(3, **more), headers=headers)
    assert answer.status == 504 and "is over" in answer.message and answer.n_request_ids == 1
    assert inner.calls == ["http.disconnect"] and guard.load.in_flight == 0
    assert metric("refusals_total", reason="deadline") == before[0] + 1
    assert metric("calls_total", route=RERANK, status="5xx") == before[1] + 1


def test_the_dialect_is_kept():
    said = json.loads(one(Guard(Vllm()), "/rerank", {"query": "q", "texts": ["a"], "timeout_ms": 30}).body)
    assert "is over" in said["error"] and said["error_type"] == "backend"


def test_a_call_in_time_is_as_without():
    inner = Inner()
    assert (
        one(Guard(inner), RERANK, documents(timeout_ms=60000), headers={"X-Request-Timeout-Ms": "50000"}).status == 200
    )
    assert json.loads(inner.calls[0][2]) == documents()


def test_a_body_that_comes_too_slowly_is_given_up():
    async def slow():
        guard = Guard(Inner())
        chunks = [b'{"query": "q", ']
        sent = []

        async def receive():
            if chunks:
                return {"type": "http.request", "body": chunks.pop(), "more_body": True}
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": RERANK, "headers": [(b"x-request-timeout-ms", b"50")]}
        await asyncio.wait_for(guard(scope, receive, send), 5)
        assert sent[0]["status"] == 504 and guard.load.in_flight == 0

    asyncio.run(slow())


@pytest.mark.parametrize("sent", ["0", "-5", "soon", "nan", "1e", "\xff"])
def test_what_is_no_time_is_refused(sent):
    inner = Inner()
    answer = one(Guard(inner), RERANK, documents(), headers={"X-Request-Timeout-Ms": sent})
    assert answer.status == 422 and "X-Request-Timeout-Ms" in answer.message and not inner.calls


def test_what_cannot_be_met_is_refused_at_once(monkeypatch):
    async def case(guard, gate, inner):
        assert guard.load.pairs_per_s == 0
        hold = await started(guard, 50)
        guard.load.pairs_per_s = 100.0
        late = await ask(guard, RERANK, documents(10, timeout_ms=500))
        assert late.status == 429 and "about 0.6 s" in late.message and late.headers["retry-after"] == "1"
        assert guard.load.in_flight == 50
        enough = asyncio.create_task(ask(guard, RERANK, documents(10, timeout_ms=5000)))
        await asyncio.sleep(0.01)
        assert guard.load.in_flight == 60
        gate.set()
        assert (await enough).status == (await hold).status == 200

    run_admission(case, monkeypatch)


def test_an_idle_service_tries_any_call():
    guard = Guard(Inner())
    guard.load.pairs_per_s = 1.0
    assert one(guard, RERANK, documents(10, timeout_ms=900)).status == 200
