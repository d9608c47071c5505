"""Cold start: score query-document pairs with vllm.LLM in this process, without a server.

    python vllm_usage.py                                            the built-in example
    python vllm_usage.py --input pairs.jsonl --output scores.jsonl  a file; an interrupted run goes on where it stopped

Model: MODEL_PATH, through the same profile as the service. Input lines: {"query": ..., "document": ...,
"instruction": optional, "id": optional}. Output, a line for each input line in the same order:
{"line": N, "score": float, "id": ...} or {"line": N, "error": "...", "id": ...}.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine_args import Plan, make_plan
from env_utils import ConfigError, get_config

EXAMPLE_QUERY = "What is the capital of China?"
EXAMPLE_DOCUMENTS = (
    "Gravity attracts bodies.",
    "The capital of China is Beijing.",
    "Shanghai is a large city in China.",
    "中国的首都是北京。",
)
CHUNK = 1024  # pairs between two writes: what an interrupt can cost


@dataclass(frozen=True)
class Pair:
    """One query with one document; `line` is its number in the input file, `extra` its id."""

    query: str
    document: str
    instruction: str | None = None
    line: int = 0
    extra: tuple = ()


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
        self.llm = LLM(**engine)

    def score(self, pairs: list[Pair]) -> list[float | str]:
        """Score pairs.

        Returns:
            For each pair, in order, its score, or a text that says why it has none.
        """
        out: list[float | str] = [""] * len(pairs)
        groups: dict[str | None, list[int]] = {}
        for index, pair in enumerate(pairs):
            if pair.instruction and not self.plan.profile.instruction:
                out[index] = f"profile {self.plan.profile.name} takes no instruction"
            else:
                groups.setdefault(pair.instruction, []).append(index)
        for instruction, indices in groups.items():
            for index, score in zip(indices, self._score_group(instruction, [pairs[i] for i in indices]), strict=True):
                out[index] = score
        return out

    def _score_group(self, instruction: str | None, pairs: list[Pair]) -> list[float | str]:
        from vllm import PoolingParams

        params = PoolingParams()
        if instruction:
            params.extra_kwargs = {"chat_template_kwargs": {"instruction": instruction}}
        queries, documents = [p.query for p in pairs], [p.document for p in pairs]
        try:
            outputs = self.llm.score(
                queries, documents, use_tqdm=False, pooling_params=params, chat_template=self.plan.template
            )
            return [o.outputs.score for o in outputs]
        except ValueError as exc:  # vLLM refuses a whole batch for one pair, e.g. one that is too long
            if len(pairs) == 1:
                return [" ".join(str(exc).split())[:300]]
            half = len(pairs) // 2
            return self._score_group(instruction, pairs[:half]) + self._score_group(instruction, pairs[half:])

    def token_ids(self, pairs: list[Pair]) -> list[list[int]]:
        """Token ids of each pair's prompt, as the engine saw them."""
        out = []
        for pair in pairs:
            from vllm import PoolingParams

            params = PoolingParams()
            if pair.instruction:
                params.extra_kwargs = {"chat_template_kwargs": {"instruction": pair.instruction}}
            result = self.llm.score(
                pair.query, pair.document, use_tqdm=False, pooling_params=params, chat_template=self.plan.template
            )
            out.append(list(result[0].prompt_token_ids))
        return out


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
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number <= skip:
                continue
            try:
                chunk.append(parse_line(raw.decode("utf-8-sig" if number == 1 else "utf-8"), number))
            except UnicodeDecodeError as exc:
                chunk.append({"line": number, "error": f"not UTF-8: {exc.reason} at byte {exc.start}"})
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
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
        for chunk in read_chunks(source, skip):
            pairs = [row for row in chunk if isinstance(row, Pair)]
            scores = iter(reranker.score(pairs))
            for row in chunk:
                if isinstance(row, Pair):
                    score = next(scores)
                    result = "error" if isinstance(score, str) else "score"
                    row = {"line": row.line, result: score, **dict(row.extra)}
                if "error" in row:
                    failed += 1
                    tqdm.write(f"[WARN] {source} line {row['line']}: {row['error']}", file=sys.stderr)
                else:
                    scored += 1
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            bar.update(len(chunk))
    return scored, failed


def example_pairs() -> list[Pair]:
    return [Pair(EXAMPLE_QUERY, document) for document in EXAMPLE_DOCUMENTS]


def print_example(plan: Plan, scores: list[float | str]) -> None:
    """The built-in example's scores, best first."""
    print(f"model: {plan.checkpoint.path}\nprofile: {plan.profile.name}\nquery: {EXAMPLE_QUERY}")
    for index, score in sorted(enumerate(scores), key=lambda item: -float(item[1])):
        print(f"- score={score:.4f} | idx={index} | doc={EXAMPLE_DOCUMENTS[index]}")


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
    scored, failed = score_file(OfflineReranker(plan), args.input, args.output, skip, total)
    print(f"{scored} scored, {failed} without a score, {skip} done before -> {args.output}")
    return 1 if failed else 0


def main() -> int:
    args = arguments(__doc__).parse_args()
    try:
        plan = make_plan(get_config(), args.model)
        if args.input or args.output:
            if not args.input:
                raise ConfigError("--output needs --input")
            return run_file(args, plan)
        print_example(plan, OfflineReranker(plan).score(example_pairs()))
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":  # vLLM's workers import this file again
    sys.exit(main())
