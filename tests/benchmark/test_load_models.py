"""The load of bench_rerank.py: load models, several client processes, searches, on servers of known behaviour."""

import asyncio
import dataclasses
import heapq
import itertools
import json
import os
import re
import time
from pathlib import Path

import known_server
import pytest
from known_server import (
    bench,
    one_level,
    serving,
    slow,
)

import bench_rerank
from rerank_kit.benchmark import arguments
from rerank_kit.benchmark import rows as benchmark_rows
from rerank_kit.benchmark.load import Call, Gate, Level, drive_open
from rerank_kit.benchmark.report import percentile, summarise
from rerank_kit.benchmark.searches import knee
from rerank_kit.benchmark.texts import Texts

KIT = Path(bench_rerank.__file__).parent
own_settings = known_server.own_settings  # a fixture
pytestmark = pytest.mark.timing


# --- load models ---


def test_closed_loop_on_fixed_latency(tmp_path, capsys):
    with serving(slow(0.1)) as service:
        code, out = bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "8", "--requests", "80")
    row = out["rows"][0]
    assert code == 0 and row["ok"] == 80 and row["err"] == 0
    assert 100 <= row["p50_ms"] < 150
    # N in flight at latency T give N / T, whatever T came out as on a busy machine.
    assert row["req/s"] == pytest.approx(8 / (row["p50_ms"] / 1000), rel=0.15)
    assert row["pairs/s"] == pytest.approx(4 * row["req/s"], rel=1e-3)
    assert service.most_in_flight == 8
    assert len(service.bodies) == 1 + 8 + 80  # the check, the warm-up, the calls; no retries
    assert row["tokens_per_pair"] == 7


def test_closed_loop_has_a_connection_for_each_caller(tmp_path, capsys):
    with serving(slow(0.5)) as service:
        bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "130", "--requests", "130")
    assert service.most_in_flight == 130  # aiohttp's own limit is 100


def test_of_several_addresses_a_call_takes_the_least_busy_one(tmp_path, capsys):
    """The slow service gets as many calls in flight as the fast one, so a quarter of its calls."""
    with serving(slow(0.2)) as slow_one, serving(slow(0.05)) as fast_one:
        argv = ("--endpoint", "rerank", "--concurrency", "8", "--requests", "160", "--target-pairs-s", "1000000")
        slow_one.url = f"{slow_one.url}, {fast_one.url}"
        code, out = bench(slow_one, tmp_path, *argv)
    row = out["rows"][0]
    assert (code, row["ok"], row["err"], out["services"]) == (0, 160, 0, 2)
    assert (slow_one.most_in_flight, fast_one.most_in_flight) == (4, 4)
    assert len(fast_one.bodies) / len(slow_one.bodies) == pytest.approx(4, rel=0.3)
    copies = int(re.search(r"(\d+) copies of these services for 1e\+06 pairs/s", capsys.readouterr().out)[1])
    assert copies == pytest.approx(1e6 / row["pairs/s"], rel=0.01)


def test_one_bad_address_of_several_is_named(capsys):
    with pytest.raises(SystemExit):
        arguments.parse_args(["--base-url", "http://a:1/v1,b:2"])
    assert "base URL b:2 is not http://HOST:PORT/v1" in capsys.readouterr().err


def test_seconds_bound_a_level(tmp_path, capsys):
    with serving(slow(0.05)) as service:
        out = bench(service, tmp_path, "--endpoint", "score", "--concurrency", "4", "--seconds", "1")[1]
        assert 1.0 <= out["rows"][0]["window_s"] < 1.5
        # The warm-up too: 100 calls at 50 ms would be 5 s.
        begun = time.perf_counter()
        argv = ("--endpoint", "score", "--concurrency", "1", "--seconds", "0.5", "--warmup", "100")
        assert bench(service, tmp_path, *argv)[1]["rows"][0]["ok"] > 3
        assert time.perf_counter() - begun < 3
        out = bench(service, tmp_path, "--endpoint", "score", "--rate", "40", "--seconds", "1", "--constant")[1]
        assert out["rows"][0]["window_s"] == pytest.approx(1.0)
        assert 39 <= out["rows"][0]["ok"] <= 41


