"""Files as tools export them: every reader takes the same records from them, and a run can go on after any end."""

import gzip
import json
import os
import random
import sys
from pathlib import Path

import pytest
from one_file import score_file
from test_reranker import LengthReranker, read_rows

from rerank_kit.benchmark.texts import FileTexts
from rerank_kit.models.pair import Pair
from rerank_kit.offline import files
from rerank_kit.offline.files import find_shard, lines_done, read_chunks, score_shards
from rerank_kit.offline.records import Broken, read_records
from rerank_kit.settings import ConfigError

RECORDS = [
    {"query": "q", "document": "d" * 10, "id": "a"},
    {"query": "q", "document": 'comma, "quote"\nand line', "id": "b"},
    {"query": "Größe 检", "document": "文档" * 5, "id": "b", "instruction": "Judge."},
    {"query": "q", "document": "d" * 30, "id": None},
]
WANTED = [
    Pair(r["query"], r["document"], r.get("instruction"), n, (("id", r["id"]),)) for n, r in enumerate(RECORDS, 1)
]


def cell(value):
    text = "" if value is None else str(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',;\t"\n') else text


def table(mark, end="\n", last=True):
    names = ["id", "query", "document", "instruction"]
    lines = [mark.join(names), *(mark.join(cell(r.get(name)) for name in names) for r in RECORDS)]
    return end.join(lines) + (end if last else "")


JSON_LINES = "".join(json.dumps(r) + "\n" for r in RECORDS)
# What a tool writes -> (file name, bytes). All hold RECORDS.
EXPORTS = {
    "jq -c": ("x.jsonl", JSON_LINES.encode()),
    "pandas lines": ("x.json", JSON_LINES.removesuffix("\n").encode()),
    "Windows": ("x.jsonl", b"\xef\xbb\xbf" + JSON_LINES.replace("\n", "\r\n").encode()),
    "pandas NaN": ("x.jsonl", JSON_LINES.replace('"id": null', '"id": NaN, "instruction": NaN').encode()),
    "gzip": ("x.jsonl.gz", gzip.compress(JSON_LINES.encode())),
    "pandas CSV": ("x.csv", table(",").encode()),
    "Excel CSV UTF-8": ("x.csv", b"\xef\xbb\xbf" + table(",", "\r\n").encode()),
    "Excel, comma as decimal point": ("x.csv", b"\xef\xbb\xbf" + table(";", "\r\n").encode()),
    "DuckDB TSV": ("x.tsv", table("\t", last=False).encode()),
    "Spark CSV": ("x.csv.gz", gzip.compress(table(",").encode())),
    "blank CSV lines": ("x.csv", (table(",") + "\n\n").encode()),
}


def parquet(path, rows, **types):
    pyarrow = pytest.importorskip("pyarrow")
    write_table = pytest.importorskip("pyarrow.parquet").write_table
    columns = {
        name: pyarrow.array([row.get(name) for row in rows], types.get(name)) for name in rows[0] | {"instruction": 0}
    }
    write_table(pyarrow.table(columns), path)
    return path


def made(folder, export):
    if export == "Parquet":
        return parquet(folder / "x.parquet", RECORDS)
    name, data = EXPORTS[export]
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("export", [*EXPORTS, "Parquet"])
def test_every_export_gives_the_same_pairs_to_every_reader(tmp_path, export):
    source = made(tmp_path, export)
    [chunk] = read_chunks(source, 0)
    assert chunk == WANTED
    assert [pair for part in read_chunks(source, 3, 1) for pair in part] == WANTED[3:]
    output = tmp_path / "out.jsonl"
    shard = find_shard(source, output)
    assert (shard.skip, shard.total) == (0, 4) and score_shards(LengthReranker(), [shard]) == (4, 0, [])
    assert [row["id"] for row in read_rows(output)] == ["a", "b", "b", None]
    assert find_shard(source, output).skip == 4
    calls = sorted(FileTexts(str(source), 1).calls, key=lambda call: (len(call[1]), call[0], call[1]))
    assert [len(documents) for _, documents, _ in calls] == [1, 1, 2] and calls[2][1] == [
        r["document"] for r in RECORDS[:2]
    ]


def test_blank_lines_are_no_records_and_numbers_are_the_files(tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text("\n" + JSON_LINES.replace("\n", "\n \n\r\n"))
    assert [pair.line for part in read_chunks(source, 0) for pair in part] == [2, 5, 8, 11]
    output = tmp_path / "out.jsonl"
    assert score_file(LengthReranker(), source, output, 0, 4) == (4, 0)
    assert find_shard(source, output).skip == 4
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:2]))
    assert find_shard(source, output).skip == 2


