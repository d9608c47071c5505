"""Files of pairs in, files of scores out, in input order and resumable: one file, or a folder of shards.

Scores are written as JSON lines while a shard is scored, also where its output is a table (CSV, TSV, Parquet): that is
made of them at the shard's end. docs/bulk.md says what is on the disk after which event.
"""

import errno
import fcntl
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rerank_kit.models.images import BadImage, parts_of
from rerank_kit.models.pair import Pair
from rerank_kit.offline.feeding import ahead
from rerank_kit.offline.records import (
    SUFFIXES,
    UNREADABLE,
    Broken,
    check_table,
    kind_of,
    parse_json,
    read_records,
    read_table,
    write_table,
)
from rerank_kit.settings import ConfigError

CHUNK = 512  # pairs that are tokenized at a time, and between two writes
CHUNK_CHARS = 16_000_000  # or this many characters: token ids of books take gigabytes


@dataclass(frozen=True)
class Result:
    """A pair's score, or why it has none; `cut` when the model saw only a part of the pair."""

    score: float | None
    cut: bool = False
    error: str | None = None
    windows: int = 1  # the score is the best of these


def parse_line(text: str, number: int) -> Pair | dict:
    """A line of JSON as a Pair, or as the output line that reports what is wrong with it."""
    return as_pair(parse_json(text), number)


def as_pair(row: dict | Broken, number: int) -> Pair | dict:
    """A record as a Pair, or as the output line that reports what is wrong with it."""
    if isinstance(row, Broken):
        return {"line": number, "error": row.reason}
    reason: str | None = None
    texts: dict[str, Any] = {}
    images: dict[str, str | None] = {}
    for name in ("query", "document"):
        texts[name], images[name] = row.get(name), None
        if isinstance(row.get(name), dict):
            try:
                texts[name], urls = parts_of(row[name]) or (None, [])
                images[name] = urls[0] if urls else None
            except BadImage as exc:
                reason = reason or f"{name}: {exc}"
        if not isinstance(texts[name], str):
            reason = reason or f"field {name!r} is missing or not a text"
    if not isinstance(row.get("instruction"), str | None):
        reason = reason or "field 'instruction' is not a text"
    try:
        if not reason:
            "".join((*texts.values(), row.get("instruction") or "")).encode()
    except UnicodeEncodeError:
        reason = "a lone surrogate is not text"
    if reason:
        return {"line": number, "error": reason, **({"id": row["id"]} if "id" in row else {})}
    extra = (("id", row["id"]),) if "id" in row else ()
    shown = images["query"], images["document"]
    return Pair(texts["query"], texts["document"], row.get("instruction"), number, extra, shown)


@dataclass(frozen=True)
class Earlier:
    """What an earlier run wrote: its lines, those of them without a score, the number and the id of the last."""

    lines: int = 0
    failed: int = 0
    last_line: int = 0
    last_id: Any = None


def lines_done(output: Path) -> Earlier:
    """What an earlier run finished; a line that it was writing when it stopped is cut off.

    So are zero bytes at the end, which a file system can leave after a power loss.

    Raises:
        ConfigError: the file is no output of this program.
    """
    if not output.exists():
        return Earlier()
    done = good = failed = last = 0
    row: dict = {}
    with output.open("r+b") as file:
        _lock(file, output)  # a half line that another process is writing is not a leftover
        for line in file:
            # A first line is the program's own if it could be that of line 1. Others stand behind such a line.
            begin = b'{"line": ' if done else b'{"line": 1'
            try:
                if b"\0" in line:
                    zeros = line[line.index(b"\0") :]
                    while zeros:
                        if zeros.strip(b"\0"):
                            raise ValueError
                        zeros = file.read(1 << 20)
                    break
                if not line.endswith(b"\n"):
                    if not (line.startswith(begin) or begin.startswith(line)):
                        raise ValueError
                    break
                row = json.loads(line)
                if not row["line"] > last or not ("score" in row or "error" in row):
                    raise ValueError
                last = row["line"]
            except (ValueError, LookupError, TypeError):
                raise ConfigError(f"{output} line {done + 1} is not a score line: choose another --output") from None
            done, good, failed = done + 1, good + len(line), failed + ("error" in row)
        file.truncate(good)
    return Earlier(done, failed, last, row.get("id"))


