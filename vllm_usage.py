"""Cold start: score query-document pairs with vllm.LLM in this process, without a server.

    python vllm_usage.py                                            the built-in example
    python vllm_usage.py --input pairs.jsonl --output scores.jsonl  a file; an interrupted run goes on where it stopped

Model: MODEL_PATH, through the same profile as the service. Input lines: {"query": ..., "document": ...,
"instruction": optional, "id": optional}. Output, a line for each input line in the same order:
{"line": N, "score": float, "id": ...} or {"line": N, "error": "...", "id": ...}. LONG_DOCUMENTS says what becomes of a
pair longer than MAX_MODEL_LEN: truncate cuts it ("cut": true), error reports it, chunk gives it the best score of
overlapping windows of its document ("windows": n).
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from engine_args import Plan, make_plan
from env_utils import ConfigError, get_config
from long_documents import Fitter
from model_files import make_adapted

EXAMPLE_QUERY = "What is the capital of China?"
EXAMPLE_DOCUMENTS = (
    "Gravity attracts bodies.",
    "The capital of China is Beijing.",
    "Shanghai is a large city in China.",
    "中国的首都是北京。",
)
CHUNK = 4096  # pairs between two writes: what an interrupt can cost
CHUNK_CHARS = 16_000_000  # or this many characters: token ids of books take gigabytes


@dataclass(frozen=True)
class Pair:
    """One query with one document; `line` is its number in the input file, `extra` its id."""

    query: str
    document: str
    instruction: str | None = None
    line: int = 0
    extra: tuple = ()


@dataclass(frozen=True)
class Prompt:
    """Token ids of one pair. A long pair is cut as its family's reference cuts it, and says so."""

    ids: list[int]
    cut: bool
    n_first: int | None = None  # BERT: tokens of the first segment


class PairEncoder:
    """Pairs to token ids, many at a time: the tokenizer uses every core, vLLM's own rendering one."""

    def __init__(self, plan: Plan):
        from transformers import AutoTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        make_adapted(plan.checkpoint, plan.profile, Path(plan.engine["model"]))
        # Said in full: left open, transformers asks the terminal whether to run a checkpoint's code.
        trusted = plan.engine.get("trust_remote_code", False)
        self.tokenizer = AutoTokenizer.from_pretrained(plan.engine["model"], trust_remote_code=trusted)
        self.template, self.max_length = plan.template, plan.engine["max_model_len"]

    def encode(self, pairs: list[Pair]) -> list[Prompt]:
        """Token ids of N pairs.

        Source: the profile's template, cut as on the model card of Qwen3-Reranker (the end of the document, then of
        the query; the suffix stays); without a template the tokenizer's own pair format with longest_first.
        """
        if self.template is None:
            return self._encode_segments(pairs)
        out: list[Prompt | None] = [None] * len(pairs)
        groups: dict[str | None, list[int]] = {}
        for index, pair in enumerate(pairs):
            groups.setdefault(pair.instruction, []).append(index)
        for instruction, indices in groups.items():
            texts = self._render([pairs[i] for i in indices], instruction)
            for index, ids in zip(indices, self.tokenizer(texts)["input_ids"], strict=True):
                cut = len(ids) > self.max_length
                if cut:
                    suffix = self._suffix(instruction)
                    ids = ids[: self.max_length - len(suffix)] + suffix
                out[index] = Prompt(ids, cut)
        return out

    def _render(self, pairs: list[Pair], instruction: str | None) -> list[str]:
        chats = [[{"role": "query", "content": p.query}, {"role": "document", "content": p.document}] for p in pairs]
        more = {"instruction": instruction} if instruction else {}
        return self.tokenizer.apply_chat_template(chats, chat_template=self.template, tokenize=False, **more)

    def _suffix(self, instruction: str | None) -> list[int]:
        """Token ids behind the document."""
        mark = "\ue000"  # a private character that no template holds
        text = self._render([Pair("", mark)], instruction)[0].rpartition(mark)[2]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) + 16 > self.max_length:
            raise ConfigError(f"MAX_MODEL_LEN={self.max_length} leaves no room beside the template")
        return ids

    def _encode_segments(self, pairs: list[Pair]) -> list[Prompt]:
        both = ([p.query for p in pairs], [p.document for p in pairs])
        whole = self.tokenizer(*both, return_token_type_ids=False)["input_ids"]
        batch = self.tokenizer(*both, truncation="longest_first", max_length=self.max_length)
        kinds = batch.get("token_type_ids") or [None] * len(pairs)
        return [
            Prompt(ids, len(ids) < len(full), kind.index(1) if kind and 1 in kind else None)
            for ids, full, kind in zip(batch["input_ids"], whole, kinds, strict=True)
        ]


