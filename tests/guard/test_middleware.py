"""The guard driven as an ASGI app: access, bodies, caps, metrics; some cases over real sockets with uvicorn."""

import asyncio
import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import until
from guard_app import KIT, RERANK, Inner, documents, metric, one
from hypothesis import given, settings
from hypothesis import strategies as st

from rerank_kit.guard import middleware, paths
from rerank_kit.guard.asked import NVIDIA_PATHS, RERANK_PATHS, SCORE_PATHS
from rerank_kit.guard.fields import FIELDS
from rerank_kit.guard.middleware import Guard

# ---- log ----


def test_the_warning_of_every_score_call_is_logged_once(caplog):
    middleware._once.cache_clear()
    log = logging.getLogger(middleware.SCORE_LOGGER)
    log.filters.clear()
    for _ in range(2):
        Guard(Inner())
    for _ in range(3):
        log.warning("To indicate that %s API, we have moved it", middleware.SCORE_WARNING)
        log.warning("another warning")
    texts = [record.getMessage() for record in caplog.records]
    assert sum(middleware.SCORE_WARNING in text for text in texts) == 1
    assert texts.count("another warning") == 3
    log.filters.clear()


# ---- access ----


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/score", "/metrics", "/ping", "/v1/models", "/docs", "/"])
@pytest.mark.parametrize(
    "sent", [None, "Bearer wrong", "Basic sesame", "sesame", "Bearer", "Bearer sesame2", "Bearer \xff"]
)
def test_guard_wants_key(monkeypatch, path, sent):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    inner = Inner()
    answer = one(Guard(inner), path, documents(), headers={"Authorization": sent} if sent else {})
    assert answer.status == 401 and "Authorization: Bearer" in answer.message
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not inner.calls


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_guard_takes_key(monkeypatch, scheme):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert one(Guard(Inner()), RERANK, documents(), headers={"Authorization": f"{scheme} sesame"}).status == 200


@pytest.mark.parametrize("path", ["/health", "/live", "/ready"])
def test_guard_leaves_probes_open(monkeypatch, path):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert one(Guard(Inner()), path, method="GET").status == 200


CLOSED = ["/", "/docs", "/openapi.json", "/tokenize", "/detokenize", "/invocations", "/pooling", "/classify"]
CLOSED += [
    "/v1/embeddings",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/rerank/rerank",
    "/v1/v1/v1/rerank",
    "/V1/rerank",
]
CLOSED += ["/v1/v1/tokenize", "/v1/metrics", "//docs/", "/v1/models/x", "/metrics2", "/health/x", "/v1/rerank\u0100"]


@pytest.mark.parametrize("path", CLOSED)
def test_guard_closes_path(path):
    inner = Inner()
    answer = one(Guard(inner), path, documents())
    assert answer.status == 404 and "/v1/rerank" in answer.message
    assert not inner.calls


@pytest.mark.parametrize(
    ("sent", "served"),
    [
        ("/v1/rerank/", "/v1/rerank"),
        ("//v1//rerank", "/v1/rerank"),
        ("/v1//rerank//", "/v1/rerank"),
        ("/v1/v1/rerank", "/v1/rerank"),
        ("/v1/v2/rerank", "/v2/rerank"),
        ("/v1/v1/score/", "/v1/score"),
        ("//health/", "/health"),
    ],
)
def test_guard_serves_the_path_that_a_client_means(monkeypatch, sent, served):
    inner = Inner()
    body = documents() if "rerank" in served else {"queries": "q", "documents": ["a"]}
    before = metric("calls_total", route=served, status="2xx")
    assert one(Guard(inner), sent, body).status == 200
    assert inner.calls[0][0] == served and metric("calls_total", route=served, status="2xx") == before + 1
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert one(Guard(inner), sent, body).status == (200 if served == "/health" else 401)
    monkeypatch.delenv("VLLM_API_KEY")
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "1")
    status = one(Guard(inner), "/api" + sent, documents(2), root_path="/api").status
    assert status == (200 if served == "/health" else 413)


def test_guard_says_how_to_set_an_address_that_is_too_long():
    answer = one(Guard(Inner()), "/v1/rerank/v1/rerank", documents())
    assert answer.status == 404 and "set the client's address so that the whole path is /v1/rerank" in answer.message


