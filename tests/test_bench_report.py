"""bench_report.py: rows, verdicts, searches, cost, comparison and page on inputs with known answers."""

import asyncio
import json
import math
import os
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

import bench_report
from bench_report import (
    SEEN,
    compare,
    cost_lines,
    difference,
    doubts,
    gpus_of,
    highest_rate,
    histogram,
    knee,
    late_share,
    metric_sums,
    page,
    percentile,
    slo_text,
    stops_growing,
    summarise,
    verdict,
    what_changed,
)
from bench_workload import Call, Level

# --- numbers ---


@pytest.mark.parametrize(
    ("values", "p", "expected"),
    [
        ([15, 20, 35, 40, 50], 50, 35),  # ceil(2.5) = 3rd
        ([1, 2, 3, 4], 50, 2),  # nearest-rank takes the lower of the two in the middle
        ([3, 6, 7, 8, 8, 10, 13, 15, 16, 20], 90, 16),  # 9th of 10
        (list(range(1, 12)), 90, 10),  # ceil(9.9) = 10th of 11
        (list(range(1, 21)), 95, 19),
        (list(range(1, 101)), 99, 99),
        (list(range(1, 151)), 99, 149),  # ceil(148.5)
        (list(range(1, 100)), 99, None),  # 99 samples cannot tell one in 100
        (list(range(1, 20)), 95, None),
        (list(range(1, 10)), 90, None),
        ([1], 50, None),
        ([], 50, None),
    ],
)
def test_percentile_is_nearest_rank(values, p, expected):
    assert percentile(values, p) == expected


def test_summarise_counts_by_hand():
    level = Level("rerank", "open", 2.0, 1, 4, None, opened=10.0, closed=12.0)
    level.calls = [
        Call(9.0, 9.0, 10.5, None, 40, 10, False),  # of the warm-up, answered inside the window
        Call(9.5, 9.5, 9.9, None, 40, 10, False),  # of the warm-up, answered before
        Call(10.0, 10.1, 10.4, None, 40, 10, True),  # 400 ms from due, 300 from sending
        Call(10.5, 10.5, 12.0, None, 60, 10, True),  # 1500 ms, at the very end of the window
        Call(11.0, 11.0, 13.0, None, 40, 10, True),  # 2000 ms, answered too late for throughput
        Call(11.5, 11.5, 11.6, "http_429", 0, 10, True),
    ]
    row = summarise(level)
    assert (row["ok"], row["refused"], row["err"], row["errors"]) == (3, 1, 0, {"http_429": 1})
    assert row["ok_in_window"] == 3 and row["window_s"] == 2.0
    assert (row["req/s"], row["pairs/s"]) == (1.5, 15.0)
    assert (row["p50_ms"], row["p90_ms"], row["max_ms"]) == (1500.0, None, 2000.0)
    assert row["tokens_per_pair"] == pytest.approx(140 / 30, abs=1e-3) and row["tok/s"] == 70.0
    assert not row["client_limited"]


@pytest.mark.parametrize(
    ("cpu", "lags_ms", "limited"),
    [
        (0.5, [1] * 20, False),
        (0.95, [1] * 20, True),
        (0.5, [60] * 20, True),
        (0.5, [40] * 20, False),
        (0.5, [60], True),
    ],
)
def test_summarise_says_when_the_client_was_the_limit(cpu, lags_ms, limited):
    level = Level(
        "rerank", "closed", 1, 0, 2, None, opened=0.0, closed=1.0, cpu=cpu, lags_s=[ms / 1000 for ms in lags_ms]
    )
    level.calls = [Call(t, t, t + 0.5, None, 0, 1, True) for t in (0.0, 0.5)]
    row = summarise(level)
    assert row["client_limited"] is limited  # a tenth of p50 = 50 ms
    assert bool(doubts(row)) is limited


def test_doubts_name_a_window_shorter_than_a_call():
    level = Level("rerank", "closed", 1, 0, 2, None, opened=0.0, closed=1.0)
    level.calls = [Call(0.0, 0.0, 1.1, None, 0, 1, True)] * 2
    assert "p50 is longer than the window of 1.0 s" in doubts(summarise(level))[0]