@dataclass(frozen=True)
class Result:
    """A pair's score, or why it has none; `cut` when the model saw only a part of the pair."""

    score: float | None
    cut: bool = False
    error: str | None = None
    windows: int = 1  # of which the score is the best


@dataclass(frozen=True)
class Prepared:
    """N pairs ready for the engine: what is scored for them, and for which of the N."""

    n_pairs: int
    owners: list[int]  # owners[i] = index of the pair that scored[i] is, or is a window of
    scored: list[Pair]
    prompts: list[Prompt]  # of `scored`; empty for embedding models
    cut: set[int]  # indices of pairs whose query was cut beside its windows


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
        self.encoder = PairEncoder(plan)
        self.fitter = None
        if plan.cfg.long_documents == "chunk":
            # A tokenizer of its own: prepare() runs in another thread than _cosine(), and one is not thread-safe.
            tokenizer, length = deepcopy(self.encoder.tokenizer), plan.engine["max_model_len"]
            self.fitter = Fitter(tokenizer, plan.template, length, separate=self.embeds)
        self.llm = LLM(**engine)

    def score(self, pairs: list[Pair]) -> list[Result]:
        """Score N pairs; N results in the same order."""
        return self.run(self.prepare(pairs))

    def prepare(self, pairs: list[Pair]) -> Prepared:
        """The part that needs no engine, so that a thread can do it while the engine runs."""
        owners, scored, cut = [], [], set()
        for index, pair in enumerate(pairs):
            if not self._takes(pair):
                continue
            parts = [pair]
            if self.fitter:
                query, windows, is_cut = self.fitter.windows(pair.query, pair.document, pair.instruction)
                parts = [replace(pair, query=query, document=window) for window in windows]
                cut |= {index} if is_cut else set()
            owners += [index] * len(parts)
            scored += parts
        return Prepared(len(pairs), owners, scored, [] if self.embeds else self.encoder.encode(scored), cut)

    def run(self, prepared: Prepared) -> list[Result]:
        """Results of prepare()'s pairs, in their order."""
        results = self._cosine(prepared.scored) if self.embeds else self._classify(prepared.prompts)
        refused = Result(None, error=f"profile {self.plan.profile.name} takes no instruction")
        out = [refused] * prepared.n_pairs
        windows = Counter(prepared.owners)
        for owner, result in zip(prepared.owners, results, strict=True):
            if result.cut and self.plan.cfg.long_documents == "error":
                limit = self.encoder.max_length
                out[owner] = Result(None, error=f"longer than MAX_MODEL_LEN={limit} (LONG_DOCUMENTS=error)")
            elif not math.isfinite(result.score):
                out[owner] = Result(None, error=f"the model gave the score {result.score}")
            elif out[owner] is refused or (out[owner].score is not None and result.score > out[owner].score):
                out[owner] = replace(result, cut=result.cut or owner in prepared.cut, windows=windows[owner])
        return out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End the engine's processes, also after an interrupt: leave() skips what would end them at exit."""
        self.llm.llm_engine.engine_core.shutdown()

    def _takes(self, pair: Pair) -> bool:
        return self.plan.profile.instruction or not pair.instruction

    def _classify(self, prompts: list[Prompt]) -> list[Result]:
        from vllm import PoolingParams

        if not prompts:
            return []
        params = [
            PoolingParams(extra_kwargs={"compressed_token_type_ids": p.n_first} if p.n_first is not None else None)
            for p in prompts
        ]
        outputs = self.llm.classify(
            [{"prompt_token_ids": p.ids} for p in prompts], pooling_params=params, use_tqdm=False
        )
        return [Result(o.outputs.probs[0], p.cut) for o, p in zip(outputs, prompts, strict=True)]

    def _cosine(self, pairs: list[Pair]) -> list[Result]:
        """Cosine of the two embeddings; every distinct text is embedded once."""
        import torch

        texts = list(dict.fromkeys(t for p in pairs for t in (p.query, p.document)))
        if not texts:
            return []
        limit = self.encoder.max_length
        whole = self.encoder.tokenizer(texts)["input_ids"]
        batch = self.encoder.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        outputs = self.llm.embed([{"prompt_token_ids": ids} for ids in batch], use_tqdm=False)
        vectors = {t: torch.tensor(o.outputs.embedding) for t, o in zip(texts, outputs, strict=True)}
        cut = {t for t, ids in zip(texts, whole, strict=True) if len(ids) > limit}
        return [
            Result(
                torch.cosine_similarity(vectors[p.query], vectors[p.document], dim=0).item(),
                p.query in cut or p.document in cut,
            )
            for p in pairs
        ]


