"""server_guard.py: driven as an ASGI app around a small inner app; some cases over real sockets with uvicorn."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import until
from hypothesis import given, settings
from hypothesis import strategies as st

import guard_long
import guard_rules
import server_guard
from guard_rules import Counts, Load, Refusal
from long_documents import Fitter, TooManyWindows
from server_guard import Guard

pytest.importorskip("msgspec")  # both come with vLLM
pytest.importorskip("prometheus_client")

RERANK = "/v1/rerank"
SCOPE = {"type": "http", "method": "POST", "path": RERANK, "headers": []}
KIT = Path(server_guard.__file__).parent


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [*os.environ]:
        if name.startswith("GUARD_") or name == "VLLM_API_KEY":
            monkeypatch.delenv(name)


class Inner:
    """Stands for vLLM: notes what arrives, answers 200 or as told."""

    def __init__(self, status=200, gate=None, error=None, headers=()):
        self.status, self.gate, self.error, self.headers = status, gate, error, list(headers)
        self.calls = []  # (path, headers, body)

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.calls.append((scope["path"], dict(scope["headers"]), body))
        if self.gate:
            await self.gate.wait()
        if self.error:
            raise self.error
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"{}"})


class Answer:
    def __init__(self, messages):
        assert messages, "no answer"
        self.status = messages[0]["status"]
        self.headers = {k.decode(): v.decode() for k, v in messages[0]["headers"]}
        self.n_request_ids = sum(k == b"x-request-id" for k, _ in messages[0]["headers"])
        self.body = b"".join(m.get("body", b"") for m in messages[1:])

    @property
    def message(self):
        """Text of an error in vLLM's format."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        return error["message"]


async def ask(
    app, path=RERANK, body=b"", *, method="POST", headers=None, chunks=None, length=True, root_path="", leaves=False
):
    """One request; chunks = the body in pieces (or functions that give one); None, or leaves = the client leaves."""
    if isinstance(body, (dict, list)):
        body = json.dumps(body).encode()
    pieces = [body] if chunks is None else list(chunks)
    lines = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
    if length and chunks is None:
        lines.append((b"content-length", str(len(body)).encode()))
    scope = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": lines}
    sent = []

    async def receive():
        if not pieces:
            if leaves:
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()  # a client that waits
        piece = pieces.pop(0)
        if callable(piece):
            piece = piece()
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return Answer(sent) if sent else None


def one(app, *args, **kwargs):
    return asyncio.run(ask(app, *args, **kwargs))


def documents(n=2, **more):
    return {"query": "q", "documents": [f"d{i}" for i in range(n)], **more}


def metric(name, **labels):
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(f"rerank_guard_{name}", labels) or 0.0


# ---- long documents ----


class Fake:
    """Stands for long_documents.Fitter: texts above 4 characters are long, a window has 4."""

    blank, template, separate = "", None, False

    def fits_surely(self, query, document, instruction=None):
        return len(document) <= 4

    def fit(self, query, document, instruction=None, limit=0):
        return query, document[:4], len(document) > 4

    def windows(self, query, document, instruction=None, most=0):
        if most and len(document) > 4 * most:
            raise TooManyWindows(most + 1)
        return query, [document[i : i + 4] for i in range(0, len(document), 4)] or [document], False


class Scorer(Inner):
    """Scores a text by its last digit, as vLLM answers."""

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"]
        self.calls.append((scope["path"], dict(scope["headers"]), body))
        if self.gate:
            await self.gate.wait()
        rows = [
            {"index": i, "relevance_score": int(text[-1]) / 10, "document": {"text": text}}
            for i, text in enumerate(json.loads(body)["documents"])
        ]
        text = json.dumps({"results": rows}).encode()
        await send(
            {"type": "http.response.start", "status": self.status, "headers": [(b"content-length", b"%d" % len(text))]}
        )
        await send({"type": "http.response.body", "body": text[:9], "more_body": True})
        await send({"type": "http.response.body", "body": text[9:]})


@pytest.fixture
def scorer(monkeypatch):
    """(inner app, guard around it that knows when a text is long)."""

    def make(default="truncate", status=200):
        monkeypatch.setenv("GUARD_LONG_DOCUMENTS", default)
        inner = Scorer(status)
        guard = Guard(inner)
        guard.long.fitter = Fake()
        return inner, guard

    return make


LONG = {"query": "q", "documents": ["xxx1", "xxx2xxx9xxx3", "xxx5"]}


@pytest.mark.parametrize(("default", "asked"), [("truncate", "chunk"), ("chunk", None), ("error", "chunk")])
def test_chunk_answers_one_score_a_document(scorer, monkeypatch, default, asked):
    monkeypatch.setenv("GUARD_MAX_TOKENS_PER_DOC", "3")  # would cut
    inner, guard = scorer(default)
    answer = one(guard, RERANK, {**LONG, "top_n": 2} | ({"long_documents": asked} if asked else {}))
    assert json.loads(inner.calls[0][2]) == {"query": "q", "documents": ["xxx1", "xxx2", "xxx9", "xxx3", "xxx5"]}
    rows = json.loads(answer.body)["results"]
    assert [(r["index"], r["relevance_score"], r["document"]["text"]) for r in rows] == [
        (1, 0.9, LONG["documents"][1]),
        (2, 0.5, "xxx5"),
    ]
    assert answer.headers["x-rerank-windows"] == "1:3" and "x-rerank-cut" not in answer.headers
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert guard.load.in_flight == 0
    answer = one(guard, RERANK, {"query": "q", "documents": ["xxx1"], "long_documents": "chunk"})
    assert answer.headers["x-rerank-windows"] == "none" and len(json.loads(answer.body)["results"]) == 1


def test_chunk_counts_windows_and_limits_them(scorer, monkeypatch):
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "5")
    inner, guard = scorer("chunk")
    before = metric("pairs_total")
    assert one(guard, RERANK, LONG).status == 200
    assert metric("pairs_total") == before + 5
    answer = one(guard, RERANK, {"query": "q", "documents": ["x" * 24]})
    assert answer.status == 413 and "6 windows or more" in answer.message and len(inner.calls) == 1
    assert guard.load.in_flight == 0
    _, guard = scorer("chunk", status=400)
    answer = one(guard, RERANK, LONG)
    assert answer.status == 400 and len(json.loads(answer.body)["results"]) == 5  # vLLM's own text


