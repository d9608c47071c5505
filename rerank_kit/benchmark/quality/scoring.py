"""Scores of all candidates: through the service, or by a vllm.LLM in this process."""

import argparse
import asyncio
import contextlib
import itertools
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rerank_kit.benchmark.load import Bench, say
from rerank_kit.benchmark.quality.judgements import Judged
from rerank_kit.benchmark.quality.metrics import ranking
from rerank_kit.benchmark.server_view import ask_server, hardware, is_local, server_flags, without_secrets
from rerank_kit.client import RerankError, RerankHTTPError, rerank
from rerank_kit.models.checkpoint import read_checkpoint
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import find_profile
from rerank_kit.settings import ConfigError, EnvConfig, passed_on_env

REFUSALS, PATIENCE_S = 20, 2.0  # tries of a query while the service answers 429 or 503, and the first pause
MOST_PAIRS = 1_000_000  # of an embedding model at a time: their texts and vectors are in memory


@dataclass
class Scored:
    """Scores of N queries; None = the query failed, or was not reached before Ctrl-C."""

    scores: list[list[float] | None]
    orders: list[list[int]]  # indices of the candidates, best first; [] where there are no scores
    seconds: float = 0.0
    timed_pairs: int = 0  # pairs that were scored in these seconds
    cut: int = 0  # documents of which the model saw a part
    windows: int = 0  # windows of documents that were split
    errors: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    interrupted: bool = False

    @classmethod
    def nothing(cls, n_queries: int) -> "Scored":
        return cls([None] * n_queries, [[] for _ in range(n_queries)])


class Counter:
    """Progress on stderr: on a terminal a line that counts, elsewhere a line every 10 s."""

    def __init__(self, total: int):
        self.total, self.done, self.pairs, self.began = total, 0, 0, time.perf_counter()
        self.shown = self.began

    def add(self, queries: int, pairs: int) -> None:
        self.done, self.pairs = self.done + queries, self.pairs + pairs
        now = time.perf_counter()
        if now - self.shown < (0.5 if sys.stderr.isatty() else 10.0):
            return
        self.shown, rate = now, self.done / (now - self.began)
        left = f"{(self.total - self.done) / rate:.0f} s left" if self.done else ""
        say(f"{self.done}/{self.total} queries, {self.pairs / (now - self.began):.0f} pairs/s, {left}", live=True)


def by_service(queries: list[Judged], args: argparse.Namespace, earlier: dict[str, Any] | None = None) -> Scored:
    """Ask the service, --concurrency queries at a time.

    Args:
        earlier: contents of --json of an interrupted run that is continued.

    Raises:
        RerankError: the first query failed, as it does without a server. Later failures are counted.
    """
    out, stop = Scored.nothing(len(queries)), threading.Event()
    known = {one["id"]: one["scores"] for one in earlier["scored"]} if earlier else {}
    todo = [i for i, query in enumerate(queries) if query.id not in known]
    counter = Counter(len(todo))
    for i, query in enumerate(queries):
        if scores := known.get(query.id):
            out.scores[i], out.orders[i] = scores, ranking(scores)
    if earlier:
        out.cut, out.windows, out.versions = earlier["cut_documents"], earlier["windows"], set(earlier["versions"])
    if not todo:
        return out
    more = {"instruction": args.instruction, "long_documents": args.long_documents}

    def one(i: int) -> tuple[int, list[float], dict[str, Any]] | None:
        if stop.is_set():
            return None
        query = queries[i]
        own = more | ({"instruction": query.instruction} if query.instruction is not None else {})
        where = (None, args.model, args.base_url, args.timeout_s)
        for n_tries in itertools.count(1):
            try:
                _, scores, raw = rerank(
                    query.query, query.documents, *where, max_tokens_per_doc=args.max_tokens_per_doc, **own
                )
            except RerankHTTPError as exc:
                # A slow service refuses what would wait too long. Here nobody waits, so the call is sent again.
                if exc.status_code not in (429, 503) or n_tries == REFUSALS or stop.wait(min(30, PATIENCE_S * n_tries)):
                    raise
            else:
                # Without top_n every document has a score; rerank() checked it.
                return i, [float(score) for score in scores], raw  # type: ignore[arg-type]
        raise AssertionError

    def take(done: Future) -> None:
        try:
            found = done.result()
        except RerankError as exc:
            out.errors.append(" ".join(str(exc).split())[:300])
            if len(out.errors) == 1:
                say(f"[ERR] first failed query: {out.errors[0]}")
            counter.add(1, 0)
            return
        if found is None:
            return
        i, scores, raw = found
        out.scores[i], out.orders[i] = scores, ranking(scores)
        out.cut += len(raw["_cut"])
        out.windows += sum(raw["_windows"].values())
        out.versions |= {raw["_version"]} - {""}
        counter.add(1, len(scores))

    first = one(todo[0])
    ready: Future = Future()
    ready.set_result(first)
    began = time.perf_counter()  # the first query may compile something
    take(ready)
    pool = ThreadPoolExecutor(args.concurrency, thread_name_prefix="quality")
    waiting = {pool.submit(one, i) for i in todo[1:]}
    try:
        while waiting:
            ended, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for done in ended:
                take(done)
    except KeyboardInterrupt:
        out.interrupted = True
        stop.set()
        for done in waiting:
            done.cancel()
        with contextlib.suppress(KeyboardInterrupt):
            for done in waiting:
                if not done.cancelled():
                    take(done)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    out.seconds, out.timed_pairs = time.perf_counter() - began, counter.pairs - len(first[1] if first else ())
    return out