BROKEN = {
    "x.jsonl": (
        b'{"query": "q", "document": "d"}\n',
        [b"{", b'{"query": "\xff"}', b"[1]", b"\0\0\0", b'{"query": "q"}'],
    ),
    "x.csv": (b"q,d,1\n", [b"q,d\n", b"q,d,1,2\n", b"\xff,d,1\n", b"q,,1\n", b",d,1\n", b'q,"d" x,1\n']),
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, (_, bads) in BROKEN.items() for bad in bads], ids=repr)
def test_a_broken_record_is_reported_and_the_rest_is_scored(tmp_path, capsys, name, bad):
    good, source = BROKEN[name][0], tmp_path / name
    header = b"query,document,id\n" if name == "x.csv" else b""
    source.write_bytes(header + good + bad.removesuffix(b"\n") + b"\n" + good)
    output = tmp_path / "out.jsonl"
    assert score_file(LengthReranker(), source, output, 0, 3) == (2, 1)
    rows = read_rows(output)
    assert [row["line"] for row in rows] == [1, 2, 3] and rows[1]["error"] and "score" in rows[2]
    assert "line 2: " in capsys.readouterr().err
    assert FileTexts(str(source), 1).lines in (1, 2)  # as two calls, or one where nothing stands between them
    assert "line 2 is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.jsonl", json.dumps(RECORDS).encode(), "is one JSON list"),
        ("x.jsonl", json.dumps(RECORDS, indent=1).encode(), "is one JSON list"),
        ("x.jsonl", JSON_LINES.encode("utf-16"), "is UTF-16 text"),
        ("x.csv", table(",").encode("utf-16"), "is UTF-16 text"),
        ("x.csv", b"text,label\na,b\n", "names no column 'query': text, label"),
        ("x.csv", b"query,query,document\na,b,c\n", "two columns have the same name"),
        ("x.csv", b"", "names no column 'query': an empty line"),
        ("x.jsonl", b"PAR1....", "is a Parquet file"),
        ("x.csv.gz", b"plain", "x.csv.gz"),
        ("x.parquet", b"no parquet", "Parquet"),
    ],
)
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, name, data, said):
    if name == "x.parquet":
        pytest.importorskip("pyarrow")
    source = tmp_path / name
    source.write_bytes(data)
    with pytest.raises(ConfigError, match=said) as caught:
        find_shard(source, tmp_path / "out.jsonl")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.jsonl").exists()
    with pytest.raises((OSError, ValueError), match=said):
        FileTexts(str(source), 1)


def test_a_long_cell_is_read(tmp_path):
    source = tmp_path / "x.csv"
    source.write_text("query,document\nq," + "d" * 300_000 + "\n")
    assert len(next(read_chunks(source, 0))[0].document) == 300_000


IDS = [7, "7", 1.5, float("nan"), None, True, ["a", {"b": 1}], "\ud83d", 10**30, "", "a\nb", {"x": float("inf")}, -0.0]


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.tsv", "out.parquet"])
@pytest.mark.parametrize("one", IDS, ids=repr)
def test_a_run_goes_on_whatever_its_ids_are(tmp_path, one, name):
    if name == "out.parquet":
        pytest.importorskip("pyarrow")
    source, output = tmp_path / "x.jsonl", tmp_path / name
    lines = [json.dumps({"query": "q", "document": "d" * n, "id": one}) + "\n" for n in range(5)]
    source.write_text("".join(lines[:3]))
    assert score_shards(LengthReranker(), [find_shard(source, output)])[0] == 3
    assert find_shard(source, output).skip == 3
    source.write_text("".join(lines))
    whole = tmp_path / f"whole-{name}"
    for path, n in ((output, 2), (whole, 5)):
        assert score_shards(LengthReranker(), [find_shard(source, path)])[0] == n
    if name == "out.jsonl":
        assert [row["score"] for row in read_rows(output)] == [0, 0.01, 0.02, 0.03, 0.04]
    assert list(read_records(output, ())) == list(read_records(whole, ()))


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.parquet"])
def test_tables_out(tmp_path, name):
    if name == "out.parquet":
        pytest.importorskip("pyarrow")
    source, output = tmp_path / "x.jsonl", tmp_path / name
    rows = [{"query": "q", "document": "d" * n, "id": n} for n in (10, 30, 95)]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"query": "q", "id": 4}]))

    class Interrupted(LengthReranker):
        chunk = 1

        def run(self, pairs):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().run(pairs)

    with pytest.raises(KeyboardInterrupt):
        score_shards(Interrupted(), [find_shard(source, output)])
    assert not output.exists() and find_shard(source, output).skip == 2
    assert score_shards(LengthReranker(), [find_shard(source, output)]) == (0, 2, [])
    assert os.listdir(tmp_path) and not [
        path for path in tmp_path.iterdir() if "part" in path.name or "new-" in path.name
    ]
    got = [row for _, row in read_records(output, ())]
    plain = [[None if row[name] is None else str(row[name]) for name in ("line", "id", "score")] for row in got]
    assert plain == [["1", "10", "0.1"], ["2", "30", "0.3"], ["3", "95", None], ["4", "4", None]]
    assert [row["error"] for row in got] == [None, None, "no score", "field 'document' is missing or not a text"]
    assert str(got[1]["cut"]) == "True" and not got[0]["cut"]
    shard = find_shard(source, output)
    assert (shard.skip, shard.total, shard.failed) == (4, 4, 2)
    output.write_text("query,document\na,b\n") if name != "out.parquet" else parquet(output, RECORDS)
    with pytest.raises(ConfigError, match="is not a table of scores"):
        find_shard(source, output)