def test_windows_are_admitted_as_pairs(scorer, monkeypatch):
    """Twenty calls of one document with five windows each: no more windows in flight than pairs are allowed."""
    monkeypatch.setenv("GUARD_MAX_PAIRS_IN_FLIGHT", "20")
    inner, guard = scorer("chunk")
    inner.gate = asyncio.Event()
    most = 0

    async def watch():
        nonlocal most
        for _ in range(50):
            await asyncio.sleep(0.01)
            most = max(most, guard.load.in_flight)
        inner.gate.set()

    async def all_at_once():
        calls = [ask(guard, RERANK, {"query": "q", "documents": ["xxx1" * 5]}) for _ in range(20)]
        return (await asyncio.gather(watch(), *calls))[1:]

    statuses = [answer.status for answer in asyncio.run(all_at_once())]
    assert statuses.count(200) == 4 and statuses.count(429) == 16
    assert 20 <= most < 40 and guard.load.in_flight == 0


def test_a_client_that_left_holds_no_place_in_the_tokenizers_queue(scorer):
    inner, guard = scorer("chunk")
    started, go = threading.Event(), threading.Event()

    def slow(query, document, instruction=None, most=0):
        started.set()
        go.wait(10)
        return query, ["xxx1"], False

    guard.long.fitter.windows = slow
    body = {"query": "q", "documents": ["xxxxxx"]}

    async def leave_while_waiting():
        first = asyncio.create_task(ask(guard, RERANK, body))
        await asyncio.to_thread(started.wait, 5)
        assert await asyncio.wait_for(ask(guard, RERANK, body, leaves=True), 5) is None
        assert guard.load.in_flight == 1, "only the first call's"
        go.set()
        return await first

    assert asyncio.run(leave_while_waiting()).status == 200
    assert len(inner.calls) == 1 and guard.load.in_flight == 0


def test_lists_in_headers_are_short():
    assert guard_long.listed({3: "", 0: "", 1: ""}) == b"0-1,3"
    assert guard_long.listed({0: ":2", 1: ":2", 2: ":3"}) == b"0-1:2,2:3"
    long = guard_long.listed(dict.fromkeys(range(0, 5000, 2), ""))
    assert len(long) <= guard_long.MAX_LIST_BYTES + 4 and long.endswith(b",...")


def test_an_empty_document_keeps_its_separator_in_every_mode(scorer):
    for mode in ("truncate", "error", "chunk"):
        inner, guard = scorer(mode)
        guard.long.fitter.blank = " "
        with contextlib.suppress(ValueError, IndexError):  # the stand-in reads a score from the text
            one(guard, RERANK, {"query": "q", "documents": ["xxx1", ""]})
        assert json.loads(inner.calls[0][2])["documents"] == ["xxx1", " "], mode


@pytest.mark.parametrize(
    ("default", "body", "documents_sent"),
    [
        ("truncate", {}, ["xxx1", "xxx2", "xxx5"]),
        ("error", {}, LONG["documents"]),
        ("error", {"long_documents": "truncate"}, ["xxx1", "xxx2", "xxx5"]),
        ("chunk", {"long_documents": "truncate"}, ["xxx1", "xxx2", "xxx5"]),
        ("truncate", {"long_documents": "error"}, LONG["documents"]),
        ("truncate", {"max_tokens_per_doc": 0}, LONG["documents"]),
        ("chunk", {"max_tokens_per_doc": 0}, LONG["documents"]),
        ("chunk", {"max_tokens_per_doc": 9}, ["xxx1", "xxx2", "xxx5"]),
    ],
)
def test_the_call_may_choose_what_happens_to_long_documents(scorer, default, body, documents_sent):
    inner, guard = scorer(default)
    answer = one(guard, RERANK, {**LONG, **body})
    sent = json.loads(inner.calls[0][2])
    assert sent["documents"] == documents_sent and "long_documents" not in sent
    cut = documents_sent != LONG["documents"]
    assert answer.headers.get("x-rerank-cut") == ("1" if cut else None)
    assert "x-rerank-windows" not in answer.headers


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"long_documents": "split"}, "long_documents='split' is unknown: allowed is truncate, error, chunk"),
        ({"long_documents": ["chunk"]}, "long_documents=['chunk'] is unknown"),
        ({"long_documents": "chunk", "max_tokens_per_doc": 3}, "max_tokens_per_doc cuts documents"),
        ({"long_documents": "error", "max_tokens_per_doc": 3}, "max_tokens_per_doc cuts documents"),
    ],
)
def test_what_cannot_be_done_with_long_documents_is_refused(scorer, body, said):
    inner, guard = scorer()
    answer = one(guard, RERANK, {**LONG, **body})
    assert answer.status == 422 and said in answer.message and not inner.calls


@pytest.mark.parametrize(("limit", "named"), [(3, "0-2"), (4, "1"), (12, None)])
def test_what_the_limits_cut_in_mode_error_is_named(scorer, limit, named):
    inner, guard = scorer("error")
    guard.long.fitter.head = lambda text, n: text[:n]
    answer = one(guard, RERANK, {**LONG, "max_tokens_per_doc": limit})
    assert answer.headers.get("x-rerank-cut") == named
    assert json.loads(inner.calls[0][2])["documents"] == LONG["documents"], "vLLM cuts them"


def test_chunk_is_refused_where_the_tokenizer_is_not_known(scorer):
    inner, guard = scorer()
    guard.long.fitter = False
    answer = one(guard, RERANK, {**LONG, "long_documents": "chunk"})
    assert answer.status == 422 and "cannot split" in answer.message and not inner.calls
    assert one(guard, RERANK, LONG).status == 200  # vLLM judges


def test_a_wrong_mode_stops_the_server(monkeypatch):
    monkeypatch.setenv("GUARD_LONG_DOCUMENTS", "cut")
    with pytest.raises(ValueError, match="GUARD_LONG_DOCUMENTS='cut'"):
        Guard(Inner())


@pytest.mark.parametrize(
    "more",
    [
        {"continue_final_message": True},  # takes the prompt's end away, where the model is asked for its answer
        {"instruction": ["<|im_start|>"]},  # its control tokens would not be neutralised
        {"instruction": {"a": 1}},
        {"instruction": "Find", "enable_thinking": False},
    ],
)
def test_what_could_change_the_prompt_is_refused(more):
    inner = Inner()
    answer = one(Guard(inner), RERANK, documents(chat_template_kwargs=more))
    assert answer.status == 422 and "nothing else" in answer.message and not inner.calls
    for right in ({"instruction": "Find"}, {"instruction": None}, {}, None):
        assert one(Guard(inner), RERANK, documents(chat_template_kwargs=right)).status == 200


