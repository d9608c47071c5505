"""Files of pairs in, files of scores out, in input order and resumable."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from env_utils import ConfigError
from offline_engine import ahead
from pair_prompts import Pair

CHUNK = 512  # pairs that are tokenized at a time, and between two writes
CHUNK_CHARS = 16_000_000  # or this many characters: token ids of books take gigabytes


@dataclass(frozen=True)
class Result:
    """A pair's score, or why it has none; `cut` when the model saw only a part of the pair."""

    score: float | None
    cut: bool = False
    error: str | None = None
    windows: int = 1  # of which the score is the best


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


def read_chunks(path: Path, skip: int, size: int = CHUNK) -> Iterator[list[Pair | dict]]:
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
            if len(chunk) == size or n_chars > CHUNK_CHARS:
                yield chunk
                chunk, n_chars = [], 0
    if chunk:
        yield chunk


def score_file(reranker, source: Path, output: Path, skip: int, total: int) -> tuple[int, int]:
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
        prepared = ahead(_prepare(reranker, read_chunks(source, skip, reranker.chunk)))
        for chunk, results in reranker.stream(prepared):
            results = iter(results)
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


def _prepare(reranker, chunks: Iterator[list]) -> Iterator[tuple[list, Any]]:
    """Chunks with their prepared pairs."""
    for chunk in chunks:
        yield chunk, reranker.prepare([row for row in chunk if isinstance(row, Pair)])


def _output_row(pair: Pair, result: Result) -> dict:
    row = {"line": pair.line}
    row |= {"error": result.error} if result.score is None else {"score": result.score}
    row |= {"cut": True} if result.cut else {}
    return row | ({"windows": result.windows} if result.windows > 1 else {}) | dict(pair.extra)
