"""bench_rerank.py against servers whose behaviour is known."""

import asyncio
import csv
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import known_server
import pytest
from aiohttp import web
from known_server import (
    Service,
    after_check,
    bench,
    good,
    null_server,
    one_level,
    serving,
    slow,
    status,
    table_of,
)
from test_report import runs

import bench_rerank
from rerank_kit.benchmark import arguments, program, server_view
from rerank_kit.benchmark.load import OPENED, TAKEN, Gate, Level
from rerank_kit.benchmark.report import COLUMNS
from rerank_kit.benchmark.server_view import server_flags, without_secrets
from rerank_kit.benchmark.texts import WORDS, Texts

KIT = Path(bench_rerank.__file__).parent
own_settings = known_server.own_settings  # a fixture


# --- the load ---


def test_levels_of_rounds_closed_loop_up_to_whole_rounds():
    args, *_ = arguments.parse_args(["--endpoint", "rerank", "--requests", "100"])
    levels = program.levels_of(args)
    assert [(v.level, v.requests, v.warmup) for v in levels] == [
        (1, 100, 5), (16, 112, 16), (50, 100, 50), (100, 100, 100), (150, 150, 150),
    ]  # fmt: skip
    args, *_ = arguments.parse_args(["--endpoint", "score", "--rate", "2,30"])
    assert [(v.mode, v.requests, v.warmup) for v in program.levels_of(args)] == [
        ("open", 100, 5),
        ("open", 300, 30),
    ]


def test_run_sends_new_texts_over_levels_and_endpoints(tmp_path):
    with serving() as service:
        assert bench(service, tmp_path, "--concurrency", "1,3", "--requests", "9", "--seed", "1")[0] == 0
    assert len(service.bodies) == 2 + 2 * (5 + 9) + 2 * (5 + 9)
    assert len(set(service.queries)) == len(service.bodies)
    assert len(set(service.documents)) == 4 * len(service.bodies)
    assert {body["model"] for _, body in service.bodies} == {"qwen3-reranker"}
    assert {frozenset(b) for e, b in service.bodies if e == "rerank"} == {frozenset(("model", "query", "documents"))}
    assert {frozenset(b) for e, b in service.bodies if e == "score"} == {frozenset(("model", "text_1", "text_2"))}


def test_run_repeats_texts_and_seeds_on_request(tmp_path):
    sent = []
    for argv in (["--repeat"], ["--repeat", "query"], ["--seed", "7"], ["--seed", "7"], [], []):
        with serving() as service:
            bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "2", "--requests", "4", *argv)
        sent.append(service)
    everything, query, one, again, fresh, other = sent
    assert len(set(everything.queries)) == 1 and len(set(everything.documents)) == 4
    assert len(set(query.queries)) == 1 and len(set(query.documents)) == 4 * len(query.bodies)
    assert sorted(one.documents) == sorted(again.documents)
    # A run without --seed meets no cache of another.
    assert not set(one.documents) & set(other.documents) and not set(fresh.documents) & set(other.documents)


# --- the server's side ---


def test_rows_have_the_servers_metrics(tmp_path, capsys):
    with serving(slow(0.05)) as service:
        row = bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "4", "--requests", "40")[1]["rows"][0]
    assert row["queue_ms"] == pytest.approx(30.0) and row["cache_hits"] == 0.25
    assert row["step_tokens"] is None and row["api_cpu"] is None  # not told; the server is this very process
    assert row["tok/s"] == pytest.approx(7 * row["pairs/s"], rel=1e-3)


def test_rows_have_the_gpu_of_nvidia_smi(tmp_path, capsys, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *query-gpu=name*) echo "NVIDIA Test"; exit;; esac\n'
        'while :; do echo "0, 3, 512"; echo "1, 96, 40960"; sleep 0.05; done\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with serving(slow(0.2)) as service:
        out = bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "2", "--seconds", "1.5")[1]
    row = out["rows"][0]
    assert out["hardware"] == "1 x NVIDIA Test"
    assert (row["gpu_util"], row["gpu_mem_gib"]) == (96.0, 40.0)
    assert row["bound"] in ("gpu", "client")  # client: where this machine is too busy to tell
    assert row["client_limited"] or "96 % of the time" in row["verdict"]