@pytest.mark.parametrize(("sent", "read"), [("5", 5), (5.0, 5), ("5.0", 5), (" 5 ", 5), ("0", 0), (5, 5)])
def test_token_limits_are_read_as_vllm_reads_them(scorer, sent, read):
    _, guard = scorer("truncate")
    call = server_guard.Call({**SCOPE, "root_path": ""})
    payload = documents(max_tokens_per_doc=sent, max_tokens_per_query=sent)
    changed = guard._complete(call, payload)
    assert payload["max_tokens_per_doc"] == payload["max_tokens_per_query"] == read
    assert type(payload["max_tokens_per_doc"]) is int and changed == (type(sent) is not int)
    assert call.mode == ("truncate" if read else "error")


@pytest.mark.parametrize("sent", ["x", 5.5, "5.5", [5], float("inf"), "nan"])
def test_token_limits_that_vllm_refuses_are_left_to_it(sent):
    payload = documents(max_tokens_per_doc=sent)
    Guard(Inner())._complete(server_guard.Call(dict(SCOPE)), payload)
    assert payload["max_tokens_per_doc"] is sent


def test_a_client_that_leaves_a_split_call_is_no_error(scorer):
    """To a client that has left, vLLM answers null."""
    _, guard = scorer("chunk")

    async def answers_null(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"null"})

    guard.app = answers_null
    assert one(guard, RERANK, LONG).body == b"null"


@pytest.mark.parametrize("body", [{"instruction": "Find"}, {"chat_template_kwargs": {"instruction": "Find"}}])
def test_an_instruction_is_refused_by_a_model_that_takes_none(monkeypatch, body):
    inner = Inner()
    assert one(Guard(inner), RERANK, documents(**body)).status == 200
    monkeypatch.setenv("GUARD_TAKES_INSTRUCTION", "0")
    answer = one(Guard(inner), RERANK, documents(**body))
    assert answer.status == 422 and "takes no instruction" in answer.message and len(inner.calls) == 1
    for empty in ({"instruction": None}, {"instruction": ""}, {"chat_template_kwargs": {}}):
        assert one(Guard(inner), RERANK, documents(**empty)).status == 200


@pytest.mark.parametrize("patched", [False, True])
def test_the_guard_reads_characters_also_under_fastokens(checkpoints, monkeypatch, patched):
    """vLLM patches transformers with fastokens, which knows no offsets: the guard needs the plain tokenizer."""
    fastokens = pytest.importorskip("fastokens")
    if patched:
        monkeypatch.setenv("VLLM_USE_FASTOKENS", "1")
        fastokens.patch_transformers()
    try:
        tokenizer = guard_long.plain_tokenizer(str(checkpoints["qwen3"]), False)
        assert tokenizer("yes no", return_offsets_mapping=True)["offset_mapping"]
        assert Fitter(tokenizer, None, 20, separate=True).fit("q", "word " * 99)[2]
    finally:
        if patched:
            fastokens.unpatch_transformers()


# ---- log ----


def test_the_warning_of_every_score_call_is_logged_once(caplog):
    server_guard._once.cache_clear()
    log = logging.getLogger(server_guard.SCORE_LOGGER)
    log.filters.clear()
    for _ in range(2):
        Guard(Inner())
    for _ in range(3):
        log.warning("To indicate that %s API, we have moved it", server_guard.SCORE_WARNING)
        log.warning("another warning")
    texts = [record.getMessage() for record in caplog.records]
    assert sum(server_guard.SCORE_WARNING in text for text in texts) == 1
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
CLOSED += ["/v1/embeddings", "/v1/completions", "/v1/chat/completions", "/v1/rerank/", "//v1/rerank", "/V1/rerank"]
CLOSED += ["/v1/models/x", "/metrics2", "/health/x", "/v1/rerank\u0100"]


@pytest.mark.parametrize("path", CLOSED)
def test_guard_closes_path(path):
    inner = Inner()
    answer = one(Guard(inner), path, documents())
    assert answer.status == 404 and "/v1/rerank" in answer.message
    assert not inner.calls


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
    assert inner.calls[0][1][b"x-request-id"] == sent.encode()


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "a b", "a\tb", "\xe9"])
def test_request_id_is_made(sent):
    inner = Inner()
    answer = one(Guard(inner), RERANK, documents(), headers={} if sent is None else {"X-Request-ID": sent})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert inner.calls[0][1][b"x-request-id"].decode() == answer.headers["x-request-id"]


def test_request_id_of_body_stays_in_force():
    inner = Inner()
    one(Guard(inner), RERANK, documents(request_id="mine"))
    assert b"x-request-id" not in inner.calls[0][1]  # it would win over the field in vLLM


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


@pytest.mark.parametrize("path", sorted(server_guard.SCORING))
def test_defaults_fill_in_what_is_absent_or_null(monkeypatch, path):
    monkeypatch.setenv("GUARD_MAX_TOKENS_PER_DOC", "512")
    monkeypatch.setenv("GUARD_MAX_TOKENS_PER_QUERY", "64")
    inner = Inner()
    text = "Zürich 检索 \u2028 \U0001f600"
    payload = {"query": text, "documents": [text], "max_tokens_per_doc": None, "top_n": None, "x": [None, 1.5]}
    assert one(Guard(inner), path, payload, headers={"Transfer-Encoding": "chunked"}).status == 200
    _, headers, body = inner.calls[0]
    expected = {"query": text, "documents": [text], "x": [None, 1.5]}
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
    "bom": b"\xef\xbb\xbf{}",
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
    assert len(answer.body) < 500  # what the client sent does not come back whole
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
    for name in ("truncate_prompt_tokens", "long_documents"):  # these two mean something to the guard
        payload.pop(name, None)
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


@pytest.mark.parametrize("field", server_guard.SCORE_FIELDS)
def test_document_cap(monkeypatch, field):
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "3")
    guard = Guard(Inner())
    answer = one(guard, "/v1/score", {"query": "q", field: ["a"] * 4})
    assert answer.status == 413 and "3 (MAX_DOCS_PER_CALL)" in answer.message and field in answer.message
    assert one(guard, "/v1/score", {"query": "q", field: ["a"] * 3}).status == 200


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
    assert answer.status == 422 and "11 characters" in answer.message and "10 a text" in answer.message
    shorter = json.loads(json.dumps(payload).replace("x" * 11, "x" * 10).replace("\\u68c0" * 11, "\\u68c0" * 10))
    assert one(Guard(Inner()), RERANK, shorter).status == 200


