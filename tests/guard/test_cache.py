"""The result cache: the same answers as without it, for exactly the same pairs only; its memory and its speed."""

import json
import math
import time
import tracemalloc

import pytest
from guard_app import RERANK, Inner, metric, one
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dialects import Vllm
from test_long_documents import Fake

from rerank_kit.guard.cache import Known, ResultCache
from rerank_kit.guard.middleware import Guard

BODY = {"model": "m", "query": "q", "documents": ["a", "b", "c"]}


@pytest.fixture
def cached(monkeypatch):
    def make(mib=1, version="v1"):
        monkeypatch.setenv("GUARD_RESULT_CACHE_MIB", str(mib))
        monkeypatch.setenv("GUARD_VERSION", version)
        inner = Vllm()
        return inner, Guard(inner)

    return make


def said(guard, body, path=RERANK):
    answer = one(guard, path, body)
    assert answer.status == 200, answer.body
    assert int(answer.headers["content-length"]) == len(answer.body)
    return json.loads(answer.body)


def test_off_by_default():
    inner = Vllm()
    guard = Guard(inner)
    said(guard, BODY)
    assert "cached" not in said(guard, BODY)["meta"] and len(inner.calls) == 2


def test_a_call_seen_before_is_answered_without_vllm(cached):
    inner, guard = cached()
    before = metric("cached_pairs_total", cache="process")
    first, second = said(guard, BODY), said(guard, BODY)
    assert len(inner.calls) == 1 and guard.load.in_flight == 0
    assert first["results"] == second["results"] and second["model"] == "m"
    assert (first["meta"]["cached"], second["meta"]["cached"]) == (0, 3)
    assert second["usage"] == {"completion_tokens": 0, "prompt_tokens": 0, "total_tokens": 0}
    assert metric("cached_pairs_total", cache="process") == before + 3


def test_only_what_is_missing_is_scored(cached):
    inner, guard = cached()
    said(guard, {**BODY, "documents": ["a", "c"]})
    answer = said(guard, {**BODY, "documents": ["b", "a", "x", "c", "b"], "top_n": 3})
    assert inner.calls[1][2]["documents"] == ["b", "x", "b"] and "top_n" not in inner.calls[1][2]
    rows = [(row["index"], row["relevance_score"], row["document"]["text"]) for row in answer["results"]]
    assert rows == [(0, 0.75, "b"), (4, 0.75, "b"), (3, 0.5, "c")] and answer["meta"]["cached"] == 2


@pytest.mark.parametrize(
    "other",
    [
        {"query": "r"},
        {"instruction": "Judge."},
        {"model": "n"},
        {"use_activation": False},
        {"max_tokens_per_doc": 5},
        {"long_documents": "error"},
        {"cache_salt": "x"},
        {"documents": ["A", "B", "C"]},
        {"query": "qa", "documents": ["", "b", "c"]},
        {"chat_template_kwargs": {"instruction": "Judge."}},
    ],
    ids=str,
)
def test_another_pair_is_another_key(cached, other):
    inner, guard = cached()
    said(guard, BODY)
    said(guard, BODY | other)
    n = len(inner.calls[1][2]["documents"])
    assert len(inner.calls) == 2 and n == 3


def test_what_only_shapes_the_answer_is_the_same_key(cached):
    inner, guard = cached()
    said(guard, BODY)
    assert [row["index"] for row in said(guard, {**BODY, "top_n": 1, "request_id": "x", "user": "u"})["results"]] == [1]
    assert said(guard, {"query": "q", "model": "m", "texts": ["c", "a"]}, "/rerank") == [
        {"index": 0, "score": 0.5},
        {"index": 1, "score": 0.25},
    ]
    few = said(guard, {**BODY, "min_score": 0.5, "return_documents": False})
    assert few["results"] == [{"index": 1, "relevance_score": 0.75}, {"index": 2, "relevance_score": 0.5}]
    assert few["meta"] == {"cached": 3, "left_out": 1} and len(inner.calls) == 1


def test_a_text_with_nul_is_no_other_pair():
    cache = ResultCache(1, b"v")
    keys = {
        key
        for query, document in (("a\0b", "c"), ("a", "b\0c"), ("a\0", "bc"), ("a0:", "c"), ("a", "0:c"))
        for key in cache.look_up({"query": query, "documents": [document]}, RERANK, ()).keys
    }
    assert len(keys) == 5


def test_a_query_that_another_document_shortened_is_not_kept(cached):
    """All documents of a rerank call get the shortest query that fits beside any of them."""

    class Shortens(Fake):
        def fit(self, query, document, instruction=None, limit=0):
            return (query[:3] if len(document) > 4 else query), document[:4], len(document) > 4

    inner, guard = cached()
    guard.long.fitter, guard.long.default = Shortens(), "truncate"
    said(guard, {"query": "question", "documents": ["short"[:4], "a long one"]})
    said(guard, {"query": "question", "documents": ["short"[:4]]})
    assert [body["query"] for _, _, body in inner.calls] == ["que", "question"]