def a_row(level=8, rate=100.0, p50=50.0, run=1, **more):
    """A row as summarise() makes it: `level` calls in flight, 10 documents each."""
    made = Level("rerank", "closed", level, 0, 40, None, run=run, opened=0.0, closed=40 / rate)
    ends = [(i + 1) / rate for i in range(40)]
    made.calls = [Call(end - p50 / 1000, end - p50 / 1000, end, None, 100, 10, True) for end in ends]
    return summarise(made) | more


def test_summarise_counts_pairs_of_each_call():
    level = Level("rerank", "closed", 1, 0, 3, None, opened=0.0, closed=2.0)
    level.calls = [Call(t, t, t + 0.5, None, 7 * pairs, pairs, True) for t, pairs in ((0.0, 1), (0.5, 30), (1.0, 5))]
    row = summarise(level)
    assert (row["req/s"], row["pairs/s"], row["tok/s"], row["tokens_per_pair"]) == (1.5, 18.0, 126.0, 7.0)


def test_summarise_counts_what_missed_the_slo():
    level = Level("rerank", "open", 1, 0, 4, None, slo_ms=500.0, opened=0.0, closed=4.0)
    level.calls = [Call(t, t, t + s, e, 0, 1, True) for t, s, e in ((0.0, 0.4, None), (1.0, 0.6, None))]
    level.calls += [Call(2.0, 2.0, 2.1, "http_429", 0, 1, True), Call(3.0, 3.0, 3.1, "timeout", 0, 1, True)]
    assert summarise(level)["slo_missed"] == 3  # late, refused, failed
    level.slo_ms = None
    assert summarise(level)["slo_missed"] is None


def test_histogram_and_timeline_count_every_call():
    rng = random.Random(1)
    latencies = sorted(rng.lognormvariate(3, 1) for _ in range(500))
    bars = histogram(latencies)
    assert sum(n for *_, n in bars) == 500 and len(bars) <= 25
    assert bars[0][0] <= latencies[0] + 0.001 and latencies[-1] <= bars[-1][1] + 0.001
    for low, high, n in bars[2:6]:
        assert n == pytest.approx(sum(low <= ms < high for ms in latencies), abs=1)
    assert histogram([50.0] * 7) == [[50.0, 52.5, 7]] and histogram([]) == []
    row = a_row(rate=100.0)
    assert sum(part["pairs/s"] for part in row["series"]["timeline"]) * row["window_s"] / 40 == pytest.approx(
        400, rel=0.01
    )


# --- verdicts ---


@pytest.mark.parametrize(
    ("seen", "bound", "says"),
    [
        ({"gpu_util": 97.0, "api_cpu": 0.5}, "gpu", "97 % of the time"),
        ({"gpu_util": 85.0, "api_cpu": 1.0}, "gpu", "more GPUs"),
        ({"gpu_util": 60.0, "api_cpu": 0.98}, "cpu", "API_SERVER_COUNT"),
        ({"gpu_util": 84.9, "api_cpu": 0.85}, "cpu", "more GPUs do not help"),
        ({"host_cpu": 0.97}, "cpu", "all cores of this host were busy (97%)"),
        ({"host_cpu": 1.0, "host_cores": 4, "api_cpu": 0.3, "server_cpu": 2.5, "client_cpu": 0.2}, "cpu", "more cores"),
        (
            {"host_cpu": 1.0, "host_cores": 4, "api_cpu": 0.3, "server_cpu": 0.5, "client_cpu": 0.2},
            "other",
            "0.7 of this",
        ),
        ({"gpu_util": 40.0, "api_cpu": 0.3, "queue_ms": 30.0}, "engine", "MAX_NUM_BATCHED_TOKENS"),
        ({"gpu_util": 50.0, "api_cpu": 0.5, "engine_cpu": 0.92}, "engine", "0.92 cores, the GPU worked 50 %"),
        ({"gpu_util": 92.0, "api_cpu": 0.5, "engine_cpu": 0.92}, "gpu", "92 % of the time"),
        ({"api_cpu": 0.1, "engine_cpu": 1.9}, "idle", "API process 0.10 cores"),
        ({"gpu_util": 40.0, "api_cpu": 0.3, "queue_ms": 10.0}, "idle", "more calls in flight"),
        ({"gpu_util": 2.0, "api_cpu": 0.0}, "idle", "GPU 2 %, API process 0.00 cores"),
        ({"gpu_util": 70.0, "api_cpu": 0.3}, "mixed", "more calls in flight, then API_SERVER_COUNT"),
        ({"gpu_util": 20.0, "api_cpu": 0.7}, "mixed", "API process 0.70 cores"),
        ({"gpu_util": 20.0}, "idle", "GPU 20 %"),
        ({"api_cpu": 0.1}, "idle", "API process 0.10 cores"),
        ({}, "?", "neither GPU nor server processes were seen"),
        ({"queue_ms": 45.0}, "?", "run it on the server's host"),
        ({"client_limited": True, "client_cpu": 0.97, "gpu_util": 99.0}, "client", "--processes"),
        ({"client_limited": True, "client_cpu": 0.97, "host_cpu": 0.99}, "client", "a host of its own"),
        ({"client_limited": True, "client_cpu": 0.03}, "client", "a host of its own"),
        ({"ok": 0, "refused": 9, "gpu_util": 99.0}, "refuse", "MAX_PAIRS_IN_FLIGHT"),
        ({"ok": 0, "err": 9}, "none", "see the errors"),
        ({"refused": 10, "gpu_util": 97.0}, "gpu", "20% of the calls were refused"),
        ({"mode": "open", "gpu_util": 5.0}, "idle", "a higher rate"),
    ],
)
def test_verdict(seen, bound, says):
    row = a_row() | dict.fromkeys(SEEN) | seen
    found, text = verdict(row)
    assert found == bound and says in text


