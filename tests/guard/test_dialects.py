"""The APIs of TEI, Voyage, NVIDIA, Cohere v1: their bodies in, their answers and errors out; what all answers carry."""

import asyncio
import gzip
import json
import math
import time

import pytest
from guard_app import RERANK, Inner, metric, one
from hypothesis import given, settings
from hypothesis import strategies as st
from test_long_documents import Fake

from rerank_kit.guard import dialects
from rerank_kit.guard.answers import Refusal, _send_refusal, with_additions
from rerank_kit.guard.asked import Asked
from rerank_kit.guard.fields import FIELDS
from rerank_kit.guard.middleware import Guard

SCORES = {"a": 0.25, "b": 0.75, "c": 0.5}


class Vllm(Inner):
    """Answers as vLLM 0.32 does: rows of /rerank best first with their texts, rows of /score in order."""

    async def __call__(self, scope, receive, send):
        body = json.loads((await receive())["body"])
        self.calls.append((scope["path"], dict(scope["headers"]), body))
        if self.status != 200:
            error = {"message": "The model `m` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
            return await self.say(send, {"error": error})
        texts = body["documents"]
        values = [SCORES.get(text[-1:], 0.125) for text in texts]
        usage = {"prompt_tokens": 9, "total_tokens": 9}
        if scope["path"].endswith("/score"):
            assert isinstance(body["queries"], str) or len(body["queries"]) == len(texts)
            rows = [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]
            answer = {"id": "score-1", "object": "list", "created": 1, "model": "m", "data": rows}
            return await self.say(send, answer | {"usage": usage | {"completion_tokens": 0}})
        rows = [
            {"index": i, "document": {"text": text, "multi_modal": None}, "relevance_score": value}
            for i, (text, value) in enumerate(zip(texts, values, strict=True))
        ]
        rows.sort(key=lambda row: -row["relevance_score"])
        await self.say(
            send, {"id": "score-1", "model": "m", "usage": usage, "results": rows[: body.get("top_n") or None]}
        )

    async def say(self, send, answer):
        data = json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()
        headers = [(b"content-length", b"%d" % len(data)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": data[:40], "more_body": True})
        await send({"type": "http.response.body", "body": data[40:]})


def ask_vllm(path, body, status=200, **more):
    """(answer, its JSON, body that vLLM got, vLLM's path)."""
    inner = Vllm(status=status)
    answer = one(Guard(inner), path, body, **more)
    assert int(answer.headers["content-length"]) == len(answer.body)
    path, _, got = inner.calls[0] if inner.calls else (None, None, None)
    return answer, json.loads(answer.body), got, path


THREE = {"query": "q", "documents": ["a", "b", "c"]}


# ---- what all answers carry ----


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_answers_carry_meta_and_completion_tokens(path):
    _, said, got, inner_path = ask_vllm(path, THREE)
    assert got == THREE and inner_path == path
    assert said["meta"] == {} and said["usage"] == {"completion_tokens": 0, "prompt_tokens": 9, "total_tokens": 9}
    assert (said["id"], said["model"]) == ("score-1", "m")
    assert said["results"][0] == {"index": 1, "document": {"text": "b", "multi_modal": None}, "relevance_score": 0.75}


def test_score_answers_are_vllms():
    _, said, _, _ = ask_vllm("/v1/score", {"queries": "q", "documents": ["a", "b"]})
    assert "meta" not in said and [row["score"] for row in said["data"]] == [0.25, 0.75]


def test_windows_keep_the_additions(monkeypatch):
    monkeypatch.setenv("GUARD_LONG_DOCUMENTS", "chunk")
    inner = Vllm()
    guard = Guard(inner)
    guard.long.fitter = Fake()
    said = json.loads(one(guard, RERANK, {"query": "q", "documents": ["xxxaxxxb", "c"]}).body)
    assert inner.calls[0][2]["documents"] == ["xxxa", "xxxb", "c"]
    assert said["meta"] == {} and said["usage"]["completion_tokens"] == 0
    rows = [(row["index"], row["relevance_score"], row["document"]["text"]) for row in said["results"]]
    assert rows == [(0, 0.75, "xxxaxxxb"), (1, 0.5, "c")]


def test_max_chunks_per_doc_scores_the_first_windows(monkeypatch):
    inner = Vllm()
    guard = Guard(inner)
    guard.long.fitter = Fake()
    answer = one(guard, RERANK, {"query": "q", "documents": ["xxxaxxxcxxxb", "c"], "max_chunks_per_doc": 2})
    assert inner.calls[0][2] == {"query": "q", "documents": ["xxxa", "xxxc", "c"]}
    assert answer.headers["x-rerank-cut"] == "0" and answer.headers["x-rerank-windows"] == "0:2"
    assert json.loads(answer.body)["results"][0]["relevance_score"] == 0.5


utf8 = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(model=utf8, text=utf8 | st.just('"usage":{'), n=st.integers(0, 4))
def test_additions_change_nothing_else(model, text, n):
    usage = {"prompt_tokens": n, "total_tokens": n}
    answer = {"id": text[:9], "model": model, "usage": usage, "results": [{"document": {"text": text}}] * n}
    said = json.loads(with_additions(json.dumps(answer, separators=(",", ":"), ensure_ascii=n > 2).encode()))
    assert said.pop("meta") == {} and said["usage"].pop("completion_tokens") == 0
    assert said == answer
    for other in (b"{}", b"null", b"[]", b"", b'{"results":[]}'):
        assert with_additions(other) == other


def test_additions_cost_less_than_50_microseconds():
    """The target for 100 documents. Bytes are copied, nothing is parsed."""
    rows = [{"index": i, "document": {"text": "w " * 250}, "relevance_score": 0.5} for i in range(100)]
    body = json.dumps({"id": "x", "model": "m", "usage": {"prompt_tokens": 1}, "results": rows}, separators=(",", ":"))
    data, asked, taken = body.encode(), Asked(inner_path=RERANK), []
    for _ in range(200):
        began = time.perf_counter()
        dialects.edit(asked, None, 200, data, lambda value: json.dumps(value).encode())
        taken.append(time.perf_counter() - began)
    assert sorted(taken)[20] < 50e-6


def test_vllms_errors_get_a_message_for_every_client():
    answer, said, _, _ = ask_vllm(RERANK, THREE, status=404)
    assert answer.status == 404 and said["message"] == said["detail"] == said["error"]["message"]
    assert said["error"]["param"] == "model"


def test_retry_after_is_at_most_59():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(_send_refusal(send, Refusal(429, "wait", "busy", retry_s=500)))
    assert dict(sent[0]["headers"])[b"retry-after"] == b"59"


# ---- TEI ----


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_tei(path):
    body = {"query": "q", "texts": ["a", "b", "c"], "raw_scores": False, "truncate": True, "return_text": False}
    answer, said, got, inner_path = ask_vllm(path, body | {"truncation_direction": "Right"})
    assert answer.status == 200 and inner_path == "/rerank" and got == THREE
    assert said == [{"index": 1, "score": 0.75}, {"index": 2, "score": 0.5}, {"index": 0, "score": 0.25}]
    _, said, got, _ = ask_vllm(path, body | {"return_text": True, "raw_scores": True})
    assert said[0] == {"index": 1, "score": 0.75, "text": "b"} and got["use_activation"] is False


def test_tei_info(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    monkeypatch.setenv("GUARD_SCORE_SCALE", '{"name": "probability", "min": 0, "max": 1}')
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "7")
    inner = Inner()
    assert one(Guard(inner), "/info", method="GET").status == 401
    answer = one(Guard(inner), "/info", method="GET", headers={"Authorization": "Bearer sesame"})
    said = json.loads(answer.body)
    assert answer.status == 200 and not inner.calls and "reranker" in said["model_type"]
    assert said["max_client_batch_size"] == 7 and said["score_scale"]["name"] == "probability"


# ---- Voyage ----


@pytest.mark.parametrize("more", [{"top_k": None, "truncation": True}, {"top_k": 2}, {"truncation": True, "top_k": 2}])
def test_voyage(more):
    _, said, got, _ = ask_vllm(RERANK, {**THREE, "model": "m", **more})
    n = more.get("top_k") or 3
    assert got == {**THREE, "model": "m", **({"top_n": 2} if n == 2 else {})}
    assert [(row["index"], row["relevance_score"]) for row in said["data"]] == [(1, 0.75), (2, 0.5), (0, 0.25)][:n]
    assert said["object"] == "list" and said["usage"]["total_tokens"] == 9 and "document" not in said["data"][0]
    assert [row["index"] for row in said["results"]] == [1, 2, 0][:n]  # for a client that only borrowed top_k
    _, said, _, _ = ask_vllm(RERANK, {**THREE, "return_documents": True, **more})
    assert said["data"][0]["document"] == "b"


# ---- NVIDIA ----


@pytest.mark.parametrize("path", ["/ranking", "/v1/ranking"])
def test_nvidia(path):
    body = {"model": "m", "query": {"text": "q"}, "passages": [{"text": "a"}, {"text": "b"}], "truncate": "END"}
    _, said, got, inner_path = ask_vllm(path, body)
    assert inner_path == "/rerank"
    assert got == {"model": "m", "query": "q", "documents": ["a", "b"], "use_activation": False}
    assert said["rankings"] == [{"index": 1, "logit": 0.75}, {"index": 0, "logit": 0.25}]
    assert (
        one(Guard(Inner()), path, {"query": {"text": "q"}, "passages": [{"text": "a"}], "truncate": "START"}).status
        == 422
    )


# ---- errors in the caller's shape, the same admission and limits ----

BODIES = {
    "tei": ("/rerank", {"query": "q", "texts": ["a", "b"]}),
    "voyage": (RERANK, {"query": "q", "documents": ["a", "b"], "top_k": None}),
    "nvidia": ("/v1/ranking", {"query": {"text": "q"}, "passages": [{"text": "a"}, {"text": "b"}]}),
}


def message_of(dialect, said):
    if dialect == "tei":
        assert said["error_type"] in ("validation", "overloaded", "unhealthy", "backend")
        return said["error"]
    if dialect == "nvidia":
        assert said["object"] == "error" and said["message"] == said["detail"]
    return said["detail"]


@pytest.mark.parametrize("dialect", BODIES)
def test_errors_have_the_dialects_shape(dialect):
    path, body = BODIES[dialect]
    answer, said, got, _ = ask_vllm(path, body | {"padding": "max_length"})
    assert answer.status == 422 and got is None and "padding" in message_of(dialect, said)
    answer, said, _, _ = ask_vllm(path, body, status=404)
    assert answer.status == 404 and message_of(dialect, said) == "The model `m` does not exist."


@pytest.mark.parametrize("dialect", BODIES)
def test_dialects_have_the_same_admission_limits_key_and_metrics(monkeypatch, dialect):
    path, body = BODIES[dialect]
    before = metric("calls_total", route=path, status="2xx"), metric("pairs_total")
    assert ask_vllm(path, body)[0].status == 200
    assert metric("calls_total", route=path, status="2xx") == before[0] + 1 and metric("pairs_total") == before[1] + 2
    guard = Guard(Vllm())
    guard.load.max_pairs = 5
    guard.load.counts.change(4)  # others' pairs in flight
    answer = one(guard, path, body)
    assert answer.status == 429 and answer.headers["retry-after"] == "1"
    assert "busy" in message_of(dialect, json.loads(answer.body))
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "1")
    assert one(Guard(Vllm()), path, body).status == 413
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert one(Guard(Vllm()), path, body).status == 401


@pytest.mark.parametrize("dialect", BODIES)
def test_dialects_follow_the_rules_for_long_documents(dialect):
    path, body = BODIES[dialect]
    name = next(name for name in body if name in ("texts", "documents", "passages"))
    body = {**body, name: [{"text": "xxxaxxxb"}, {"text": "c"}]}
    for mode, texts in (("truncate", ["xxxa", "c"]), ("chunk", ["xxxa", "xxxb", "c"])):
        inner = Vllm()
        guard = Guard(inner)
        guard.long.fitter, guard.long.default = Fake(), mode
        answer = one(guard, path, body)
        assert inner.calls[0][2]["documents"] == texts
        if mode == "truncate":
            assert answer.headers["x-rerank-cut"] == "0"
        else:
            assert answer.headers["x-rerank-windows"] == "0:2"


# ---- answers that users ask for ----


def test_return_documents_false_leaves_the_texts_out():
    _, said, got, _ = ask_vllm(RERANK, {**THREE, "return_documents": False})
    assert got == THREE and said["results"][0] == {"index": 1, "relevance_score": 0.75} and said["meta"] == {}


def test_rank_fields_give_the_objects_back():
    objects = [{"title": "x", "text": "a", "id": 1}, {"title": "y", "text": "b", "id": 2}]
    _, said, _, _ = ask_vllm(RERANK, {"query": "q", "documents": objects, "rank_fields": ["title", "text"]})
    assert [row["document"] for row in said["results"]] == objects[::-1]


@pytest.mark.parametrize(
    ("more", "kept", "left_out"),
    [
        ({"min_score": 0.5}, [1, 2], 1),
        ({"min_score": 0.5, "top_n": 1}, [1], 1),
        ({"min_score": 0.9, "top_n": 1}, [], 3),
        ({"min_score": 0}, [1, 2, 0], 0),
    ],
)
def test_min_score(more, kept, left_out):
    _, said, got, _ = ask_vllm(RERANK, {**THREE, **more})
    assert got == THREE  # all are scored, so that all that are left out can be counted
    assert [row["index"] for row in said["results"]] == kept and said["meta"] == {"left_out": left_out}
    assert FIELDS["min_score"].about == "documents below it are left out; `meta.left_out` counts them", (
        "whatever top_n is"
    )


def test_score_scale_is_in_meta(monkeypatch):
    scale = {"name": "probability", "min": 0, "max": 1, "profile": "qwen3_reranker"}
    monkeypatch.setenv("GUARD_SCORE_SCALE", json.dumps(scale))
    assert ask_vllm(RERANK, THREE)[1]["meta"] == {"score_scale": scale}
    assert ask_vllm(RERANK, {**THREE, "return_documents": False})[1]["meta"] == {"score_scale": scale}
    assert ask_vllm(RERANK, {**THREE, "raw_scores": True})[1]["meta"] == {"score_scale": {"name": "logit"}}


@pytest.mark.parametrize("shared", [True, False])
def test_many_queries_in_one_call(shared):
    lists = ["a", "b", "c"] if shared else [["a", "b"], [{"text": "c"}]]
    _, said, got, path = ask_vllm(RERANK, {"model": "m", "queries": ["q", "r"], "documents": lists, "top_n": 2})
    n = [3, 3] if shared else [2, 1]
    assert path == "/score" and got["queries"] == ["q"] * n[0] + ["r"] * n[1]
    assert got["documents"] == (["a", "b", "c"] * 2 if shared else ["a", "b", "c"])
    wanted = [[(1, 0.75), (2, 0.5)]] * 2 if shared else [[(1, 0.75), (0, 0.25)], [(0, 0.5)]]
    assert [[(row["index"], row["relevance_score"]) for row in rows] for rows in said["results"]] == wanted
    assert said["meta"] == {} and said["usage"]["total_tokens"] == 9


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (RERANK, {"documents": ["a"], "top_k": 1}),
        (RERANK, {"documents": ["a"], "truncation": True, "return_documents": True}),
        (RERANK, {"texts": ["a"]}),
        ("/v1/ranking", {"passages": [{"text": "a"}]}),
    ],
)
def test_many_queries_are_answered_alike_in_every_dialect(path, fields):
    answer, said, *_ = ask_vllm(path, {"queries": ["q", "r"], **fields})
    assert answer.status == 200, answer.body
    assert [[row["index"] for row in rows] for rows in said["results"]] == [[0], [0]]