def test_character_cap_spares_images(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_CHARS_PER_FIELD", "10")
    part = {"type": "image_url", "image_url": {"url": "data:" + "x" * 100}}
    assert one(Guard(Inner()), RERANK, {"query": "q", "documents": [{"content": [part]}]}).status == 200


# ---- admission ----


def run_admission(case, monkeypatch, inner_kwargs=None, **env):
    """Run case(guard, gate, inner): the inner app answers once the gate is set."""
    for key, value in env.items():
        monkeypatch.setenv(f"GUARD_{key}", str(value))

    async def main():
        gate = asyncio.Event()
        inner = Inner(gate=gate, **(inner_kwargs or {}))
        await asyncio.wait_for(case(Guard(inner), gate, inner), 20)

    asyncio.run(main())


async def started(guard, n_pairs, path=RERANK):
    """A call that now waits in the inner app."""
    task = asyncio.create_task(ask(guard, path, documents(n_pairs)))
    before = guard.load.in_flight
    while guard.load.in_flight == before and not task.done():
        await asyncio.sleep(0)
    return task


def test_admission_by_pairs_in_flight(monkeypatch):
    async def case(guard, gate, inner):
        first = [await started(guard, 4), await started(guard, 5)]
        refused = await ask(guard, RERANK, documents(4))
        assert refused.status == 429 and "limit of 12 pairs" in refused.message and "9 pairs" in refused.message
        assert refused.headers["retry-after"] == "1"
        fits = await started(guard, 3)
        assert guard.load.in_flight == 12
        assert len(inner.calls) == 3  # the refused call never got there
        gate.set()
        assert {(await task).status for task in [*first, fits]} == {200}
        assert guard.load.in_flight == 0
        assert (await ask(guard, RERANK, documents(12))).status == 200

    run_admission(case, monkeypatch, MAX_PAIRS_IN_FLIGHT=12)


def test_admission_of_a_call_above_the_limit(monkeypatch):
    async def case(guard, gate, inner):
        small = await started(guard, 1)
        assert (await ask(guard, RERANK, documents(20))).status == 429
        gate.set()
        await small
        gate.clear()
        big = await started(guard, 20)  # nothing else runs
        assert guard.load.in_flight == 20
        assert (await ask(guard, RERANK, documents(1))).status == 429
        gate.set()
        assert (await big).status == 200

    run_admission(case, monkeypatch, MAX_PAIRS_IN_FLIGHT=10)


def test_admission_refuses_unread_when_full(monkeypatch):
    async def case(guard, gate, inner):
        task = await started(guard, 10)
        answer = await ask(guard, RERANK, chunks=[], headers={"Content-Length": "50"})  # a read would wait
        assert answer.status == 429
        gate.set()
        await task

    run_admission(case, monkeypatch, MAX_PAIRS_IN_FLIGHT=10)


def test_admission_counts_after_the_whole_body(monkeypatch):
    """Two calls that are read at the same time do not both take the last room."""

    async def case(guard, gate, inner):
        body = json.dumps(documents(6)).encode()
        hold = await started(guard, 3)
        tasks = [asyncio.create_task(ask(guard, RERANK, chunks=[body[:5], body[5:]])) for _ in range(2)]
        await asyncio.sleep(0.05)
        gate.set()
        assert sorted([(await task).status for task in tasks]) == [200, 429]
        await hold

    run_admission(case, monkeypatch, MAX_PAIRS_IN_FLIGHT=10)


@pytest.mark.parametrize(
    ("path", "payload", "pairs"),
    [
        (RERANK, {"query": "q", "documents": ["a"] * 7}, 7),
        (RERANK, {"query": "q", "documents": "a"}, 1),
        (RERANK, {"query": "q", "documents": {"content": []}}, 1),
        (RERANK, {"query": "q"}, 1),
        ("/v2/rerank", {"query": "q", "documents": [{"text": "a"}] * 3}, 3),
        ("/score", {"text_1": "q", "text_2": ["a"] * 5}, 5),
        ("/score", {"text_1": ["q"] * 5, "text_2": ["a"] * 5}, 5),
        ("/score", {"data_1": "q", "data_2": "a"}, 1),
        ("/v1/score", {"queries": "q", "items": ["a"] * 6}, 6),
        ("/v1/score", {"queries": "q", "documents": ["a"] * 2, "text_1": "q", "text_2": ["a"] * 9}, 9),
    ],
)
def test_pairs_of_a_call(monkeypatch, path, payload, pairs):
    async def case(guard, gate, inner):
        task = asyncio.create_task(ask(guard, path, payload))
        await asyncio.sleep(0.02)
        assert guard.load.in_flight == pairs == metric("pairs_in_flight")
        gate.set()
        await task
        assert guard.load.in_flight == 0 == metric("pairs_in_flight")

    run_admission(case, monkeypatch)


def test_pairs_come_back_after_an_exception(monkeypatch):
    async def case(guard, gate, inner):
        task = await started(guard, 5)
        gate.set()
        with pytest.raises(RuntimeError, match="boom"):
            await task
        assert guard.load.in_flight == 0 and not guard.tasks

    before = metric("calls_total", route=RERANK, status="5xx")
    run_admission(case, monkeypatch, {"error": RuntimeError("boom")})
    assert metric("calls_total", route=RERANK, status="5xx") == before + 1


def test_pairs_come_back_after_cancellation(monkeypatch):
    async def case(guard, gate, inner):
        task = await started(guard, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert guard.load.in_flight == 0 and not guard.tasks

    run_admission(case, monkeypatch)


def test_pairs_come_back_when_the_client_leaves():
    class Cancels:
        """As vLLM's with_cancellation: waits for the scores or for a disconnect, then answers null."""

        async def __call__(self, scope, receive, send):
            assert (await receive())["type"] == "http.request"
            assert (await receive())["type"] == "http.disconnect"
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"null"})

    before = metric("calls_total", route=RERANK, status="aborted"), metric("pairs_total")
    guard = Guard(Cancels())
    guard.load._busy_s = 100.0  # any served pair would now give a sample
    assert one(guard, RERANK, documents(5), leaves=True).body == b"null"  # it came as far as the inner app
    assert guard.load.in_flight == 0 and guard.load.pairs_per_s == 0
    assert metric("calls_total", route=RERANK, status="aborted") == before[0] + 1
    assert metric("pairs_total") == before[1]


def test_call_without_an_answer_counts_as_aborted():
    async def silent(scope, receive, send):
        await receive()

    before = metric("calls_total", route=RERANK, status="aborted")
    guard = Guard(silent)
    assert one(guard, RERANK, documents(5)) is None
    assert metric("calls_total", route=RERANK, status="aborted") == before + 1
    assert guard.load.in_flight == 0


def test_client_that_leaves_while_it_sends_is_not_passed_on():
    inner = Inner()
    guard = Guard(inner)
    assert one(guard, RERANK, chunks=[b'{"query":', None]) is None
    assert not inner.calls and not guard.load.in_flight