class Counted(LengthReranker):
    """Stopped by Ctrl-C after n chunks of one pair."""

    chunk = 1

    def __init__(self, n):
        super().__init__()
        self.n = n

    def run(self, pairs):
        if len(self.calls) == self.n:
            raise KeyboardInterrupt
        return super().run(pairs)


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.parquet"])
def test_a_finished_table_keeps_its_rows_when_its_input_has_grown(tmp_path, name, monkeypatch):
    if name == "out.parquet":
        pytest.importorskip("pyarrow")
    source, output, whole = tmp_path / "x.jsonl", tmp_path / name, tmp_path / f"whole-{name}"
    rows = [{"query": "q", "document": "d" * n, "id": f"é\n{n}"} for n in (10, 30, 95, 7, 40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert score_shards(LengthReranker(), [find_shard(source, output)]) == (2, 1, [])
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_shards(LengthReranker(), [find_shard(source, whole)])
    before = output.read_bytes()

    shard = find_shard(source, output)
    assert (shard.skip, shard.total, shard.failed, shard.done) == (3, 5, 1, False) and not shard.lines.exists()
    shard.lines.write_text('{"line": 1, "score": 0.1}\n{"line": 2, "sc')  # stopped while it wrote the rows back
    with pytest.raises(KeyboardInterrupt):
        score_shards(Counted(1), [find_shard(source, output)])
    assert output.read_bytes() == before  # the table stays as it was until the new one is whole
    assert find_shard(source, output).skip == 4
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_table", lambda rows, path: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert score_shards(LengthReranker(), [find_shard(source, output)])[2]
    shard = find_shard(source, output)
    assert shard.skip == 5 and not shard.done and output.read_bytes() == before
    assert score_shards(LengthReranker(), [shard]) == (0, 0, [])
    assert output.read_bytes() == whole.read_bytes()
    shard = find_shard(source, output)
    assert shard.done and shard.failed == 1 and not shard.lines.exists()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("line,id,score,error,label\n1,,0.5,,good\n", "row 1 cannot be kept .*: column 'label' is not this program's"),
        ("line,id,score,error\n1,,high,\n", "row 1 cannot be kept .*could not convert string to float: 'high'"),
        ("line,id,score,error\n1,,inf,\n", "score 'inf' is no number"),
        ("line,id,score,error\n1,,,\n", "it has neither a score nor an error"),
        ("line,id,score,error\n1,,0.5,bad\n", "it has both a score and an error"),
        ("line,id,score,error,cut\n1,,0.5,,no\n", "cut 'no' is neither True nor empty"),
        ("line,id,score,error,windows\n1,,0.5,,few\n", "invalid literal for int"),
        ("line,id,score,error\n1,,0.5,\n1,,0.5,\n", "row 2 .*line 1 comes after line 1"),
    ],
)
def test_a_table_whose_rows_cannot_be_kept_is_refused_before_anything_is_scored(tmp_path, table, said):
    source, output = tmp_path / "x.jsonl", tmp_path / "out.csv"
    source.write_text('{"query": "q", "document": "d"}\n' * (table.count("\n") - 1))
    output.write_text(table)
    if "comes after" not in said:
        assert find_shard(source, output).done  # nothing is written to it
    source.write_text('{"query": "q", "document": "d"}\n' * 9)
    with pytest.raises(ConfigError, match=said) as caught:
        find_shard(source, output)
    assert "choose another --output" in str(caught.value) and output.read_text() == table


