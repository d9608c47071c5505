"""Cold start: score query-document pairs with vllm.LLM in this process, without a server.

    python vllm_usage.py                                            the built-in example
    python vllm_usage.py --input pairs.jsonl --output scores.jsonl  a file; an interrupted run goes on where it stopped
    python vllm_usage.py --input FOLDER --output FOLDER [--shard 1/4]   all its *.jsonl and *.jsonl.gz (docs/bulk.md)

Model: MODEL_PATH, through the same profile as the service. Input lines: {"query": ..., "document": ...,
"instruction": optional, "id": optional}. Output, a line for each input line in the same order:
{"line": N, "score": float, "id": ...} or {"line": N, "error": "...", "id": ...}. LONG_DOCUMENTS says what becomes of a
pair longer than MAX_MODEL_LEN: truncate cuts it ("cut": true), error reports it, chunk gives it the best score of
overlapping windows of its document ("windows": n). MAX_TOKENS_PER_DOC and MAX_TOKENS_PER_QUERY cut ("cut": true) as in
the service.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine_args import Plan, make_plan
from env_utils import ConfigError, get_config, passed_on_env
from long_documents import Fitter
from offline_engine import Feeder, ahead
from pair_prompts import Pair, PairEncoder, Prompt
from score_files import CHUNK, Result, find_shard, score_shards, shard_files

EXAMPLE_QUERY = "What is the capital of China?"
EXAMPLE_DOCUMENTS = (
    "Gravity attracts bodies.",
    "The capital of China is Beijing.",
    "Shanghai is a large city in China.",
    "中国的首都是北京。",
)


@dataclass(frozen=True)
class Prepared:
    """N pairs ready for the engine: what is scored for them, and for which of the N."""

    n_pairs: int
    owners: list[int]  # owners[i] = index of the pair that the i-th scored pair is, or is a window of
    needs: list[tuple[int, ...]]  # needs[i] = indices of the prompts that its score comes from
    prompts: list[Prompt]
    cut: set[int]  # indices of pairs of which a part was cut before the prompts were made


class OfflineReranker:
    """vllm.LLM with a plan's arguments. Loads the model when it is made."""

    def __init__(self, plan: Plan):
        os.environ.update(plan.env)  # before vllm is imported: it reads its settings then
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # scores, not start-up chatter
        if plan.cfg.cuda_visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = plan.cfg.cuda_visible_devices
        from vllm import LLM

        # Copies of the model need a server in front of them; offline, one engine takes every pair.
        engine = {k: v for k, v in plan.engine.items() if k != "data_parallel_size"}
        self.plan = plan
        self.embeds = plan.profile.reference == "embedding"
        # Every distinct text of a chunk is embedded once: the larger, the fewer come twice.
        self.chunk = 4096 if self.embeds else CHUNK
        self.encoder = PairEncoder(plan)
        self.fitter = None
        if plan.cfg.long_documents == "chunk":
            length = plan.engine["max_model_len"]
            self.fitter = Fitter(self.encoder.tokenizer, plan.template, length, separate=self.embeds)
        self.llm = LLM(**engine)
        self.feeder = Feeder(self.llm, "embed" if self.embeds else "classify")

    def score(self, pairs: list[Pair]) -> list[Result]:
        """Score N pairs; N results in the same order."""
        parts = (pairs[i : i + self.chunk] for i in range(0, len(pairs), self.chunk))
        prepared = ahead((None, self.prepare(part)) for part in parts)
        return [result for _, results in self.stream(prepared) for result in results]

    def prepare(self, pairs: list[Pair]) -> Prepared:
        """The part that needs no engine, so that a thread can do it while the engine runs."""
        owners, scored = [], []
        shorter, cut = self._within_limits(pairs)
        for index, pair in enumerate(shorter):
            if not self._takes(pair):
                continue
            parts = [pair]
            if self.fitter:
                query, windows, is_cut = self.fitter.windows(pair.query, pair.document, pair.instruction)
                parts = [replace(pair, query=query, document=window) for window in windows]
                cut |= {index} if is_cut else set()
            owners += [index] * len(parts)
            scored += parts
        if not self.embeds:
            return Prepared(len(pairs), owners, [(i,) for i in range(len(scored))], self.encoder.encode(scored), cut)
        texts = list(dict.fromkeys(text for pair in scored for text in (pair.query, pair.document)))
        where = {text: i for i, text in enumerate(texts)}
        needs = [(where[pair.query], where[pair.document]) for pair in scored]
        return Prepared(len(pairs), owners, needs, self.encoder.encode_texts(texts) if texts else [], cut)

    def _within_limits(self, pairs: list[Pair]) -> tuple[list[Pair], set[int]]:
        """The pairs within MAX_TOKENS_PER_QUERY and MAX_TOKENS_PER_DOC, and the indices of those that were cut."""
        cfg, out = self.plan.cfg, pairs
        # As in the guard: chunk scores all of a document.
        per_doc = None if cfg.long_documents == "chunk" else cfg.max_tokens_per_doc
        for name, limit in (("query", cfg.max_tokens_per_query), ("document", per_doc)):
            if limit:
                texts = list({getattr(pair, name): None for pair in out})
                short = dict(zip(texts, self.encoder.first_tokens(texts, limit), strict=True))
                out = [replace(pair, **{name: short[getattr(pair, name)]}) for pair in out]
        return out, {i for i, (old, new) in enumerate(zip(pairs, out, strict=True)) if old != new}

    def stream(self, source: Iterable[tuple[Any, Prepared]]) -> Iterator[tuple[Any, list[Result]]]:
        """Results of many prepare()d lists, each with the tag that came with it, in their order.

        The engine gets the next lists while it works on the first, so it is never idle between two.
        """
        source, more, waiting = iter(source), True, deque()
        try:
            while True:
                while more and self.feeder.has_room:
                    tag, prepared = next(source, (None, None))
                    if prepared is None:
                        more = False
                    else:
                        waiting.append((tag, prepared, self.feeder.submit(prepared.prompts)))
                if not waiting:
                    return
                tag, prepared, batch = waiting[0]
                if batch.done:
                    waiting.popleft()
                    yield tag, self._results(prepared, batch.outputs)
                else:
                    self.feeder.step()
        finally:
            self.feeder.abort()

    def _results(self, prepared: Prepared, outputs: list) -> list[Result]:
        """Results of the pairs of one prepare(), in their order."""
        refused = Result(None, error=f"profile {self.plan.profile.name} takes no instruction")
        out = [refused] * prepared.n_pairs
        windows = Counter(prepared.owners)
        scores = self._scores(prepared.needs, outputs)
        for owner, needs, score in zip(prepared.owners, prepared.needs, scores, strict=True):
            cut = any(prepared.prompts[i].cut for i in needs)
            if cut and self.plan.cfg.long_documents == "error":
                limit = self.encoder.max_length
                out[owner] = Result(None, error=f"longer than MAX_MODEL_LEN={limit} (LONG_DOCUMENTS=error)")
            elif not math.isfinite(score):
                out[owner] = Result(None, error=f"the model gave the score {score}")
            elif out[owner] is refused or (out[owner].score is not None and score > out[owner].score):
                out[owner] = Result(score, cut or owner in prepared.cut, windows=windows[owner])
        return out

    def _scores(self, needs: list[tuple[int, ...]], outputs: list) -> list[float]:
        """One score for each of `needs`: the head's output, or the cosine of two embeddings."""
        import torch

        if not needs:
            return []
        if any(output is None for output in outputs):
            raise RuntimeError("the engine gave no output for a pair; its log says why (VLLM_LOGGING_LEVEL=INFO)")
        values = torch.stack(outputs).float()
        if not self.embeds:
            return values[:, 0].tolist()
        first, second = (values[torch.tensor(side)] for side in zip(*needs, strict=True))
        return torch.cosine_similarity(first, second, dim=1).tolist()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End the engine's processes, also after an interrupt: leave() skips what would end them at exit."""
        self.llm.llm_engine.engine_core.shutdown()

    def _takes(self, pair: Pair) -> bool:
        return self.plan.profile.instruction or not pair.instruction