def test_metrics_of_vllm_become_what_was_seen():
    before = """# HELP vllm:request_queue_time_seconds Histogram
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="m"} 9.0
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 10.0
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 1.0
vllm:request_queue_time_seconds_count{engine="1",model_name="a}b"} 0.0
vllm:request_queue_time_seconds_sum{engine="1",model_name="a}b"} 0.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 1e+02
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 0.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 0.0
vllm:external_prefix_cache_queries_total{engine="0"} 77.0
"""
    after = before.replace('_count{engine="0",model_name="m"} 10.0', '_count{engine="0",model_name="m"} 30.0')
    after = after.replace('_count{engine="1",model_name="a}b"} 0.0', '_count{engine="1",model_name="a}b"} 20.0')
    after = after.replace('_sum{engine="0",model_name="m"} 1.0', '_sum{engine="0",model_name="m"} 2.0')
    after = after.replace('_sum{engine="1",model_name="a}b"} 0.0', '_sum{engine="1",model_name="a}b"} 1.0')
    after = after.replace(" 1000.0", " 3000.0").replace(" 1e+02", " 6e+02")
    first, last = ({"time_s": t, **metric_sums(text)} for t, text in ((5.0, before), (7.0, after)))
    seen = what_changed(first, last, {}, [])
    assert seen == {"queue_ms": pytest.approx(50.0), "cache_hits": 0.25}  # 2 s over 40 pairs; 500 of 2000 tokens
    assert what_changed(last, first, {}, []) == {}  # the counters fell: the server started anew


def test_processes_and_gpus_become_what_was_seen():
    first = {"time_s": 10.0, 7: 1.0, 8: 2.0, 9: 5.0, "host_all": 1000, "host_busy": 100}
    last = {"time_s": 12.0, 7: 2.8, 8: 2.2, 9: 8.0, "host_all": 1400, "host_busy": 400}
    lines = ["0, 10, 1024\n", "1, 90, 40960\n", "0, 20, 1024\n", "1, 100, 51200\n", "1, [N/A], 4\n", "1, 5"]
    seen = what_changed(first, last, {7: True, 8: True, 9: False, 10: True}, lines)
    assert seen == {
        "gpu_util": 95.0, "gpu_mem_gib": 50.0, "host_cpu": 0.75, "host_cores": os.cpu_count(),
        "server_cpu": pytest.approx(2.5), "api_cpu": pytest.approx(0.9), "engine_cpu": pytest.approx(1.5),
    }  # fmt: skip


# --- searches ---


