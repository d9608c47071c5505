"""Makes the rows of a benchmark, and searches for the load that matters (bench_rerank.py)."""

import argparse
import asyncio
import dataclasses
import math
import os
import sys
from collections import Counter
from pathlib import Path

from bench_page import write_files
from bench_report import calls_of, doubts, error_cell, summarise, table_line
from bench_server import gpus_of, is_local, observe, utilisation, without_secrets
from bench_texts import FileTexts, Texts, one_token_words
from bench_workload import TAKEN, Bench, Gate, Level, drive, drive_processes, say

MOST_IN_FLIGHT = 1024  # where --saturate ends
MOST_PROBES = 20  # windows of one --slo search


async def check(bench: Bench, endpoints: list[str]) -> float | None:
    """One scored call per endpoint first: tokens per pair (None = the server does not tell), or RuntimeError."""
    for endpoint in endpoints:
        first = await bench.call(endpoint, *bench.body(endpoint, 0))
        bench.first += 1
        if first.error:
            what = "no server" if first.error == "connect" else f"{first.error} for {endpoint}"
            where, why = without_secrets([bench.addresses]), bench.error_texts[first.error]
            raise RuntimeError(f"{what} at {where}: run sh start_rerank.sh status ({why})")
    bench.checked = True
    return first.tokens / first.pairs or None


def texts_of(args: argparse.Namespace, model_root: str | None) -> Texts | FileTexts:
    """The texts to send. Raises ValueError: no tokenizer for lengths in tokens, a broken --input; OSError."""
    if args.input:
        return FileTexts(args.input, args.seed)
    doc, query, words = args.doc_tokens or args.doc_words, args.query_tokens or args.query_words, None
    if args.doc_tokens or args.query_tokens:
        folder = args.tokenizer or model_root
        if not folder or not Path(folder).is_dir():
            raise ValueError(
                f"lengths in tokens need --tokenizer FOLDER: the server's model ({folder}) is no folder here"
            )
        words = one_token_words(folder)
    return Texts(args.seed, args.docs or 32, doc, query, args.repeat, words)


# --- the rows ---


class Interrupted(Exception):
    """Ctrl-C ended a level; its row is written."""


async def run_level(bench: Bench, level: Level) -> dict | None:
    """Make one row. Ctrl-C ends it early with what was measured so far; None = nothing was."""
    gate = Gate(level.processes)
    say(f"{level}: running" + f" with {level.processes} processes" * (level.processes > 1), live=True)
    seeing = asyncio.create_task(observe(bench, gate))
    try:
        await (drive(bench, level, gate) if level.processes == 1 else drive_processes(bench, level, gate))
        bench.first += int(gate.n[TAKEN])
        return summarise(level, await seeing) if level.opened and level.closed else None
    finally:
        seeing.cancel()
        print("\r\033[K" * sys.stderr.isatty(), end="", file=sys.stderr, flush=True)


def level_of(args: argparse.Namespace, endpoint: str, mode: str, level: float, **more) -> Level:
    """One row to make, with the sizes asked for."""
    # Warm-up: closed loop one round, open loop about a second.
    warmup = max(5, math.ceil(level)) if args.warmup is None else args.warmup
    requests = args.requests or max(100, math.ceil((10 if mode == "open" else 3) * level))
    if mode == "closed":
        # Whole rounds: of answers that come in waves, a part of a wave would take no time.
        requests = math.ceil(requests / level) * level
    return Level(endpoint, mode, level, warmup, requests, **{"seconds": args.seconds, "constant": args.constant} | more)