def test_guard_opens_allowed_paths(monkeypatch):
    monkeypatch.setenv("GUARD_ALLOW_PATHS", "/tokenize, /docs,")
    inner = Inner()
    assert one(Guard(inner), "/tokenize", b"not json").status == 200  # not parsed either
    assert inner.calls[0][2] == b"not json"
    assert one(Guard(inner), "/docs", method="GET").status == 200
    assert one(Guard(inner), "/detokenize").status == 404


def test_guard_knows_root_path(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "1")
    guard = Guard(Inner())
    assert one(guard, "/api/v1/rerank", documents(2), root_path="/api").status == 413
    assert one(guard, "/v1/rerank", documents(2), root_path="/api").status == 413  # a proxy has cut it off
    assert one(guard, "/apiv1/rerank", documents(1), root_path="/api").status == 404


def test_guard_closes_websockets():
    async def case():
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        inner = Inner()
        await Guard(inner)({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
        assert [m["type"] for m in sent] == ["websocket.close"]
        assert not inner.calls

    asyncio.run(case())


def test_live_does_not_ask_engine():
    inner = Inner(error=RuntimeError("dead"))
    assert one(Guard(inner), "/live", method="GET").status == 200
    assert not inner.calls


@pytest.mark.parametrize(("engine", "expected"), [(200, 200), (503, 503), (500, 503), (404, 503)])
def test_ready_asks_engine(engine, expected):
    inner = Inner(status=engine)
    answer = one(Guard(inner), "/ready", method="GET")
    assert answer.status == expected
    assert [path for path, _, _ in inner.calls] == ["/health"]


@pytest.mark.parametrize("sent", ["abc-1", "x" * 128, "a:b/c=d"])
def test_request_id_is_echoed_and_passed_on(sent):
    inner = Inner(headers=[(b"x-request-id", b"inner")])
    answer = one(Guard(inner), RERANK, documents(), headers={"X-Request-ID": sent})
    assert answer.headers["x-request-id"] == sent and answer.n_request_ids == 1
    assert inner.calls[0][1][b"x-request-id"] == sent.encode() + b".n2", "the engine waits for that many pairs"


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "a b", "a\tb", "\xe9"])
def test_request_id_is_made(sent):
    inner = Inner()
    answer = one(Guard(inner), RERANK, documents(), headers={} if sent is None else {"X-Request-ID": sent})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    # vLLM's copy says how many pairs come (call_scheduler.py).
    assert inner.calls[0][1][b"x-request-id"].decode() == answer.headers["x-request-id"] + ".n2"


@pytest.mark.parametrize(("own", "header"), [("mine", b"mine.n2"), ("my own", None), ("号", None), ("x" * 129, None)])
def test_request_id_of_body_stays_in_force(own, header):
    """In vLLM a header would take precedence over the field, so it says the same or nothing."""
    inner = Inner()
    answer = one(Guard(inner), RERANK, documents(request_id=own), headers={"X-Request-ID": "abc"})
    assert inner.calls[0][1].get(b"x-request-id") == header
    assert answer.headers["x-request-id"] == "abc"