@pytest.mark.timing
def test_server_processes_are_found_by_port_and_measured(tmp_path, capsys):
    service, shares = Service(), []
    for argv in (["--cpu-ms", "20"], ["--delay-ms", "20"]):
        process, service.url = null_server(*argv)
        with process:
            assert server_view.server_processes(service.url) == {process.pid: True}
            row = bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "2", "--seconds", "1.5")[1]["rows"][
                0
            ]
            process.kill()
        shares.append(row["api_cpu"])
        assert row["server_cpu"] == row["api_cpu"] and 0 < row["host_cpu"] <= 1
    assert server_view.server_processes(service.url) == {}
    assert server_view.server_processes("http://10.1.2.3:80/v1") == {}
    assert shares[0] > 3 * shares[1]  # one computes all the time, one only waits


# --- errors ---


async def _disconnect(service, endpoint, body):
    raise asyncio.CancelledError  # aiohttp then drops the connection


def _json(change):
    async def behave(service, endpoint, body):
        answer = good("rerank", 4)
        change(answer["results"])
        return web.Response(text=json.dumps(answer))

    return behave


BAD = {
    "http_400": status(400),
    "http_401": status(401),
    "http_429": status(429),
    "http_503": status(503),
    "http_302": status(302, headers={"Location": "/v1/score"}),
    "timeout": slow(5),
    "disconnect": _disconnect,
    "bad_answer no json": status(200, "<html>"),
    "bad_answer no results": status(200, "{}"),
    "bad_answer a list": status(200, "[1]"),
    "bad_answer null": status(200, "null"),
    "bad_answer one short": _json(lambda r: r.pop()),
    "bad_answer duplicate": _json(lambda r: r[1].update(index=0)),
    "bad_answer outside": _json(lambda r: r[3].update(index=4)),
    "bad_answer negative": _json(lambda r: r[3].update(index=-1)),
    "bad_answer index text": _json(lambda r: r[0].update(index="0")),
    "bad_answer no score": _json(lambda r: r[2].pop("relevance_score")),
    "bad_answer nan": _json(lambda r: r[2].update(relevance_score=float("nan"))),
    "bad_answer infinite": _json(lambda r: r[2].update(relevance_score=float("inf"))),
    "bad_answer null score": _json(lambda r: r[2].update(relevance_score=None)),
    "bad_answer bool": _json(lambda r: r[2].update(relevance_score=True)),
}


@pytest.mark.parametrize("name", BAD)
def test_call_names_each_error(name):
    with serving(BAD[name]) as service:
        call = one_level(service.url, lambda b: b.call("rerank", *b.body("rerank", 0)), timeout_s=0.5)
    assert call.error == name.split()[0]


def test_call_accepts_a_good_answer():
    for endpoint in ("rerank", "score"):
        with serving() as service:
            call = one_level(service.url, lambda b, e=endpoint: b.call(e, *b.body(e, 0)))
        assert call.error is None and call.tokens == 28 and call.end > call.sent


def test_call_names_a_refused_connection(closed_port):
    call = one_level(f"http://127.0.0.1:{closed_port}/v1", lambda b: b.call("rerank", *b.body("rerank", 0)))
    assert call.error == "connect"


@pytest.fixture
def closed_port():
    with serving() as service:
        port = int(service.url.split(":")[2].split("/")[0])
    return port


def test_errors_are_counted_by_type_and_give_no_throughput(tmp_path, capsys):
    async def mixed(service, endpoint, body):
        kind = len(service.bodies) % 4
        await asyncio.sleep(0.02)
        if kind == 0:
            return web.Response(status=429, text="too many, come later")
        if kind == 1:
            return web.Response(status=503, text="down")
        return web.Response(text="{}") if kind == 2 else None

    with serving(after_check(mixed)) as service:
        code, out = bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "4", "--requests", "80")
    row, shown = out["rows"][0], capsys.readouterr()
    assert code == 0
    assert row["ok"] + row["refused"] + row["err"] == 80
    assert row["refused"] == row["errors"]["http_429"] + row["errors"]["http_503"]
    assert row["err"] == row["errors"]["bad_answer"]
    assert set(row["errors"]) == {"http_429", "http_503", "bad_answer"}
    assert 15 <= row["ok"] <= 25 and all(15 <= n <= 25 for n in row["errors"].values())
    # Only a quarter of what 4 callers at about 25 ms get done is throughput.
    everything = 80 / row["window_s"]
    assert row["req/s"] == pytest.approx(everything / 4, rel=0.15)
    assert shown.err.count("first http_429: too many, come later") == 1 and "first http_503: down" in shown.err
    assert out["error_texts"]["http_503"] == "down"
    assert f"http_429:{row['errors']['http_429']}" in table_of(shown.out)[-1][-1]