def test_pairs_come_back_with_the_first_byte_of_the_answer():
    """A client that reads slowly holds no pairs: the engine's work is done."""
    seen = []

    async def slow_reader(message):
        seen.append((message["type"], guard.load.in_flight))

    async def receive():
        return {"type": "http.request", "body": json.dumps(documents(5)).encode()}

    guard = Guard(Inner())
    asyncio.run(guard({"type": "http", "method": "POST", "path": RERANK, "headers": []}, receive, slow_reader))
    assert seen == [("http.response.start", 0), ("http.response.body", 0)]


def test_accounting_is_exact_under_chaos(monkeypatch):
    rng = random.Random(3)
    seen = []

    async def inner(scope, receive, send):
        size = len(json.loads((await receive())["body"])["documents"])
        seen.append((size, guard.load.in_flight))
        await asyncio.sleep(rng.random() * 0.003)
        if rng.random() < 0.3:
            raise RuntimeError("boom")
        await send({"type": "http.response.start", "status": rng.choice([200, 400, 500]), "headers": []})
        if rng.random() < 0.2:
            raise RuntimeError("boom in the answer")
        await send({"type": "http.response.body", "body": b""})

    async def client():
        for _ in range(20):
            task = asyncio.create_task(ask(guard, RERANK, documents(rng.randint(1, 40))))
            await asyncio.sleep(rng.random() * 0.002)
            if rng.random() < 0.3:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def main():
        await asyncio.gather(*[client() for _ in range(30)])

    monkeypatch.setenv("GUARD_MAX_PAIRS_IN_FLIGHT", "60")
    guard = Guard(inner)
    asyncio.run(main())
    assert len(seen) > 100
    assert all(in_flight <= 60 for _, in_flight in seen)
    assert max(in_flight for _, in_flight in seen) > 50  # the room was used
    assert guard.load.in_flight == 0 and not guard.tasks