def read_chunks(path: Path, skip: int, size: int = CHUNK) -> Iterator[list[Pair | dict]]:
    """Chunks of records, without the first `skip`. A broken record is reported in its place; the others are scored."""
    chunk: list[Pair | dict] = []
    n_chars = n_seen = 0
    for number, record in read_records(path):
        n_seen += 1
        if n_seen <= skip:
            continue
        chunk.append(pair := as_pair(record, number))
        if isinstance(pair, Pair):
            n_chars += len(pair.query) + len(pair.document) + sum(len(url) for url in pair.images if url)
        if len(chunk) == size or n_chars > CHUNK_CHARS:
            yield chunk
            chunk, n_chars = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Shard:
    """One input file, its output, and how far an earlier run came."""

    source: Path
    output: Path
    skip: int = 0  # records done before
    total: int = 0  # records of the input
    size: int | None = None  # bytes of the output then; another process may have appended since
    failed: int = 0  # records done before that have no score
    in_table: bool = False  # they are in the finished table, whose input has grown, and not yet in `lines` again

    @property
    def done(self) -> bool:
        """Nothing is left to score or to write."""
        made = self.output.exists() and (self.lines == self.output or not self.lines.exists())
        return self.skip == self.total and made

    @property
    def lines(self) -> Path:
        """The JSON lines that are appended to: the output itself, or what a table is made of at the end."""
        return _lines_of(self.output)


def find_shard(source: Path, output: Path) -> Shard:
    """A shard as it is now; a line that an earlier run was writing when it stopped is cut off.

    Raises:
        ConfigError: it cannot be read, or the output is not its own.
    """
    if source.exists() and not source.is_file():
        raise ConfigError(f"{source} is not a regular file, and the input is read more than once")
    total, last, number = 0, None, 0
    try:
        next(read_records(source), None)  # before the output is touched
        output.parent.mkdir(parents=True, exist_ok=True)
        is_table = kind_of(output) != "jsonl"
        if is_table:
            check_table(output)
        earlier = lines_done(_lines_of(output))
        in_table = False
        if is_table and output.exists():
            # Lines beside a finished table begin with its rows. Fewer: a run was stopped while it wrote them back.
            table = _table_done(output)
            if in_table := table.lines > earlier.lines:
                earlier = table
        for total, (line, record) in enumerate(read_records(source), 1):
            if total == earlier.lines:
                last, number = as_pair(record, line), line
        if in_table and earlier.lines < total:
            deque(read_table(output), maxlen=0)  # before anything is scored
    except UNREADABLE as exc:
        raise ConfigError(f"{getattr(exc, 'filename', None) or source}: {_reason(exc)}") from exc
    n = earlier.lines
    if n > total:
        raise ConfigError(f"{output} has {n} lines, {source} only {total}: it is the output of another input")
    last_id = (dict(last.extra) if isinstance(last, Pair) else last or {}).get("id")
    if _same(last_id) != _same(earlier.last_id):
        ids = f"has the id {earlier.last_id!r}, and that of {source} is {last_id!r}"
        raise ConfigError(f"line {n} of {output} {ids}: the input has changed since, choose another --output")
    if number != earlier.last_line:
        lines = f"is for line {earlier.last_line} of the input, which is now line {number}"
        raise ConfigError(f"line {n} of {output} {lines}: the input has changed since, choose another --output")
    file = _lines_of(output)
    size = file.stat().st_size if file.exists() else 0
    return Shard(source, output, n, total, size, earlier.failed, in_table)


def _lines_of(output: Path) -> Path:
    return output if kind_of(output) == "jsonl" else output.with_name(output.name + ".part.jsonl")


def _same(one: Any) -> str:
    """An id as text, since a table gives back texts for numbers and lists, and nothing for an empty text."""
    text = one if isinstance(one, str) else "" if one is None else json.dumps(one)
    return text.encode("utf-8", "backslashreplace").decode()


