"""Searches: the load where throughput stops growing (--saturate), the highest rate within an SLO (--slo)."""

import math
from collections import Counter

from rerank_kit.benchmark.load import say
from rerank_kit.benchmark.report import calls_of
from rerank_kit.benchmark.rows import Rows, level_of

MOST_IN_FLIGHT = 1024  # where --saturate ends
MOST_PROBES = 20  # windows of one --slo search


# --- searches ---


async def saturate(rows: Rows, endpoint: str) -> str:
    """Double the calls in flight until throughput stops growing. Returns the finding in a sentence."""
    made: list[dict] = []
    n = 1
    while n <= MOST_IN_FLIGHT and not stops_growing(made):
        made.append(await rows.make(level_of(rows.args, endpoint, "closed", n)))
        if not made[-1]["ok"]:
            return f"{endpoint}: search ended: no call succeeded at {n} calls in flight"
        n *= 2
    at = knee(made)
    head = f"{endpoint}: throughput stops growing at about {at['level']:g} calls in flight"
    if not stops_growing(made):
        head = f"{endpoint}: throughput was still growing at {made[-1]['level']:g} calls in flight"
    tail = f"{at['req/s']:.4g} req/s, {at['pairs/s']:.4g} pairs/s, p50 {at['p50_ms'] or math.nan:.4g} ms"
    client = "; the client was the bottleneck, so the service may be faster" if at["client_limited"] else ""
    return f"{head}: {tail} (levels double; the first level within 5 % of the best is named){client}"


async def search_slo(rows: Rows, endpoint: str) -> str:
    """Find the highest open-loop rate that holds the SLO. Returns the finding in sentences."""
    p, slo_ms = rows.args.slo
    made: list[dict] = []
    first = await rows.make(level_of(rows.args, endpoint, "closed", 16))
    if not first["req/s"]:
        return f"{endpoint}: search ended: no call succeeded"
    held = slo_probe(rows, endpoint, made)
    low, high, sure = await highest_rate(held, float(f"{0.7 * first['req/s']:.3g}"), MOST_PROBES)
    return slo_text(f"{endpoint}: p{p} <= {slo_ms:g} ms", p, slo_ms, made, low, high, sure)


def slo_probe(rows: Rows, endpoint: str, made: list[dict], settings: str | None = None):
    """Async function: rate -> whether all its windows together held the SLO. Rows are appended to `made`."""
    args, (p, slo_ms) = rows.args, rows.args.slo

    async def held(rate: float) -> bool:
        # 20 times the SLO: an overload of more than 1 / (20 p) makes calls exceed the SLO within the window.
        # Five times the calls that the percentile needs, but at most two minutes.
        seconds = args.seconds or max(10.0, 0.02 * slo_ms, min(120.0, 500 / (100 - p) / rate))
        # A rate that is tried again may be the answer. Rare long queues show only in a longer window.
        seconds *= 3 if any(row["level"] == rate for row in made) else 1
        level = level_of(args, endpoint, "open", rate, seconds=seconds, slo_ms=slo_ms, run=len(made) + 1)
        row = await rows.make(level, settings)
        made.append(row)
        same = [one for one in made if one["level"] == rate]
        calls, missed = sum(map(calls_of, same)), sum(one["slo_missed"] for one in same)
        row["slo_held"] = missed <= calls * (100 - p) / 100
        said = "held" if row["slo_held"] else "missed"
        windows = f"{len(same)} window" + "s" * (len(same) > 1)
        say(f"[INFO] {level}: {missed} of {calls} calls missed in {windows}: p{p} <= {slo_ms:g} ms {said}")
        return row["slo_held"]

    return held


# --- the rules of the searches ---


def late_share(missed: int, calls: int) -> tuple[float, float]:
    """Share of calls that missed, and its upper limit with 95 % confidence (Wilson score, one-sided)."""
    share, z = missed / calls, 1.645
    middle = share + z * z / (2 * calls)
    spread = z * math.sqrt(share * (1 - share) / calls + z * z / (4 * calls * calls))
    return share, min(1.0, (middle + spread) / (1 + z * z / calls))


def knee(rows: list[dict]) -> dict:
    """The first row, in order of load, that has 95 % of the best throughput."""
    best = max(row["req/s"] for row in rows)
    return next(row for row in rows if row["req/s"] >= 0.95 * best)


def stops_growing(rows: list[dict]) -> bool:
    """Two doublings in a row brought less than 5 % more than the best before them."""
    return len(rows) > 2 and max(r["req/s"] for r in rows[-2:]) < 1.05 * max(r["req/s"] for r in rows[:-2])


async def highest_rate(held, guess: float, most: int) -> tuple[float, float, bool]:
    """Bisect for the highest rate that holds, in at most `most` tries.

    One window may be lucky or disturbed, so both rates of the answer are tried twice. The search goes on if the
    second try changes the result.

    Args:
        held: async function: rate in calls/s -> whether it held over all its tries so far.
        guess: the first rate to try. Rates below a 64th of it are not tried.
        most: limit on tries. It is exceeded while no rate is known to hold.

    Returns:
        (highest rate that held, 0 = none; lowest that did not, inf = none; whether both were tried twice). The two
        differ by at most 10 %, unless the limit on tries was reached.
    """
    holds: dict[float, bool] = {}
    tries: Counter[float] = Counter()
    rate = guess
    while True:
        holds[rate] = await held(rate)
        tries[rate] += 1
        high = min((r for r in holds if not holds[r]), default=math.inf)
        low = max((r for r in holds if holds[r] and r < high), default=0.0)
        if tries.total() >= most and low and not (tries[low] > 1 and tries[high] > 1 and high <= 1.1 * low):
            return low, high, False
        if high == math.inf or not low or high > 1.1 * low:
            step = 1.5 * low if high == math.inf else math.sqrt(low * high) if low else high / 2
            rate = float(f"{step:.3g}")  # three digits: easy to write down
            if rate < guess / 64:
                return low, high, False
        elif tries[low] > 1 and tries[high] > 1:
            return low, high, True
        else:
            rate = low if tries[low] < 2 else high


def slo_text(what: str, p: int, slo_ms: float, rows: list[dict], low: float, high: float, sure: bool) -> str:
    """The finding of an SLO search in sentences, with its limits; rows: the windows of the search."""
    at = [row for row in rows if row["level"] == low]
    if any(row["client_limited"] for row in rows if row["level"] == high):
        what = f"the client was the bottleneck at {high:.3g} calls/s, so the service may be faster; {what}"
    if not low:
        return f"{what} did not hold even at {high:.3g} calls/s"
    calls, missed = sum(map(calls_of, at)), sum(row["slo_missed"] for row in at)
    share, most = late_share(missed, calls)
    pairs = sum(row["pairs/s"] * row["window_s"] for row in at) / sum(row["window_s"] for row in at)
    overload = slo_ms / 1000 / max(row["window_s"] for row in at) / (p / 100)
    above = f"but not at {high:.3g}" if high < math.inf else "and no higher rate failed"
    out = [f"{what} held up to {low:.3g} calls/s = {pairs:.4g} pairs/s, {above}"]
    out += ["NOT confirmed: the limit on windows was reached"] * (not sure)
    windows = f"{len(at)} window" + "s" * (len(at) > 1)
    out.append(
        f"{missed} of {calls} calls missed the SLO there in {windows} ({share:.1%}, below {most:.1%} with 95 % "
        "confidence if calls were independent; calls in one queue are not)"
    )
    return "; ".join([*out, f"windows of this length do not show an overload below {overload:.1%}"])
