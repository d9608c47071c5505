"""Bodies that are read at the same time: bounds of their memory and their time."""

import asyncio
import sys

import pytest
from conftest import KIT
from guard_app import RERANK, Guard, Inner, ask, documents, metric, one, run_admission

from rerank_kit.guard.answers import Refusal
from rerank_kit.guard.body import Limits
from rerank_kit.guard.reading import BUDGET, FREE_SHARE, Reading

MAX = 512 * 100


def receives(*pieces, then=None):
    """An ASGI receive(): pieces of a body, then what `then` is: an event to wait for, or the end."""
    left = list(pieces)

    async def receive():
        if not left:
            await then.wait()
        piece = left.pop(0) if left else b""
        return {
            "type": "http.request",
            "body": piece,
            "more_body": bool(left) or (then is not None and not then.is_set()),
        }

    return receive


async def hold(reading, n_bytes, gate):
    """A body of which n_bytes have come."""
    before = reading.held
    task = asyncio.create_task(reading.read(receives(b"x" * n_bytes, then=gate)))
    for _ in range(20):
        await asyncio.sleep(0)
    return task, reading.held - before


def test_bodies_together_have_a_bound_and_give_it_back():
    async def main():
        gate, reading = asyncio.Event(), Reading(Limits(MAX, 0, 0), 0, 1)
        held = [await hold(reading, MAX, gate) for _ in range(BUDGET)]
        assert all(n == MAX - MAX // FREE_SHARE for _, n in held)
        refused, n = await hold(reading, MAX, gate)
        with pytest.raises(Refusal, match="6 x MAX_BODY_BYTES") as exc:
            await refused
        assert n == 0 and exc.value.status == 429 and exc.value.retry_s
        small = receives(b"x" * 50, b"x" * 50)
        assert await reading.read(small) == b"x" * 100, "a small body is read whatever the others do"
        whole = receives(b"x" * MAX)
        assert await reading.read(whole) == b"x" * MAX, "and one that is here already"
        gate.set()
        assert [await task for task, _ in held] == [b"x" * MAX] * BUDGET and reading.held == 0

    asyncio.run(main())


def test_the_pieces_of_a_body_count_once():
    async def main():
        gate, reading = asyncio.Event(), Reading(Limits(MAX, 0, 0), 0, 1)
        task = asyncio.create_task(reading.read(receives(*[b"x" * 1000] * 30, then=gate)))
        while reading.held < 30_000 - MAX // FREE_SHARE:
            await asyncio.sleep(0)
        for _ in range(9):
            await asyncio.sleep(0)
        assert reading.held == 30_000 - MAX // FREE_SHARE
        gate.set()
        assert len(await task) == 30_000

    asyncio.run(main())


def test_many_bodies_of_any_size_stay_below_the_bound():
    """1000 bodies hold at most 8 x MAX_BODY_BYTES, whatever their sizes and pieces."""

    async def main():
        for size in (99, 101, 1000, 10_000, MAX - 1):
            gate, reading, n_bytes = asyncio.Event(), Reading(Limits(MAX, 0, 0), 0, 1), 0
            tasks = []
            for _ in range(1000):
                pieces = (b"x" * 100, b"x" * (size - 100)) if size > 100 else (b"x" * size,)
                task = asyncio.create_task(reading.read(receives(*pieces, then=gate)))
                for _ in range(8):
                    await asyncio.sleep(0)
                n_bytes += 0 if task.done() else size
                tasks.append(task)
            assert n_bytes <= 8 * MAX, size
            gate.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert reading.held == 0

    asyncio.run(main())


def test_processes_share_the_bound():
    assert [Reading(Limits(MAX, 0, 0), 0, n).most for n in (1, 2, 6, 9)] == [6 * MAX, 3 * MAX, MAX, MAX]


def test_without_a_limit_on_bodies_there_is_no_bound():
    async def main():
        gate, reading = asyncio.Event(), Reading(Limits(0, 0, 0), 0, 1)
        tasks = [await hold(reading, 10**6, gate) for _ in range(20)]
        gate.set()
        assert [len(await task) for task, _ in tasks] == [10**6] * 20

    asyncio.run(main())


@pytest.mark.parametrize("end", ["disconnect", "too large", "cancelled"])
def test_every_end_gives_the_bytes_back(end):
    async def main():
        reading = Reading(Limits(MAX, 0, 0), 0, 1)
        first = {"type": "http.request", "body": b"x" * 1000, "more_body": True}
        last = {"disconnect": {"type": "http.disconnect"}, "too large": {**first, "body": b"x" * MAX}}
        messages = [first, last.get(end)]

        async def receive():
            message = messages.pop(0)
            return message or await asyncio.Event().wait()

        task = asyncio.create_task(reading.read(receive))
        for _ in range(5):
            await asyncio.sleep(0)
        if end == "cancelled":
            assert reading.held == 1000 - MAX // FREE_SHARE
            task.cancel()
        await asyncio.wait((task,))
        assert reading.held == 0
        if end == "disconnect":
            assert task.result() is None

    asyncio.run(main())


@pytest.mark.parametrize("sent", [[], [b"{"]])
def test_a_body_that_takes_too_long_is_refused_and_the_connection_closed(monkeypatch, sent):
    before = metric("refusals_total", reason="slow")
    monkeypatch.setenv("GUARD_BODY_TIMEOUT_S", "0.05")

    async def main():
        guard = Guard(Inner())
        scope = {"type": "http", "method": "POST", "path": RERANK, "headers": []}
        answer = []
        await guard(scope, receives(*sent, then=asyncio.Event()), lambda message: note(answer, message))
        return answer

    async def note(answer, message):
        answer.append(message)

    start, body = asyncio.run(main())
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
    assert b"not complete after 0.05 s (BODY_TIMEOUT_S)" in body["body"]
    assert metric("refusals_total", reason="slow") == before + 1


def test_the_time_of_a_body_is_not_that_of_its_scores(monkeypatch):
    monkeypatch.setenv("GUARD_BODY_TIMEOUT_S", "0.05")

    async def case(guard, gate, inner):
        call = asyncio.create_task(ask(guard, RERANK, documents()))
        await asyncio.sleep(0.15)
        assert not call.done()
        gate.set()
        assert (await call).status == 200

    run_admission(case, monkeypatch)


def test_a_refused_body_is_counted(monkeypatch):
    before = metric("refusals_total", reason="reading")
    monkeypatch.setenv("GUARD_MAX_BODY_BYTES", str(MAX))
    guard = Guard(Inner())
    guard.reading.held = BUDGET * MAX
    answer = one(guard, RERANK, chunks=[b" " * 1000, b"{}"])
    assert answer.status == 429 and answer.headers["retry-after"] == "1" and "6 x MAX_BODY_BYTES" in answer.message
    assert metric("refusals_total", reason="reading") == before + 1


def test_memory_of_connections_that_never_finish(monkeypatch):
    """measurements/unfinished.py at a small scale: 100 MiB are sent, the bound is 8 x 4 MiB."""
    pytest.importorskip("uvicorn")
    monkeypatch.syspath_prepend(str(KIT / "measurements"))
    import unfinished

    seen = unfinished.measure(100, 2**20, MAX_BODY_BYTES=4 * 2**20)
    sys.modules.pop("unfinished")
    assert seen["grown"] < 8 * 4 * 2**20 and seen["usual_call"] == 200, seen
    assert seen["answers"]["429"] > 70 and seen["answers"]["reads on"] > 20, seen


def test_unpacked_bodies_exist_two_at_a_time(monkeypatch):
    """Two hundred packed bodies of a few KB do not become two hundred of MAX_BODY_BYTES before the first is parsed."""
    most = now = 0

    async def unpack(self, body, encoding):
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return body

    monkeypatch.setattr(Limits, "unpack", unpack)

    async def main():
        reading = Reading(Limits(1000, 0, 0), 0, 1)
        await asyncio.gather(*(reading.unpack(b"x", b"gzip") for _ in range(50)))

    asyncio.run(main())
    assert most == 2