def parse_line(text: str, number: int) -> Pair | dict:
    """A line of the input as a Pair, or as the output line that reports what is wrong with it."""
    row = None
    try:
        row = json.loads(text)
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        for name in ("query", "document"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"field {name!r} is missing or no text")
        if not isinstance(row.get("instruction"), str | None):
            raise ValueError("field 'instruction' is no text")
        "".join((row["query"], row["document"], row.get("instruction") or "")).encode()  # lone surrogates
    except (ValueError, RecursionError) as exc:
        reason = "a lone surrogate is no text" if isinstance(exc, UnicodeEncodeError) else " ".join(str(exc).split())
        return {"line": number, "error": reason, **({"id": row["id"]} if isinstance(row, dict) and "id" in row else {})}
    extra = (("id", row["id"]),) if "id" in row else ()
    return Pair(row["query"], row["document"], row.get("instruction"), number, extra)


def lines_done(output: Path) -> int:
    """Lines that an earlier run finished; a line that it was writing when it stopped is cut off.

    Raises:
        ConfigError: the file is no output of this program.
    """
    if not output.exists():
        return 0
    done = good = 0
    with output.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                if json.loads(line)["line"] != done + 1:
                    raise ValueError
            except (ValueError, LookupError, TypeError):
                raise ConfigError(f"{output} line {done + 1} is no score line: choose another --output") from None
            done, good = done + 1, good + len(line)
        file.truncate(good)
    return done


def read_chunks(path: Path, skip: int) -> Iterator[list[Pair | dict]]:
    """Chunks of parsed lines, from line skip + 1 on. Bytes that are no UTF-8 make a line broken, not the file."""
    chunk: list[Pair | dict] = []
    n_chars = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number <= skip:
                continue
            try:
                chunk.append(parse_line(raw.decode("utf-8-sig" if number == 1 else "utf-8"), number))
            except UnicodeDecodeError as exc:
                chunk.append({"line": number, "error": f"not UTF-8: {exc.reason} at byte {exc.start}"})
            n_chars += len(raw)
            if len(chunk) == CHUNK or n_chars > CHUNK_CHARS:
                yield chunk
                chunk, n_chars = [], 0
    if chunk:
        yield chunk


def score_file(reranker: OfflineReranker, source: Path, output: Path, skip: int, total: int) -> tuple[int, int]:
    """Score a file from line skip + 1 on and append to the output after every chunk.

    Returns:
        (lines scored, lines without a score) of this run.
    """
    from tqdm import tqdm

    scored = failed = 0
    with (
        output.open("a", encoding="utf-8") as out,
        tqdm(total=total, initial=skip, unit="pair", file=sys.stderr, dynamic_ncols=True) as bar,
    ):
        for chunk, prepared in _ahead(reranker, read_chunks(source, skip)):
            results = iter(reranker.run(prepared))
            for row in chunk:
                if isinstance(row, Pair):
                    row = _output_row(row, next(results))
                if "error" in row:
                    failed += 1
                    tqdm.write(f"[WARN] {source} line {row['line']}: {row['error']}", file=sys.stderr)
                else:
                    scored += 1
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            bar.update(len(chunk))
    return scored, failed


