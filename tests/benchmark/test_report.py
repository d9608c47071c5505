"""Rows, verdicts, cost and comparison on inputs with known answers."""

import random
import re

import pytest

from rerank_kit.benchmark.compare import compare, difference
from rerank_kit.benchmark.load import Call, Level
from rerank_kit.benchmark.report import cost_lines, doubts, histogram, percentile, summarise, verdict
from rerank_kit.benchmark.server_view import SEEN

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
        ({"host_cpu": 1.0, "host_cores": 4, "api_cpu": 0.3, "server_cpu": 2.5, "client_cpu": 0.2}, "cpu", "add cores"),
        (
            {"host_cpu": 1.0, "host_cores": 4, "api_cpu": 0.3, "server_cpu": 0.5, "client_cpu": 0.2},
            "other",
            "0.7 of this",
        ),
        ({"gpu_util": 40.0, "api_cpu": 0.3, "queue_ms": 30.0}, "engine", "MAX_NUM_BATCHED_TOKENS"),
        ({"gpu_util": 50.0, "api_cpu": 0.5, "engine_cpu": 0.92}, "engine", "0.92 cores, the GPU was busy 50 %"),
        ({"gpu_util": 92.0, "api_cpu": 0.5, "engine_cpu": 0.92}, "gpu", "92 % of the time"),
        ({"api_cpu": 0.1, "engine_cpu": 1.9}, "idle", "API process 0.10 cores"),
        ({"gpu_util": 40.0, "api_cpu": 0.3, "queue_ms": 10.0}, "idle", "more calls in flight"),
        ({"gpu_util": 2.0, "api_cpu": 0.0}, "idle", "GPU 2 %, API process 0.00 cores"),
        ({"gpu_util": 70.0, "api_cpu": 0.3}, "mixed", "more calls in flight, then API_SERVER_COUNT"),
        ({"gpu_util": 20.0, "api_cpu": 0.7}, "mixed", "API process 0.70 cores"),
        ({"gpu_util": 20.0}, "idle", "GPU 20 %"),
        ({"api_cpu": 0.1}, "idle", "API process 0.10 cores"),
        ({}, "?", "neither GPU nor server processes are visible"),
        ({"queue_ms": 45.0}, "?", "run the benchmark on the server's host"),
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


# --- cost ---


def test_cost_of_a_million_pairs_and_gpus_for_a_target():
    rows = [a_row(rate=100.0), a_row(level=16, rate=250.0, client_limited=True)]
    lines = cost_lines({"server_flags": "m --port 1"}, rows, 3.6, [1000.0, 5001.0])
    # 3.6 an hour = 0.001 a second; 1000 pairs/s: 1000 s for a million.
    assert "1000.0 pairs/s" in lines[0] and "1.00 per million pairs" in lines[0]
    assert "1 GPUs for 1000 pairs/s" in lines[0] and "6 GPUs for 5001 pairs/s" in lines[0]
    assert "0.40 per million pairs" in lines[1] and "3 GPUs for 5001 pairs/s" in lines[1]
    assert "the client was the bottleneck" in lines[1] and "the client was the bottleneck" not in lines[0]
    assert "each as fast and as loaded as in this row" in lines[-1]
    lines = cost_lines({"server_flags": "m --tensor-parallel-size 2 --data-parallel-size=4"}, rows, None, [1001.0])
    assert "16 GPUs for 1001 pairs/s" in lines[0] and not any("million" in line for line in lines)
    unknown = cost_lines({"server_flags": None}, rows, None, [5001.0])
    assert "6 copies of this service for 5001" in unknown[0] and "GPUs are not visible" in unknown[-1]
    nothing = a_row() | {"pairs/s": 0.0}
    assert "5 pairs/s cannot be reached" in cost_lines({}, [nothing], 1.0, [5.0])[0]


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
    assert "rerank closed 8: the client was the bottleneck in some runs" in "".join(compare(base, limited)[0])
    slower = {"rows": runs([100, 101, 99], p50=60.0)}
    assert "worse (+20.0" in compare({"rows": runs([100, 101, 99], p50=50.0)}, slower, 5)[1][0]


def test_compare_tells_what_it_cannot_judge():
    one, two = {"rows": runs([100])}, {"rows": runs([50]) + runs([70, 70], level=4)}
    lines, worse, untold = compare(one, two, fail_over=5)
    assert "one run, no interval (-50.0 %)" in lines[0] and worse == []
    assert "closed 8 (one run" in untold and "closed 4 (only in one file)" in untold


def test_compare_cannot_judge_what_is_missing_in_some_runs():
    base = {"rows": runs([100, 101, 99])}
    none = {"rows": [row | {"p95_ms": None} for row in base["rows"]]}
    assert compare(base, none, 5)[2] == "rerank closed 8 p95_ms (too few calls in some runs)"
    once = {"rows": [*none["rows"][:2], base["rows"][2] | {"p95_ms": 900.0}]}
    assert compare(once, base, 5)[2] == compare(base, once, 5)[2] == compare(base, none, 5)[2]
    assert compare(none, none, 5)[2] == "", "too few calls in both: nothing was promised"
    assert (
        "nothing in the first file" in compare({"rows": [row | {"pairs/s": 0.0} for row in base["rows"]]}, base, 5)[2]
    )
    for rows in ([], runs([100, 100], interrupted=True)):
        assert "without a whole row" in compare({"rows": rows}, {"rows": rows}, 5)[2]


def test_compare_keeps_settings_of_a_search_apart():
    tuned = [runs([rate] * 3, settings=name) for rate, name in ((100, "present"), (10, "MAX_NUM_SEQS=4"))]
    lines, worse, untold = compare({"rows": tuned[0] + tuned[1]}, {"rows": tuned[0]}, 5)
    assert "rerank closed 8 [present]: pairs/s 1000.0 -> 1000.0: no measurable difference (+0.0 +- 0.0 %)" in lines
    assert worse == [] and "[MAX_NUM_SEQS=4] (only in one file)" in untold


def test_compare_gives_nothing_a_gpu_where_one_file_does_not_know_its_gpus():
    base, other = {"server_flags": None, "rows": runs([100] * 3)}, {"server_flags": "m --tensor-parallel-size 8"}
    assert not any("a GPU" in line for line in compare(base, {**other, "rows": runs([100] * 3)})[0])


def test_compare_counts_lost_calls_and_leaves_out_interrupted_rows():
    base, other = runs([100, 101, 99]), runs([100, 101, 99], refused=20)
    lines, worse, _ = compare({"rows": base}, {"rows": other}, fail_over=5)
    assert lines[-1] == worse[0] == "rerank closed 8: lost calls 0.0 % -> 33.3 %"
    assert compare({"rows": base}, {"rows": base + runs([10], interrupted=True)}, 5)[1] == []


def test_compare_tells_flags_that_differ_and_what_a_gpu_gives():
    flags = "m --port 8 --tensor-parallel-size {} --max-num-seqs 256 --dtype bfloat16"
    base, other = (
        {"server_flags": flags.format(n), "rows": runs(rates)} for n, rates in ((1, [100] * 3), (2, [150] * 3))
    )
    lines = compare(base, other)[0]
    assert "differs: server_flags: --tensor-parallel-size 1 -> --tensor-parallel-size 2" in lines
    each = "pairs/s a GPU 1000.0 -> 750.0: 1.50 times the throughput with 2 times the GPUs, 75% efficient"
    assert f"rerank closed 8: {each}" in lines
    assert not any("a GPU" in line for line in compare(base, base)[0])
    assert "differs: server_flags: None -> m" in compare({"rows": []}, {"server_flags": "m", "rows": []})[0]