def test_only_429_is_no_throughput_and_exits_1(tmp_path, capsys):
    with serving(after_check(status(429))) as service:
        code, out = bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "2", "--requests", "20")
    row = out["rows"][0]
    assert code == 1
    assert [row[n] for n in ("ok", "refused", "err", "req/s", "pairs/s", "p50_ms")] == [0, 20, 0, 0, 0, None]
    assert row["bound"] == "refuse"
    shown = capsys.readouterr()
    cells = table_of(shown.out)[-1]
    assert cells[3:] == ["0", "20", "0", "0.00", "0.00", *"------", "refuse", "http_429:20"]
    assert row["warmup_err"] == 5 and "5 calls of the warm-up failed" in shown.err


def test_check_says_no_server_in_one_line(closed_port, capsys):
    assert bench_rerank.main(["--base-url", f"http://127.0.0.1:{closed_port}/v1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"no server at http://127.0.0.1:{closed_port}/v1: run sh start_rerank.sh status" in err


@pytest.mark.parametrize("name", ["http_401", "bad_answer nan", "disconnect"])
def test_check_stops_at_a_bad_answer(name, tmp_path, capsys):
    with serving(BAD[name]) as service:
        code, out = bench(service, tmp_path, "--endpoint", "rerank")
    assert code == 1 and out == {} and len(service.bodies) == 1
    assert f"{name.split()[0]} for rerank at {service.url}" in capsys.readouterr().err


# --- output ---


def test_json_csv_and_table_have_the_same_names_and_values(tmp_path, capsys):
    table = tmp_path / "out.csv"
    with serving(slow(0.01)) as service:
        argv = ("--concurrency", "1,5", "--requests", "25", "--csv", str(table), "--seed", "11", "--verbose")
        code, out = bench(service, tmp_path, *argv)
    lines = capsys.readouterr().out.splitlines()
    head, *body = table_of("\n".join(lines))
    assert code == 0 and head == list(COLUMNS) and len(body) == 4
    assert [cells[:3] for cells in body] == [["rerank", "closed", n] for n in "15"] + [
        ["score", "closed", n] for n in "15"
    ]
    with table.open() as file:
        from_csv = list(csv.DictReader(file))
    for cells, row, flat in zip(body, out["rows"], from_csv, strict=True):
        assert list(row)[: len(head)] == head and list(flat) == [name for name in row if name != "series"]
        for name, cell in zip(head, cells, strict=True):
            value = row[name]
            if isinstance(value, float):
                assert float(cell) == pytest.approx(
                    value, abs=0.5 if value >= 1000 else 0.0501 if value >= 10 else 0.00501
                )
                assert float(flat[name]) == value
            else:
                assert cell == ("-" if value is None or value == {} else str(value))
                assert flat[name] == ("" if value is None else "-" if value == {} else str(value))
        assert row["p99_ms"] is None and flat["p99_ms"] == "" and row["p95_ms"] > 0
    about = dict(line[2:].split(": ", 1) for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert about["vllm"] == out["vllm"] == "9.9.9"
    assert about["model_root"] == "some-checkpoint" and about["max_model_len"] == "4096"
    assert about["command"].startswith("python bench_rerank.py --base-url http://127.0.0.1:")
    assert set(about) == set(out) - {"rows", "error_texts", "findings"}
    assert out["seed"] == 11 and about["tokens_per_pair"] == "7.0"


def test_a_seed_that_was_not_given_is_in_the_command(tmp_path, capsys):
    with serving() as service:
        out = bench(service, tmp_path, "--endpoint", "score", "--concurrency", "1", "--requests", "2")[1]
    assert out["command"].endswith(f"--seed {out['seed']}")


def test_api_key_is_sent_and_never_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("API_KEY", "verysecretkey")
    out = tmp_path / "o.json"

    async def no_http(service, endpoint, body):
        service.request.transport.write(b"this is not HTTP\r\n\r\n")
        return web.Response(text="x")

    for behave in (None, after_check(no_http)):
        with serving(behave) as service:
            url = service.url.replace("//", "//user:urlpassword@")
            argv = ["--endpoint", "rerank", "--concurrency", "1", "--requests", "2", "--docs", "4", "--json", str(out)]
            bench_rerank.main(["--base-url", service.url, *argv])
            assert service.headers[-1]["Authorization"] == "Bearer verysecretkey"
            monkeypatch.delenv("API_KEY")
            bench_rerank.main(["--base-url", url, *argv])
            monkeypatch.setenv("API_KEY", "verysecretkey")
        shown = "".join(capsys.readouterr()) + out.read_text()
        assert "verysecretkey" not in shown and "urlpassword" not in shown
        assert ("bad_answer" in shown) == (behave is not None)  # the path that could have shown headers was taken


def test_without_secrets():
    words = [
        "m",
        "--api-key",
        "k1",
        "k 2",
        "--port",
        "8",
        "--api-key=k3",
        "--hf-token",
        "k4",
        "--max-num-batched-tokens",
        "9",
        "--hf_tok=k5",
    ]
    shown = "m --api-key *** --port 8 --api-key *** --hf-token *** --max-num-batched-tokens 9 --hf_tok ***"
    assert without_secrets(words) == shown


def test_server_flags_finds_the_server_by_port(closed_port):
    url = f"http://127.0.0.1:{closed_port}/v1"
    assert server_flags(url) is None
    words = ["vllm", "serve", "m", "--port", str(closed_port), "--api-key", "k1", "--max-num-seqs", "8"]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words]) as process:
        deadline = time.monotonic() + 5
        while not (found := server_flags(url)) and time.monotonic() < deadline:
            time.sleep(0.01)
        other = server_flags(f"http://10.1.2.3:{closed_port}/v1")
        process.kill()
    assert found == f"m --port {closed_port} --api-key *** --max-num-seqs 8"
    assert other is None  # another host's port says nothing about this one


@pytest.mark.timing
def test_client_bottleneck_is_reported(tmp_path, capsys, monkeypatch):
    real = Texts.body
    argv = ("--endpoint", "rerank", "--concurrency", "4", "--requests", "12")
    with serving(slow(0.3)) as service:
        row = bench(service, tmp_path, *argv)[1]["rows"][0]
        assert not row["client_limited"] and row["client_cpu"] < 0.6
        assert "[WARN]" not in capsys.readouterr().err

        def busy(self, endpoint, model, k):
            until = time.process_time() + 0.1
            while time.process_time() < until:
                pass
            return real(self, endpoint, model, k)

        monkeypatch.setattr(Texts, "body", busy)
        row = bench(service, tmp_path, *argv)[1]["rows"][0]
    assert row["client_limited"]
    assert "rerank closed 4: the client was the bottleneck" in capsys.readouterr().err


# --- what is sent ---


def test_input_sends_the_users_own_calls(tmp_path, capsys):
    lines = [{"query": f"q{i}", "documents": [f"d{i}{j}" for j in range(i + 1)]} for i in range(6)]
    file = tmp_path / "calls.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    argv = ("--input", str(file), "--endpoint", "rerank", "--concurrency", "1", "--warmup", "0")
    with serving(slow(0.01)) as service:
        code, out = bench(service, tmp_path, *argv, "--requests", "5")
    assert code == 0 and sorted(service.queries) == [f"q{i}" for i in range(6)]  # the check's call is one of them
    pairs = sum(len(body["documents"]) for _, body in service.bodies[1:])
    row = out["rows"][0]
    assert row["ok"] == 5 and row["pairs/s"] * row["window_s"] == pytest.approx(pairs, rel=0.01)
    assert "calls.jsonl: 6 calls of 3.5 documents" in out["texts"]
    assert "sent again" not in capsys.readouterr().err
    with serving(slow(0.01)) as service:
        bench(service, tmp_path, *argv, "--requests", "6")
    assert "the file's 6 calls were sent again" in capsys.readouterr().err
    file.write_text("{}")
    with serving() as service:
        assert bench_rerank.main(["--base-url", service.url, "--input", str(file)]) == 2
    assert "calls.jsonl line 1 is left out: it is not" in capsys.readouterr().err and service.bodies == []


def test_lengths_in_tokens_take_the_served_models_tokenizer(tmp_path, capsys):
    from test_load import byte_level_tokenizer

    known = [w for line in WORDS[:30] for w in (line, f"x {line}")]
    tokenizer = byte_level_tokenizer(tmp_path / "model", known * 5, 2000)
    argv = (
        "--endpoint",
        "rerank",
        "--concurrency",
        "2",
        "--requests",
        "4",
        "--doc-tokens",
        "40-60",
        "--query-tokens",
        "9",
    )
    with serving(root=str(tmp_path / "model")) as service:
        code, out = bench(service, tmp_path, *argv)
    assert code == 0 and "documents of 40-60 tokens" in out["texts"]
    lengths = [len(tokenizer.encode(d).ids) for d in service.documents]
    assert min(lengths) >= 40 and max(lengths) <= 60 and len(set(lengths)) > 5
    assert {len(tokenizer.encode(q).ids) for q in service.queries} == {9}
    with serving() as service:
        assert bench(service, tmp_path, *argv)[0] == 2
        assert "lengths in tokens need --tokenizer FOLDER" in capsys.readouterr().err
        assert bench(service, tmp_path, *argv, "--tokenizer", str(tmp_path / "model"))[0] == 0


# --- page, cost, comparison ---


def test_html_has_what_is_needed_to_repeat_the_run(tmp_path, capsys):
    with serving(slow(0.01)) as service:
        argv = ("--concurrency", "1,2", "--requests", "20", "--html", str(tmp_path / "o.html"), "--price-per-hour", "2")
        out = bench(service, tmp_path, *argv)[1]
    text = (tmp_path / "o.html").read_text("utf-8")
    for value in (
        "model_root",
        "some-checkpoint",
        f"--seed {out['seed']}",
        "per million pairs",
        out["texts"],
        out["date"],
    ):
        assert value in text, value
    assert text.count("<svg") == 1 + 1 + 2 + 3 * 4  # the curve; throughput; latency of two endpoints; three a row


@pytest.mark.timing
def test_compare_of_two_servers_exits_1_on_a_regression(tmp_path, capsys):
    files = []
    for i, delay_s in enumerate((0.05, 0.05, 0.1)):
        with serving(slow(delay_s)) as service:
            argv = ("--endpoint", "rerank", "--concurrency", "2", "--requests", "20", "--runs", "4")
            out = bench(service, tmp_path, *argv)[1]
        assert [row["run"] for row in out["rows"]] == [1, 2, 3, 4]
        files.append(str(tmp_path / f"{i}.json"))
        Path(files[-1]).write_text(json.dumps(out))
    capsys.readouterr()
    assert bench_rerank.main(["--compare", *files[:2], "--fail-over", "30"]) == 0
    assert bench_rerank.main(["--compare", *files, "--fail-over", "30"]) == 1
    shown = capsys.readouterr()
    assert "rerank closed 2: pairs/s" in shown.out and ": worse (-" in shown.out
    assert "regression of more than 30 %: rerank closed 2: p50_ms" in shown.err
    assert bench_rerank.main(["--compare", files[2], files[0], "--fail-over", "30"]) == 0  # faster
    assert bench_rerank.main(["--compare", *files]) == 0  # nothing was to fail


def test_compare_exits_2_where_it_cannot_judge(tmp_path, capsys):
    with serving(slow(0.01)) as service:
        bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "2", "--requests", "20")
    file, bad = str(tmp_path / "out.json"), tmp_path / "bad.json"
    assert bench_rerank.main(["--compare", file, file]) == 0
    assert bench_rerank.main(["--compare", file, file, "--fail-over", "5"]) == 2
    assert "cannot judge rerank closed 2 (one run, use --runs)" in capsys.readouterr().err
    for content in ("{", "{}", "[1]", '{"rows": [{}]}'):
        bad.write_text(content)
        assert bench_rerank.main(["--compare", file, str(bad)]) == 2
    assert bench_rerank.main(["--compare", file, str(tmp_path / "none.json")]) == 2