def example_pairs() -> list[Pair]:
    return [Pair(EXAMPLE_QUERY, document) for document in EXAMPLE_DOCUMENTS]


def print_example(plan: Plan, results: list[Result]) -> int:
    """Print the built-in example's scores, best first: 0 when every document has one, else 1."""
    print(f"model: {plan.checkpoint.path}\nprofile: {plan.profile.name}\nquery: {EXAMPLE_QUERY}")
    failed = [index for index, result in enumerate(results) if result.score is None]
    scored = [index for index, result in enumerate(results) if result.score is not None]
    for index in sorted(scored, key=lambda index: -results[index].score):
        print(f"- score={results[index].score:.4f} | idx={index} | doc={EXAMPLE_DOCUMENTS[index]}")
    for index in failed:
        print(f"- error={results[index].error} | idx={index} | doc={EXAMPLE_DOCUMENTS[index]}")
    return 1 if failed else 0


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="folder or hub id; default: the configured one")
    add = parser.add_argument
    add("--input", type=Path, metavar="PATH", help="pairs, one JSON object a line; or a folder of *.jsonl, *.jsonl.gz")
    add("--output", type=Path, metavar="PATH", help="scores, one JSON object a line; goes on if it exists; or a folder")
    add("--shard", metavar="I/N", help="of a folder every N-th file from the I-th: one of N processes or hosts")
    return parser