def test_a_finished_but_unconverted_table_is_made_by_the_next_run(tmp_path):
    source, output = tmp_path / "x.csv", tmp_path / "out.csv"
    source.write_text("query,document\nq,d\n")
    shard = find_shard(source, output)
    shard.lines.write_text('{"line": 1, "score": 0.5}\n')
    shard = find_shard(source, output)
    assert (shard.skip, shard.total) == (1, 1)
    assert score_shards(LengthReranker(), [shard]) == (0, 0, [])
    assert output.read_text().splitlines() == ["line,id,score,error", "1,,0.5,"]


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    source = tmp_path / "x.jsonl"
    source.write_text(JSON_LINES)
    with pytest.raises(ConfigError, match=r"out\.csv\.gz: a table is written without gzip"):
        find_shard(source, tmp_path / "out.csv.gz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for paths in ((source, tmp_path / "out.parquet"), (tmp_path / "in.parquet", tmp_path / "out.jsonl")):
        paths[0].touch()
        with pytest.raises(ConfigError, match="needs pyarrow: pip install pyarrow"):
            find_shard(*paths)


def test_parquet_ids_of_other_types(tmp_path):
    import datetime
    import decimal

    pytest.importorskip("pyarrow")
    for one in (datetime.date(2026, 1, 2), decimal.Decimal("1.50"), 2**60, b"\xff"):
        source = parquet(tmp_path / "x.parquet", [{"query": "q", "document": "d", "id": one}])
        output = tmp_path / f"{type(one).__name__}.jsonl"
        assert score_shards(LengthReranker(), [find_shard(source, output)]) == (1, 0, [])
        assert str(read_rows(output)[0]["id"]) == str(one) and find_shard(source, output).skip == 1


# ---- after a power loss ----


@pytest.mark.parametrize("zeros", [1, 100, 5000, 3_000_000])
@pytest.mark.parametrize("half", [b"", b'{"line": 3, "sc', b"{"])
def test_zero_bytes_at_the_end_are_cut_off(tmp_path, zeros, half):
    output = tmp_path / "out.jsonl"
    good = b'{"line": 1, "score": 0.5}\n{"line": 2, "score": 0.25}\n'
    output.write_bytes(good + half + bytes(zeros))
    assert lines_done(output).lines == 2 and output.read_bytes() == good
    output.write_bytes(bytes(zeros))
    assert lines_done(output).lines == 0 and output.read_bytes() == b""
    output.write_bytes(good + half + bytes(zeros) + b"x")
    with pytest.raises(ConfigError, match="is not a score line"):
        lines_done(output)


def test_a_cut_at_any_byte_resumes_to_the_same_file(tmp_path):
    source, whole = tmp_path / "x.jsonl", tmp_path / "whole.jsonl"
    source.write_text("".join(json.dumps({"query": "q", "document": "d" * n, "id": f"é{n}"}) + "\n" for n in range(9)))
    score_shards(LengthReranker(), [find_shard(source, whole)])
    data = whole.read_bytes()
    for end in range(0, len(data), 7):
        output = tmp_path / "out.jsonl"
        output.write_bytes(data[:end] + bytes(random.Random(end).choice([0, 0, 512])))
        score_shards(LengthReranker(), [find_shard(source, output)])
        assert output.read_bytes() == data, end


def test_a_shard_is_on_the_disk_when_it_is_done(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").resolve()))
    source = tmp_path / "x.jsonl"
    source.write_text(JSON_LINES)
    for name in ("a.jsonl", "b.csv"):
        score_shards(LengthReranker(), [find_shard(source, tmp_path / name)])
    names = [path.name for path in synced]
    assert names == ["a.jsonl", tmp_path.name, "b.csv.part.jsonl", "new-b.csv", tmp_path.name]


def test_a_disk_that_cannot_sync_costs_one_shard(tmp_path, monkeypatch):
    source = tmp_path / "x.jsonl"
    source.write_text(JSON_LINES)
    calls = []

    def fails(fd):
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", fails)
    shards = [find_shard(source, tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    scored, failed, broken = score_shards(LengthReranker(), shards)
    assert (scored, failed, len(broken)) == (8, 0, 1) and "Input/output error" in broken[0]


# ---- damaged files ----


@pytest.mark.parametrize("export", ["jq -c", "Windows", "gzip", "pandas CSV", "DuckDB TSV"])
def test_no_damaged_file_makes_a_traceback(tmp_path, export):
    name, data = EXPORTS[export]
    rng = random.Random(3)
    for n in range(100):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 3, 20])):
            at = rng.randrange(len(broken) or 1)
            what = rng.random()
            if what < 0.3:
                del broken[at : at + rng.randrange(9)]
            else:
                broken[at : at + (what < 0.6)] = rng.choice(
                    [b"\0", b"\xff", b'"', b"\n", b",", b"{", b"\r", b"[" * 3000]
                )
        source = tmp_path / f"{n}-{name}"
        source.write_bytes(bytes(broken))
        try:
            shard = find_shard(source, tmp_path / f"{n}.jsonl")
        except ConfigError as exc:
            assert "\n" not in str(exc)
            continue
        scored, failed, unread = score_shards(LengthReranker(), [shard])
        assert scored + failed == shard.total or unread
        assert all(isinstance(record, dict | Broken) for _, record in read_records(source))