def test_share_of_each_api_process(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("GUARD_MAX_PAIRS_IN_FLIGHT", "10")
    monkeypatch.setenv("GUARD_API_SERVERS", "4")
    guard = Guard(Inner())
    assert guard.load.max_pairs == 3  # rounded up
    assert guard.load.first_pairs == server_guard.FIRST_PAIRS // 4


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def loaded(max_pairs=0, max_wait_s=10.0, first_pairs=100):
    clock = Clock()
    return Load(max_pairs, max_wait_s, first_pairs, clock, trusted_samples=1), clock


@pytest.fixture
def two_processes(tmp_path):
    """The Loads of two API processes of one service, with a clock in common."""
    clock = Clock()
    child = subprocess.Popen(["sleep", "600"])
    died = struct.pack("6d", 0, 5000, 0, 0, 0, 0)  # a server's whose folder this was before
    (tmp_path / f"guard-1-1-{child.pid}.load").write_bytes(died)
    made = [Counts(str(tmp_path), 2, clock, pid) for pid in (os.getpid(), child.pid)]
    yield *(Load(0, 2.0, 100, clock, trusted_samples=1, counts=one) for one in made), clock
    child.kill()
    child.wait()


def test_api_processes_know_what_the_others_hold(two_processes):
    """Seen on an H100 with four of them: the kernel gives one process most connections, and what it had measured as
    its own speed, with few connections, refused calls that would have waited half a second."""
    busy, quiet, clock = two_processes
    for _ in range(40):  # 100 pairs/s, 15 of 16 by one process
        busy.take(75)
        quiet.take(5)
        clock.now += 0.8
        busy.release(75, True)
        quiet.release(5, True)
    assert busy.pairs_per_s == pytest.approx(100) and quiet.pairs_per_s == pytest.approx(100, rel=0.1)
    for _ in range(20):  # now the other one has all: 1.5 s of work
        quiet.take(8)
    assert quiet.in_flight == 160 and busy.in_flight == 0
    busy.take(60)
    for load in (busy, quiet):  # 2.2 s of work, whoever holds it
        with pytest.raises(Refusal, match=r"220 pairs are in flight, about 2\.2 s of work"):
            load.take(1)
    clock.now += 1.6
    for _ in range(20):
        quiet.release(8, True)
    busy.take(100)  # 0.6 s of work
    assert busy.wait_s == pytest.approx(1.6, rel=0.05)


def test_api_processes_share_a_limit_of_pairs(two_processes):
    first, second, _ = two_processes
    first.max_pairs = second.max_pairs = 100
    first.take(70)
    with pytest.raises(Refusal, match="limit of 100 pairs"):
        second.take(40)
    second.take(30)
    first.release(70, True)
    second.take(70)
    assert (first.in_flight, second.in_flight) == (0, 100)


def test_api_processes_never_exceed_a_limit_together(two_processes, monkeypatch):
    """Another process wants to take a call just after this one has looked at what is in flight."""
    first, second, _ = two_processes
    first.max_pairs = second.max_pairs = 100
    first.take(10)
    look, once = first.counts.in_flight, [60]

    def look_and_be_overtaken():
        found = look()
        if once:
            with contextlib.suppress(Refusal):
                second.take(once.pop())
        return found

    monkeypatch.setattr(first.counts, "in_flight", look_and_be_overtaken)
    with contextlib.suppress(Refusal):
        first.take(60)
    assert not once and first.in_flight + second.in_flight == 70


def test_idle_time_of_another_process_lowers_no_speed(two_processes):
    busy, quiet, clock = two_processes
    serve(busy, clock, 100, 1.0)
    serve(quiet, clock, 100, 1.0)
    clock.now += 1000
    serve(busy, clock, 100, 1.0)
    clock.now += 1000
    serve(quiet, clock, 100, 1.0)
    assert busy.pairs_per_s == pytest.approx(100) and quiet.pairs_per_s == pytest.approx(100)


def test_busy_time_that_cannot_be_told_apart_is_no_sample(two_processes):
    """Bursts of both, and one late call of the other each: it once saw twice the busy time and half of the speed."""
    busy, quiet, clock = two_processes
    serve(busy, clock, 100, 1.0)
    serve(quiet, clock, 100, 1.0)
    assert quiet.pairs_per_s == pytest.approx(100)
    for _ in range(8):
        clock.now += 30
        quiet.take(10)
        for _ in range(7):
            serve(busy, clock, 100, 1.0)
        quiet.release(10, True)
    assert busy.pairs_per_s == pytest.approx(100, rel=0.02)
    for _ in range(8):
        clock.now += 30  # not looked at by `quiet`, which is busy for a part of that time
        for _ in range(3):
            serve(busy, clock, 100, 1.0)
        serve(quiet, clock, 300, 3.0)
    assert quiet.pairs_per_s == pytest.approx(100, rel=0.05)


def serve(load, clock, n_pairs, seconds, served=True):
    load.take(n_pairs)
    clock.now += seconds
    load.release(n_pairs, served)


def test_load_learns_speed_over_busy_time():
    load, clock = loaded()
    serve(load, clock, 80, 0.5)
    assert load.pairs_per_s == 0  # too short to say
    clock.now += 1000  # idle
    serve(load, clock, 80, 0.5)
    assert load.pairs_per_s == 160
    for _ in range(30):
        serve(load, clock, 200, 1.0)
    assert load.pairs_per_s == pytest.approx(200, rel=0.01)


def test_load_learns_nothing_from_a_first_call_that_compiles():
    """Seen on a GPU: the start's own probe took a second, and 64 pairs then looked like 13.9 s of work."""
    load, clock = loaded(first_pairs=1000)
    serve(load, clock, 1, 5.0)
    assert load.pairs_per_s == 0
    load.take(500)  # not refused for its wait
    clock.now += 1
    load.release(500, True)
    assert load.pairs_per_s == 500


def test_load_learns_one_sample_at_a_time():
    load, clock = loaded()
    serve(load, clock, 100, 1.0)
    serve(load, clock, 200, 1.0)
    assert load.pairs_per_s == pytest.approx(100 + guard_rules.FASTER_WEIGHT * 100)


@pytest.mark.parametrize("compile_s", [0.0, 4.0, 8.0])
def test_load_is_not_fooled_by_the_start_of_a_burst(compile_s):
    """Eight calls come at once after idle time; the first answer comes late, the others at once behind it."""
    load, clock = loaded(first_pairs=10_000)
    for _ in range(8):
        load.take(32)
    clock.now += 1.0 + compile_s
    for _ in range(8):
        load.release(32, True)
        clock.now += 0.01
        load.take(32)  # must never be refused: the work in flight is one second's
    for _ in range(30):
        clock.now += 0.125
        load.release(32, True)
        load.take(32)
    assert load.pairs_per_s == pytest.approx(256, rel=0.15)


def test_load_does_not_trust_the_samples_of_a_warm_up():
    """Ten seconds of compilation in the first burst, then the real speed: no call of the second burst is refused."""
    clock = Clock()
    load = Load(0, 10.0, 4096, clock)
    for _ in range(8):
        load.take(64)
    clock.now += 10.0
    for _ in range(8):
        load.release(64, True)
    assert 0 < load.pairs_per_s < 60
    for _ in range(26):
        load.take(32)  # 832 pairs: 16 s at the speed of the warm-up
    for _ in range(60):
        clock.now += 0.07
        load.release(32, True)
        load.take(32)
    assert load.pairs_per_s > 350
    with pytest.raises(Refusal):  # by now it limits again
        for _ in range(300):
            load.take(32)


def test_load_is_not_slowed_by_small_calls():
    load, clock = loaded(max_wait_s=4)
    serve(load, clock, 100, 1.0)
    for _ in range(100):
        serve(load, clock, 1, 0.1)  # 10 a second, but nobody waited
    assert load.pairs_per_s == 100


def test_load_is_slowed_when_calls_wait():
    load, clock = loaded(max_wait_s=4)
    serve(load, clock, 100, 1.0)
    for _ in range(30):
        serve(load, clock, 20, 2.0)  # documents have grown
    assert load.pairs_per_s == pytest.approx(10, rel=0.01)


def test_load_ignores_failed_calls():
    load, clock = loaded()
    serve(load, clock, 100, 1.0)
    serve(load, clock, 5000, 0.1, served=False)
    serve(load, clock, 100, 0.9)
    assert load.pairs_per_s == 100


def test_load_refuses_by_wait():
    load, clock = loaded(max_wait_s=4)
    serve(load, clock, 100, 1.0)
    load.take(390)
    load.take(30)  # 3.9 s ahead of it
    assert load.wait_s == 4.2
    with pytest.raises(Refusal, match=r"420 pairs are in flight, about 4\.2 s of work.*wait 4 s at most") as refused:
        load.take(1)
    assert (refused.value.status, refused.value.reason) == (429, "wait")
    assert refused.value.retry_s == pytest.approx(0.2)
    assert load.in_flight == 420


def test_load_says_when_a_call_will_fit():
    load, clock = loaded(max_pairs=500, max_wait_s=0)
    serve(load, clock, 100, 1.0)
    load.take(450)
    with pytest.raises(Refusal) as refused:
        load.take(350)
    assert refused.value.retry_s == pytest.approx(3)  # 300 pairs too many at 100 a second


def test_load_before_the_first_sample():
    load, _ = loaded(first_pairs=100)
    load.take(90)
    with pytest.raises(Refusal, match="limit of 100 pairs"):
        load.take(11)
    load.take(10)


def test_load_without_limits():
    load, _ = loaded(max_wait_s=0)
    for _ in range(100):
        load.take(10_000)
    assert load.in_flight == 1_000_000


@pytest.mark.parametrize(("retry_s", "header"), [(0.01, "1"), (2.2, "3"), (1e6, "60")])
def test_retry_after_is_whole_seconds_within_a_minute(monkeypatch, retry_s, header):
    guard = Guard(Inner())

    def busy(n_pairs):
        raise Refusal(429, "wait", "busy", retry_s=retry_s)

    monkeypatch.setattr(guard.load, "check", busy)
    assert one(guard, RERANK, documents()).headers["retry-after"] == header


def test_refusals_are_fast(monkeypatch):
    async def case(guard, gate, inner):
        hold = await started(guard, 10)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            assert (await ask(guard, RERANK, documents(32))).status == 429
            times.append(time.perf_counter() - start)
        assert sorted(times)[100] < 0.005
        gate.set()
        await hold

    run_admission(case, monkeypatch, MAX_PAIRS_IN_FLIGHT=10)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer: minutes of load in a moment, the same every time."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def jump(timeout):
            self.now += timeout or 0
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.now


def overload(guard_of, speed_at, *, n_clients, sizes, seconds=120, seed=0):
    """Closed loop of n_clients on a model of the engine: first in, first out, speed_at(time) pairs a second.

    Clients wait for Retry-After when they are refused. Returns [(end, latency, pairs)] of the served calls and the
    number of refused ones.
    """
    loop = VirtualLoop()
    rng = random.Random(seed)
    busy_until, served, n_refused = 0.0, [], 0

    async def engine(scope, receive, send):
        nonlocal busy_until
        n_pairs = len(json.loads((await receive())["body"])["documents"])
        for _ in range(n_pairs):
            busy_until = max(busy_until, loop.time())
            busy_until += 1 / speed_at(busy_until)
        await asyncio.sleep(busy_until - loop.time())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def client(guard):
        nonlocal n_refused
        await asyncio.sleep(rng.random())
        while (start := loop.time()) < seconds:
            n_pairs = rng.choice(sizes)
            answer = await ask(guard, RERANK, documents(n_pairs))
            if answer.status == 200:
                served.append((loop.time(), loop.time() - start, n_pairs))
            else:
                n_refused += 1
                assert answer.status == 429
                await asyncio.sleep(int(answer.headers["retry-after"]) * (1 + 0.2 * rng.random()))

    async def main():
        guard = guard_of(engine)
        guard.load._clock, guard.load._last = loop.time, 0.0
        guard.load.counts._clock, guard.load.counts._own[5] = loop.time, 0.0
        await asyncio.gather(*[client(guard) for _ in range(n_clients)])
        assert guard.load.in_flight == 0

    with contextlib.closing(loop):
        loop.run_until_complete(main())
    return served, n_refused


def goodput(served, begin, end):
    return sum(n_pairs for at, _, n_pairs in served if begin <= at < end) / (end - begin)


def p99_s(served, begin, end):
    latencies = sorted(latency for at, latency, _ in served if begin <= at < end)
    return latencies[int(len(latencies) * 0.99)]


@pytest.mark.parametrize("limits", [{"MAX_WAIT_S": 3}, {"MAX_PAIRS_IN_FLIGHT": 300}, {"MAX_WAIT_S": 10}])
@pytest.mark.parametrize("sizes", [[32], [1, 10, 100]])
def test_overload_keeps_goodput_and_latency(monkeypatch, limits, sizes):
    for key, value in limits.items():
        monkeypatch.setenv(f"GUARD_{key}", str(value))
    served, n_refused = overload(Guard, lambda now: 100, n_clients=120, sizes=sizes, seconds=80)  # 4 fill the engine
    assert n_refused > 500
    assert goodput(served, 20, 80) >= 95
    bound_s = limits.get("MAX_WAIT_S", 3) * 1.25 + max(sizes) / 100
    assert p99_s(served, 30, 80) <= bound_s


def test_overload_follows_a_slower_engine(monkeypatch):
    """Documents grow tenfold after 20 s: the wait comes back under the limit, and nothing is lost."""
    monkeypatch.setenv("GUARD_MAX_WAIT_S", "4")
    served, _ = overload(Guard, lambda now: 200 if now < 20 else 20, n_clients=100, sizes=[10], seconds=160)
    assert goodput(served, 10, 20) >= 190
    assert goodput(served, 30, 160) >= 19
    assert p99_s(served, 100, 160) <= 4 * 1.25 + 10 / 20


def test_overload_follows_a_faster_engine(monkeypatch):
    monkeypatch.setenv("GUARD_MAX_WAIT_S", "4")
    served, _ = overload(Guard, lambda now: 20 if now < 20 else 200, n_clients=150, sizes=[10], seconds=60)
    assert goodput(served, 40, 60) >= 190


# ---- stopping ----


class Engine:
    """Stands for vLLM's engine client."""

    def __init__(self, guard):
        self.guard, self.calls = guard, []  # calls: (pairs in flight, timeout)

    def shutdown(self, timeout=None):
        self.calls.append((self.guard.load.in_flight, timeout))


async def with_lifespan(guard):
    """Give the guard the app's state as vLLM does; returns the engine client."""
    engine = Engine(guard)
    state = type("State", (), {"engine_client": engine})
    scope = {"type": "lifespan", "app": type("App", (), {"state": state})}
    guard.app, inner = lifespan_app, guard.app
    await guard(scope, None, None)
    guard.app = inner
    return engine


async def lifespan_app(scope, receive, send):
    assert scope["type"] == "lifespan"


class Dying(Inner):
    """vLLM whose engine dies during the call: 500 in its own words, headers first."""

    errored = True

    async def __call__(self, scope, receive, send):
        scope["app"].state.engine_client.errored = self.errored
        await super().__call__(scope, receive, send)


@pytest.mark.parametrize("errored", [True, False])
def test_calls_that_a_dying_engine_takes_along_may_go_elsewhere(errored):
    """503 tells a balancer and the client to ask another server; an error of the call itself stays 500."""
    inner = Dying(500)
    inner.errored = errored
    guard = Guard(inner)
    app = type("App", (), {"state": type("State", (), {"engine_client": Engine(guard)})})

    async def ask_in_app(scope, receive, send):
        await guard({**scope, "app": app}, receive, send)

    before = metric("refusals_total", reason="dead")
    answer = one(ask_in_app, RERANK, documents(3))
    assert guard.load.in_flight == 0
    if errored:
        assert answer.status == 503 and "another server" in answer.message and answer.headers["retry-after"] == "5"
        assert metric("refusals_total", reason="dead") == before + 1
    else:
        assert answer.status == 500 and answer.body == b"{}"


def test_answers_name_the_version(monkeypatch):
    assert "x-rerank-version" not in one(Guard(Inner()), RERANK, documents()).headers
    monkeypatch.setenv("GUARD_VERSION", "0123456789ab")
    monkeypatch.setenv("GUARD_RESTARTS", "3")
    guard = Guard(Inner())
    for path, method in ((RERANK, "POST"), ("/live", "GET"), ("/nothing", "GET")):
        assert one(guard, path, documents(), method=method).headers["x-rerank-version"] == "0123456789ab"
    assert metric("restarts") == 3 and metric("version", version="0123456789ab") == 1
    assert abs(metric("start_time_seconds") - time.time()) < 60


def test_stop_waits_for_calls_and_refuses_new_ones(monkeypatch):
    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call = await started(guard, 5)
        stop = asyncio.create_task(asyncio.to_thread(engine.shutdown, timeout=30))
        await asyncio.sleep(0.15)
        assert not engine.calls
        refused = await ask(guard, RERANK, documents())
        assert refused.status == 503 and refused.headers["retry-after"] == str(server_guard.DRAIN_RETRY_S)
        ready = await ask(guard, "/ready", method="GET")
        assert ready.status == 503 and "stopping" in ready.message
        assert (await ask(guard, "/live", method="GET")).status == 200
        gate.set()
        assert (await call).status == 200
        await stop
        [(in_flight, timeout)] = engine.calls
        assert in_flight == 0 and 25 < timeout <= 30

    run_admission(case, monkeypatch)


def test_stop_ends_what_is_left_at_the_deadline(monkeypatch):
    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call = await started(guard, 5)  # its gate never opens
        await asyncio.to_thread(engine.shutdown, timeout=0.2)
        assert engine.calls == [(5, 1.0)]
        answer = await call
        assert answer.status == 503 and "stopping" in answer.message
        assert guard.load.in_flight == 0 and not guard.tasks

    run_admission(case, monkeypatch)


@pytest.mark.timeout(20)
def test_stop_ends_calls_that_are_still_sent_or_never_read():
    """Else the HTTP server waits for them without end, and KILL ends it."""

    async def main():
        guard = Guard(Inner())
        engine = await with_lifespan(guard)
        sent, never = [], asyncio.Event()
        pieces = [{"type": "http.request", "body": b'{"query', "more_body": True}]

        async def half_a_body():
            return pieces.pop() if pieces else await never.wait()

        async def whole_body():
            return {"type": "http.request", "body": json.dumps(documents()).encode()}

        async def note(message):
            sent.append(message)

        async def nobody_reads(message):
            if message["type"] == "http.response.body":
                await never.wait()

        sends = asyncio.create_task(guard(SCOPE, half_a_body, note))
        reads = asyncio.create_task(guard(SCOPE, whole_body, nobody_reads))
        while pieces or len(guard.tasks) < 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert guard.load.in_flight == 0, "neither holds pairs"
        await asyncio.to_thread(engine.shutdown, timeout=0.2)
        _, waits = await asyncio.wait((sends, reads), timeout=2)
        assert not waits and not guard.tasks
        assert sent[0]["status"] == 503 and sends.exception() is None and reads.cancelled()

    asyncio.run(main())


def test_an_unexpected_error_is_answered_with_our_headers(monkeypatch):
    """vLLM's handler for it stands outside all middleware; the error itself goes on to its log."""
    monkeypatch.setenv("GUARD_VERSION", "0123456789ab")
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps(documents()).encode()}

    async def note(message):
        sent.append(message)

    with pytest.raises(RuntimeError, match="boom"):
        asyncio.run(Guard(Inner(error=RuntimeError("boom")))(SCOPE, receive, note))
    answer = Answer(sent)
    assert answer.status == 500 and answer.headers["x-rerank-version"] == "0123456789ab"
    assert answer.headers["x-request-id"] in answer.message and "boom" not in answer.message