def test_a_regression_is_told_whatever_comes_after_it(tmp_path):
    names = {}
    for name, rates in {"base": [100, 101, 99], "slow": [50, 51, 49], "one": [100]}.items():
        names[name] = str(tmp_path / name)
        Path(names[name]).write_text(json.dumps({"rows": runs(rates)}))
    for order in (("base", "slow", "one"), ("base", "one", "slow")):
        assert bench_rerank.main(["--compare", *(names[n] for n in order), "--fail-over", "10"]) == 1
    assert bench_rerank.main(["--compare", names["base"], names["one"], "--fail-over", "10"]) == 2


def test_saturate_ends_where_no_call_is_answered(tmp_path, capsys):
    with serving(after_check(status(500))) as service:
        code, out = bench(service, tmp_path, "--endpoint", "rerank", "--saturate", "--requests", "5", "--warmup", "0")
    assert code == 1 and len(out["rows"]) <= 2
    assert "no call succeeded at" in capsys.readouterr().out


def test_a_full_disk_does_not_end_a_measurement(tmp_path, capsys):
    with serving(slow(0.0)) as service:
        argv = ["--endpoint", "rerank", "--concurrency", "1,2", "--requests", "5", "--base-url", service.url]
        assert bench_rerank.main([*argv, "--csv", "/dev/full"]) == 1
    shown = capsys.readouterr()
    assert "No space left on device" in shown.err and shown.out.count("\nrerank    closed") == 2


