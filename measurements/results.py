"""The tables in measurements/results/: CSV below a head of `# name: value` lines.

    python measurements/results.py compact RAW.json NAME.csv
    python measurements/results.py compact plain=A.json fp8=B.json NAME.csv

`compact` reads what `bench_rerank.py --json` or measurements/scale.py wrote. It keeps what a reader needs to judge a
number, without time series, verdicts, hosts and paths. Several files of bench_rerank.py become one table, in which the
column `arrangement` has the names. A cell is a number or a text, "" stands for None; numbers have seven digits.
"""

import argparse
import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results"
DIGITS = 7
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
# Of the head of `bench_rerank.py --json`; its other values are hosts, paths and sentences.
RUN = ("date", "command", "vllm", "model", "max_model_len", "services", "server_flags", "hardware", "client", "load")
RUN += ("texts", "tokens_per_pair", "seed")
# Of its rows.
LOAD = ("endpoint", "mode", "level", "run", "ok", "refused", "err", "pairs/s", "p50_ms", "p95_ms", "p99_ms")
LOAD += ("bound", "gpu_util", "api_cpu", "engine_cpu", "host_cpu", "queue_ms", "cache_hits", "step_tokens", "mfu")
# Of the head and the rows of measurements/scale.py.
SCALE_RUN = ("date", "command", "vllm", "hardware", "cores", "documents_per_call", "query_tokens", "lengths_in")
SCALE_RUN += ("seconds", "parity")
SCALE = ("model", "arrangement", "gpus", "tokens", "in_flight", "ok", "refused", "err", "pairs/s", "p50_ms", "p95_ms")
SCALE += ("bound", "gpu_util", "api_cpu", "engine_cpu", "host_cpu", "queue_ms", "step_tokens", "mfu", "efficiency")
SCALE += ("parity", "parity_mean", "other_first", "swapped", "start_s", "error")

Row = dict[str, int | float | str | None]


def settings(found: dict) -> str:
    """`name=value name=value` of the plain values, for a head."""
    plain = (int, float, str)  # bool is an int
    return " ".join(f"{name}={value}" for name, value in found.items() if isinstance(value, plain))


def read(name: str) -> tuple[dict[str, str], list[Row]]:
    """(head, rows) of results/NAME.csv. Raises ValueError for a row with more or fewer cells than columns."""
    head, lines = {}, (FOLDER / f"{name}.csv").read_text("utf-8").splitlines()
    while lines and lines[0].startswith("# "):
        key, _, value = lines.pop(0)[2:].partition(": ")
        head[key] = value
    columns, *rows = csv.reader(lines)
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{name}.csv: {len(row)} cells for {len(columns)} columns: {','.join(row)}")
    return head, [dict(zip(columns, map(_value, row), strict=True)) for row in rows]


def write(path: Path, head: dict, rows: Iterable[Row]) -> None:
    """Write a table; a name or a column without any value is left out."""
    rows = list(rows)
    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if any(_given(r, name) for r in rows)
    ]
    out = io.StringIO()
    for name, value in head.items():
        if _given(head, name):
            out.write(f"# {name}: {_cell(value)}\n")
    table = csv.writer(out, lineterminator="\n")
    table.writerow(columns)
    table.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    path.write_text(out.getvalue(), "utf-8")


def compact(raw: dict) -> tuple[dict, list[Row]]:
    """(head, rows) of what measurements/scale.py or bench_rerank.py wrote. Raises ValueError for anything else."""
    if isinstance(raw, dict) and "arrangements" in raw and "table" in raw:
        return _compact_scale(raw)
    if isinstance(raw, dict) and raw.get("rows") and "level" in raw["rows"][0]:
        return _only(RUN, raw), [_only(LOAD, row) for row in raw["rows"]]
    raise ValueError("no rows of measurements/scale.py or of bench_rerank.py --json")


def _compact_scale(raw: dict) -> tuple[dict, list[Row]]:
    rows, table = [], iter(raw["table"])  # a row for each row of each arrangement; one for an arrangement without any
    for it in raw["arrangements"]:
        gap = it["parity"] or {"other_first": "", "swapped": ""}
        about = {
            "parity_mean": gap.get("mean"),
            "other_first": gap["other_first"].removesuffix(" queries"),
            "swapped": gap["swapped"].removesuffix(" document pairs"),
            "start_s": it["start_s"],
            "error": it["error"] and it["error"][:200],
        }
        for row in it["rows"] or [{}]:
            rows.append(_only(SCALE, row | next(table) | about | {"bound": row.get("bound")}))
    return _only(SCALE_RUN, raw), rows


def merged(named: dict[str, dict]) -> tuple[dict, list[Row]]:
    """One table of several files of bench_rerank.py: {name of the arrangement: content}."""
    tables = {name: compact(raw) for name, raw in named.items()}
    head = {}
    for key in dict.fromkeys(key for of_one, _ in tables.values() for key in of_one):
        values = {name: of_one.get(key) for name, (of_one, _) in tables.items()}
        if len(set(map(str, values.values()))) == 1:
            head[key] = next(iter(values.values()))
        else:
            head |= {f"{key} of {name}": value for name, value in values.items()}
    return head, [{"arrangement": name} | row for name, (_, rows) in tables.items() for row in rows]


def _only(names: tuple[str, ...], found: dict) -> dict:
    return {name: found.get(name) for name in names}


def _given(found: dict, name: str) -> bool:
    return found.get(name) not in (None, "")


def _value(text: str) -> int | float | str | None:
    if NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    return text or None


def _cell(value) -> str:
    """A value as text: seven digits, no line break, no place of the machine that measured."""
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value) and value:
        value = round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))
    if isinstance(value, float):
        return str(int(value) if value.is_integer() else value)
    return without_places(" ".join(str(value).split()))


def without_places(text: str) -> str:
    """No host of an address, and of an absolute path the last part only; /v1/rerank and its like are routes."""
    text = re.sub(r"//[^\s/,'\"]+", "//HOST", text)
    return re.sub(r"(?<![\w:/.])~?/(?!v\d)(?:[^\s/,'\"]+/)+([^\s/,'\"]+)/?", r"\1", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["compact"])
    parser.add_argument("raw", nargs="+", metavar="[NAME=]RAW.json")
    parser.add_argument("out", type=Path, metavar="NAME.csv")
    args = parser.parse_args(argv)
    named: dict[str, dict] = {}
    try:
        for text in args.raw:
            name, _, path = text.rpartition("=")
            if (not name and len(args.raw) > 1) or name in named:
                raise ValueError(f"{text}: of several files each has a name of its own, NAME=RAW.json")
            named[name] = json.loads(Path(path).read_text("utf-8"))
        head, rows = merged(named) if len(args.raw) > 1 else compact(next(iter(named.values())))
    except (OSError, ValueError) as exc:
        parser.error(str(exc))
    write(args.out, head, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
