"""The guard's own calls: ready after the first scores, and a hang is seen whoever calls and whoever leaves."""

import asyncio
import json
import os
import socket
from types import SimpleNamespace

import pytest
from guard_app import RERANK, Guard, Inner, ask, documents, metric, one, started

from rerank_kit.guard import health
from rerank_kit.guard.admission import Load
from rerank_kit.guard.counts import Counts
from rerank_kit.models.known_pairs import PAIRS
from rerank_kit.serving.health import API_HANGS

EXPECTED = {"tokens": [9] * len(PAIRS), "low": 0, "high": 1, "known": [["What is ...?", 0, 1]]}


class Core:
    """vLLM's connection to its engines."""

    def __init__(self):
        self.outputs = asyncio.Queue()

    async def get_output_async(self):
        return await self.outputs.get()


SCORES = dict(zip((document for _, document in PAIRS), (0.9, 0.1, 0.8, 0.2, 0.5), strict=True))


class Scores(Inner):
    """vLLM: scores pairs by SCORES, or what `script` says: a status, an exception, a gate to wait for."""

    def __init__(self, *script, tokens=9, scores=None):
        super().__init__()
        self.script, self.tokens, self.scores, self.asked = list(script), tokens, scores or SCORES, []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return None
        if scope["path"] == "/health":
            return await Inner()(scope, receive, send)
        if scope["path"] != "/v1/score":
            return await super().__call__(scope, receive, send)
        self.asked.append((dict(scope["headers"]), json.loads((await receive())["body"])))
        step = self.script.pop(0) if self.script else 200
        if isinstance(step, asyncio.Event):
            await step.wait()
            step = 200
        if isinstance(step, Exception):
            raise step
        score = self.scores.get(self.asked[-1][1]["text_2"], 0.5)
        answer = {"data": [{"score": score}], "usage": {"prompt_tokens": self.tokens}}
        await send({"type": "http.response.start", "status": step, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def begun(guard, core=None):
    """The guard once vLLM's app has started."""
    client = SimpleNamespace(shutdown=lambda **_: None, engine_core=core or Core())
    app = SimpleNamespace(state=SimpleNamespace(engine_client=client))
    await guard({"type": "lifespan", "app": app}, None, None)
    return guard


async def probes(guard):
    answers = [await ask(guard, path, method="GET") for path in ("/ready", "/live")]
    return [answer.status for answer in answers], next((a.message for a in answers if a.status != 200), "")


async def until_ready(guard):
    for _ in range(1000):
        if (await probes(guard))[0] == [200, 200]:
            return
        await asyncio.sleep(0.005)
    raise AssertionError((await probes(guard))[1])


def run(case):
    asyncio.run(asyncio.wait_for(case(), 20))


# ---- the first scores ----


def test_ready_after_the_first_scores_that_are_nobodys_call(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sekret")
    before = metric("pairs_total"), metric("calls_total", route="/v1/score", status="2xx")

    async def case():
        gate = asyncio.Event()
        inner = Scores(gate)
        guard = await begun(Guard(inner))
        while not inner.asked:
            await asyncio.sleep(0.005)
        status, message = await probes(guard)
        assert status == [503, 200] and "no pair was scored yet" in message
        gate.set()
        await until_ready(guard)
        assert [headers[b"authorization"] for headers, _ in inner.asked] == [b"Bearer sekret"]

    run(case)
    assert before == (metric("pairs_total"), metric("calls_total", route="/v1/score", status="2xx"))


@pytest.mark.parametrize("first", [503, 500, RuntimeError("no engine")])
def test_the_first_scores_are_asked_for_again(monkeypatch, first):
    monkeypatch.setattr(health, "AGAIN_S", 0.3)

    async def case():
        guard = await begun(Guard(Scores(first)))
        while guard.health.fault == health.NOT_YET:
            await asyncio.sleep(0.005)
        status, message = await probes(guard)
        assert status == [503, 200] and str(first) in message
        await until_ready(guard)

    run(case)


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ({"tokens": 8}, "the service uses another template"),
        ({"scores": {"nothing": 0}}, "every score is 0.5"),
        ({"scores": {**SCORES, PAIRS[2][1]: 1.5}}, "not within 0 to 1"),
        ({"scores": {**SCORES, PAIRS[2][1]: float("nan")}}, "not all finite"),
        ({"scores": {**SCORES, PAIRS[0][1]: 0.05}}, "ranks first for: What is ...?"),
        ({}, ""),
    ],
)
def test_not_ready_while_the_scores_cannot_be_right(monkeypatch, inner, said):
    monkeypatch.setenv("GUARD_CHECK", json.dumps(EXPECTED))
    monkeypatch.setattr(health, "AGAIN_S", 0.01)

    async def case():
        guard = await begun(Guard(Scores(**inner)))
        if not said:
            return await until_ready(guard)
        while guard.health.fault == health.NOT_YET:
            await asyncio.sleep(0.005)
        status, message = await probes(guard)
        assert status == [503, 200] and said in message and "the scores cannot be right" in message
        assert (await ask(guard, RERANK, documents())).status == 200, "start's own check still gets its answers"

    run(case)


def test_a_bad_check_stops_the_server(monkeypatch):
    monkeypatch.setenv("GUARD_CHECK", "{")
    with pytest.raises(ValueError, match="GUARD_CHECK is not JSON"):
        Guard(Inner())


# ---- hangs ----


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


async def watched(monkeypatch, n_engines=1, core=None, inner=None):
    """(guard, clock, inner), ready; look() is called by the test alone."""
    monkeypatch.setattr(health, "LOOK_S", 1e6)
    monkeypatch.setenv("GUARD_HEALTH_TIMEOUT_S", "1e9")
    monkeypatch.setenv("GUARD_ENGINES", str(n_engines))
    clock, inner = Clock(), inner or Scores()
    guard = Guard(inner)
    counts = Counts(None, 1, clock, n_engines=n_engines)
    guard.load, guard.health.counts = Load(0, 0, clock=clock, counts=counts), counts
    await begun(guard, core)
    await until_ready(guard)
    guard.health.timeout_s = 100
    return guard, clock, inner


async def pass_s(guard, clock, seconds):
    """Time passes, and the guard looks every 5 s."""
    for _ in range(round(seconds / 5)):
        clock.now += 5
        guard.health.look()
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.mark.parametrize("statistics", [False, True])
def test_a_hang_is_seen_after_the_limit_and_ends_with_the_next_scores(monkeypatch, statistics):
    """Statistics of an engine without scores are no sign of life."""

    async def case():
        core = Core()
        guard, clock, inner = await watched(monkeypatch, core=core)
        inner.gate = asyncio.Event()
        inner.script = [inner.gate] * 9
        call = await started(guard, 3)
        await pass_s(guard, clock, 95)
        assert (await probes(guard))[0] == [200, 200]
        if statistics:
            core.outputs.put_nowait(SimpleNamespace(outputs=[], engine_index=0))
            await guard.health.core.get_output_async()
        await pass_s(guard, clock, 15)
        status, message = await probes(guard)
        assert status == [503, 503] and "the engine hangs: pairs wait, and none was scored for 10" in message
        core.outputs.put_nowait(SimpleNamespace(outputs=[1], engine_index=0))
        await guard.health.core.get_output_async()
        assert (await probes(guard))[0] == [200, 200]
        inner.gate.set()
        await call

    run(case)


def test_one_long_call_of_a_working_engine_is_no_hang(monkeypatch):
    """A call of 1000 documents can take minutes on a CPU: the engine's steps count, not the calls."""

    async def case():
        core = Core()
        guard, clock, inner = await watched(monkeypatch, core=core)
        inner.gate = asyncio.Event()
        call = await started(guard, 1000)
        for _ in range(20):
            await pass_s(guard, clock, 20)
            core.outputs.put_nowait(SimpleNamespace(outputs=[1], engine_index=0))
            await guard.health.core.get_output_async()
            assert (await probes(guard))[0] == [200, 200]
        inner.gate.set()
        await call

    run(case)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_pair_whose_client_left_is_asked_about(monkeypatch, hangs):
    """Clients that leave before the limit hide no hang, and those that leave a good service make none."""

    async def case():
        guard, clock, inner = await watched(monkeypatch)
        inner.gate = asyncio.Event()
        asked, inner.script = len(inner.asked), [inner.gate] if hangs else []
        call = await started(guard, 3)
        await pass_s(guard, clock, 10)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert not guard.load.in_flight
        await pass_s(guard, clock, 150)
        assert (await probes(guard))[0] == ([503, 503] if hangs else [200, 200])
        assert len(inner.asked) == asked + 1, "one pair is enough"
        inner.gate.set()
        await pass_s(guard, clock, 10)
        assert (await probes(guard))[0] == [200, 200]

    run(case)


def test_a_vllm_that_shows_no_engine_is_judged_by_its_calls(monkeypatch):
    async def case():
        guard, clock, inner = await watched(monkeypatch, core=SimpleNamespace())
        inner.gate = asyncio.Event()
        inner.script = [inner.gate] * 9
        stuck = await started(guard, 1)
        for _ in range(4):
            await pass_s(guard, clock, 60)
            gate, inner.gate = inner.gate, None
            assert (await ask(guard, RERANK, documents())).status == 200
            inner.gate = gate
            assert (await probes(guard))[0] == [200, 200]
        await pass_s(guard, clock, 110)
        assert (await probes(guard))[0] == [503, 503]
        inner.gate.set()
        await stuck

    run(case)


def test_an_idle_service_is_never_asked_and_never_hangs(monkeypatch):
    async def case():
        guard, clock, inner = await watched(monkeypatch)
        asked = len(inner.asked)
        await pass_s(guard, clock, 1000)
        assert (await probes(guard))[0] == [200, 200] and len(inner.asked) == asked

    run(case)


def test_one_of_several_engines_hangs(monkeypatch):
    async def case():
        core = Core()
        core.reqs_in_flight = {}
        guard, clock, _ = await watched(monkeypatch, n_engines=3, core=core)
        core.reqs_in_flight |= {"a": (1).to_bytes(2, "little"), "b": (2).to_bytes(2, "little")}
        for _ in range(22):
            await pass_s(guard, clock, 5)
            core.outputs.put_nowait(SimpleNamespace(outputs=[1], engine_index=1))
            await guard.health.core.get_output_async()
        status, message = await probes(guard)
        assert status == [503, 503] and message.startswith("engine 2 hangs")
        del core.reqs_in_flight["b"]  # the engine has dropped it
        await pass_s(guard, clock, 5)
        assert (await probes(guard))[0] == [200, 200]

    run(case)


def test_api_processes_know_each_others_engines(tmp_path):
    """Whichever process is asked: pairs of any of them wait, and scores to any of them are a sign of life."""
    clock = Clock()
    one, two = (Counts(str(tmp_path), 2, clock, pid, n_engines=2) for pid in (os.getpid(), os.getppid()))
    one.engine_waits(1, True)
    clock.now += 50
    assert one.silent_s() == two.silent_s() == {1: 50}
    two.engine_scored(1)
    clock.now += 5
    assert one.silent_s() == two.silent_s() == {1: 5}
    one.engine_waits(1, False)
    assert one.silent_s() == two.silent_s() == {}


def test_an_api_process_that_hangs_is_seen_by_the_others(monkeypatch, tmp_path):
    """It shares their port and accepts nothing: only they can say it. One that ends is no hang."""

    async def case():
        guard, clock, _ = await watched(monkeypatch)
        one, two = (Counts(str(tmp_path), 2, clock, pid) for pid in (os.getpid(), os.getppid()))
        guard.health.counts = one
        two.note_ready()
        await pass_s(guard, clock, 200)  # the other has not begun to watch
        assert (await probes(guard))[0] == [200, 200]
        for _ in range(30):  # both live
            two.note_alive()
            await pass_s(guard, clock, 5)
            assert (await probes(guard))[0] == [200, 200]
        await pass_s(guard, clock, 95)
        assert (await probes(guard))[0] == [200, 200]
        await pass_s(guard, clock, 15)
        status, message = await probes(guard)
        assert status == [503, 503]
        assert message.startswith(f"{API_HANGS}: it gave no sign of life for 110 s")
        two.note_alive()
        await pass_s(guard, clock, 5)
        assert (await probes(guard))[0] == [200, 200], "it goes on"
        clock.now += 500  # a pause of the whole machine
        guard.health.look()
        assert (await probes(guard))[0] == [200, 200]
        two.note_alive()
        two.note_alive(False)
        await pass_s(guard, clock, 500)
        assert (await probes(guard))[0] == [200, 200], "it has ended"

    run(case)


def test_a_stopping_process_is_not_missed(monkeypatch, tmp_path):
    async def case():
        guard, clock, _ = await watched(monkeypatch)
        one, two = (Counts(str(tmp_path), 2, clock, pid) for pid in (os.getpid(), os.getppid()))
        guard.health.counts = one
        guard.health.look()
        clock.now += 7
        assert two.mute_s() == 7
        guard.health.end()
        guard.health.look()
        clock.now += 500
        assert two.mute_s() == 0

    run(case)


def test_ready_when_all_api_processes_are(monkeypatch, tmp_path):
    """They share a port: a probe of one says what the next call may meet in another."""

    async def case():
        guards = []
        for pid in (os.getpid(), os.getppid()):
            guards.append(Guard(Scores()))
            guards[-1].health.counts = Counts(str(tmp_path), 2, pid=pid)
        await begun(guards[0])
        while guards[0].health.fault:
            await asyncio.sleep(0.005)
        status, message = await probes(guards[0])
        assert status == [503, 200] and "another API process has scored no pair yet" in message
        await begun(guards[1])
        for guard in guards:
            await until_ready(guard)

    run(case)


def test_an_api_process_that_never_appears_is_not_waited_for_without_end(tmp_path):
    clock = Clock()
    counts = Counts(str(tmp_path), 2, clock)
    counts.note_ready()
    clock.now += 59
    assert not counts.others_ready()
    clock.now += 2
    assert counts.others_ready()


def test_without_a_limit_nothing_hangs(monkeypatch):
    async def case():
        guard = await begun(Guard(Scores()))
        await until_ready(guard)
        guard.health.counts.engine_waits(0, True)
        guard.health.counts._own[-1] = 1e-9
        assert (await probes(guard))[0] == [200, 200] and len(guard.health.tasks) == 1

    run(case)


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_systemd_is_told_once_where_run_is_its_service(monkeypatch, tmp_path, kind):
    address = str(tmp_path / "notify") if kind == "file" else f"@kit-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address if kind == "file" else "\0" + address[1:])
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        health.tell_systemd("WATCHDOG=trigger")
        with pytest.raises(BlockingIOError):
            listener.recv(100)
        monkeypatch.setenv("GUARD_NOTIFY_SOCKET", address)
        health.tell_systemd("WATCHDOG=trigger")
        assert listener.recv(100) == b"WATCHDOG=trigger"
    health.tell_systemd("nobody listens: a line in the log")


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics", "/v1/models", "/live", "/ready"])
def test_head_is_get_without_a_body(path):
    class Methods(Inner):
        async def __call__(self, scope, receive, send):
            self.method = scope["method"]
            await super().__call__(scope, receive, send)

    inner = Methods()
    assert one(Guard(inner), path, method="HEAD").status == 200
    assert path == "/live" or inner.method == "GET"