def offline(queries: list[Judged], args: argparse.Namespace, cfg: EnvConfig) -> tuple[Scored, dict[str, Any]]:
    """Load the model in this process and score everything. Returns (scores, what describes the run).

    Raises:
        ConfigError: the model or the settings cannot be used.
    """
    from rerank_kit.engine.machine import vllm_version
    from rerank_kit.engine.plan import plan_engine
    from rerank_kit.offline.reranker import OfflineReranker

    cfg = replace(
        cfg,
        long_documents=args.long_documents or cfg.long_documents,
        max_tokens_per_doc=args.max_tokens_per_doc or cfg.max_tokens_per_doc,
    )
    os.environ.update(passed_on_env())  # HF_*, VLLM_* ... of .env
    plan = plan_engine(cfg)
    about = {"server": "none: vllm.LLM in this process", "model": plan.checkpoint.path.name}
    about |= {"model_root": str(plan.checkpoint.path), "profile": plan.profile.name, "score_scale": plan.profile.score}
    about |= {"server_flags": " ".join(f"--{k} {v}" for k, v in sorted(plan.engine.items())), "hardware": hardware()}
    about["vllm"] = vllm_version()
    out, counter = Scored.nothing(len(queries)), Counter(len(queries))
    # An instruction for a model that takes none is an error of each pair, never ignored.
    pairs = [
        Pair(q.query, text, q.instruction or args.instruction, line=i)
        for i, q in enumerate(queries)
        for text in q.documents
    ]
    with OfflineReranker(plan) as reranker:
        out.seconds, counter.began = -time.perf_counter(), time.perf_counter()
        # Of an embedding model each distinct text of a part is computed once, so one part is best.
        size = MOST_PAIRS if reranker.embeds else reranker.chunk
        parts = (pairs[i : i + size] for i in range(0, len(pairs), size))
        rows: list[list[float | None]] = [[] for _ in queries]
        try:
            for part, results in reranker.stream((part, reranker.prepare(part)) for part in parts):
                for pair, result in zip(part, results, strict=True):
                    rows[pair.line].append(result.score)
                    out.cut += result.cut
                    out.windows += result.windows if result.windows > 1 else 0
                    if result.score is None:
                        out.errors.append(f"query {queries[pair.line].id}: {result.error}")
                counter.add(len({pair.line for pair in part}), len(part))
        except KeyboardInterrupt:
            out.interrupted = True
    out.seconds, out.timed_pairs = out.seconds + time.perf_counter(), counter.pairs
    for i, row in enumerate(rows):
        scores = [score for score in row if score is not None]
        if len(scores) == len(queries[i].ids):
            out.scores[i], out.orders[i] = scores, ranking(scores)
    return out, about


def describe_service(args: argparse.Namespace, cfg: EnvConfig) -> dict[str, Any]:
    """What the server says of itself, and the profile where its checkpoint is on this host."""

    async def ask() -> dict:
        key = cfg.api_key
        async with Bench(args.base_url, args.model, None, key, cfg.timeout_s, cfg.connect_timeout_s) as bench:
            return await ask_server(bench)

    url = args.base_url.split(",")[0].strip()
    about = {"server": without_secrets([args.base_url]), "model": args.model, **asyncio.run(ask())}
    about |= {"server_flags": server_flags(url), "profile": None, "score_scale": None}
    about["hardware"] = hardware() + ("" if is_local(url) else " (this client's; the server is another host)")
    with contextlib.suppress(ConfigError, OSError, ValueError, TypeError):
        profile = find_profile(read_checkpoint(Path(about["model_root"])), cfg.model_profile)
        about |= {"profile": profile.name, "score_scale": profile.score}
    return about