def test_a_client_that_reads_slowly_is_no_slow_call():
    before = metric("call_seconds_sum")

    async def main():
        async def receive():
            return {"type": "http.request", "body": json.dumps(documents()).encode()}

        async def reads_slowly(message):
            await asyncio.sleep(0.5 if message["type"] == "http.response.body" else 0)

        await Guard(Inner())(SCOPE, receive, reads_slowly)

    asyncio.run(main())
    assert 0 < metric("call_seconds_sum") - before < 0.3


def test_stop_of_several_processes_ends_before_the_parent_kills_them(monkeypatch):
    monkeypatch.setenv("GUARD_API_SERVERS", "4")

    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call, began = await started(guard, 5), time.monotonic()
        await asyncio.to_thread(engine.shutdown, timeout=2.2)
        assert (await call).status == 503 and time.monotonic() - began < 1.5

    run_admission(case, monkeypatch)


def test_stop_does_not_answer_twice():
    async def starts_and_hangs(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def main():
        guard = Guard(starts_and_hangs)
        sent = []

        async def receive():
            return {"type": "http.request", "body": json.dumps(documents()).encode()}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": RERANK, "headers": []}
        call = asyncio.create_task(guard(scope, receive, send))
        while not sent:
            await asyncio.sleep(0)
        guard.draining = True
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(sent) == 1

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [0, None])
def test_stop_without_timeout_does_not_wait(monkeypatch, timeout):
    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call = await started(guard, 5)
        await asyncio.to_thread(engine.shutdown, timeout=timeout)
        assert engine.calls == [(5, timeout)]
        assert (await call).status == 503

    run_admission(case, monkeypatch)


