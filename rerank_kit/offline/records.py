"""Records of the files that people bring: JSON lines, CSV, TSV (each plain or gzip) and Parquet, read alike.

Offline scoring, bulk, Ray and the benchmark read their input here, so a blank line, a missing value or a byte order
mark means the same to all of them. docs/bulk.md has the rules.
"""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNREADABLE = (OSError, EOFError, zlib.error)  # raised by a file that is missing, forbidden or corrupt
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")  # of a folder's shards
DELIMITERS = ",;\t"
COLUMNS = ("line", "id", "score", "error", "cut", "windows")  # of an output table


@dataclass(frozen=True)
class Broken:
    """A record that cannot be read, and why."""

    reason: str


def kind_of(path: Path) -> str:
    """ "csv", "tsv", "parquet", or "jsonl" for all other names; a last .gz does not count."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()[1:]
    return suffix if suffix in ("csv", "tsv", "parquet") else "jsonl"


def read_records(path: Path, columns: tuple[str, ...] = ("query", "document")) -> Iterator[tuple[int, dict | Broken]]:
    """(number, record) of a file: of JSON lines the line's number, of a table the row's, without the header.

    Blank lines are left out. A missing value (null, NaN, an empty cell) is None.

    Args:
        columns: those that a table must have.

    Raises:
        OSError, EOFError, zlib.error: the file cannot be read, or is of another kind.
    """
    kind = kind_of(path)
    rows = _json_lines(path) if kind == "jsonl" else _parquet(path) if kind == "parquet" else _table(path, columns)
    for number, row in rows:
        if isinstance(row, dict):
            row = {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in row.items()}
        yield number, row


def _json_lines(path: Path) -> Iterator[tuple[int, dict | Broken]]:
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                _check_start(path, raw)
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield number, parse_json(raw)


def parse_json(raw: bytes | str) -> dict | Broken:
    """One line of JSON as a record."""
    try:
        row = json.loads(raw.decode("utf-8") if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError as exc:
        return Broken(f"not UTF-8: {exc.reason} at byte {exc.start}")
    except (ValueError, RecursionError) as exc:
        if isinstance(raw, bytes) and b"\0" in raw:
            return Broken("it holds zero bytes: the file was not written to its end")
        return Broken(" ".join(str(exc).split()) or "it is nested too deep")
    return row if isinstance(row, dict) else Broken("not a JSON object")


def _check_start(path: Path, first: bytes) -> None:
    """Raise OSError for a file that is another kind as a whole, which would be one error a line."""
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise OSError(None, "is UTF-16 text: save it as UTF-8", str(path))
    if first.startswith(b"PAR1"):
        raise OSError(None, "is a Parquet file: name it *.parquet", str(path))
    text = first.removeprefix(b"\xef\xbb\xbf").strip()
    if text == b"[" or (text.startswith(b"[") and text[1:].lstrip().startswith(b"{")):
        raise OSError(None, "is one JSON list, not one object a line: jq -c '.[]' makes such a file", str(path))


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict | Broken]]:
    """CSV or TSV with a header. An empty cell is a missing value; all others are texts."""
    csv.field_size_limit(2**31 - 1)  # the default ends a document at 128 KiB
    with _open(path) as packed:
        start = packed.read(4)
        _check_start(path, start)
    with _open(path) as packed, io.TextIOWrapper(packed, "utf-8-sig", "surrogateescape", newline="") as file:
        first = file.readline()
        # Excel separates by semicolons where a comma is the decimal point.
        mark = "\t" if kind_of(path) == "tsv" else max(DELIMITERS, key=first.count)
        header = next(csv.reader([first], delimiter=mark), [])
        header = [name.strip() for name in header]
        if len(set(header)) != len(header):
            raise OSError(None, f"two columns have the same name: {', '.join(header)[:200]}", str(path))
        if missing := [name for name in columns if name not in header]:
            found = ", ".join(header)[:200] or "an empty line"
            raise OSError(None, f"its first line names no column {missing[0]!r}: {found}", str(path))
        # strict: a quote in the middle of a cell is an error, where the text would lose its quotes in silence.
        rows, number = csv.reader(file, delimiter=mark, strict=True), 0
        while True:
            try:
                cells = next(rows, None)
            except csv.Error as exc:
                number += 1
                yield number, Broken(f"not CSV: {exc}")
                continue
            if cells is None:
                return
            if not cells or (len(cells) == 1 and not cells[0].strip() and len(header) > 1):
                continue  # a blank line
            number += 1
            if len(cells) != len(header):
                yield (
                    number,
                    Broken(f"it has {len(cells)} cells, the header {len(header)} (ends in line {rows.line_num + 1})"),
                )
            elif any(not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell) for cell in cells):
                yield number, Broken("not UTF-8")
            else:
                yield number, {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}


def _parquet(path: Path) -> Iterator[tuple[int, dict | Broken]]:
    pyarrow, parquet = _pyarrow(path)
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row | ({"id": _as_json(row["id"])} if "id" in row else {})
    except (pyarrow.ArrowException, ValueError) as exc:
        raise OSError(
            None, f"is no Parquet file that can be read: {' '.join(str(exc).split())[:200]}", str(path)
        ) from exc


def _as_json(value: Any) -> Any:
    """A column's value as one of JSON: times, decimals and the like as texts."""
    try:
        json.dumps(value)
        return value
    except (TypeError, ValueError):
        return str(value)


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise OSError(None, "needs pyarrow: pip install pyarrow", str(path)) from exc
    return pyarrow, pyarrow.parquet


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


