"""Measures the service that runs, for --tune."""

import argparse
import json

import aiohttp

from rerank_kit.benchmark.load import Bench, answer_fault
from rerank_kit.benchmark.rows import Rows, check, level_of, texts_of
from rerank_kit.benchmark.searches import slo_probe
from rerank_kit.benchmark.server_view import server_processes
from rerank_kit.benchmark.service import pairs_served
from rerank_kit.settings import EnvConfig

WINDOW_S = 8.0  # of a throughput window, unless --seconds
PARITY_PAIRS = 64


class Meter:
    """Measures the service that runs: windows of load, rates that hold an SLO, scores, other traffic."""

    def __init__(self, args: argparse.Namespace, rows: Rows, bench: Bench, cfg: EnvConfig):
        self.args, self.rows, self.bench, self.cfg = args, rows, bench, cfg
        self.endpoint, self.windows = args.endpoint[0], 0
        # Texts that no window sends, the same for every start and for a search that is taken up again.
        self.fixed = texts_of(argparse.Namespace(**{**vars(args), "seed": 0, "repeat": None}), rows.about["model_root"])

    async def ready(self) -> None:
        """Forget what was known of the old processes after a start. Raises RuntimeError."""
        await check(self.bench, [self.endpoint])
        self.bench.server_pids = server_processes(self.args.base_url)

    async def window(self, label: str) -> dict:
        """Row of one window at the concurrency asked for."""
        self.windows += 1
        seconds = {} if self.args.seconds or self.args.requests else {"seconds": WINDOW_S}
        level = level_of(self.args, self.endpoint, "closed", self.args.concurrency[0], run=self.windows, **seconds)
        return await self.rows.make(level, label)

    def held(self, label: str):
        """Async function, rate -> did it hold the SLO; its windows count for this start alone."""
        return slo_probe(self.rows, self.endpoint, [], label)

    async def scores(self) -> list[float]:
        """Scores of fixed texts, one call after the other. Raises RuntimeError."""
        out: list[float] = []
        k = 0
        while len(out) < PARITY_PAIRS and k < 16:
            body, n_docs = self.fixed.body(self.endpoint, self.bench.model, 10**6 + k)
            try:
                async with self.bench.session.post(f"{self.bench.base_url}/{self.endpoint}", data=body) as answer:
                    data = await answer.read()
            except (aiohttp.ClientError, OSError) as exc:
                raise RuntimeError(f"no scores to compare: {exc!r}") from None
            wrong = answer_fault(self.endpoint, data, n_docs)[0] if answer.status == 200 else f"HTTP {answer.status}"
            if wrong:
                raise RuntimeError(f"no scores to compare: {wrong}")
            items, name = ("results", "relevance_score") if self.endpoint == "rerank" else ("data", "score")
            found = sorted((item["index"], item[name]) for item in json.loads(data)[items])
            out += [score for _, score in found]
            self.bench.answered += n_docs
            k += 1
        return out

    async def served(self) -> float | None:
        return await pairs_served(self.cfg)