def parse_part(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8)."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise ConfigError(f"--shard {text!r} is not I/N with 1 <= I <= N")
    return int(first), int(second)


def run_file(args: argparse.Namespace, plan: Plan) -> int:
    """--input / --output, a file or a folder: 0 when every line has a score, 1 when some have none."""
    if args.output is None or args.output.resolve() == args.input.resolve():
        raise ConfigError("--input needs --output, another file than the input")
    broken, shards = [], []
    if args.input.is_dir():
        for source, output in shard_files(args.input, args.output, parse_part(args.shard or "1/1")):
            try:
                shards.append(find_shard(source, output))
            except ConfigError as exc:
                broken.append(str(exc))
                print(f"[WARN] {exc}", file=sys.stderr)
    elif args.shard:
        raise ConfigError(f"--shard needs a folder, and {args.input} is none")
    else:
        shards = [find_shard(args.input, args.output)]
    skip, total, failed_before = (sum(getattr(s, name) for s in shards) for name in ("skip", "total", "failed"))
    todo = [s for s in shards if s.skip < s.total or not s.output.exists()]
    if not todo:
        lacks = f", {len(broken)} files not done" if broken else ""
        print(f"nothing to do: {args.output} has {total} lines, {failed_before} without a score{lacks}")
        return 1 if failed_before or broken else 0
    if skip:
        print(f"going on after line {skip} of {total}", file=sys.stderr)
    with OfflineReranker(plan) as reranker:
        began = time.perf_counter()
        scored, failed, more = score_shards(reranker, todo)
        speed = f"{scored / (time.perf_counter() - began):.0f} pairs/s"
    broken += more
    files = f", {len(broken)} of {len(shards) + len(broken) - len(more)} files not done" if broken else ""
    before = f"{skip} done before" + (f" ({failed_before} of them without a score)" if failed_before else "")
    print(f"{scored} scored ({speed}), {failed} without a score, {before}{files} -> {args.output}")
    return 1 if failed or failed_before or broken else 0


def leave(code: int) -> None:
    """End the process with this exit code.

    Not by sys.exit() once vLLM is loaded: the interpreter's teardown can abort ("terminate called without an active
    exception", exit code 134) after all work is done; seen with 0.26 on an H100 and, rarely, with 0.32 on a CPU.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "vllm" in sys.modules:
        os._exit(code)
    sys.exit(code)


def main() -> int:
    args = arguments(__doc__).parse_args()
    try:
        os.environ.update(passed_on_env())  # HF_*, VLLM_* ... of .env; the environment's own are not among them
        plan = make_plan(get_config(), args.model, offline=True)
        if args.input or args.output or args.shard:
            if not args.input:
                raise ConfigError("--output and --shard need --input")
            return run_file(args, plan)
        with OfflineReranker(plan) as reranker:
            return print_example(plan, reranker.score(example_pairs()))
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":  # vLLM's workers import this file again
    leave(main())