@pytest.mark.parametrize(
    ("rates", "stops", "at"),
    [
        ([10, 20, 40, 41, 41.5], True, 40),
        ([10, 20, 40, 41, 45], False, 45),
        ([10, 20, 40, 30, 41], True, 40),
        ([10, 20, 40, 45, 41], False, 45),
        ([10, 10.1], False, 10),
        ([10, 10.1, 10.2], True, 10),
        ([40, 20, 39], True, 40),
        ([10, 19, 36, 70], False, 70),
    ],
)
def test_saturation_is_two_doublings_without_growth(rates, stops, at):
    rows = [{"req/s": rate} for rate in rates]
    assert stops_growing(rows) is stops
    assert knee(rows)["req/s"] == at


def search(holds, guess, most=20):
    tried = []

    async def held(rate):
        tried.append(rate)
        return holds(rate, len(tried))

    return asyncio.run(highest_rate(held, guess, most)), tried


@pytest.mark.parametrize("guess", [1.0, 9.0, 36.0, 37.5, 40.0, 200.0])
def test_highest_rate_ends_within_ten_percent(guess):
    (low, high, twice), tried = search(lambda rate, _: rate <= 37.0, guess)
    assert low <= 37.0 < high <= 1.1 * low and twice
    assert tried[-1] == high and tried.count(low) == tried.count(high) == 2 and len(tried) <= 20
    assert all(rate == float(f"{rate:.3g}") for rate in tried)


def test_highest_rate_that_never_or_always_holds():
    (low, high, twice), tried = search(lambda rate, _: False, 64.0)
    assert (low, twice) == (0.0, False) and high == 1.0 and min(tried) == 1.0
    (low, high, twice), tried = search(lambda rate, _: True, 10.0)
    assert low > 1000 and high == math.inf and not twice and len(tried) == 20


def late(rate, seconds, rng, service_s=0.04, slo_s=0.5):
    """(late calls, calls) of a server that takes 40 ms for each, one at a time; arrivals are Poisson."""
    n, missed, wait, at = 0, 0, 0.0, 0.0
    while at < seconds:
        n, missed = n + 1, missed + (wait + service_s > slo_s)
        gap = rng.expovariate(rate)
        at, wait = at + gap, max(0.0, wait + service_s - gap)
    return missed, n


def test_highest_rate_finds_what_a_queue_holds_in_the_long_run():
    """With the windows of --slo: 10 s, and 30 s for a rate that is tried again, all pooled."""
    shares = {rate: late(rate, 20_000, random.Random(0)) for rate in (21.5, 22.5)}
    assert [missed / n <= 0.05 for missed, n in shares.values()] == [True, False]
    truth = 22.0
    found = []
    for seed in range(40):
        rng, pool = random.Random(seed), {}

        def holds(rate, _, rng=rng, pool=pool):
            pool.setdefault(rate, []).append(late(rate, 30 if rate in pool else 10, rng))
            missed, calls = map(sum, zip(*pool[rate], strict=True))
            return missed <= 0.05 * calls

        (low, high, _), tried = search(holds, 17.0)
        assert low < high and len(tried) <= 20
        found.append(low)
    assert all(rate == pytest.approx(truth, rel=0.12) for rate in found)
    assert sum(rate == pytest.approx(truth, rel=0.05) for rate in found) > 25


@pytest.mark.parametrize("wrong", range(1, 8))
def test_highest_rate_recovers_from_a_disturbed_window(wrong):
    """A window that comes out wrong at the first try of a rate does not change the answer."""
    first = set()

    def holds(rate, n):
        fresh = rate not in first
        first.add(rate)
        return (rate <= 37.0) != (n == wrong and fresh)

    (low, high, sure), _ = search(holds, 40.0, most=30)
    assert low <= 37.0 < high <= 1.1 * low and sure