# --- the program ---


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--concurrency", "1,x"], "1,x"),
        (["--concurrency", "0"], "'0'"),
        (["--rate", "-1"], "'-1'"),
        (["--rate", "nan"], "'nan'"),
        (["--rate", "5", "--concurrency", "5"], "--concurrency"),
        (["--requests", "5", "--seconds", "5"], "--seconds"),
        (["--constant"], "--constant"),
        (["--endpoint", "embed"], "'embed'"),
        (["--docs", "0"], "'0'"),
        (["--doc-words", "4"], "'4'"),
        (["--repeat", "often"], "'often'"),
        (["--timeout-s", "soon"], "'soon'"),
        (["--timeout-s", "0"], "'0'"),
        (["--base-url", "localhost:1"], "localhost:1"),
        (["--base-url", "http://h:port/v1"], "http://h:port/v1"),
        (["--json", "/no/such/folder/o.json"], "/no/such/folder/o.json"),
        (["--csv", "/"], "'/'"),
        (["--what"], "--what"),
        (["--doc-words", "9-5"], "'9-5'"),
        (["--doc-tokens", "lognormal:9"], "'lognormal:9'"),
        (["--doc-words", "9", "--doc-tokens", "9"], "--doc-tokens"),
        (["--tokenizer", "x"], "--tokenizer"),
        (["--input", "x", "--docs", "5"], "--docs"),
        (["--input", "x", "--repeat=query"], "--repeat"),
        (["--slo", "p95=500"], "'p95=500'"),
        (["--slo", "p42=5s"], "'p42=5s'"),
        (["--slo", "p95=0ms"], "'p95=0ms'"),
        (["--slo", "p95=5s", "--rate", "5"], "--rate"),
        (["--slo", "p95=5s", "--requests", "5"], "--requests"),
        (["--saturate", "--runs", "3"], "--runs"),
        (["--compare", "x"], "--compare"),
        (["--compare", "x", "y", "--json", "/dev/null"], "--json: not with --compare"),
        (["--tune", "--price-per-hour", "2"], "--price-per-hour: not with --tune"),
        (["--fail-over", "5"], "--fail-over"),
        (["--target-pairs-s", "0"], "'0'"),
        (["--processes", "0"], "'0'"),
        (["--tune", "PORT"], "'PORT' cannot be tuned; choose from: ENGINES_PER_GPU, API_SERVER_COUNT"),
        (["--tune", "--budget", "30"], "'30' is not a time"),
        (["--tune", "--concurrency", "1,2"], "--concurrency"),
        (["--tune", "--rate", "5"], "--tune"),
        (["--budget", "30m"], "--budget"),
        (["--score-tolerance", "0.1"], "--score-tolerance"),
        (["--shared-query", "--repeat"], "--repeat"),
        (["--input", "x", "--shared-query"], "--shared-query"),
    ],
)
def test_bad_usage_exits_2_and_names_the_value(argv, named, capsys):
    with pytest.raises(SystemExit) as info:
        bench_rerank.main(argv)
    assert info.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_bad_setting_exits_2(capsys, monkeypatch):
    monkeypatch.setenv("PORT", "many")
    with pytest.raises(SystemExit) as info:
        bench_rerank.main([])
    assert info.value.code == 2 and "PORT='many' (environment)" in capsys.readouterr().err