def test_stop_from_the_loop_does_not_block_it(monkeypatch):
    async def case(guard, gate, inner):
        engine = await with_lifespan(guard)
        call = await started(guard, 5)
        start = time.perf_counter()
        engine.shutdown(timeout=10)
        assert time.perf_counter() - start < 5
        gate.set()
        await call

    run_admission(case, monkeypatch)


def test_stop_refuses_calls_whose_body_is_still_read():
    def last_piece():
        guard.draining = True
        return body[5:]

    body = json.dumps(documents()).encode()
    inner = Inner()
    guard = Guard(inner)
    assert one(guard, RERANK, chunks=[body[:5], last_piece]).status == 503
    assert not inner.calls and not guard.load.in_flight


def test_guard_runs_without_engine_client():
    async def main():
        guard = Guard(lifespan_app)
        await guard({"type": "lifespan"}, None, None)

    asyncio.run(main())


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
from test_server_guard import Guard, Inner, ask, documents, started
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

    code = MULTI_PROCESS.format(kit=str(KIT), tests=str(Path(__file__).parent))
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
            child.communicate("\n", timeout=20)


@pytest.mark.parametrize(
    ("sent", "trace"), [(f"00-{'a1' * 16}-{'b2' * 8}-01", "a1" * 16), (f"00-{'A1' * 16}-x", "-"), ("", "-")]
)
def test_slow_call_is_logged_in_one_line(monkeypatch, caplog, sent, trace):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM's logger has its own handler
    monkeypatch.setenv("GUARD_SLOW_CALL_MS", "0.000001")
    guard = Guard(Inner())
    with caplog.at_level(logging.WARNING, "vllm.server_guard"):
        one(guard, RERANK, documents(5), headers={"X-Request-ID": "abc", "traceparent": sent})
        one(guard, "/health", method="GET")
        one(guard, RERANK, b"bad")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("slow call: /v1/rerank 2xx, 5 pairs, ") and line.endswith(f"request id abc, trace {trace}")


def test_fast_call_is_not_logged(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setenv("GUARD_SLOW_CALL_MS", "60000")
    with caplog.at_level(logging.WARNING, "vllm.server_guard"):
        one(Guard(Inner()), RERANK, documents(5))
    assert not caplog.records


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
        "import sys, threading; before = set(sys.modules); import server_guard; "
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
    assert set(routes) == set(server_guard.SCORING)
    protocol = (folder / "pooling/scoring/protocol.py").read_text()
    score_classes = re.findall(r"class Score\w*Request\(ScoringRequestMixin\):(.*?)(?=\nclass |\n\w)", protocol, re.S)
    fields = re.findall(r"^    (\w+): ScoreInput", "\n".join(score_classes), re.M)
    assert set(fields) == set(server_guard.SCORE_FIELDS)
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
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
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
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
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