def test_slo_text_says_how_sure_it_is():
    def window(level, missed, window_s=10.0, **more):
        return a_row(level, slo_missed=missed, window_s=window_s, **more)

    rows = [window(21.5, 0), window(22.6, 9), window(9.0, 40), window(21.5, 4, 30.0)]
    text = slo_text("rerank: p95 <= 570 ms", 95, 570.0, rows, 21.5, 22.6, True)
    assert "held up to 21.5 calls/s = 1000 pairs/s, not at 22.6; 4 of 80 calls missed there in 2 windows" in text
    assert "(5.0%, below 10.7% with" in text and "an overload below 2.0% would not show" in text
    assert "client" not in text and "NOT" not in text
    rows[1]["client_limited"] = True
    assert slo_text("x", 95, 570.0, rows, 21.5, 22.6, True).startswith("the client was the limit at 22.6")
    text = slo_text("x", 95, 570.0, rows[:1], 21.5, math.inf, False)
    assert "in 1 window (" in text and "no rate was too high; NOT confirmed" in text
    assert slo_text("x", 95, 570.0, rows, 0.0, 9.0, False) == "x did not hold even at 9 calls/s"


def test_late_share_has_an_honest_limit():
    assert late_share(0, 100) == (0.0, pytest.approx(2.706 / 102.706, rel=1e-3))  # z^2 / (n + z^2)
    assert late_share(100, 100)[1] == 1.0
    # Coverage by trial: the true share lies below the limit in 95 % of the samples.
    rng, true = random.Random(4), 0.04
    below = sum(late_share(sum(rng.random() < true for _ in range(300)), 300)[1] > true for _ in range(800))
    assert 0.92 < below / 800 < 0.98


# --- cost ---


def test_cost_of_a_million_pairs_and_gpus_for_a_target():
    rows = [a_row(rate=100.0), a_row(level=16, rate=250.0, client_limited=True)]
    lines = cost_lines({"server_flags": None}, rows, 3.6, [1000.0, 5001.0])
    # 3.6 an hour = 0.001 a second; 1000 pairs/s: 1000 s for a million.
    assert "1000.0 pairs/s" in lines[0] and "1.00 per million pairs" in lines[0]
    assert "1 GPUs for 1000 pairs/s" in lines[0] and "6 GPUs for 5001 pairs/s" in lines[0]
    assert "0.40 per million pairs" in lines[1] and "3 GPUs for 5001 pairs/s" in lines[1]
    assert "the client was the limit" in lines[1] and "the client was the limit" not in lines[0]
    assert "every copy as fast as this one" in lines[-1]
    lines = cost_lines({"server_flags": "m --tensor-parallel-size 2 --data-parallel-size=4"}, rows, None, [1001.0])
    assert "16 GPUs for 1001 pairs/s" in lines[0] and not any("million" in line for line in lines)
    nothing = a_row() | {"pairs/s": 0.0}
    assert "never 5 pairs/s" in cost_lines({}, [nothing], 1.0, [5.0])[0]


def test_gpus_of_reads_the_servers_arguments():
    assert gpus_of(None) == gpus_of("m --port 1") == 1
    assert gpus_of("--data-parallel-size 8 --tensor-parallel-size 2") == 16


# --- comparison ---


def test_difference_is_welchs_interval():
    # By hand: variances 4 and 4/3, n = 3 and 3; se^2 = 4/3 + 4/9 = 16/9; df = (16/9)^2 / ((4/3)^2/2 + (4/9)^2/2) = 3.2.
    a, b = [8.0, 10.0, 12.0], [19.0, 19.0, 21.0]
    change, half = difference(a, b)
    assert change == pytest.approx(29 / 3) and half == pytest.approx(3.182 * 4 / 3, rel=1e-3)
    assert difference([1.0], [2.0, 3.0]) is None
    assert difference([2.0, 2.0], [3.0, 3.0]) == (1.0, 0.0)


def test_difference_of_equal_servers_is_seldom_measurable():
    rng = random.Random(2)
    samples = [[[rng.gauss(100, 5) for _ in range(5)] for _ in "ab"] for _ in range(1000)]
    wrong = sum(abs(change) > half for change, half in (difference(*s) for s in samples))
    assert 20 < wrong < 65  # 5 % of 1000, a little less as df is rounded down


def runs(rates, level=8, **more):
    return [a_row(level, rate, run=i, **more) for i, rate in enumerate(rates, 1)]