def test_options_in_the_documentation_exist(capsys):
    with pytest.raises(SystemExit):
        bench_rerank.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    known |= {"--cpu-ms", "--delay-ms"}  # of the null server
    known |= {"--renderer-num-workers", "--backend"}  # of vLLM
    known |= set(re.findall(r'"(--[a-z-]+)"', (KIT / "measurements" / "second_instrument.py").read_text("utf-8")))
    text = (KIT / "docs" / "benchmarking.md").read_text("utf-8")
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known
    # Every verdict is explained.
    report = (KIT / "rerank_kit" / "benchmark" / "report.py").read_text("utf-8")
    bounds = set(re.findall(r'return\s+\(?\s*"(\w+|\?)",', report))
    assert len(bounds) == 10 and bounds <= set(re.findall(r"`(\S+?)`", text))


def test_defaults_come_from_the_configuration(monkeypatch):
    monkeypatch.setenv("PORT", "1234")
    monkeypatch.setenv("SERVED_MODEL_NAME", "mine")
    monkeypatch.setenv("TIMEOUT_S", "7")
    args, *_ = arguments.parse_args([])
    assert (args.base_url, args.model, args.timeout_s) == ("http://127.0.0.1:1234/v1", "mine", 7.0)
    args, *_ = arguments.parse_args(["--base-url", "http://h:1/v1/", "--model", "m", "--timeout-s", "3"])
    assert (args.base_url, args.model, args.timeout_s) == ("http://h:1/v1", "m", 3.0)