def test_warmup_is_excluded(tmp_path, capsys):
    async def slow_start(service, endpoint, body):
        await asyncio.sleep(0.6 if 1 < len(service.bodies) <= 5 else 0.01)

    argv = ("--endpoint", "rerank", "--concurrency", "4", "--requests", "40")
    with serving(slow_start) as service:
        row = bench(service, tmp_path, *argv)[1]["rows"][0]
    assert row["ok"] == 40 and row["max_ms"] < 500
    with serving(slow_start) as service:
        row = bench(service, tmp_path, *argv, "--warmup", "0")[1]["rows"][0]
    assert row["max_ms"] >= 600


class Stalls:
    """Answers in 2 ms; once, `at_s` after the first call, the whole server stands still for `for_s`."""

    def __init__(self, at_s, for_s):
        self.at_s, self.for_s, self.first = at_s, for_s, None

    async def __call__(self, service, endpoint, body):
        now = time.perf_counter()
        self.first = self.first or now
        until = self.first + self.at_s + self.for_s
        await asyncio.sleep(until - now if until - self.for_s <= now < until else 0.002)


def test_open_loop_shows_a_stall_that_closed_loop_hides(tmp_path, capsys):
    with serving(Stalls(1.0, 1.0)) as service:
        argv = ("--endpoint", "rerank", "--rate", "50", "--constant", "--seconds", "3", "--warmup", "5")
        row = bench(service, tmp_path, *argv)[1]["rows"][0]
    # A third of the 150 calls were due in the stalled second: they waited 0 to 1 s, so p90 is near 0.7 s.
    assert 149 <= row["ok"] <= 151
    assert 500 < row["p90_ms"] < 950 and 900 < row["max_ms"] < 1300 and row["p50_ms"] < 100
    with serving(Stalls(1.0, 1.0)) as service:
        row = bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "1", "--seconds", "3")[1]["rows"][0]
    # One caller that waits meets the stall once.
    assert row["ok"] > 100 and row["p90_ms"] < 100 and row["max_ms"] > 800


def test_open_loop_latency_runs_from_due_not_from_sending(monkeypatch):
    """A client that cannot send for a second must not lose that second (coordinated omission)."""
    real = Texts.body

    def body(self, endpoint, model, k):
        if k == 50:
            time.sleep(1)
        return real(self, endpoint, model, k)

    monkeypatch.setattr(Texts, "body", body)
    level = Level("rerank", "open", 50.0, 5, 145, None, constant=True)
    with serving() as service:
        row = one_level(service.url, lambda b: benchmark_rows.run_level(b, level))
    from_sending = sorted((c.end - c.sent) * 1000 for c in level.calls if c.measured)
    assert row["ok"] == 145
    assert 400 < row["p90_ms"] < 950 and row["max_ms"] > 900
    assert percentile(from_sending, 90) < 300
    assert row["client_limited"]  # and the client says that it was late


def test_open_loop_arrivals():
    def dues(constant, seed, run=1):
        async def drive(bench):
            async def call(endpoint, body, n_docs, due=None, measured=True):
                return Call(due, due, due, None, 0, n_docs, measured)

            bench.call = call
            level = Level("rerank", "open", 2000.0, 0, 1000, None, constant=constant, run=run)
            await drive_open(bench, level, Gate())
            return [c.due for c in sorted(level.calls, key=lambda c: c.due)]

        found = one_level("http://127.0.0.1:1/v1", drive, n_docs=1, seed=seed)
        assert len(found) == 1000
        return [b - a for a, b in itertools.pairwise(found)]

    assert dues(True, 1) == pytest.approx([1 / 2000] * 999)
    gaps = dues(False, 1)
    mean = sum(gaps) / len(gaps)
    deviation = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    # Exponential gaps: mean 1/rate, deviation equal to the mean (both within 4 standard errors here).
    assert mean == pytest.approx(1 / 2000, rel=0.13) and deviation == pytest.approx(mean, rel=0.25)
    assert gaps == pytest.approx(dues(False, 1)) and gaps != pytest.approx(dues(False, 2))
    assert gaps != pytest.approx(dues(False, 1, run=2))  # a second window is no copy of the first


