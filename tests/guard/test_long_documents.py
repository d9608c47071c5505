"""What becomes of texts that are too long, call by call."""

import asyncio
import contextlib
import json
import threading

import pytest
from guard_app import RERANK, SCOPE, Inner, ask, documents, metric, one

from rerank_kit.guard import long_documents, middleware
from rerank_kit.guard.middleware import Guard
from rerank_kit.models.fitting import Fitter, TooManyWindows


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
    assert long_documents.listed({3: "", 0: "", 1: ""}) == b"0-1,3"
    assert long_documents.listed({0: ":2", 1: ":2", 2: ":3"}) == b"0-1:2,2:3"
    long = long_documents.listed(dict.fromkeys(range(0, 5000, 2), ""))
    assert len(long) <= long_documents.MAX_LIST_BYTES + 4 and long.endswith(b",...")


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
    _, guard = scorer("error")
    guard.app = inner = Inner()
    guard.long.fitter.head = lambda text, n: text[:n]
    answer = one(guard, RERANK, {**LONG, "max_tokens_per_doc": limit})
    assert answer.headers.get("x-rerank-cut") == named
    assert json.loads(inner.calls[0][2])["documents"] == [text[:limit] for text in LONG["documents"]]


def test_chunk_is_refused_where_the_tokenizer_is_not_known(scorer):
    inner, guard = scorer()
    guard.long.fitter = False
    assert one(guard, RERANK, {**LONG, "max_chunks_per_doc": 1024}).status == 200  # a limit, no wish for windows
    inner.calls.clear()
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
    assert answer.status == 422 and "takes only instruction" in answer.message and not inner.calls
    for right in ({"instruction": "Find"}, {"instruction": None}, {}, None):
        assert one(Guard(inner), RERANK, documents(chat_template_kwargs=right)).status == 200


@pytest.mark.parametrize(("sent", "read"), [("5", 5), (5.0, 5), ("5.0", 5), (" 5 ", 5), ("0", 0), (5, 5)])
def test_token_limits_are_read_as_vllm_reads_them(scorer, sent, read):
    _, guard = scorer("truncate")
    call = middleware.Call({**SCOPE, "root_path": ""})
    payload = documents(max_tokens_per_doc=sent, max_tokens_per_query=sent)
    changed = guard._complete(call, payload)
    assert payload["max_tokens_per_doc"] == payload["max_tokens_per_query"] == read
    assert type(payload["max_tokens_per_doc"]) is int and changed == (type(sent) is not int)
    assert call.mode == ("truncate" if read else "error")


@pytest.mark.parametrize("sent", ["x", 5.5, "5.5", [5], float("inf"), "nan"])
def test_token_limits_that_vllm_refuses_are_left_to_it(sent):
    payload = documents(max_tokens_per_doc=sent)
    Guard(Inner())._complete(middleware.Call(dict(SCOPE)), payload)
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
        tokenizer = long_documents.plain_tokenizer(str(checkpoints["qwen3"]), False)
        assert tokenizer("yes no", return_offsets_mapping=True)["offset_mapping"]
        assert Fitter(tokenizer, None, 20, separate=True).fit("q", "word " * 99)[2]
    finally:
        if patched:
            fastokens.unpatch_transformers()
