"""Makes the rows of a benchmark, one level after the other."""

import argparse
import asyncio
import dataclasses
import math
import os
import sys
from pathlib import Path

from rerank_kit.benchmark.load import TAKEN, Bench, Gate, Level, drive, drive_processes, say
from rerank_kit.benchmark.page import write_files
from rerank_kit.benchmark.report import doubts, error_cell, summarise, table_line
from rerank_kit.benchmark.server_view import gpus_of, is_local, observe, utilisation, without_secrets
from rerank_kit.benchmark.texts import FileTexts, Texts, one_token_words


async def check(bench: Bench, endpoints: list[str]) -> float | None:
    """Send one call per endpoint. Returns tokens per pair (None = not reported) or raises RuntimeError."""
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
    """The texts to send. Raises ValueError (no tokenizer for lengths in tokens, invalid --input) or OSError."""
    if args.input:
        return FileTexts(args.input, args.seed)
    doc, query, words = args.doc_tokens or args.doc_words, args.query_tokens or args.query_words, None
    if args.doc_tokens or args.query_tokens:
        folder = args.tokenizer or model_root
        if not folder or not Path(folder).is_dir():
            raise ValueError(
                f"lengths in tokens need --tokenizer FOLDER: the server's model ({folder}) is not a folder here"
            )
        words = one_token_words(folder)
    return Texts(args.seed, args.docs or 32, doc, query, args.repeat, words)


# --- the rows ---


class Interrupted(Exception):
    """Ctrl-C ended a level; its row is written."""


async def run_level(bench: Bench, level: Level) -> dict | None:
    """Make one row. Ctrl-C ends it early with what was measured so far. None = no window was completed."""
    gate = Gate(level.processes)
    say(f"{level}: running" + f" with {level.processes} processes" * (level.processes > 1), live=level.processes == 1)
    seeing = asyncio.create_task(observe(bench, gate))
    try:
        await (drive(bench, level, gate) if level.processes == 1 else drive_processes(bench, level, gate))
        bench.first += int(gate.n[TAKEN])
        return summarise(level, await seeing) if level.opened and level.closed else None
    finally:
        seeing.cancel()
        print("\r\033[K" * sys.stderr.isatty(), end="", file=sys.stderr, flush=True)


def level_of(args: argparse.Namespace, endpoint: str, mode: str, level: float, **more) -> Level:
    """The Level of one row, with the sizes from the command line."""
    # Warm-up: closed loop one round, open loop about a second.
    warmup = max(5, math.ceil(level)) if args.warmup is None else args.warmup
    requests = args.requests or max(100, math.ceil((10 if mode == "open" else 3) * level))
    if mode == "closed":
        # Whole rounds only: answers arrive in waves, and part of a wave would add calls but no time.
        requests = math.ceil(requests / level) * level
    return Level(endpoint, mode, level, warmup, requests, **{"seconds": args.seconds, "constant": args.constant} | more)


class Rows:
    """Makes, prints and writes rows. Adds client processes when the client is the bottleneck."""

    def __init__(self, args: argparse.Namespace, bench: Bench, about: dict):
        self.args, self.bench, self.about = args, bench, about
        self.rows: list[dict] = []
        # config.json of the model and name of the GPU; empty = not known
        self.model: dict = {}
        self.gpu = ""
        cores = len(os.sched_getaffinity(0))
        # A server on this host needs cores too.
        self.most = args.processes or (max(2, cores // 2) if is_local(args.base_url) else cores)
        self.processes = args.processes or 1

    async def make(self, level: Level, settings: str | None = None) -> dict:
        """Row of a level. While the client is the bottleneck, it is measured again with twice the processes.

        Args:
            settings: the service's settings, if they change from row to row.

        Raises:
            Interrupted: Ctrl-C.
        """
        most = min(self.most, int(level.level)) if level.mode == "closed" else self.most
        level.processes = min(self.processes, most)
        row = await run_level(self.bench, level)
        # A client that is late at low CPU use is waiting for a core, and more processes would wait too.
        while row and row["client_limited"] and row["client_cpu"] > 0.25 and level.processes < most:
            if level.interrupted:
                break
            self.processes = min(2 * level.processes, most)
            say(f"[INFO] {level}: the client was the bottleneck; measuring again with {self.processes} processes")
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
                say(f"[WARN] {level}: the file's {lines} calls were sent again and may hit the prefix cache")
        if level.interrupted or row is None:
            raise Interrupted
        return row

    def write(self) -> bool:
        """Write the result files. A failure (full disk) does not end the measurement: reported on stderr, False."""
        try:
            write_files({"json": self.args.json, "csv": self.args.csv, "html": self.args.html}, self.about, self.rows)
        except OSError as exc:
            say(f"[ERR] {exc.filename or 'a result file'}: {exc.strerror}")
            return False
        return True