class Echoes(Inner):
    """Answers with the id as vLLM makes it of the header."""

    async def __call__(self, scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        given = dict(scope["headers"])[b"x-request-id"].decode()
        self.sent = json.dumps(
            {"id": f"score-{given}", "results": [{"document": {"text": f'"score-{given}"'}}]}
        ).encode()
        head = [(b"content-type", b"application/json"), (b"Content-Length", str(len(self.sent)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": self.sent})


@pytest.mark.parametrize("sent", ["abc", 'a"b\\c', "x.n2", None])
def test_answers_have_the_callers_id_and_not_the_engines(sent):
    inner = Echoes()
    answer = one(Guard(inner), RERANK, documents(), headers={"X-Request-ID": sent} if sent else {})
    data, told = json.loads(answer.body), answer.headers["x-request-id"]
    assert data["id"] == f"score-{told}" and told == (sent or told)
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert data["results"][0]["document"]["text"] == json.loads(inner.sent)["results"][0]["document"]["text"]


def test_request_id_is_on_refusals():
    answer = one(Guard(Inner()), RERANK, b"[]", headers={"X-Request-ID": "abc"})
    assert answer.status == 400 and answer.headers["x-request-id"] == "abc"


# ---- the body ----


def test_body_without_change_passes_as_it_is():
    inner = Inner()
    body = b' {"query" : "q\\u00e9",\n"documents":["a", "b"], "max_tokens_per_doc": 7} '
    assert one(Guard(inner), RERANK, body).status == 200
    assert inner.calls[0][2] == body
    assert inner.calls[0][1][b"content-length"] == str(len(body)).encode()


def test_body_is_not_read_on_other_paths_and_methods(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_BODY_BYTES", "10")
    inner = Inner()
    assert one(Guard(inner), "/v1/models", b"x" * 100, method="GET").status == 200
    assert one(Guard(inner), RERANK, b"x" * 100, method="PUT").status == 200  # vLLM answers 405
    assert [body for _, _, body in inner.calls] == [b"x" * 100] * 2


@pytest.mark.parametrize("path", sorted(paths.SCORING))
def test_defaults_fill_in_what_is_absent_or_null(monkeypatch, path):
    monkeypatch.setenv("GUARD_MAX_TOKENS_PER_DOC", "512")
    monkeypatch.setenv("GUARD_MAX_TOKENS_PER_QUERY", "64")
    inner = Inner()
    text = "Zürich 检索 \u2028 \U0001f600"
    payload = {"query": text, "documents": [text], "max_tokens_per_doc": None, "top_n": None, "x": [None, 1.5]}
    if "ranking" in path:
        payload["passages"] = payload.pop("documents")
    assert one(Guard(inner), path, payload, headers={"Transfer-Encoding": "chunked"}).status == 200
    _, headers, body = inner.calls[0]
    expected = {"queries" if "score" in path else "query": text, "documents": [text], "x": [None, 1.5]}
    expected |= {"use_activation": False} if "ranking" in path else {}
    assert json.loads(body) == {**expected, "max_tokens_per_doc": 512, "max_tokens_per_query": 64}
    assert headers[b"content-length"] == str(len(body)).encode() and b"transfer-encoding" not in headers


def test_defaults_leave_values_of_the_client(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_TOKENS_PER_DOC", "512")
    inner = Inner()
    one(Guard(inner), RERANK, documents(max_tokens_per_doc=0))
    assert json.loads(inner.calls[0][2])["max_tokens_per_doc"] == 0


def test_defaults_are_off_without_setting():
    inner = Inner()
    one(Guard(inner), RERANK, documents(max_tokens_per_doc=None))  # what langchain-cohere sends
    assert json.loads(inner.calls[0][2]) == documents()


@pytest.mark.parametrize("value", [10, -1, 0, "10"])
def test_truncate_prompt_tokens_is_refused(value):
    inner = Inner()
    answer = one(Guard(inner), RERANK, documents(truncate_prompt_tokens=value))
    assert answer.status == 422 and "max_tokens_per_doc" in answer.message
    assert not inner.calls


def test_truncate_prompt_tokens_null_passes():
    assert one(Guard(Inner()), RERANK, documents(truncate_prompt_tokens=None)).status == 200


BAD_BODIES = {
    "empty": b"",
    "text": b"hello",
    "list": b"[1]",
    "null": b"null",
    "cut": b'{"query":"q","documents":["a"',
    "tail": b'{"query":"q"} x',
    "key_twice": b'{"query":"q","query":"r","documents":["a"]}',
    "key_twice_inside": b'{"query":"q","documents":[{"text":"a","text":"b"}]}',
    "nan": b'{"query":"q","documents":["a"],"x":NaN}',
    "infinity": b'{"query":"q","documents":["a"],"x":-Infinity}',
    "1e999": b'{"query":"q","documents":["a"],"x":1e999}',
    "long_integer": b'{"query":"q","x":' + b"9" * 5000 + b"}",
    "latin1": b'{"query":"\xe9"}',
    "utf16": json.dumps(documents()).encode("utf-16"),
    "bom_twice": b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "raw_surrogate": b'{"query":"\xed\xa0\x80"}',
    "surrogate": b'{"query":"\\ud800","documents":["a"]}',
    "surrogate_in_key": b'{"query":"a","\\uDFFF":1}',
    "nested": b'{"query":"q","x":' + b"[" * 40 + b"]" * 40 + b"}",
    "nested_media": b'{"query":"q","x":{"image_url":' + b"[" * 40 + b"]" * 40 + b"}}",
    "nested_deep": b'{"query":"q","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nested_objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_body_gets_400(name):
    inner = Inner()
    guard = Guard(inner)
    answer = one(guard, RERANK, BAD_BODIES[name])
    assert answer.status == 400 and answer.message.startswith("the body ")
    assert len(answer.body) < 800  # what the client sent does not come back whole
    assert not inner.calls and not guard.load.in_flight


def test_surrogate_pair_passes():
    inner = Inner()
    body = b'{"query":"\\ud83d\\ude00","documents":["a"]}'
    assert one(Guard(inner), RERANK, body).status == 200
    assert inner.calls[0][2] == body


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(payload=st.dictionaries(st.text() | st.sampled_from(["query", "documents", "top_n"]), json_values, max_size=6))
def test_any_object_arrives_with_its_values(payload):
    inner = Inner()
    os.environ["GUARD_MAX_TOKENS_PER_DOC"] = "9"
    try:
        guard = Guard(inner)
    finally:
        del os.environ["GUARD_MAX_TOKENS_PER_DOC"]
    for name in FIELDS.keys() - {"query", "documents", "top_n"}:  # these mean something to the guard
        payload.pop(name, None)
    for name in ("query", "documents"):
        value = payload.get(name)
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            del payload[name]
    assert one(guard, RERANK, payload).status == 200
    expected = {k: v for k, v in payload.items() if v is not None}
    assert json.loads(inner.calls[0][2]) == {"max_tokens_per_doc": 9, **expected}
    assert guard.load.in_flight == 0


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=60) | st.text(max_size=60).map(lambda s: b'{"documents":["' + s.encode() + b'"]}'))
def test_any_bytes_get_a_clear_answer(body):
    guard = Guard(Inner())
    assert one(guard, "/score", body).status in (200, 400)
    assert guard.load.in_flight == 0


# ---- caps ----


def test_body_cap_by_length_refuses_before_reading(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_BODY_BYTES", "100")
    guard = Guard(Inner())
    answer = one(guard, RERANK, chunks=[], headers={"Content-Length": "101"})  # a read would wait for ever
    assert answer.status == 413 and "101" in answer.message and "100 (MAX_BODY_BYTES)" in answer.message
    assert one(guard, RERANK, chunks=[], headers={"Content-Length": "9" * 5000}).status == 413


def test_body_cap_while_streaming(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_BODY_BYTES", "100")
    guard = Guard(Inner())
    answer = one(guard, RERANK, chunks=[b"x" * 60, b"x" * 41, AssertionError("read on after the limit")])
    assert answer.status == 413 and "100 (MAX_BODY_BYTES)" in answer.message
    body = json.dumps(documents()).encode().ljust(100)
    assert one(guard, RERANK, chunks=[body[:9], body[9:50], body[50:]]).status == 200


@pytest.mark.parametrize("field", paths.SCORE_FIELDS)
def test_document_cap(monkeypatch, field):
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "3")
    guard = Guard(Inner())
    answer = one(guard, "/v1/score", {field: ["a"] * 4})
    assert answer.status == 413 and "3 (MAX_DOCS_PER_CALL)" in answer.message and field in answer.message
    assert one(guard, "/v1/score", {field: ["a"] * 3}).status == 200


def test_document_cap_counts_content_parts(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "3")
    parts = [{"type": "text", "text": "a"}] * 4
    assert one(Guard(Inner()), RERANK, {"query": "q", "documents": {"content": parts}}).status == 413


@pytest.mark.parametrize(
    "payload",
    [
        {"query": "x" * 11, "documents": ["a"]},
        {"query": "q", "documents": ["a", "x" * 11]},
        {"query": "q", "documents": "x" * 11},
        {"query": "q", "documents": [{"text": "x" * 11}]},
        {"query": "q", "documents": [{"content": [{"type": "text", "text": "x" * 11}]}]},
        {"query": "q", "documents": ["a"], "instruction": "x" * 11},
        {"query": "q", "documents": ["a"], "chat_template_kwargs": {"instruction": "x" * 11}},
        {"query": "检" * 11, "documents": ["a"]},
    ],
)
def test_character_cap(monkeypatch, payload):
    monkeypatch.setenv("GUARD_MAX_CHARS_PER_FIELD", "10")
    answer = one(Guard(Inner()), RERANK, payload)
    assert answer.status == 422 and "11 characters" in answer.message and "10 per text" in answer.message
    shorter = json.loads(json.dumps(payload).replace("x" * 11, "x" * 10).replace("\\u68c0" * 11, "\\u68c0" * 10))
    assert one(Guard(Inner()), RERANK, shorter).status == 200


def test_character_cap_spares_images(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_CHARS_PER_FIELD", "10")
    part = {"type": "image_url", "image_url": {"url": "data:" + "x" * 100}}
    for document in ({"content": [part]}, {"image": part["image_url"]["url"]}):
        answer = one(Guard(Inner()), RERANK, {"query": "q", "documents": [document]})
        assert "holds an image" in answer.message, "the image itself is what is refused, by a service of texts"
    body = {"query": "q", "documents": [{"image": "x" * 11}], "rank_fields": ["image"]}
    assert "rank_fields: image is a key of images" in one(Guard(Inner()), RERANK, body).message


# ---- metrics, log, settings ----


def test_metrics_of_a_call():
    names = ["pairs_total", "call_seconds_count", "call_pairs_sum", "call_bytes_sum"]
    before = {name: metric(name) for name in names}
    calls = metric("calls_total", route=RERANK, status="2xx")
    body = json.dumps(documents(7)).encode()
    one(Guard(Inner()), RERANK, body)
    gained = {name: metric(name) - before[name] for name in names}
    assert gained == {"pairs_total": 7, "call_seconds_count": 1, "call_pairs_sum": 7, "call_bytes_sum": len(body)}
    assert metric("calls_total", route=RERANK, status="2xx") == calls + 1


def test_metrics_of_refusals():
    before = metric("refusals_total", reason="truncate"), metric("calls_total", route=RERANK, status="4xx")
    one(Guard(Inner()), RERANK, documents(truncate_prompt_tokens=1))
    assert metric("refusals_total", reason="truncate") == before[0] + 1
    assert metric("calls_total", route=RERANK, status="4xx") == before[1] + 1


def test_metrics_do_not_grow_with_paths():
    before = metric("calls_total", route="closed", status="4xx")
    for i in range(5):
        one(Guard(Inner()), f"/scan/{i}")
    assert metric("calls_total", route="closed", status="4xx") == before + 5


MULTI_PROCESS = """
import asyncio, os, sys
sys.path[:0] = [{kit!r}, {tests!r}]
from guard_app import Guard, Inner, ask, documents, started
async def main():
    await ask(Guard(Inner()), "/rerank", documents(3))
    guard = Guard(Inner(gate=asyncio.Event()))
    hold = await started(guard, 4)
    print("held", flush=True)
    sys.stdin.readline()
    hold.cancel()
asyncio.run(main())
"""


def test_metrics_add_up_over_api_processes(tmp_path):
    """What vLLM sets up with --api-server-count 2: one folder, a file a process, summed by any of them."""
    from prometheus_client import CollectorRegistry, multiprocess

    code = MULTI_PROCESS.format(kit=str(KIT), tests=str(Path(__file__).parents[1] / "stand_ins"))
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", code], env=env, **pipes) for _ in range(2)]
    try:
        assert [child.stdout.readline() for child in children] == ["held\n"] * 2
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
        value = registry.get_sample_value
        assert value("rerank_guard_calls_total", {"route": "/rerank", "status": "2xx"}) == 2
        assert value("rerank_guard_pairs_total") == 6
        assert value("rerank_guard_pairs_in_flight") == 8
        assert value("rerank_guard_call_pairs_bucket", {"le": "5.0"}) == 2
    finally:
        for child in children:
            child.communicate("\n", timeout=60)


@pytest.mark.parametrize(
    ("sent", "trace"), [(f"00-{'a1' * 16}-{'b2' * 8}-01", "a1" * 16), (f"00-{'A1' * 16}-x", "-"), ("", "-")]
)
def test_slow_call_is_logged_in_one_line(monkeypatch, caplog, sent, trace):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM's logger has its own handler
    monkeypatch.setenv("GUARD_SLOW_CALL_MS", "0.000001")
    guard = Guard(Inner())
    with caplog.at_level(logging.WARNING, "vllm.rerank_guard"):
        one(guard, RERANK, documents(5), headers={"X-Request-ID": "abc", "traceparent": sent})
        one(guard, "/health", method="GET")
        one(guard, RERANK, b"bad")
    # Where another test has imported vLLM, each record is caught twice, and INFO is on.
    [line] = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    assert line.startswith("slow call: /v1/rerank 2xx, 5 pairs, ") and line.endswith(f"request id abc, trace {trace}")


def test_fast_call_is_not_logged(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setenv("GUARD_SLOW_CALL_MS", "60000")
    with caplog.at_level(logging.WARNING, "vllm.rerank_guard"):
        one(Guard(Inner()), RERANK, documents(5))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MAX_DOCS_PER_CALL", "many"),
        ("MAX_BODY_BYTES", "-1"),
        ("MAX_CHARS_PER_FIELD", "1.5"),
        ("MAX_WAIT_S", "nan"),
        ("MAX_WAIT_S", "inf"),
        ("API_SERVERS", "x"),
        ("ALLOW_PATHS", "tokenize"),
    ],
)
def test_bad_setting_stops_the_server(monkeypatch, key, value):
    monkeypatch.setenv(f"GUARD_{key}", value)
    with pytest.raises(ValueError, match=f"GUARD_{key}.*'{value}'"):
        Guard(Inner())


def test_empty_settings_are_off(monkeypatch):
    for key in ("MAX_DOCS_PER_CALL", "MAX_WAIT_S", "MAX_TOKENS_PER_DOC", "ALLOW_PATHS", "API_SERVERS"):
        monkeypatch.setenv(f"GUARD_{key}", "")
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert one(Guard(Inner()), RERANK, documents(3000)).status == 200


def test_import_does_nothing():
    code = (
        "import sys, threading; before = set(sys.modules); import rerank_kit.guard; "
        "heavy = {'msgspec', 'prometheus_client', 'vllm', 'starlette', 'uvicorn', 'torch'} & set(sys.modules); "
        "assert not heavy, heavy; assert threading.active_count() == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=KIT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_guard_knows_every_route_and_field_of_vllm():
    """A release that adds a scoring route or a spelling of documents must fail here, not slip past the limits."""
    folder = Path(find_spec("vllm").origin).parent / "entrypoints"
    routes = re.findall(r'@router\.post\(\s*"([^"]+)"', (folder / "pooling/scoring/api_router.py").read_text())
    assert set(routes) == {*RERANK_PATHS, *SCORE_PATHS}
    assert set(paths.SCORING) == {*routes, *NVIDIA_PATHS}
    protocol = (folder / "pooling/scoring/protocol.py").read_text()
    score_classes = re.findall(r"class Score\w*Request\(ScoringRequestMixin\):(.*?)(?=\nclass |\n\w)", protocol, re.S)
    fields = re.findall(r"^    (\w+): ScoreInput", "\n".join(score_classes), re.M)
    assert set(fields) == set(paths.SCORE_FIELDS)
    assert "partial(engine_client.shutdown, timeout=timeout)" in (folder / "launchers/launcher.py").read_text()


# ---- over real sockets ----


@pytest.fixture
def served(monkeypatch):
    """Start uvicorn, the server under vLLM, around Guard(inner); gives its port."""
    uvicorn = pytest.importorskip("uvicorn")
    running = []

    def start(inner, **env):
        for key, value in env.items():
            monkeypatch.setenv(f"GUARD_{key}", str(value))
        guard = Guard(inner)
        server = uvicorn.Server(uvicorn.Config(guard, port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return guard, server.servers[0].sockets[0].getsockname()[1]

    yield start
    for server, thread in running:
        server.should_exit = server.force_exit = True
        thread.join(10)


def test_socket_refused_body_leaves_the_connection_usable(served):
    _, port = served(Inner(), MAX_BODY_BYTES=1000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(3):
        connection.request("POST", RERANK, b"x" * 5_000_000)
        answer = connection.getresponse()
        assert answer.status == 413 and b"MAX_BODY_BYTES" in answer.read()
        connection.request("POST", RERANK, json.dumps(documents()))
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read() == b"{}"
    connection.close()


def test_socket_chunked_body(served):
    inner = Inner()
    _, port = served(inner, MAX_BODY_BYTES=1000, MAX_TOKENS_PER_DOC=5)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps(documents()).encode()
    connection.request("POST", RERANK, iter([body[:10], body[10:]]))
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read()
    assert json.loads(inner.calls[0][2]) == documents(max_tokens_per_doc=5)
    connection.request("POST", RERANK, iter([b"x" * 600] * 3))
    assert connection.getresponse().status == 413
    connection.close()


def test_socket_disconnect_releases_pairs(served):
    class Listens:
        async def __call__(self, scope, receive, send):
            await receive()
            assert (await receive())["type"] == "http.disconnect"

    guard, port = served(Listens())
    client = socket.create_connection(("127.0.0.1", port))
    body = json.dumps(documents(5)).encode()
    client.sendall(b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    until(lambda: guard.load.in_flight == 5)
    client.close()
    until(lambda: guard.load.in_flight == 0)