def test_open_loop_does_not_wait_for_answers(tmp_path, capsys):
    with serving(slow(0.5)) as service:
        argv = ("--endpoint", "rerank", "--rate", "40", "--constant", "--requests", "60", "--warmup", "20")
        row = bench(service, tmp_path, *argv)[1]["rows"][0]
    assert service.most_in_flight > 12  # 40/s for 0.5 s: 20
    assert row["req/s"] == pytest.approx(40, rel=0.15) and row["window_s"] == pytest.approx(60 / 40)


# --- several processes ---


@pytest.mark.parametrize("seconds", [None, 1.0])
def test_closed_loop_of_several_processes_is_one_load(seconds):
    level = Level("rerank", "closed", 7, 7, None if seconds else 70, seconds, processes=3)
    with serving(slow(0.1)) as service:
        row = one_level(service.url, lambda b: benchmark_rows.run_level(b, level))
    assert service.most_in_flight == 7
    calls = 70 if seconds is None else row["ok"]
    assert row["ok"] == calls and row["err"] == 0 and row["client_processes"] == 3
    assert row["req/s"] == pytest.approx(7 / (row["p50_ms"] / 1000), rel=0.2)
    # The processes count calls together: no text is sent twice, none left out.
    assert len(set(service.documents)) == len(service.documents) == 4 * len(service.bodies)
    expected = {q for k in range(len(service.bodies)) for q in [Texts(1, 4).of_call(k)[0]]}
    assert set(service.queries) == expected
    if seconds is None:
        assert len(service.bodies) == 7 + 70