def test_compare_says_better_worse_and_no_measurable_difference():
    base = {"vllm": "1", "rows": runs([100, 101, 99]) + runs([200, 210, 190], level=16)}
    other = {"vllm": "2", "rows": runs([90, 91, 89]) + runs([205, 195, 208], level=16)}
    lines, worse, untold = compare(base, other, fail_over=5)
    by_level = {re.match(r".*? \d+: \S+", line)[0]: line for line in lines if "differs" not in line}
    assert "differs: vllm: 1 -> 2" in lines
    assert "worse (-10.0 +- 2." in by_level["rerank closed 8: pairs/s"]
    assert "no measurable difference" in by_level["rerank closed 16: pairs/s"]
    assert worse == [by_level["rerank closed 8: pairs/s"]] and untold == ""
    assert compare(base, other, fail_over=15)[1] == []
    assert compare(other, base, fail_over=0)[1] == []  # better is no regression
    assert not any("client" in line for line in lines)
    limited = {"rows": runs([100, 101, 99], client_limited=True)}
    assert "rerank closed 8: the client was the limit in some runs" in "".join(compare(base, limited)[0])
    slower = {"rows": runs([100, 101, 99], p50=60.0)}
    assert "worse (+20.0" in compare({"rows": runs([100, 101, 99], p50=50.0)}, slower, 5)[1][0]


def test_compare_tells_what_it_cannot_judge():
    one, two = {"rows": runs([100])}, {"rows": runs([50]) + runs([70, 70], level=4)}
    lines, worse, untold = compare(one, two, fail_over=5)
    assert "one run, no interval (-50.0 %)" in lines[0] and worse == []
    assert "closed 8 (one run" in untold and "closed 4 (only in one file)" in untold


def test_compare_counts_lost_calls_and_leaves_out_interrupted_rows():
    base, other = runs([100, 101, 99]), runs([100, 101, 99], refused=20)
    lines, worse, _ = compare({"rows": base}, {"rows": other}, fail_over=5)
    assert lines[-1] == worse[0] == "rerank closed 8: lost calls 0.0 % -> 33.3 %"
    assert compare({"rows": base}, {"rows": base + runs([10], interrupted=True)}, 5)[1] == []


# --- page ---


class Balance(HTMLParser):
    """Every tag that opens closes, in order; remembers tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_needs_no_other_file_and_shows_everything():
    rows = runs([100, 110]) + runs([200, 210], level=16) + [a_row(level=2, ok=0, p50_ms=None)]
    about = {"command": "python bench_rerank.py --seed 7", "server_flags": None, "error_texts": {"x": "<script>&\"'"}}
    text = page(about, rows)
    found = Balance(text)
    assert "script" not in found.tags and "link" not in found.tags and "img" not in found.tags
    assert not {"src", "href", "style"} & {name for name, _ in found.attributes} and "url(" not in text
    assert "@import" not in text and "http" not in text
    shown = "".join(found.text)
    assert "python bench_rerank.py --seed 7" in shown and "<script>" in shown and "unknown" in shown
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    assert len(drawings) == 2 + 3 * len(rows)
    # Throughput against load: a point for each row, at a height in proportion to it.
    circles = drawings[0].findall("circle")
    expected = [pairs for _, pairs in sorted((row["level"], row["pairs/s"]) for row in rows)]
    assert [float(c.find("title").text.split(": ")[1]) for c in circles] == pytest.approx(expected, rel=1e-4)
    ground = bench_report.HIGH - bench_report.BOTTOM
    heights = [(ground - float(c.get("cy"))) / float(c.find("title").text.split(": ")[1]) for c in circles]
    assert heights == pytest.approx([heights[0]] * len(rows), rel=0.02)
    # The line goes through the medians: one point a level.
    line = [float(point.split(",")[1]) for point in drawings[0].find("polyline").get("points").split()]
    ys = [float(c.get("cy")) for c in circles]  # one of level 2, two of 8, two of 16
    assert line == pytest.approx([ys[0], (ys[1] + ys[2]) / 2, (ys[3] + ys[4]) / 2], abs=0.11)
    # The histogram's bars are the calls.
    bars = drawings[2].findall("rect")
    assert sum(float(bar.find("title").text.split(": ")[1]) for bar in bars) == 40


def test_page_of_one_row_without_answers():
    level = Level("score", "open", 5, 0, 1, None, opened=0.0, closed=1.0)
    level.calls = [Call(0.0, 0.0, 0.5, "timeout", 0, 1, True)]
    assert "no good answer" in "".join(Balance(page({}, [summarise(level)])).text)
    json.dumps(summarise(level))
