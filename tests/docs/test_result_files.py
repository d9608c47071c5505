"""measurements/results.py: tables that are written are read alike, and what programs wrote becomes one of them."""

import json
import re
import subprocess
import sys

import pytest
from conftest import KIT

from measurements import cold, kernels, peers, plot, results, scale

NAMES = sorted(path.stem for path in results.FOLDER.iterdir())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


def test_a_table_is_read_as_it_was_written(folder):
    rows = [{"a": 1, "b": 2.5, "c": 'x, "y"', "d": None}, {"a": -3, "b": 6e-08, "c": "# 1", "e": "0.26.0"}]
    results.write(folder / "t.csv", {"vllm": "0.30", "command": "python x: 1", "none": None, "n": 2}, rows)
    head, found = results.read("t")
    assert head == {"vllm": "0.30", "command": "python x: 1", "n": "2"}
    # A column without a value is left out, a missing value is None.
    assert found == [
        {"a": 1, "b": 2.5, "c": 'x, "y"', "e": None},
        {"a": -3, "b": 6e-08, "c": "# 1", "e": "0.26.0"},
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2009.21224, "2009.212"),
        (60.0, "60"),
        (0.0, "0"),
        (1 / 3e7, "3.333333e-08"),
        (123456789.4, "123456800"),
        (7, "7"),
    ],
)
def test_numbers_have_seven_digits(folder, value, text):
    results.write(folder / "t.csv", {}, [{"x": value}])
    assert (folder / "t.csv").read_text() == f"x\n{text}\n"
    assert results.read("t")[1][0]["x"] == pytest.approx(value, rel=1e-6)


def test_no_place_of_a_machine_gets_into_a_table(folder):
    command = (
        "python /opt/kit/scale.py --model /data/models/M --tokenizer ~/a/b --url http://me:pw@10.1.2.3:80/v1/rerank"
    )
    row = {"arrangement": "MODEL_PATH=/data/models/M\nEXTRA_ARGS='--chat-template /x/y.jinja'"}
    results.write(folder / "t.csv", {"command": command, "what": "pairs/s, 16/64, POST /v1/rerank"}, [row])
    head, rows = results.read("t")
    assert head["command"] == "python scale.py --model M --tokenizer b --url http://HOST/v1/rerank"
    assert head["what"] == "pairs/s, 16/64, POST /v1/rerank"
    assert rows == [{"arrangement": "MODEL_PATH=M EXTRA_ARGS='--chat-template y.jinja'"}]


def test_a_row_with_a_cell_too_few_is_refused(folder):
    (folder / "t.csv").write_text("# vllm: 1\na,b\n1,2\n3\n")
    with pytest.raises(ValueError, match=re.escape("t.csv: 1 cells for 2 columns: 3")):
        results.read("t")


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_as_the_program_writes_it_and_says_where_it_is_from(name, tmp_path):
    head, rows = results.read(name)
    results.write(tmp_path / "t.csv", head, rows)
    text = (results.FOLDER / f"{name}.csv").read_text("utf-8")
    assert (tmp_path / "t.csv").read_text("utf-8") == text
    assert len(text) < 12_000
    assert head.keys() >= {"hardware"} and head.keys() & {"vllm", "python"}
    assert any(key.startswith(("command", "source")) for key in head)


def test_the_plot_is_that_of_the_table(tmp_path):
    """python measurements/plot.py draws it again."""
    assert plot.FILE.read_text("utf-8") == plot.picture()
    assert plot.main([str(tmp_path / "a.svg")]) == 0
    lines = (tmp_path / "a.svg").read_text("utf-8").count("<polyline")
    assert lines == 2 * len(plot.NAMES)


def test_the_readme_has_a_line_for_each_program_and_file():
    text = (KIT / "measurements" / "README.md").read_text("utf-8")
    programs = {path.name for path in (KIT / "measurements").glob("*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)`", text, re.M)) == programs
    assert set(re.findall(r"^\| \[([\w-]+)\.csv\]\(results/\1\.csv\)", text, re.M)) == set(NAMES)
    for page in re.findall(r"\]\((\.\./docs/[^)#]+)", text):
        assert (KIT / "measurements" / page).exists(), page


# --- from what the programs found ---


def load_row(level: int, speed: float) -> dict:
    """A row of bench_rerank.py, as far as it matters."""
    row = {"endpoint": "rerank", "mode": "closed", "level": level, "run": 1, "ok": 9, "refused": 0, "err": 0}
    row |= {"pairs/s": speed, "p50_ms": 10.5, "p95_ms": None, "bound": "gpu", "gpu_util": 97.0, "tok/s": 5.0}
    return row | {"series": {"timeline": [1, 2]}, "verdict": "the GPU is busy", "errors": {}}


def bench_file(path, flags: str, *speeds: float) -> str:
    head = {"date": "2026-11-27", "command": "python bench_rerank.py --tokenizer /a/b", "vllm": "0.32.0"}
    head |= {"server": "http://10.0.0.1:1/v1", "model_root": "/data/m", "server_flags": flags, "findings": ["x"]}
    rows = [load_row(8 * i, speed) for i, speed in enumerate(speeds, 1)]
    path.write_text(json.dumps(head | {"rows": rows}))
    return str(path)