def _ahead(reranker: OfflineReranker, chunks: Iterator[list]) -> Iterator[tuple[list, Prepared]]:
    """Chunks with their prepared pairs; the next chunk is tokenized while the engine scores the present one."""

    def prepare_next():
        chunk = next(chunks, None)
        return chunk and (chunk, reranker.prepare([row for row in chunk if isinstance(row, Pair)]))

    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(prepare_next).result()
        while ready:
            coming = pool.submit(prepare_next)
            yield ready
            ready = coming.result()


def _output_row(pair: Pair, result: Result) -> dict:
    row = {"line": pair.line}
    row |= {"error": result.error} if result.score is None else {"score": result.score}
    row |= {"cut": True} if result.cut else {}
    return row | ({"windows": result.windows} if result.windows > 1 else {}) | dict(pair.extra)


def example_pairs() -> list[Pair]:
    return [Pair(EXAMPLE_QUERY, document) for document in EXAMPLE_DOCUMENTS]


def print_example(plan: Plan, results: list[Result]) -> None:
    """The built-in example's scores, best first."""
    print(f"model: {plan.checkpoint.path}\nprofile: {plan.profile.name}\nquery: {EXAMPLE_QUERY}")
    for index, result in sorted(enumerate(results), key=lambda item: -item[1].score):
        print(f"- score={result.score:.4f} | idx={index} | doc={EXAMPLE_DOCUMENTS[index]}")


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="folder or hub id; default: the configured one")
    parser.add_argument("--input", type=Path, metavar="FILE", help="pairs, one JSON object a line")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="scores, one JSON object a line; goes on if it exists"
    )
    return parser


def run_file(args: argparse.Namespace, plan: Plan) -> int:
    """--input / --output: 0 when every line has a score, 1 when some have none."""
    if args.output is None or args.output.resolve() == args.input.resolve():
        raise ConfigError("--input needs --output, another file than the input")
    try:
        with args.input.open("rb") as file:
            total = sum(1 for _ in file)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        skip = lines_done(args.output)
    except OSError as exc:
        raise ConfigError(f"{exc.filename}: {exc.strerror}") from exc
    if skip > total:
        raise ConfigError(
            f"{args.output} has {skip} lines, {args.input} only {total}: it is the output of another input"
        )
    if skip == total:
        print(f"nothing to do: {args.output} has all {total} lines")
        return 0
    if skip:
        print(f"going on after line {skip} of {total}", file=sys.stderr)
    with OfflineReranker(plan) as reranker:
        began = time.perf_counter()
        scored, failed = score_file(reranker, args.input, args.output, skip, total)
        speed = f"{scored / (time.perf_counter() - began):.0f} pairs/s"
    print(f"{scored} scored ({speed}), {failed} without a score, {skip} done before -> {args.output}")
    return 1 if failed else 0


def leave(code: int) -> None:
    """End the process with this exit code.

    Not by sys.exit() once vLLM is loaded: with 0.26 on an H100 the interpreter's teardown aborts ("terminate called
    without an active exception", exit code 134) after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "vllm" in sys.modules:
        os._exit(code)
    sys.exit(code)


def main() -> int:
    args = arguments(__doc__).parse_args()
    try:
        plan = make_plan(get_config(), args.model, offline=True)
        if args.input or args.output:
            if not args.input:
                raise ConfigError("--output needs --input")
            return run_file(args, plan)
        with OfflineReranker(plan) as reranker:
            print_example(plan, reranker.score(example_pairs()))
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":  # vLLM's workers import this file again
    leave(main())