def _table_done(output: Path) -> Earlier:
    """What a finished table holds. Raises ConfigError: it is no table of scores."""
    done = failed = 0
    last: dict = {}
    for _, row in read_records(output, columns=()):
        if isinstance(row, Broken) or not {"line", "score", "error"} <= row.keys():
            raise ConfigError(f"{output} is not a table of scores: choose another --output")
        done, failed, last = done + 1, failed + (row["error"] is not None), row
    return Earlier(done, failed, int(last.get("line") or 0), last.get("id"))


def shard_files(source: Path, output: Path, part: tuple[int, int] = (1, 1)) -> list[tuple[Path, Path]]:
    """(input, output) of a folder's files by name (SUFFIXES); of part (I, N) every N-th from the I-th.

    A table's output is a table of its kind.

    Raises:
        ConfigError: no such files, or two whose outputs would be the same file.
    """
    files = sorted(path for path in source.iterdir() if path.name.endswith(SUFFIXES) and path.is_file())
    if not files:
        raise ConfigError(f"{source} has no *.jsonl, *.csv, *.tsv or *.parquet file (but for Parquet, .gz too)")
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
    file: Any = None
    current: Shard | None = None
    closed: set[Shard] = set()  # broken: neither prepared nor scored any further

    def give_up(shard: Shard, exc: Exception) -> None:
        closed.add(shard)
        broken.append(f"{getattr(exc, 'filename', None) or shard.source}: {_reason(exc)}")
        tqdm.write(f"[WARN] {broken[-1]}", file=sys.stderr)

    def end(shard: Shard | None, file: Any) -> None:
        if file is None or shard is None:
            return
        try:
            _finish(shard, file)
        except UNREADABLE as exc:
            give_up(shard, exc)

    with tqdm(total=total, initial=done, unit="pair", file=sys.stderr, dynamic_ncols=True) as bar:
        try:
            for (shard, chunk), results in reranker.stream(ahead(_prepare(reranker, shards, closed))):
                try:
                    if shard is not current:
                        end(current, file)
                        file, current = None, shard
                        file = _open_output(shard)
                    if shard in closed:
                        continue
                    if isinstance(chunk, Exception):
                        raise chunk
                    good, bad = _write_rows(file, shard, chunk, iter(results), tqdm.write)
                except UNREADABLE as exc:
                    give_up(shard, exc)
                    if file:
                        with suppress(OSError):  # close() retries the write that a full disk refused
                            file.close()
                    file = None
                    continue
                scored, failed = scored + good, failed + bad
                bar.update(len(chunk))
            end(current, file)
            file = None
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


def _finish(shard: Shard, file: Any) -> None:
    """Write a shard's lines to the disk, and make its table of them where it has one. Raises OSError."""
    with file:
        file.flush()
        _sync(file.fileno())
        if shard.lines != shard.output:
            rows = [json.loads(line) for line in shard.lines.read_bytes().splitlines()]
            new = shard.output.with_name(f"new-{shard.output.name}")
            write_table(rows, new)
            with new.open("rb") as written:
                _sync(written.fileno())
            new.replace(shard.output)
    if shard.lines != shard.output:
        shard.lines.unlink()
    folder = os.open(shard.output.parent, os.O_RDONLY)
    try:
        _sync(folder)  # so that the file has its name after a power loss
    finally:
        os.close(folder)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):  # not a file that can be synced
            raise


def _open_output(shard: Shard):
    """A shard's output to append to, which no other process of this program writes at the same time."""
    # An id may hold a lone surrogate, which is no UTF-8: backslashreplace writes what JSON escapes it to.
    file = shard.lines.open("a", encoding="utf-8", errors="backslashreplace")
    try:
        _lock(file, shard.lines)
        if shard.size not in (None, file.tell()):
            raise OSError(None, "another process has written it meanwhile", str(shard.lines))
        if shard.in_table:
            file.truncate(0)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in read_table(shard.output)]
            file.write("".join(lines))
            file.flush()
            if len(lines) != shard.skip:
                raise OSError(None, "another process has written it meanwhile", str(shard.output))
    except UNREADABLE:
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