def test_many_queries_count_all_their_pairs(monkeypatch):
    before = metric("pairs_total")
    assert ask_vllm(RERANK, {"queries": ["q"] * 3, "documents": ["a"] * 4})[0].status == 200
    assert metric("pairs_total") == before + 12
    monkeypatch.setenv("GUARD_MAX_DOCS_PER_CALL", "11")
    answer, _, got, _ = ask_vllm(RERANK, {"queries": ["q"] * 3, "documents": ["a"] * 4})
    assert answer.status == 413 and "12 pairs" in answer.message and got is None


def test_many_queries_are_bounded_as_vllm_gets_them(monkeypatch):
    """A query is repeated for each of its documents: half a megabyte would become a hundred."""
    monkeypatch.setenv("GUARD_MAX_BODY_BYTES", "5000")
    body = {"queries": ["q" * 1000], "documents": [["a"] * 4]}
    assert ask_vllm(RERANK, body)[0].status == 200
    answer, _, got, _ = ask_vllm(RERANK, {"queries": ["q" * 1000], "documents": [["a"] * 6]})
    assert answer.status == 413 and "6000 characters" in answer.message and got is None


@pytest.mark.parametrize(
    "body",
    [
        {"queries": [], "documents": ["a"]},
        {"queries": ["q"], "documents": []},
        {"queries": ["q", "r"], "documents": [["a"]]},
        {"queries": ["q", "r"], "documents": [["a"], []]},
        {"queries": ["q", "r"], "documents": [["a"], "b"]},
        {"queries": "q", "documents": ["a"]},
        {"queries": ["q"], "documents": ["a"], "top_n": "two"},
        {"queries": ["q"]},
    ],
    ids=str,
)
def test_many_queries_of_another_shape_are_refused(body):
    answer, _, got, _ = ask_vllm(RERANK, body)
    assert answer.status == 400 and got is None


