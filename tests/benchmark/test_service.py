"""Which service may be restarted. The script itself is in tests/benchmark/test_tune.py."""

import asyncio
import os
import socket

import pytest

from rerank_kit.benchmark import service
from rerank_kit.benchmark.service import Trouble, look_at, pairs_served, refuse_traffic
from rerank_kit.processes import born
from rerank_kit.settings import EnvConfig


class Found:
    """A service in a given state, whose command is or is not the present one."""

    def __init__(self, state, pid=None, supervised=True, differs="", port=1):
        self.said, self.mixed, self.cfg = {"state": state, "pid": pid, "supervised": supervised}, differs, None
        self.cfg = EnvConfig(port=port)

    async def state(self):
        return self.said

    def differs(self, shown):
        return self.mixed


def look(found, mine=None):
    return asyncio.run(look_at(found, {}, mine))


def test_a_service_of_the_script_with_the_present_settings_may_be_restarted():
    assert look(Found("ready", 5)) is True
    assert look(Found("not running")) is False


@pytest.mark.parametrize("state", ["loading", "busy", "dead", "restarting", "stopping", "not answering"])
def test_a_service_that_is_not_ready_is_left_alone(state):
    with pytest.raises(Trouble, match=f"not ready \\({state}\\)"):
        look(Found(state, 5))


def test_a_service_without_supervisor_or_with_other_settings_is_left_alone():
    with pytest.raises(Trouble, match="not ready"):
        look(Found("ready", 5, supervised=False))
    with pytest.raises(Trouble, match=r"other settings .*: TP=1 -> 2.* restart"):
        look(Found("ready", 5, differs="TP=1 -> 2"))


def test_what_a_killed_search_left_is_its_own():
    me = os.getpid()
    assert look(Found("ready", me, differs="MAX_NUM_SEQS"), [me, born(me)]) is True
    assert look(Found("dead", me), [me, born(me)]) is False
    with pytest.raises(Trouble):  # a PID that came again is another process
        look(Found("ready", me, differs="MAX_NUM_SEQS"), [me, born(me) + 1])


def test_a_port_that_somebody_else_serves_is_left_alone():
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = Found("not running", port=other.getsockname()[1])
        with pytest.raises(Trouble, match="did not start"):
            look(found)


def counters(monkeypatch, looks):
    """Let /metrics say these, one after the other, the last one for ever."""
    left = list(looks)
    monkeypatch.setattr(service, "metrics", lambda cfg: left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(service, "LOOK_S", 0.01)


def test_traffic_is_seen_in_flight_and_between(monkeypatch):
    quiet = {"rerank_guard_pairs_total": 100.0, "vllm:num_requests_running": 0.0}
    counters(monkeypatch, [quiet])
    asyncio.run(refuse_traffic(EnvConfig()))
    counters(monkeypatch, [quiet, quiet | {"rerank_guard_pairs_total": 101.0}])  # the supervisor's own probe
    asyncio.run(refuse_traffic(EnvConfig()))
    counters(monkeypatch, [quiet, quiet | {"vllm:num_requests_running": 32.0}, quiet])
    with pytest.raises(Trouble, match="32 pairs in the engine"):
        asyncio.run(refuse_traffic(EnvConfig()))
    counters(monkeypatch, [quiet, quiet | {"rerank_guard_pairs_total": 164.0}])
    with pytest.raises(Trouble, match="64 answered"):
        asyncio.run(refuse_traffic(EnvConfig()))


def test_the_probes_of_several_engines_are_no_traffic(monkeypatch):
    quiet = {"rerank_guard_pairs_total": 100.0}
    counters(monkeypatch, [quiet, quiet | {"rerank_guard_pairs_total": 112.0}])
    asyncio.run(refuse_traffic(EnvConfig(), engines=3))
    counters(monkeypatch, [quiet, quiet | {"rerank_guard_pairs_total": 113.0}])
    with pytest.raises(Trouble, match="13 answered"):
        asyncio.run(refuse_traffic(EnvConfig(), engines=3))


def test_pairs_served_without_the_guard(monkeypatch):
    counters(monkeypatch, [{"vllm:request_queue_time_seconds_count": 7.0}])
    assert asyncio.run(pairs_served(EnvConfig())) == 7.0
    counters(monkeypatch, [{}])
    assert asyncio.run(pairs_served(EnvConfig())) is None