class Rows:
    """Makes rows, prints and writes each, and adds client processes where the client is the limit."""

    def __init__(self, args: argparse.Namespace, bench: Bench, about: dict):
        self.args, self.bench, self.about, self.rows = args, bench, about, []
        self.model, self.gpu = {}, ""  # config.json and name of the GPU, where they are known
        cores = len(os.sched_getaffinity(0))
        # A server on this host needs cores too.
        self.most = args.processes or (max(2, cores // 2) if is_local(args.base_url) else cores)
        self.processes = args.processes or 1

    async def make(self, level: Level, settings: str | None = None) -> dict:
        """Row of a level, made again with twice the processes as long as the client is the limit.

        Args:
            settings: what the service runs with, where that changes from row to row.

        Raises:
            Interrupted: Ctrl-C.
        """
        most = min(self.most, int(level.level)) if level.mode == "closed" else self.most
        level.processes = min(self.processes, most)
        row = await run_level(self.bench, level)
        # A client that is late with little work waits for a core: more processes would wait too.
        while row and row["client_limited"] and row["client_cpu"] > 0.25 and level.processes < most:
            if level.interrupted:
                break
            self.processes = min(2 * level.processes, most)
            say(f"[INFO] {level}: the client was the limit, again with {self.processes} processes")
            level = dataclasses.replace(level, processes=self.processes, calls=[], lags_s=[], cpu=0.0)
            row = await run_level(self.bench, level)
        if row:
            if all(map(is_local, self.bench.base_urls)):
                gpus = (gpus_of(self.about["server_flags"]) or 0) * len(self.bench.base_urls)
                row["mfu"] = utilisation(row, self.model, self.gpu, gpus)
            row |= {} if settings is None else {"settings": settings}
            self.rows.append(row)
            print(table_line(row | {"errors": error_cell(row)}), flush=True)
            self.write()
            for text in doubts(row):
                say(f"[WARN] {level}: {text}")
            if (lines := self.bench.texts.lines) and self.bench.first > lines:
                say(f"[WARN] {level}: the file's {lines} calls came again, which the prefix cache knows")
        if level.interrupted:
            raise Interrupted
        return row

    def write(self) -> bool:
        """False, and why on stderr, where a file cannot be written: a full disk shall not end a measurement."""
        try:
            write_files({"json": self.args.json, "csv": self.args.csv, "html": self.args.html}, self.about, self.rows)
        except OSError as exc:
            say(f"[ERR] {exc.filename or 'a result file'}: {exc.strerror}")
            return False
        return True


# --- searches ---


async def saturate(rows: Rows, endpoint: str) -> str:
    """Double the calls in flight until throughput stops growing. Returns the finding in a sentence."""
    made, n = [], 1
    while n <= MOST_IN_FLIGHT and not stops_growing(made):
        made.append(await rows.make(level_of(rows.args, endpoint, "closed", n)))
        if not made[-1]["ok"]:
            return f"{endpoint}: no good answer at {n} calls in flight, no search"
        n *= 2
    at = knee(made)
    head = f"{endpoint}: throughput stops growing at about {at['level']:g} calls in flight"
    if not stops_growing(made):
        head = f"{endpoint}: throughput was still growing at {made[-1]['level']:g} calls in flight"
    tail = f"{at['req/s']:.4g} req/s, {at['pairs/s']:.4g} pairs/s, p50 {at['p50_ms'] or math.nan:.4g} ms"
    client = "; the client was the limit there, the service may go on" if at["client_limited"] else ""
    return f"{head}: {tail} (levels double; 95 % of the best counts as it){client}"


async def search_slo(rows: Rows, endpoint: str) -> str:
    """Find the highest open-loop rate that holds the SLO. Returns the finding in sentences."""
    (p, slo_ms), made = rows.args.slo, []
    first = await rows.make(level_of(rows.args, endpoint, "closed", 16))
    if not first["req/s"]:
        return f"{endpoint}: no good answer, no search"
    held = slo_probe(rows, endpoint, made)
    low, high, sure = await highest_rate(held, float(f"{0.7 * first['req/s']:.3g}"), MOST_PROBES)
    return slo_text(f"{endpoint}: p{p} <= {slo_ms:g} ms", p, slo_ms, made, low, high, sure)


def slo_probe(rows: Rows, endpoint: str, made: list[dict], settings: str | None = None):
    """Async function, rate -> did it hold the SLO, over all its windows so far; they are appended to `made`."""
    args, (p, slo_ms) = rows.args, rows.args.slo

    async def held(rate: float) -> bool:
        # 20 times the SLO: an overload of more than 1 / (20 p) lets calls wait longer than the SLO inside the window.
        # Five times the calls that the percentile needs, as far as two minutes give them.
        seconds = args.seconds or max(10.0, 0.02 * slo_ms, min(120.0, 500 / (100 - p) / rate))
        # A rate that is tried again may be the answer: rare long queues need a longer look.
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

    One window may be lucky or disturbed: the two rates of the answer are tried twice, and the search goes on where
    the second try changes the picture.

    Args:
        held: async function, rate in calls/s -> did it hold, over all its tries so far.
        guess: the first rate to try; none below a 64th of it is tried.
        most: tries; more, as long as none holds any more.

    Returns:
        (highest rate that held, 0 = none; lowest that did not, inf = none; were both tried twice). 10 % or less
        apart, unless the tries ran out.
    """
    holds: dict[float, bool] = {}
    tries, rate = Counter(), guess
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
    """The finding of an SLO search in sentences, with what limits it; rows: its windows."""
    at = [row for row in rows if row["level"] == low]
    if any(row["client_limited"] for row in rows if row["level"] == high):
        what = f"the client was the limit at {high:.3g} calls/s, the service may be faster; {what}"
    if not low:
        return f"{what} did not hold even at {high:.3g} calls/s"
    calls, missed = sum(map(calls_of, at)), sum(row["slo_missed"] for row in at)
    share, most = late_share(missed, calls)
    pairs = sum(row["pairs/s"] * row["window_s"] for row in at) / sum(row["window_s"] for row in at)
    overload = slo_ms / 1000 / max(row["window_s"] for row in at) / (p / 100)
    above = f"not at {high:.3g}" if high < math.inf else "no rate was too high"
    out = [f"{what} held up to {low:.3g} calls/s = {pairs:.4g} pairs/s, {above}"]
    out += ["NOT confirmed, the windows ran out"] * (not sure)
    windows = f"{len(at)} window" + "s" * (len(at) > 1)
    out.append(
        f"{missed} of {calls} calls missed there in {windows} ({share:.1%}, below {most:.1%} with 95 % confidence if "
        "calls were independent, which calls in one queue are not)"
    )
    return "; ".join([*out, f"an overload below {overload:.1%} would not show in windows this long"])
