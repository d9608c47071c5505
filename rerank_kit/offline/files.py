"""Files of pairs in, files of scores out, in input order and resumable: one file, or a folder of shards."""

import fcntl
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rerank_kit.models.pair import Pair
from rerank_kit.offline.feeding import ahead
from rerank_kit.settings import ConfigError

CHUNK = 512  # pairs that are tokenized at a time, and between two writes
CHUNK_CHARS = 16_000_000  # or this many characters: token ids of books take gigabytes


UNREADABLE = (OSError, EOFError, zlib.error)  # raised by a file that is missing, forbidden or corrupt


@dataclass(frozen=True)
class Result:
    """A pair's score, or why it has none; `cut` when the model saw only a part of the pair."""

    score: float | None
    cut: bool = False
    error: str | None = None
    windows: int = 1  # the score is the best of these


def parse_line(text: str, number: int) -> Pair | dict:
    """A line of the input as a Pair, or as the output line that reports what is wrong with it."""
    row = None
    try:
        row = json.loads(text)
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        for name in ("query", "document"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"field {name!r} is missing or not a text")
        if not isinstance(row.get("instruction"), str | None):
            raise ValueError("field 'instruction' is not a text")
        "".join((row["query"], row["document"], row.get("instruction") or "")).encode()  # lone surrogates
    except (ValueError, RecursionError) as exc:
        reason = "a lone surrogate is not text" if isinstance(exc, UnicodeEncodeError) else " ".join(str(exc).split())
        return {"line": number, "error": reason, **({"id": row["id"]} if isinstance(row, dict) and "id" in row else {})}
    extra = (("id", row["id"]),) if "id" in row else ()
    return Pair(row["query"], row["document"], row.get("instruction"), number, extra)


@dataclass(frozen=True)
class Earlier:
    """What an earlier run wrote: its lines, those of them without a score, the id of the last."""

    lines: int = 0
    failed: int = 0
    last_id: Any = None


def lines_done(output: Path) -> Earlier:
    """What an earlier run finished; a line that it was writing when it stopped is cut off.

    Raises:
        ConfigError: the file is no output of this program.
    """
    if not output.exists():
        return Earlier()
    done = good = failed = 0
    row: dict = {}
    with output.open("r+b") as file:
        _lock(file, output)  # a half line that another process is writing is not a leftover
        for line in file:
            begin = b'{"line": %d' % (done + 1)
            try:
                if not line.endswith(b"\n"):
                    if not (line.startswith(begin) or begin.startswith(line)):
                        raise ValueError
                    break
                row = json.loads(line)
                if row["line"] != done + 1:
                    raise ValueError
            except (ValueError, LookupError, TypeError):
                raise ConfigError(f"{output} line {done + 1} is not a score line: choose another --output") from None
            done, good, failed = done + 1, good + len(line), failed + ("error" in row)
        file.truncate(good)
    return Earlier(done, failed, row.get("id"))


def read_chunks(path: Path, skip: int, size: int = CHUNK) -> Iterator[list[Pair | dict]]:
    """Chunks of parsed lines, from line skip + 1 on. Bytes that are not UTF-8 invalidate a line, not the file."""
    chunk: list[Pair | dict] = []
    n_chars = 0
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            if number <= skip:
                continue
            chunk.append(_parse_bytes(raw, number))
            n_chars += len(raw)
            if len(chunk) == size or n_chars > CHUNK_CHARS:
                yield chunk
                chunk, n_chars = [], 0
    if chunk:
        yield chunk


def _parse_bytes(raw: bytes, number: int) -> Pair | dict:
    try:
        return parse_line(raw.decode("utf-8-sig" if number == 1 else "utf-8"), number)
    except UnicodeDecodeError as exc:
        return {"line": number, "error": f"not UTF-8: {exc.reason} at byte {exc.start}"}


@dataclass(frozen=True)
class Shard:
    """One input file, its output, and how far an earlier run came."""

    source: Path
    output: Path
    skip: int = 0  # lines done before
    total: int = 0  # lines of the input
    size: int | None = None  # bytes of the output then; another process may have appended since
    failed: int = 0  # lines done before that have no score


def find_shard(source: Path, output: Path) -> Shard:
    """A shard as it is now; a line that an earlier run was writing when it stopped is cut off.

    Raises:
        ConfigError: it cannot be read, or the output is not its own.
    """
    if source.exists() and not source.is_file():
        raise ConfigError(f"{source} is not a regular file, and the input is read more than once")
    total, last = 0, None
    try:
        with _open(source):  # before the output is touched
            pass
        output.parent.mkdir(parents=True, exist_ok=True)
        earlier = lines_done(output)
        with _open(source) as file:
            for total, raw in enumerate(file, 1):
                last = _parse_bytes(raw, total) if total == earlier.lines else last
    except UNREADABLE as exc:
        raise ConfigError(f"{getattr(exc, 'filename', None) or source}: {_reason(exc)}") from exc
    n = earlier.lines
    if n > total:
        raise ConfigError(f"{output} has {n} lines, {source} only {total}: it is the output of another input")
    last_id = (dict(last.extra) if isinstance(last, Pair) else last or {}).get("id")
    if last_id != earlier.last_id:
        ids = f"has the id {earlier.last_id!r}, and that of {source} is {last_id!r}"
        raise ConfigError(f"line {n} of {output} {ids}: the input has changed since, choose another --output")
    size = output.stat().st_size if output.exists() else 0
    return Shard(source, output, n, total, size, earlier.failed)