# ---- the description of the API ----


def test_openapi_shows_the_dialects(monkeypatch):
    monkeypatch.setenv("GUARD_ALLOW_PATHS", "/openapi.json")
    schema = {"type": "object", "properties": {"query": {"type": "string"}, "padding": {"type": "string"}}}
    post = {"post": {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/x"}}}}}}
    page = {"paths": {"/v1/rerank": post}, "components": {"schemas": {"RerankRequest": schema}}}
    said = []

    class Page(Inner):
        async def __call__(self, scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
            await send({"type": "http.response.body", "body": said[-1]})

    said.append(json.dumps(page).encode())
    answer = one(Guard(Page()), "/openapi.json", method="GET")
    got = json.loads(answer.body)
    assert {"/ranking", "/v1/ranking", "/info"} <= got["paths"].keys()
    assert int(answer.headers["content-length"]) == len(answer.body)
    properties = got["components"]["schemas"]["RerankRequest"]["properties"]
    assert {"min_score", "rank_fields", "timeout_ms", "raw_scores"} <= properties.keys()
    assert "do_not_pad" in properties["padding"]["description"] and properties["padding"]["type"] == "string"
    for other in (b"{}", b"[]", b"no JSON", b'{"paths": 1, "components": []}'):
        said.append(other)
        assert one(Guard(Page()), "/openapi.json", method="GET").body == other
    monkeypatch.delenv("GUARD_ALLOW_PATHS")
    assert one(Guard(Page()), "/openapi.json", method="GET").status == 404


# ---- any body ----

some = st.sampled_from(
    ["q", "", "a", 10**400, -1e308, 0, 1, -1, 0.5, True, False, None, [], ["a"], [["a"], ["b"]], [{"text": "a"}], {}]
)
some |= st.sampled_from([{"text": "a"}, {"text": 1}, {"content": []}, ["a", {"text": "b", "title": "c"}], ["title"]])


@settings(max_examples=1500, deadline=None)
@given(
    path=st.sampled_from(["/rerank", "/v1/rerank", "/v1/score", "/v1/ranking"]),
    base=st.sampled_from(
        [THREE, BODIES["tei"][1], BODIES["nvidia"][1], {}, {"queries": ["q", "r"], "documents": ["a"]}]
    ),
    more=st.dictionaries(st.sampled_from(sorted(FIELDS)), some, max_size=4),
)
def test_any_fields_get_an_answer_or_a_clear_refusal(path, base, more):
    inner = Inner()
    guard = Guard(inner)
    answer = one(guard, path, {**base, **more})
    assert answer.status in (200, 400, 413, 422) and guard.load.in_flight == 0
    if answer.status != 200:
        said = json.loads(answer.body)
        text = said["message"]
        assert 10 < len(text) < 400 and "\n" not in text
    else:
        got = json.loads(inner.calls[0][2])
        ours = {"texts", "passages", "rank_fields", "min_score", "return_documents", "raw_scores", "padding", "top_k"}
        assert not ours & got.keys()


# ---- on the real service ----


@pytest.mark.server
@pytest.mark.timeout(300)
def test_every_dialect_gets_the_scores_of_rerank(service):
    import requests  # the environment of the tests has it; the guard does not need it

    def post(path, body, **more):
        answer = requests.post(service.url + path, json=body, timeout=60, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    query, texts = "What is the capital of China?", ["Beijing.", "Gravity attracts bodies.", "Shanghai " * 9]
    plain = post("/v1/rerank", {"query": query, "documents": texts})
    scores = {row["index"]: row["relevance_score"] for row in plain["results"]}
    assert plain["meta"]["score_scale"] == {"name": "probability", "min": 0, "max": 1, "profile": "qwen3_reranker"}
    assert plain["usage"]["completion_tokens"] == 0

    def same(rows, name):
        assert {row["index"]: row[name] for row in rows} == pytest.approx(scores, abs=1e-6)
        assert [row[name] for row in rows] == sorted((row[name] for row in rows), reverse=True)

    same(post("/rerank", {"query": query, "texts": texts}), "score")
    same(
        post("/v1/rerank", {"query": query, "documents": texts, "top_k": None, "truncation": True})["data"],
        "relevance_score",
    )
    objects = [{"text": text} for text in texts]
    same(
        post("/v1/v1/rerank/", {"query": query, "documents": objects, "padding": "do_not_pad"})["results"],
        "relevance_score",
    )
    packed = gzip.compress(json.dumps({"query": query, "documents": texts}).encode())
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    answer = requests.post(service.url + "/v2/rerank", packed, headers=headers, timeout=60)
    same(answer.json()["results"], "relevance_score")
    ranking = {"query": {"text": query}, "passages": objects, "truncate": "END"}
    logits = {row["index"]: row["logit"] for row in post("/v1/ranking", ranking)["rankings"]}
    assert {i: 1 / (1 + math.exp(-logit)) for i, logit in logits.items()} == pytest.approx(scores, abs=1e-5)
    rows = post("/rerank", {"query": query, "documents": texts, "raw_scores": True, "return_documents": False})[
        "results"
    ]
    assert {row["index"]: row["relevance_score"] for row in rows} == pytest.approx(logits, abs=1e-5)
    assert all(set(row) == {"index", "relevance_score"} for row in rows)
    many = post("/v1/rerank", {"queries": [query, query], "documents": [texts, texts[:1]], "min_score": 0})
    same(many["results"][0], "relevance_score")
    assert many["results"][1] == [{"index": 0, "relevance_score": pytest.approx(scores[0], abs=1e-6)}]
    told = [
        post("/v1/rerank", {"query": query, "documents": texts, name: "Judge."}) for name in ("instruct", "instruction")
    ]
    one, other = ([row["relevance_score"] for row in answer["results"]] for answer in told)
    assert one == pytest.approx(other, abs=1e-6) and one != pytest.approx(
        [row["relevance_score"] for row in plain["results"]]
    )
    big = {"query": query, "documents": texts, "max_tokens_per_doc": 4096}  # MAX_MODEL_LEN is 1024
    same(post("/v1/rerank", big)["results"], "relevance_score")
    error = requests.post(service.url + "/rerank", json={"query": query, "texts": texts, "model": "m"}, timeout=60)
    assert error.status_code == 200 or "error_type" in error.json()
    error = requests.post(
        service.url + "/v1/rerank", json={"query": query, "documents": texts, "model": "m"}, timeout=60
    )
    assert error.status_code == 404 and error.json()["message"] == error.json()["error"]["message"]
    assert requests.get(service.url + "/info", timeout=60).json()["max_input_length"] == 1024
    page = requests.get(service.url + "/openapi.json", timeout=60).json()
    assert "/v1/ranking" in page["paths"]
    assert {"min_score", "padding"} <= page["components"]["schemas"]["RerankRequest"]["properties"].keys()