def test_several_processes_send_the_key(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("API_KEY", "verysecretkey")
    argv = ("--endpoint", "rerank", "--concurrency", "2", "--requests", "4", "--processes", "2")
    with serving() as service:
        code, out = bench(service, tmp_path, *argv)
    assert code == 0 and out["rows"][0]["ok"] == 4 and len(service.headers) == 1 + 5 + 4
    assert {headers.get("Authorization") for headers in service.headers} == {"Bearer verysecretkey"}


def test_several_processes_merge_latencies_exactly():
    """A tenth of the calls is slow: an average of the processes' own percentiles would not show it."""

    async def behave(service, endpoint, body):
        await asyncio.sleep(0.5 if len(service.bodies) % 10 == 0 else 0.05)

    level = Level("rerank", "open", 60.0, 0, 120, None, constant=True, processes=2)
    with serving(behave) as service:
        row = one_level(service.url, lambda b: benchmark_rows.run_level(b, level))
    latencies = sorted((c.end - c.due) * 1000 for c in level.calls)
    assert len(latencies) == row["ok"] == 120
    assert [row["p90_ms"], row["p95_ms"], row["max_ms"]] == pytest.approx(
        [latencies[107], latencies[113], latencies[119]], abs=0.001
    )
    assert row["p50_ms"] < 300 < row["p95_ms"]
    dues = sorted(c.due for c in level.calls)
    assert [b - a for a, b in itertools.pairwise(dues)] == pytest.approx([1 / 60] * 119, abs=1e-6)


@pytest.mark.parametrize(
    ("cpu", "given", "made"),
    [
        (0.95, [], [1, 1, 2, 4, 4]),  # one call in flight cannot be shared out; 16 begin with what 8 needed
        (0.20, [], [1, 1, 1]),  # late without work: it waits for a core, and more processes would too
        (0.95, ["--processes", "2"], [1, 2, 2]),
    ],
)
def test_the_client_gets_more_processes_where_it_is_the_limit(cpu, given, made, tmp_path, capsys, monkeypatch):
    real, processes = benchmark_rows.run_level, []

    async def run_level(bench, level):
        processes.append(level.processes)
        assert level.calls == []
        row = await real(bench, dataclasses.replace(level, processes=1, calls=[]))
        return row | {"client_limited": processes[-1] < 4, "client_cpu": cpu}

    monkeypatch.setattr(benchmark_rows, "run_level", run_level)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    with serving() as service:
        out = tmp_path / "o.json"
        argv = ["--endpoint", "rerank", "--concurrency", "1,8,16", "--requests", "4", "--docs", "4", "--json", str(out)]
        assert bench_rerank.main(["--base-url", service.url, *argv, *given]) == 0
    assert processes == made
    assert [row["level"] for row in json.loads(out.read_text())["rows"]] == [1, 8, 16]  # made again: one row
    assert capsys.readouterr().err.count("the client was the bottleneck; measuring again with") == len(made) - 3


class Dies(Texts):
    def body(self, endpoint, model, k):
        if k == 9:
            os._exit(3)
        return super().body(endpoint, model, k)


def test_a_client_process_that_dies_ends_the_level():
    level = Level("rerank", "closed", 4, 4, None, 60.0, processes=2)

    async def main(bench):
        bench.texts = Dies(1, 4)
        await benchmark_rows.run_level(bench, level)

    begun = time.perf_counter()
    with serving(slow(0.05)) as service, pytest.raises(RuntimeError, match="a client process died"):
        one_level(service.url, main)
    assert time.perf_counter() - begun < 20


# --- searches ---


def simulate(monkeypatch, workers, seconds):
    """Rows of a server with so many workers that take `seconds` a call, in simulated time."""

    async def run_level(bench, level):
        idle, callers = [0.0] * workers, [0.0] * int(level.level)
        for k in itertools.count():
            due = heapq.heappop(callers) if level.mode == "closed" else k / level.level
            if due >= level.seconds:
                break
            end = max(due, heapq.heappop(idle)) + seconds
            heapq.heappush(idle, end)
            heapq.heappush(callers, end)
            level.calls.append(Call(due, due, end, None, 28, 4, True))
        level.opened, level.closed = 0.0, level.seconds
        return summarise(level)

    monkeypatch.setattr(benchmark_rows, "run_level", run_level)


def test_saturate_finds_the_slots_of_the_server(tmp_path, capsys, monkeypatch):
    simulate(monkeypatch, 4, 0.1)
    with serving() as service:
        code, out = bench(service, tmp_path, "--endpoint", "rerank", "--saturate", "--seconds", "1")
    rows, finding = out["rows"], out["findings"][0]
    assert code == 0 and knee(rows)["level"] == 4
    said = "rerank: throughput stops growing at about 4 calls in flight: 40 req/s, 160 pairs/s, p50 100 ms"
    assert finding.startswith(said)
    assert [row["level"] for row in rows] == [1, 2, 4, 8, 16], "two doublings without growth end it"
    assert f"# {finding}" in capsys.readouterr().out.splitlines()


def test_slo_search_finds_the_capacity_of_the_server(tmp_path, capsys, monkeypatch):
    # One call at a time, 20 ms: evenly spaced calls wait for nothing up to 50 a second, and for ever beyond. In windows
    # of 1 and 3 s an overload of a few percent cannot be seen.
    simulate(monkeypatch, 1, 0.02)
    with serving() as service:
        argv = ("--endpoint", "rerank", "--slo", "p95=100ms", "--constant", "--seconds", "1", "--seed", "1")
        code, out = bench(service, tmp_path, *argv)
    rows, text = out["rows"], out["findings"][0]
    assert code == 0 and rows[0]["mode"] == "closed" and {row["mode"] for row in rows[1:]} == {"open"}
    found = float(re.search(r"p95 <= 100 ms held up to ([\d.]+) calls/s", text)[1])
    assert 46 < found < 53
    assert re.search(r"missed the SLO there in \d windows", text) and "do not show an overload" in text
    at = [row for row in rows if row["level"] == found]
    assert len(at) >= 2 and len(rows) <= 21
    assert at[1]["window_s"] == pytest.approx(3.0) and at[-1]["slo_held"]
    assert sum(row["slo_missed"] for row in at) <= 0.05 * sum(row["ok"] for row in at)


def test_slo_search_that_cannot_hold_ends_by_itself(tmp_path, capsys):
    """The one search over HTTP."""
    with serving(slow(0.1)) as service:
        argv = ("--endpoint", "rerank", "--slo", "p50=20ms", "--seconds", "0.2", "--warmup", "0", "--seed", "1")
        out = bench(service, tmp_path, *argv)[1]
    assert "p50 <= 20 ms did not hold even at" in out["findings"][0]