def test_the_head_is_short_and_the_rest_stands_below_the_table(tmp_path, capsys):
    with serving(slow(0.01)) as service:
        out = bench(service, tmp_path, "--endpoint", "rerank", "--concurrency", "1", "--requests", "5", "--seed", "3")[
            1
        ]
    lines = capsys.readouterr().out.splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("endpoint"))
    assert table <= 6 and lines.index("# --- to repeat it ---") > table
    names = [line[2:].partition(": ")[0] for line in lines if line.startswith("# ")]
    assert set(out) - {"rows", "error_texts", "findings"} <= set(names) and names.count("seed") == 1
    assert lines[-1] == "# seed: 3"


def test_help_is_grouped_and_has_examples(capsys):
    with pytest.raises(SystemExit):
        bench_rerank.main(["--help"])
    shown = capsys.readouterr().out
    for title in ("load:", "texts:", "service:", "output:", "tuning:", "comparison:", "examples"):
        assert f"\n{title}" in shown, title
    assert "{rerank,score,rerank,score}" not in shown


def test_a_run_that_never_began_leaves_no_file(closed_port, tmp_path):
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "csv", "html")]
    assert bench_rerank.main(["--base-url", f"http://127.0.0.1:{closed_port}/v1", *files]) == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "json").write_text("before")
    assert bench_rerank.main(["--base-url", f"http://127.0.0.1:{closed_port}/v1", files[0]]) == 1
    assert (tmp_path / "json").read_text() == "before"