def compact(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(KIT / "measurements" / "results.py"), "compact", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_file_of_the_benchmark_becomes_a_table(folder):
    assert compact(bench_file(folder / "a.json", "/data/m --port 1", 100.0, 200.0), folder / "t.csv").returncode == 0
    text = (folder / "t.csv").read_text()
    assert "10.0.0.1" not in text and "/data" not in text and "/a/b" not in text and "timeline" not in text
    head, rows = results.read("t")
    assert head["vllm"] == "0.32.0" and "findings" not in head
    assert [(r["level"], r["pairs/s"], r["p50_ms"], r["bound"]) for r in rows] == [
        (8, 100, 10.5, "gpu"),
        (16, 200, 10.5, "gpu"),
    ]
    assert "p95_ms" not in rows[0] and "verdict" not in rows[0]


def test_several_files_become_one_table_by_name(folder):
    one, two = (bench_file(folder / f"{x}.json", f"--seed {x}", x) for x in (1.0, 2.0))
    assert compact(f"plain={one}", f"QUANTIZATION=fp8={two}", folder / "t.csv").returncode == 0
    head, rows = results.read("t")
    assert [(r["arrangement"], r["pairs/s"]) for r in rows] == [("plain", 1), ("QUANTIZATION=fp8", 2)]
    assert head["vllm"] == "0.32.0"
    assert head["server_flags of plain"] == "--seed 1.0" and head["server_flags of QUANTIZATION=fp8"] == "--seed 2.0"


@pytest.mark.parametrize(
    "args", [("{one}", "{one}"), ("a={one}", "a={one}"), ("{other}",), ("{empty}",), ("{list}",), ("{none}",)]
)
def test_what_cannot_become_a_table_is_refused(folder, args):
    names = {"one": bench_file(folder / "one.json", "", 1.0), "none": folder / "none.json"}
    for name, content in (("other", {"rows": [{"x": 1}]}), ("empty", {"rows": []}), ("list", [1])):
        names[name] = folder / f"{name}.json"
        names[name].write_text(json.dumps(content))
    done = compact(*(text.format(**names) for text in args), folder / "t.csv")
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "t.csv").exists()


def test_arrangements_become_a_table_with_the_failed_one(folder):
    args = scale.parse_args(
        ["--model", str(folder / "M"), "--arrange", "DP=1", "TP=2", "--cpu", "--out", str(folder / "s")]
    )
    run = scale.Run(args, scale.Cards(["0", "1"], shared=False))
    first, second = args.arrangements
    first.rows = [load_row(16, 100.0) | {"tokens": 128}, load_row(64, 120.0) | {"tokens": 128}]
    first.scores, first.start_s = [[i / 512 for i in range(512)]], 12.3
    second.error = f"RuntimeError: {folder}/x.log:\nout of memory"
    run.write()
    head, rows = results.read("s")
    assert head["seconds"] == "8" and head["hardware"] and str(folder) not in (folder / "s.csv").read_text()
    assert [
        (r["arrangement"], r["in_flight"], r["pairs/s"], r["efficiency"], r["parity"], r["swapped"]) for r in rows
    ] == [
        ("DP=1", 16, 100, 1, 0, "0 of 3840"),
        ("DP=1", 64, 120, 1, 0, "0 of 3840"),
        ("TP=2", None, None, None, None, None),
    ]
    assert rows[2]["error"] == "RuntimeError: x.log: out of memory" and rows[0]["start_s"] == 12.3
    raw = json.loads((folder / "s.json").read_text())
    results.write(folder / "again.csv", *results.compact(raw))
    assert (folder / "again.csv").read_text() == (folder / "s.csv").read_text()


def test_runs_of_the_cold_path_become_rows():
    runs = [{"pairs_s": speed, "cpu_us_per_pair": 1.0} for speed in (5.0, 6.0)]
    head, rows = cold.table({"vllm": "1", "host": {"pairs": 9, "pairs_s": 5.5, "runs": runs}})
    assert head == {"vllm": "1"} and [(r["kind"], r["run"], r["pairs"], r["pairs_s"]) for r in rows] == [
        ("host", 1, 9, 5.0),
        ("host", 2, 9, 6.0),
    ]


def test_kernels_become_rows_of_their_kind():
    found = {"busy": 0.5, **kernels.shares({"nvjet_1": 0.3, "flash_2": 0.1}, 1.0)}
    head, rows = kernels.table(found)
    assert head == {"busy": pytest.approx(0.4)}
    assert [(r["kind"], r["kernel"], r["share"]) for r in rows] == [
        ("gemm", "all", pytest.approx(0.75)),
        ("attention", "all", pytest.approx(0.25)),
        ("gemm", "nvjet_1", pytest.approx(0.75)),
        ("attention", "flash_2", pytest.approx(0.25)),
    ]


def test_every_batch_size_of_a_peer_is_a_row():
    start = {"model": "m", "tokens": 128, "dtype": "bf16", "way": "transformers"}
    row = start | {
        "variant": "batch 8",
        "runs": {"batch 1": [5.0], "batch 8": [9.0, 7.0]},
        "load_s": 2,
        "difference": 0.1,
    }
    small, large = peers.csv_rows(row, pairs=64)
    assert (small["variant"], small["pairs_s"], small["runs"]) == ("batch 1", 5.0, 1) and "load_s" not in small
    assert (large["pairs_s"], large["pairs_s_min"], large["pairs_s_max"], large["load_s"]) == (8.0, 7.0, 9.0, 2)
    assert peers.csv_rows(start | {"error": "exit code 1"}, 64) == [start | {"pairs": 64, "error": "exit code 1"}]