def test_an_answer_without_vllm_has_the_callers_id(cached):
    inner, guard = cached()
    ids = [said(guard, {**BODY, "request_id": "mine"})["id"] for _ in range(2)]
    assert ids[1] == "score-mine" and len(inner.calls) == 1


@pytest.mark.parametrize("more", [{"priority": 5}, {"user": 7}, {"request_id": {"a": 1}}])
def test_values_that_vllm_judges_are_not_answered_without_it(cached, more):
    inner, guard = cached()
    said(guard, BODY)
    said(guard, {**BODY, **more})
    assert len(inner.calls) == 2


def test_another_version_knows_nothing():
    keys = [ResultCache(1, version).look_up(dict(BODY), RERANK, ()).keys for version in (b"v1", b"v2")]
    assert not set(keys[0]) & set(keys[1])


def test_several_queries(cached):
    inner, guard = cached()
    body = {"queries": ["q", "r"], "documents": [["a", "b"], ["c"]]}
    first = said(guard, body)
    assert said(guard, body)["results"] == first["results"] and len(inner.calls) == 1
    more = said(guard, {"queries": ["q", "r"], "documents": [["a", "x"], ["c"]]})
    assert inner.calls[1][2] == {"queries": ["q"], "documents": ["x"]}
    assert [[row["index"] for row in rows] for rows in more["results"]] == [[0, 1], [0]]


@pytest.mark.parametrize("mode", ["truncate", "chunk"])
def test_cuts_and_windows_are_remembered(cached, mode):
    inner, guard = cached()
    guard.long.fitter, guard.long.default = Fake(), mode
    name = "x-rerank-cut" if mode == "truncate" else "x-rerank-windows"
    long = ["b", "xxxaxxxb", "c"]
    first = one(guard, RERANK, {"query": "q", "documents": long})
    assert first.headers[name] == ("1" if mode == "truncate" else "1:2")
    for documents, wanted in ((long, "1"), (["new", *long], "2"), (long[::-1], "1")):
        answer = one(guard, RERANK, {"query": "q", "documents": documents})
        assert answer.headers[name] == wanted + ("" if mode == "truncate" else ":2")
        rows = {documents[row["index"]]: row for row in json.loads(answer.body)["results"]}
        assert rows["xxxaxxxb"]["relevance_score"] == (0.25 if mode == "truncate" else 0.75)
    assert len(inner.calls) == 2


@pytest.mark.parametrize("documents", ["a", [], ["a", 7], [["a"]]])
def test_what_is_no_list_of_texts_is_not_kept(cached, documents):
    _, guard = cached()
    guard.app = inner = Inner()
    for _ in range(2):
        assert one(guard, RERANK, {"query": "q", "documents": documents}).status == 200
    assert len(inner.calls) == 2 and len(guard.cache) == 0


def test_errors_are_not_kept(cached):
    inner, guard = cached()
    inner.status = 404
    assert one(guard, RERANK, BODY).status == 404 and len(guard.cache) == 0


def test_the_least_recently_used_go_first_and_memory_is_bounded():
    tracemalloc.start()
    cache = ResultCache(1, b"")
    before = tracemalloc.get_traced_memory()[0]
    for n in range(cache.most * 2):
        cache.put(n.to_bytes(16, "big"), Known(n / 7, False, 1))
        cache.get((5).to_bytes(16, "big"))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(cache) == cache.most and 0.4 * 2**20 < used < 2**20
    assert cache.get((5).to_bytes(16, "big")) and not cache.get((6).to_bytes(16, "big"))


@settings(max_examples=150, deadline=None)
@given(calls=st.lists(st.lists(st.sampled_from(["a", "b", "c", "xa", "é", ""]), min_size=1, max_size=6), max_size=6))
def test_any_calls_get_the_answers_of_a_service_without_cache(calls):
    with pytest.MonkeyPatch.context() as patch:
        plain = Guard(Vllm())
        patch.setenv("GUARD_RESULT_CACHE_MIB", "0.001")  # two pairs: entries go while a call is answered
        guard = Guard(Vllm())
    for documents in calls:
        body = {"query": "q", "documents": documents}
        assert said(guard, body)["results"] == said(plain, body)["results"]


def test_what_it_costs_and_spares(cached):
    """32 documents of 500 characters, never seen: the whole lookup and the answer within 1 ms."""
    cache, taken = ResultCache(8, b"v"), []
    for n in range(50):
        body = {"query": f"q{n}", "documents": [f"{n} {i} " + "w " * 250 for i in range(32)]}
        began = time.perf_counter()
        lookup = cache.look_up(body, RERANK, ())
        answer = {"results": [{"index": i, "relevance_score": math.exp(-i)} for i in range(32)]}
        lookup.complete(answer, [], {})
        taken.append(time.perf_counter() - began)
    assert sorted(taken)[10] < 1e-3