def test_progress_tells_the_time_left():
    gate, level = Gate(), Level("rerank", "closed", 2, 4, 20, None)
    assert level.left_s(gate, 5.0) is None, "the window is not open"
    gate.n[OPENED], gate.n[TAKEN] = 10.0, 9
    assert level.left_s(gate, 15.0) == pytest.approx(15), "5 of 20 calls in 5 s"
    assert Level("rerank", "closed", 2, 4, None, 12.0).left_s(gate, 15.0) == pytest.approx(7)


def test_import_does_nothing(tmp_path):
    bad = tmp_path / "bad.env"
    bad.write_text("PORT=many\n")
    code = "import sys, threading, bench_rerank; assert threading.active_count() == 1; print('requests' in sys.modules)"
    env = os.environ | {"KIT_ENV_FILE": str(bad)}
    done = subprocess.run([sys.executable, "-c", code], cwd=KIT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("load", [["--concurrency", "2,4"], ["--rate", "40,50", "--warmup", "5"]])
def test_ctrl_c_prints_what_was_measured_and_exits_130(load, processes, tmp_path):
    out = tmp_path / "o.json"
    argv = ["--endpoint", "rerank", "--docs", "4", "--seconds", "1.5", *load, "--json", str(out)]
    argv += ["--processes", processes]
    with serving(slow(0.05)) as service:
        command = [sys.executable, "bench_rerank.py", "--base-url", service.url, *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=KIT, start_new_session=True, **pipes) as process:
            lines = []
            while not (lines and lines[-1].startswith("rerank")):
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr.read()
            enough, deadline = len(service.bodies) + 40, time.monotonic() + 20
            while len(service.bodies) < enough and time.monotonic() < deadline:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    level = load[1].split(",")[1]
    cells = rest.splitlines()[0].split()
    assert (
        "# --- to repeat it ---" in rest
        and f"rerank {load[0].replace('--concurrency', 'closed').replace('--rate', 'open')} " in rest
    )
    assert cells[:3] == ["rerank", load[0].replace("--concurrency", "closed").replace("--rate", "open"), level]
    assert cells[-1] == "interrupted" and int(cells[3]) > 3
    rows = json.loads(out.read_text())["rows"]
    assert [row["interrupted"] for row in rows] == [False, True]
    assert rows[1]["req/s"] == pytest.approx(float(cells[6]), abs=0.06) and 0 < rows[1]["window_s"] < 1.4


@pytest.mark.parametrize("wait_s", [0.0, 0.1, 0.3, 0.6])
def test_ctrl_c_while_client_processes_start(wait_s):
    with serving(slow(0.05)) as service:
        argv = ["--endpoint", "rerank", "--docs", "4", "--concurrency", "4", "--seconds", "60", "--processes", "2"]
        command = [sys.executable, "bench_rerank.py", "--base-url", service.url, *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        with subprocess.Popen(command, cwd=KIT, **pipes) as process:
            while "running with 2" not in process.stderr.readline():
                pass
            time.sleep(wait_s)
            os.killpg(process.pid, signal.SIGINT)
            err = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "Traceback" not in err


def test_null_server_answers_both_endpoints(tmp_path, capsys):
    service = Service()
    process, service.url = null_server()
    with process:
        code, out = bench(service, tmp_path, "--concurrency", "1,20", "--requests", str(random.randint(100, 120)))
        process.kill()
    assert code == 0 and out["vllm"] == "null"
    assert all(row["ok"] >= 100 and row["err"] == 0 and row["p99_ms"] > 0 for row in out["rows"])


def test_the_clients_own_names_come_first(monkeypatch):
    """The service that rerank() calls is the one that is measured."""
    for name, value in (("PORT", "4711"), ("API_KEY", "servers"), ("RERANK_BASE_URL", "http://other:1/v1")):
        monkeypatch.setenv(name, value)
    args, key, _ = arguments.parse_args([])
    assert (args.base_url, key) == ("http://other:1/v1", "servers")
    monkeypatch.setenv("RERANK_API_KEY", "callers")
    args, key, _ = arguments.parse_args(["--base-url", "http://third:2"])
    assert args.base_url.startswith("http://third:2") and key == "callers"