def shard_files(source: Path, output: Path, part: tuple[int, int] = (1, 1)) -> list[tuple[Path, Path]]:
    """(input, output) of a folder's *.jsonl and *.jsonl.gz files, by name; of part (I, N) every N-th from the I-th.

    Raises:
        ConfigError: no such files, or two whose outputs would be the same file.
    """
    files = sorted(path for path in source.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file())
    if not files:
        raise ConfigError(f"{source} has no *.jsonl or *.jsonl.gz file")
    outputs = [output / path.name.removesuffix(".gz") for path in files]
    for path in outputs:
        if outputs.count(path) > 1:
            raise ConfigError(f"{source} has {path.name} and {path.name}.gz: both would become {path}")
    return list(zip(files, outputs, strict=True))[part[0] - 1 :: part[1]]


def score_shards(reranker, shards: list[Shard]) -> tuple[int, int, list[str]]:
    """Score shards one after the other, without a pause of the engine between two.

    A shard that cannot be read or written to the end is reported, and the others are scored. Its output so far stays.

    Returns:
        (lines scored, lines without a score, what was wrong with each broken shard) of this run.
    """
    from tqdm import tqdm

    scored = failed = 0
    broken: list[str] = []
    total, done = sum(shard.total for shard in shards), sum(shard.skip for shard in shards)
    file, current = None, None
    closed: set[Shard] = set()  # broken: neither prepared nor scored any further
    with tqdm(total=total, initial=done, unit="pair", file=sys.stderr, dynamic_ncols=True) as bar:
        try:
            for (shard, chunk), results in reranker.stream(ahead(_prepare(reranker, shards, closed))):
                try:
                    if shard is not current:
                        if file:
                            file.close()
                        file, current = None, shard
                        file = _open_output(shard)
                    if shard in closed:
                        continue
                    if isinstance(chunk, Exception):
                        raise chunk
                    good, bad = _write_rows(file, shard, chunk, iter(results), tqdm.write)
                except UNREADABLE as exc:
                    closed.add(shard)
                    broken.append(f"{getattr(exc, 'filename', None) or shard.source}: {_reason(exc)}")
                    tqdm.write(f"[WARN] {broken[-1]}", file=sys.stderr)
                    if file:
                        with suppress(OSError):  # close() retries the write that a full disk refused
                            file.close()
                    file = None
                    continue
                scored, failed = scored + good, failed + bad
                bar.update(len(chunk))
        finally:
            if file:
                file.close()
    return scored, failed, broken


def _write_rows(file, shard: Shard, chunk: list, results: Iterator[Result], say) -> tuple[int, int]:
    """Append the lines of one chunk; (lines with a score, lines without one)."""
    failed, lines = 0, []
    for row in chunk:
        if isinstance(row, Pair):
            row = _output_row(row, next(results))
        if "error" in row:
            failed += 1
            say(f"[WARN] {shard.source} line {row['line']}: {row['error']}", file=sys.stderr)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    file.write("".join(lines))
    file.flush()
    return len(chunk) - failed, failed


def _prepare(reranker, shards: list[Shard], closed: set[Shard]) -> Iterator[tuple[tuple[Shard, Any], Any]]:
    """((shard, chunk), prepared pairs) of all shards; instead of a chunk, the exception that ended its shard.

    Args:
        closed: shards that the writer has given up.
    """
    for shard in shards:
        try:
            empty = True
            for chunk in read_chunks(shard.source, shard.skip, reranker.chunk):
                empty = False
                if shard in closed:
                    break
                yield (shard, chunk), reranker.prepare([row for row in chunk if isinstance(row, Pair)])
            if empty:
                yield (shard, []), reranker.prepare([])  # so that its output exists
        except UNREADABLE as exc:
            yield (shard, exc), reranker.prepare([])


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _open_output(shard: Shard):
    """A shard's output to append to, which no other process of this program writes at the same time."""
    # An id may hold a lone surrogate, which is no UTF-8: backslashreplace writes what JSON escapes it to.
    file = shard.output.open("a", encoding="utf-8", errors="backslashreplace")
    try:
        _lock(file, shard.output)
        if shard.size not in (None, file.tell()):
            raise OSError(None, "another process has written it meanwhile", str(shard.output))
    except OSError:
        file.close()
        raise
    return file


def _lock(file, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(None, "another process is writing it", str(path)) from None


def _reason(exc: Exception) -> str:
    return str(getattr(exc, "strerror", None) or exc or type(exc).__name__)


def _output_row(pair: Pair, result: Result) -> dict:
    row: dict[str, Any] = {"line": pair.line}
    row |= {"error": result.error} if result.score is None else {"score": result.score}
    row |= {"cut": True} if result.cut else {}
    return row | ({"windows": result.windows} if result.windows > 1 else {}) | dict(pair.extra)