# --- tables out ---


def check_table(path: Path) -> None:
    """Raise OSError for an output that write_table() cannot write: found before anything is scored."""
    if path.suffix == ".gz":
        raise OSError(None, "a table is written without gzip: leave .gz out", str(path))
    if kind_of(path) == "parquet":
        _pyarrow(path)


def write_table(rows: list[dict], path: Path) -> None:
    """Rows of scores as CSV, TSV or Parquet; the columns are COLUMNS. Raises OSError."""
    names = [name for name in COLUMNS if name in ("line", "id", "score", "error") or any(name in row for row in rows)]
    ids = [row.get("id") for row in rows]
    are_numbers = all(one is None or (type(one) is int and abs(one) < 2**63) for one in ids)
    if not are_numbers:
        texts = [one if isinstance(one, str | None) else json.dumps(one) for one in ids]
        # A lone surrogate is no UTF-8.
        texts = [text and text.encode("utf-8", "backslashreplace").decode() for text in texts]
        rows = [row | {"id": text} for row, text in zip(rows, texts, strict=True)]
    if kind_of(path) == "parquet":
        pyarrow, parquet = _pyarrow(path)
        types = {"line": pyarrow.int64(), "score": pyarrow.float64(), "error": pyarrow.string()}
        types |= {"cut": pyarrow.bool_(), "windows": pyarrow.int32()}
        types["id"] = pyarrow.int64() if are_numbers else pyarrow.string()
        fields = [pyarrow.field(name, types[name]) for name in names]
        try:
            parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(fields)), path)
        except (pyarrow.ArrowException, ValueError, OverflowError) as exc:  # such as an id of 100 digits
            raise OSError(None, f"cannot be written as Parquet: {exc}", str(path)) from exc
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", delimiter="\t" if kind_of(path) == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> Iterator[dict]:
    """The rows that write_table() has written, so that it writes them again as they are.

    Raises:
        OSError: something in it would be lost.
    """
    last = 0
    for number, row in read_records(path, ("line", "score", "error")):
        try:
            if isinstance(row, Broken):
                raise ValueError(row.reason)
            if more := [name for name in row if name not in COLUMNS]:
                raise ValueError(f"column {more[0]!r} is not this program's")
            last, row = _score_row(row, last)
        except (ValueError, TypeError) as exc:
            why = " ".join(str(exc).split())[:200]
            said = f"row {number} cannot be kept when rows are added: {why}; choose another --output"
            raise OSError(None, said, str(path)) from exc
        yield row


def _score_row(cells: dict, last: int) -> tuple[int, dict]:
    """(line, row of a JSON line) of a table's row, whose cells are texts in CSV. Raises ValueError, TypeError."""
    line, score, error = int(cells["line"]), cells["score"], cells["error"]
    if line <= last:
        raise ValueError(f"line {line} comes after line {last}")
    if (score is None) == (error is None):
        raise ValueError("it has both a score and an error" if error else "it has neither a score nor an error")
    row: dict[str, Any] = {"line": line}
    row |= {"error": str(error)} if score is None else {"score": float(score)}
    if not math.isfinite(row.get("score", 0)):
        raise ValueError(f"score {score!r} is no number")
    if cells.get("cut") not in (None, True, "True"):
        raise ValueError(f"cut {cells['cut']!r} is neither True nor empty")
    row |= {"cut": True} if cells.get("cut") else {}
    row |= {"windows": int(cells["windows"])} if cells.get("windows") is not None else {}
    return line, row | ({"id": cells["id"]} if "id" in cells else {})
