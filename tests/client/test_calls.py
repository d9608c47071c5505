"""model_utils: arguments, payloads, checked answers, splitting and merging; sync and async alike."""

# ruff: noqa: F401, F811 (a fixture is imported, then named as an argument)

import asyncio
import functools
import inspect
import json
import math
import random
import signal
import threading
import time

import pytest
from fault_server import Caller, FaultServer, client, config, reply, score_of, serve, slow, status

import model_utils
from rerank_kit.client import one_call
from rerank_kit.client.calls import RerankItem, arerank, ascore, rerank, rerank_many, score
from rerank_kit.client.errors import RerankHTTPError, RerankResponseError, RerankTimeout

pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("error")]

QUERY = "What is the capital of China?"
DOCS = [
    "Gravity attracts bodies.",
    "The capital of China is Beijing.",
    "北京是中国的首都 🏮",
    "",
    'a "quoted" \n\0 text',
]


def expected(query, docs):
    return [score_of(query, doc) for doc in docs]


def ranking(query, docs, top_n=None):
    """Indices, best first, equal scores in input order."""
    return sorted(range(len(docs)), key=lambda i: (-score_of(query, docs[i]), i))[:top_n]


# --- one call ---------------------------------------------------------------------------------------------------


def test_rerank_sends_exact_json_and_aligns_scores(client, serve):
    server = serve()
    items, scores, raw = client.rerank(QUERY, DOCS, base_url=server.url)
    assert server.requests[0].json == {"model": "qwen3-reranker", "query": QUERY, "documents": DOCS}
    assert server.requests[0].path == "/v1/rerank"
    assert scores == expected(QUERY, DOCS)
    assert items == [RerankItem(i, scores[i], DOCS[i]) for i in ranking(QUERY, DOCS)]
    assert raw["usage"] == {"prompt_tokens": 5, "total_tokens": 5} and len(raw["results"]) == 5
    assert raw["_client_calls"] == 1 and raw["_client_cost_ms"] > 0


def test_score_sends_exact_json_and_keeps_input_order(client, serve):
    server = serve()
    items, scores, raw = client.score(QUERY, DOCS, base_url=server.url)
    assert server.requests[0].json == {"model": "qwen3-reranker", "text_1": QUERY, "text_2": DOCS}
    assert server.requests[0].path == "/v1/score"
    assert scores == expected(QUERY, DOCS)
    assert items == [RerankItem(i, scores[i], DOCS[i]) for i in range(5)]
    assert raw["data"][4]["score"] == scores[4] and raw["_client_calls"] == 1


def test_text_travels_as_utf8_not_as_escapes(client, serve):
    server = serve()
    client.rerank(QUERY, DOCS, base_url=server.url)
    assert "北京是中国的首都 🏮".encode() in server.requests[0].body


@pytest.mark.parametrize("top_n", [1, 3, 4])
def test_rerank_top_n_leaves_none(client, serve, top_n):
    server = serve()
    items, scores, _ = client.rerank(QUERY, DOCS, top_n, base_url=server.url)
    assert server.requests[0].json["top_n"] == top_n
    best = ranking(QUERY, DOCS, top_n)
    assert [item.index for item in items] == best
    assert scores == [score_of(QUERY, doc) if i in best else None for i, doc in enumerate(DOCS)]


@pytest.mark.parametrize("top_n", [5, 99])
def test_rerank_top_n_of_all_is_not_sent(client, serve, top_n):
    server = serve()
    items, scores, _ = client.rerank(QUERY, DOCS, top_n, base_url=server.url)
    assert "top_n" not in server.requests[0].json
    assert len(items) == 5 and None not in scores


def test_rerank_top_n_zero_returns_none_of_them_without_a_request(client, serve):
    server = serve()
    items, scores, raw = client.rerank(QUERY, DOCS, top_n=0, base_url=server.url)
    assert (items, scores, raw["results"]) == ([], [None] * 5, [])
    assert server.accepts == 0


def test_no_documents_no_request(client, serve):
    server = serve()
    for call in (client.rerank, client.score):
        items, scores, raw = call(QUERY, [], base_url=server.url)
        assert (items, scores, raw["_client_calls"]) == ([], [], 0)
    assert server.accepts == 0


def test_every_argument_reaches_the_payload(client, serve):
    server = serve()
    more = {"instruction": "Find 汉字", "max_tokens_per_doc": 7, "base_url": server.url, "model": "other"}
    client.rerank(QUERY, ["a"], 1, **more)
    client.score(QUERY, ["a"], **more)
    sent = {"model": "other", "instruction": "Find 汉字", "max_tokens_per_doc": 7}
    assert server.requests[0].json == {"query": QUERY, "documents": ["a"], **sent}
    assert server.requests[1].json == {"text_1": QUERY, "text_2": ["a"], **sent}


def test_long_documents_error_forbids_cutting(client, serve):
    server = serve()
    client.rerank(QUERY, ["a"], base_url=server.url, long_documents="error")
    assert server.requests[0].json["max_tokens_per_doc"] == 0
    assert "long_documents" not in server.requests[0].json  # a server without the guard obeys too
    bare = {"model": "qwen3-reranker", "query": QUERY, "documents": ["a"]}
    client.rerank(QUERY, ["a"], base_url=server.url, long_documents="truncate")
    assert server.requests[1].json == {**bare, "long_documents": "truncate"}
    client.rerank(QUERY, ["a"], base_url=server.url)
    assert server.requests[2].json == bare


def test_long_documents_chunk_names_what_was_split(client, serve):
    """Windows of each part become those of the whole list; a server that does not say that it splits is an error."""
    server = serve(default=reply(lambda request: request.results(), {"X-Rerank-Windows": "1:3,x,0-0:2,7-9:9"}))
    for call in (client.rerank, client.score):
        raw = call(QUERY, list("abc"), base_url=server.url, batch_size=2, long_documents="chunk")[2]
        assert raw["_windows"] == {0: 2, 1: 3, 2: 2}
    assert {request.json["long_documents"] for request in server.requests} == {"chunk"}
    server = serve(default=reply(lambda request: request.results(), {"X-Rerank-Windows": "none"}))
    assert client.rerank(QUERY, ["a"], base_url=server.url, long_documents="chunk")[2]["_windows"] == {}
    with pytest.raises(RerankResponseError, match="splits no documents"):
        client.rerank(QUERY, ["a"], base_url=serve().url, long_documents="chunk")


@pytest.mark.parametrize(
    ("header", "cut"),
    [
        ("0,2", [0, 2, 3]),
        ("2,2", [2]),
        ("0-1,...", [0, 1, 3]),
        ("1-999999999", [1, 2]),
        ("7,-1,x,", []),
        ("9" * 5000, []),
        (None, []),
    ],
)
def test_documents_that_the_guard_cut_are_named(client, serve, header, cut):
    """Indices of each part become those of the whole list; senseless ones are dropped."""
    server = serve(default=reply(lambda request: request.results(), {"X-Rerank-Cut": header}))
    raw = client.rerank(QUERY, list("abcd"), base_url=server.url, batch_size=3)[2]
    assert raw["_cut"] == cut


def versions(*values):
    """Right answers of a fleet, each by the next version; the last one stays."""
    turns = list(values)

    def behave(server, connection, request):
        with server.lock:
            version = turns.pop(0) if len(turns) > 1 else turns[0]
        return reply(lambda request: request.results(), {"X-Rerank-Version": version})(server, connection, request)

    return behave


def test_the_version_that_scored_is_named(client, serve):
    assert client.rerank(QUERY, list("abc"), base_url=serve(default=versions("abc")).url)[2]["_version"] == "abc"
    assert client.score(QUERY, list("abc"), base_url=serve().url, batch_size=2)[2]["_version"] == ""
    assert client.rerank(QUERY, [], base_url=serve().url)[2]["_version"] == ""


def test_a_call_is_not_made_of_two_models(client, serve):
    """Between the first and the other parts the fleet changed its model: all parts are asked again."""
    server = serve(default=versions("old", "new"))
    documents = [f"d{i}" for i in range(6)]
    _, scores, raw = client.rerank(QUERY, documents, base_url=server.url, batch_size=2)
    assert raw["_version"] == "new" and len(server.requests) == 6 and raw["_client_calls"] == 3
    assert scores == pytest.approx([score_of(QUERY, doc) for doc in documents])


def test_a_fleet_of_two_models_is_an_error(client, serve):
    server = serve(default=versions(*["old", "new"] * 3))
    with pytest.raises(RerankResponseError, match=r"different models or settings \(new, old\)"):
        client.score(QUERY, list("abcd"), base_url=server.url, batch_size=2)
    assert len(server.requests) == 2 * one_call.MIXED_TRIES


@pytest.mark.parametrize("call", [rerank, lambda *args, **kwargs: asyncio.run(arerank(*args, **kwargs))])
def test_the_callers_span_goes_along(config, serve, call):
    """traceparent of the caller's OpenTelemetry span, also from the threads of a split call; nothing without one."""
    trace = pytest.importorskip("opentelemetry.trace")
    server = serve()
    call(QUERY, ["a"], base_url=server.url)
    span = trace.NonRecordingSpan(trace.SpanContext(0xABC, 0xDEF, False, trace.TraceFlags(1)))
    with trace.use_span(span):
        call(QUERY, list("abcd"), base_url=server.url, batch_size=2)
    sent = [request.headers.get("traceparent") for request in server.requests]
    assert sent == [None, *[f"00-{0xABC:032x}-{0xDEF:016x}-01"] * 2]


def test_the_space_that_the_guard_sends_for_an_empty_document_is_no_other_document(client, serve):
    def echo(texts):
        rows = [{"index": i, "relevance_score": 0.5, "document": {"text": t}} for i, t in enumerate(texts)]
        return reply(lambda request: {**request.results(), "results": rows})

    assert client.rerank(QUERY, ["", "a"], base_url=serve(default=echo([" ", "a"])).url)[1] == [0.5, 0.5]
    with pytest.raises(RerankResponseError, match="another document at index 0"):
        client.rerank(QUERY, ["", "a"], base_url=serve(default=echo(["b", "a"])).url)


def test_model_comes_from_the_configuration(client, serve, config):
    server = serve()
    config(served_model_name="from-config", base_url=server.url)
    client.rerank(QUERY, ["a"])
    assert server.requests[0].json["model"] == "from-config"


def test_documents_may_be_any_iterable_of_texts(client, serve):
    server = serve()
    for docs in (("a", "b"), (d for d in ["a", "b"]), {"a": 1, "b": 2}.keys()):
        assert client.score(QUERY, docs, base_url=server.url)[1] == expected(QUERY, ["a", "b"])


def test_equal_scores_rank_in_input_order(client, serve):
    docs = ["same", "x", "same", "y", "same"]
    items, _, _ = client.rerank(QUERY, docs, base_url=serve().url)
    assert [item.index for item in items] == ranking(QUERY, docs)
    assert [item.index for item in items if item.doc == "same"] == [0, 2, 4]


# --- bad arguments: ValueError that names the value, nothing sent ---------------------------------------------


BAD = [
    ({"query": None}, "query is a NoneType"),
    ({"query": b"bytes"}, "query is a bytes"),
    ({"query": "a\ud800"}, "query has a lone surrogate at character 1"),
    ({"documents": "one text"}, "documents is a str, not a list: 'one text'"),
    ({"documents": {"a": 1}}, "documents is a dict"),
    ({"documents": {"a"}}, "documents is a set"),
    ({"documents": None}, "documents is a NoneType"),
    ({"documents": ["a", 7, "b"]}, "documents[1] is a int, not a str: 7"),
    ({"documents": ["a", "b", None]}, "documents[2] is a NoneType"),
    ({"documents": ["a", "\udfff"]}, "documents[1] has a lone surrogate"),
    ({"top_n": -1}, "top_n=-1"),
    ({"top_n": True}, "top_n=True"),
    ({"top_n": 1.0}, "top_n=1.0"),
    ({"top_n": "1"}, "top_n='1'"),
    ({"model": 3}, "model is a int"),
    ({"base_url": "127.0.0.1:1"}, "base_url='127.0.0.1:1' is not like http"),
    ({"base_url": "ftp://h"}, "base_url='ftp://h'"),
    ({"base_url": "http://"}, "base_url='http://'"),
    ({"base_url": "http://h:99999"}, "base_url='http://h:99999'"),
    ({"base_url": "http://a..b"}, "base_url='http://a..b'"),
    ({"base_url": "http://h/v1?x=1"}, "base_url="),
    ({"base_url": " , "}, "holds no address"),
    ({"base_url": 7}, "base_url=7"),
    ({"timeout_s": math.nan}, "timeout_s=nan"),
    ({"timeout_s": math.inf}, "timeout_s=inf"),
    ({"timeout_s": 0}, "timeout_s=0"),
    ({"timeout_s": -1.5}, "timeout_s=-1.5"),
    ({"timeout_s": True}, "timeout_s=True"),
    ({"timeout_s": "5"}, "timeout_s='5'"),
    ({"deadline_s": math.nan}, "deadline_s=nan"),
    ({"deadline_s": 1e300}, "deadline_s=1e+300"),
    ({"instruction": 5}, "instruction is a int"),
    ({"instruction": "\ud800"}, "instruction has a lone surrogate"),
    ({"long_documents": "split"}, "long_documents='split'"),
    ({"long_documents": []}, "long_documents=[]"),
    ({"max_tokens_per_doc": 5, "long_documents": "chunk"}, "max_tokens_per_doc=5"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 2.5}, "batch_size=2.5"),
    ({"max_tokens_per_doc": 0}, "max_tokens_per_doc=0"),
    ({"max_tokens_per_doc": 5, "long_documents": "error"}, "max_tokens_per_doc=5"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_arguments_are_named_before_any_request(client, serve, bad, message):
    server = serve()
    good = {"query": QUERY, "documents": ["a"], "base_url": server.url}
    calls = [client.rerank] if "top_n" in bad else [client.rerank, client.score]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call(**(good | bad))
        assert message in str(caught.value)
        assert type(caught.value) is ValueError
    assert server.accepts == 0


def test_bad_arguments_count_without_documents_too(client):
    with pytest.raises(ValueError, match="query is a int"):
        client.rerank(1, [])


def test_long_values_are_cut_in_messages(client):
    with pytest.raises(ValueError) as caught:
        client.rerank(QUERY, "x" * 10**6)
    assert len(str(caught.value)) < 200


def test_password_in_base_url_is_refused_and_not_shown(client):
    with pytest.raises(ValueError, match="API_KEY") as caught:
        client.rerank(QUERY, ["a"], base_url="http://user:hunter2@127.0.0.1")
    assert "hunter2" not in str(caught.value)


def test_sync_and_async_take_the_same_arguments():
    for sync, other in ((rerank, arerank), (score, ascore)):
        assert inspect.signature(sync) == inspect.signature(other)
    first = list(inspect.signature(rerank).parameters)[:6]
    assert first == ["query", "documents", "top_n", "model", "base_url", "timeout_s"]
    assert list(inspect.signature(score).parameters)[:5] == ["query", "documents", "model", "base_url", "timeout_s"]


# --- answers that must not be believed ------------------------------------------------------------------------


def rows(*pairs):
    """An answer with these (index, score); works for both routes."""

    def body(request):
        name, value = ("data", "score") if request.path == "/v1/score" else ("results", "relevance_score")
        return {"id": "x", "model": request.json["model"], name: [{"index": i, value: s} for i, s in pairs]}

    return body


WRONG = [
    (rows((0, 0.5), (0, 0.4)), "index 0"),
    (rows((0, 0.5), (2, 0.4)), "index 2"),
    (rows((0, 0.5), (-1, 0.4)), "index -1"),
    (rows((0, 0.5), (True, 0.4)), "index True"),
    (rows((0, 0.5), (1.0, 0.4)), "index 1.0"),
    (rows((0, 0.5), ("1", 0.4)), "index '1'"),
    (rows((0, 0.5), (None, 0.4)), "index None"),
    (rows((0, 0.5), (10**400, 0.4)), "index 1000"),
    (rows((0, 0.5)), "for 2"),
    (rows((0, 0.5), (1, 0.4), (2, 0.3)), "for 2"),
    (rows(), "for 2"),
    (rows((0, 0.5), (1, math.nan)), "nan for index 1"),
    (rows((0, 0.5), (1, math.inf)), "inf for index 1"),
    (rows((0, 0.5), (1, None)), "None for index 1"),
    (rows((0, 0.5), (1, "0.4")), "'0.4' for index 1"),
    (rows((0, 0.5), (1, True)), "True for index 1"),
    (rows((0, 0.5), (1, [0.4])), "[0.4] for index 1"),
    (rows((0, 0.5), (1, 10**400)), "for index 1"),
    ({"results": None, "data": None}, "without a list"),
    ({"results": {"0": 1}, "data": "x"}, "without a list"),
    ({"results": [1, 2], "data": [1, 2]}, "without a list"),
    ({"error": {"message": "said with 200"}}, "without a list"),
    ([{"index": 0}], "no JSON object"),
    ("text", "no JSON object"),
    (None, "no JSON object"),
    (b"", "not JSON"),
    (b'{"results": [{"index": 0', "not JSON"),
    (b"\xff\xfe\x00garbage", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"results": ' + b"9" * 5000 + b"}", "not JSON"),
    (lambda request: rows((0, 0.5), (1, 0.4))(request) | {"model": "someone-else"}, "as model 'someone-else'"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_wrong_answers_are_refused(client, serve, body, message):
    for call in (client.rerank, client.score):
        server = serve(reply(body))
        with pytest.raises(RerankResponseError) as caught:
            call(QUERY, ["a", "b"], base_url=server.url)
        text = str(caught.value)
        assert message in text and server.url in text and len(text) < 600
        assert isinstance(caught.value, ValueError)
        assert len(server.requests) == 1, "a wrong answer is not asked for again"


NAMES = {"data": [{"id": name, "root": "/models/one"} for name in ("main", "qwen3-reranker", "third")]}


def under(name):
    return lambda request: request.results() | {"model": name}


def test_another_name_of_the_same_model_is_no_wrong_model(client, serve):
    """vLLM with several names answers with the first, whichever was asked for."""
    server = serve(default=reply(under("main")))
    server.models = NAMES
    for _ in range(2):
        for call in (client.rerank, client.score):
            _, scores, raw = call(QUERY, DOCS, base_url=server.url, batch_size=2)
            assert scores == expected(QUERY, DOCS) and raw["model"] == "main"
    assert 1 <= server.models_asked <= 3, "asked once, or once a part that ran at the same time"


@pytest.mark.parametrize(
    "models",
    [
        None,
        {"data": [{"id": "main", "root": "/models/one"}, {"id": "qwen3-reranker", "root": "/models/two"}]},
        {"data": [{"id": "main", "root": None}, {"id": "qwen3-reranker", "root": None}]},
        {"data": [{"id": "main", "root": "/models/one"}]},
        {"data": {"main": 1}},
        {"data": [1, {"id": ["main"], "root": {}}]},
        [],
    ],
)
def test_a_name_that_is_no_alias_is_a_wrong_model(client, serve, models):
    server = serve(default=reply(under("main")))
    server.models = models
    for call in (client.rerank, client.score):
        with pytest.raises(RerankResponseError, match="as model 'main', asked was 'qwen3-reranker'"):
            call(QUERY, DOCS, base_url=server.url)
    assert server.models_asked == 2


def test_missing_keys_are_refused(client, serve):
    for row in ({"relevance_score": 0.5, "score": 0.5}, {"index": 0}, {}):
        for call in (client.rerank, client.score):
            with pytest.raises(RerankResponseError):
                call(QUERY, ["a"], base_url=serve(reply({"results": [row], "data": [row]})).url)


def test_answer_to_another_request_is_refused(client, serve):
    def body(request):
        other = request.results()
        for row in other["results"]:
            row["document"] = {"text": "somebody else's"}
        return other

    with pytest.raises(RerankResponseError, match="another document"):
        client.rerank(QUERY, ["a"], base_url=serve(reply(body)).url)


@pytest.mark.parametrize("echo", [None, {}, {"text": ""}, {"text": "Gravity"}, {"text": None}, "Gravity"])
def test_shortened_echo_is_fine(client, serve, echo):
    body = {"results": [{"index": 0, "relevance_score": 1, "document": echo}]}
    assert client.rerank(QUERY, DOCS[:1], base_url=serve(reply(body)).url)[1] == [1.0]


def test_unsorted_answer_is_sorted_and_whole_number_scores_become_floats(client, serve):
    server = serve(reply(rows((0, 0), (2, 1), (1, -3.5))))
    items, scores, _ = client.rerank(QUERY, ["a", "b", "c"], base_url=server.url)
    assert [item.index for item in items] == [2, 0, 1]
    assert scores == [0.0, -3.5, 1.0] and all(type(s) is float for s in scores)


def test_top_n_with_too_many_results_is_refused(client, serve):
    with pytest.raises(RerankResponseError, match="3 results for 2"):
        client.rerank(QUERY, ["a", "b", "c"], 2, base_url=serve(reply(rows((0, 1), (1, 1), (2, 1)))).url)


# --- long lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_n", [None, 0, 1, 7, 22, 23, 99])
@pytest.mark.parametrize("batch_size", [1, 4, 22, 23])
def test_split_gives_what_one_call_gives(client, serve, top_n, batch_size):
    random.seed(5)
    docs = [f"doc {random.randrange(9)}" for _ in range(23)]  # few different texts: many ties
    server = serve()
    whole = client.rerank(QUERY, docs, top_n, base_url=server.url, batch_size=99)
    parts = client.rerank(QUERY, docs, top_n, base_url=server.url, batch_size=batch_size)
    assert parts[:2] == whole[:2]
    assert parts[2]["results"] == whole[2]["results"]
    assert parts[2].get("usage") == whole[2].get("usage")
    assert parts[2]["_client_calls"] == (0 if top_n == 0 else math.ceil(23 / batch_size))
    assert max((len(r.json["documents"]) for r in server.requests[1:]), default=0) <= max(batch_size, 23)


def test_split_score_keeps_order_and_sums_usage(client, serve):
    docs = [f"doc {i}" for i in range(23)]
    server = serve()
    items, scores, raw = client.score(QUERY, docs, base_url=server.url, batch_size=5)
    assert sorted(len(r.json["text_2"]) for r in server.requests) == [3, 5, 5, 5, 5]
    assert scores == expected(QUERY, docs)
    assert [item.index for item in items] == list(range(23)) == [row["index"] for row in raw["data"]]
    assert raw["usage"] == {"prompt_tokens": 23, "total_tokens": 23, "completion_tokens": 0}
    assert raw["_client_calls"] == 5 and raw["id"].count(",") == 4


def test_split_parts_ask_for_no_more_than_they_need(client, serve):
    server = serve()
    client.rerank(QUERY, [f"doc {i}" for i in range(7)], 3, base_url=server.url, batch_size=5)
    assert sorted((len(r.json["documents"]), r.json["top_n"]) for r in server.requests) == [(2, 2), (5, 3)]


def test_batch_size_comes_from_the_configuration(client, serve, config):
    config(client_batch_size=2)
    server = serve()
    client.rerank(QUERY, list("abcde"), base_url=server.url)
    assert len(server.requests) == 3


class InFlight:
    """A behaviour that counts how many requests are being answered at a time."""

    def __init__(self):
        self.now, self.most, self.lock = 0, 0, threading.Lock()

    def __call__(self, server, connection, request) -> bool:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return slow(0.03)(server, connection, request)
        finally:
            with self.lock:
                self.now -= 1


def test_split_runs_a_bounded_number_at_a_time(client, serve, config):
    config(client_concurrency=3)
    count = InFlight()
    server = serve(default=count)
    client.score(QUERY, [f"doc {i}" for i in range(12)], base_url=server.url, batch_size=1)
    assert len(server.requests) == 12 and 2 <= count.most <= 3


def test_split_ranks_ties_in_input_order_whatever_the_server_does(client, serve):
    def reversed_ties(request):
        return rows(*((i, 0.5) for i in reversed(range(len(request.json["documents"])))))(request)

    server = serve(default=reply(reversed_ties))
    items, _, raw = client.rerank(QUERY, list("abcde"), base_url=server.url, batch_size=2)
    assert [item.index for item in items] == [row["index"] for row in raw["results"]] == [0, 1, 2, 3, 4]


def test_split_fails_as_a_whole_and_stops_sending(client, serve, config):
    config(client_concurrency=2)
    server = serve(status(400), default=slow(0.05))
    with pytest.raises(RerankHTTPError, match="told to say 400"):
        client.score(QUERY, [f"doc {i}" for i in range(60)], base_url=server.url, batch_size=1)
    sent = len(server.requests)
    assert sent < 10
    assert len(server.requests) == sent


def test_deadline_covers_all_parts(client, serve, config):
    config(client_concurrency=1)
    server = serve(default=slow(0.3))
    with pytest.raises(RerankTimeout):
        client.score(QUERY, [f"doc {i}" for i in range(60)], base_url=server.url, batch_size=1, deadline_s=1)
    assert 2 <= len(server.requests) <= 4


def test_async_call_can_be_cancelled(serve, config):
    server = serve(default=slow(10))

    async def run():
        task = asyncio.create_task(arerank(QUERY, list("abcd"), base_url=server.url, batch_size=1))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@pytest.mark.timing
def test_async_calls_run_at_the_same_time(serve, config):
    server = serve(default=slow(0.3))

    async def run():
        t0 = asyncio.get_running_loop().time()
        results = await asyncio.gather(*(arerank(f"q{i}", DOCS, base_url=server.url) for i in range(20)))
        return results, asyncio.get_running_loop().time() - t0

    results, took_s = asyncio.run(run())
    assert took_s < 3  # one after the other: 6 s
    assert [r[1] for r in results] == [expected(f"q{i}", DOCS) for i in range(20)]


# --- rerank_many --------------------------------------------------------------------------------------------------


def test_rerank_many_keeps_the_order_of_the_queries(serve, config):
    server = serve()
    queries = [f"q{i}" for i in range(30)]
    lists = [[f"doc {i} {j}" for j in range(i % 4)] for i in range(30)]
    results = rerank_many(queries, lists, 2, base_url=server.url, concurrency=5)
    for query, docs, (items, scores, raw) in zip(queries, lists, results, strict=True):
        assert [item.index for item in items] == ranking(query, docs, 2)
        assert [s for s in scores if s is not None] == [
            score_of(query, docs[i]) for i in sorted(ranking(query, docs, 2))
        ]
        assert raw["_client_calls"] == bool(docs)
    assert server.accepts <= 5


def test_rerank_many_bounds_requests_not_queries(serve, config):
    count = InFlight()
    server = serve(default=count)
    rerank_many(["a", "b", "c"], [list("xyz")] * 3, base_url=server.url, batch_size=1, concurrency=2)
    assert len(server.requests) == 9 and count.most <= 2


def test_rerank_many_gives_what_rerank_gives_with_every_argument(serve, config):
    server = serve()
    more = {
        "model": "m",
        "instruction": "i",
        "max_tokens_per_doc": 9,
        "batch_size": 2,
        "deadline_s": 9.0,
        "timeout_s": 5,
    }
    many = rerank_many([QUERY], [DOCS], 3, base_url=server.url, **more)
    once = rerank(QUERY, DOCS, 3, base_url=server.url, **more)
    assert many[0][:2] == once[:2]
    half = len(server.requests) // 2
    assert sorted(r.body for r in server.requests[:half]) == sorted(r.body for r in server.requests[half:])


def test_rerank_many_checks_everything_before_the_first_request(serve, config):
    server = serve()
    for queries, lists, message in (
        (["a", "b"], [["x"]], "queries has 2 entries, documents_lists has 1"),
        (["a", "b"], [["x"], "y"], "query 1: documents is a str"),
        ("ab", [["x"], ["y"]], "queries is a str"),
        (["a", 3], [["x"], ["y"]], "query 1: query is a int"),
    ):
        with pytest.raises(ValueError) as caught:
            rerank_many(queries, lists, base_url=server.url)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="concurrency=0"):
        rerank_many(["a"], [["x"]], base_url=server.url, concurrency=0)
    assert server.accepts == 0


def test_rerank_many_raises_the_failure_and_drops_the_rest(serve, config):
    server = serve(status(400), default=slow(0.05))
    with pytest.raises(RerankHTTPError):
        rerank_many(["q"] * 60, [["d"]] * 60, base_url=server.url, concurrency=2)
    assert len(server.requests) < 10


@pytest.mark.timing
def test_a_failure_ends_what_has_not_been_sent(serve, config, monkeypatch):
    """Neither further parts of the other queries, nor retries and their waits."""
    config(client_concurrency=3, client_batch_size=1)
    server = serve(default=lambda s, c, r: (status(400) if r.json["query"] == "bad" else slow(0.1))(s, c, r))
    began = time.monotonic()
    with pytest.raises(RerankHTTPError):
        rerank_many(["q1", "q2", "bad"], [["d"] * 50] * 3, base_url=server.url)
    assert time.monotonic() - began < 2 and len(server.requests) <= 8

    server = serve(status(400), default=status(503, headers={"Retry-After": "20"}))
    began = time.monotonic()
    with pytest.raises(RerankHTTPError) as caught:
        rerank("q", ["d"] * 3, base_url=server.url, deadline_s=60)
    assert time.monotonic() - began < 5 and caught.value.status_code == 400


@pytest.mark.timing
def test_ctrl_c_does_not_wait_for_answers(serve, config):
    config(client_concurrency=4, client_batch_size=1)
    server = serve(default=slow(3))
    began = time.monotonic()
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        rerank_many(["q"] * 8, [["d", "e"]] * 8, base_url=server.url)
    assert time.monotonic() - began < 1.5
    timer.join()
    time.sleep(3)  # the answers that were under way
    assert len(server.requests) == 4, "nothing more was sent"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rerank")]


def test_rerank_many_can_return_errors_in_place(serve, config):
    server = serve(default=lambda s, c, r: (status(400) if r.json["query"] == "q1" else slow(0))(s, c, r))
    results = rerank_many(["q0", "q1", "q2"], [["d"]] * 3, base_url=server.url, return_errors=True)
    assert isinstance(results[1], RerankHTTPError)
    assert [results[0][1], results[2][1]] == [[score_of("q0", "d")], [score_of("q2", "d")]]


def test_rerank_many_counts_on_stderr_only_if_asked(serve, config, capsys):
    server = serve()
    rerank_many(["q"] * 3, [["d"]] * 3, base_url=server.url)
    assert capsys.readouterr() == ("", "")
    rerank_many(["q"] * 3, [["d"]] * 3, base_url=server.url, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "3/3 queries" in err and err.endswith("\n")


def test_rerank_many_of_nothing(config):
    assert rerank_many([], []) == []


# --- random answers -------------------------------------------------------------------------------------------------


def test_random_damage_never_misplaces_a_score(config):
    """A right answer with one random change: either refused, or every score still belongs to its document."""
    rng = random.Random(11)
    docs = [f"doc {i}" for i in range(6)]
    right = {i: score_of(QUERY, doc) for i, doc in enumerate(docs)}
    refused = 0

    def damaged(request):
        data = request.results()
        row = rng.choice(data["results"])
        kind = rng.randrange(6)
        if kind == 0:
            row["index"] = rng.choice([-1, 6, 0, 3, 2.0, None, "1", True])
        elif kind == 1:
            row["relevance_score"] = rng.choice([math.nan, None, "0.1", [], -math.inf])
        elif kind == 2:
            data["results"].remove(row)
        elif kind == 3:
            data["results"].append(dict(row))
        elif kind == 4:
            row["document"]["text"] = rng.choice(docs)
        else:
            text = json.dumps(data).encode()
            return text[: rng.randrange(len(text))]
        return data

    with FaultServer(default=reply(damaged)) as server:
        for _ in range(300):
            try:
                _, scores, _ = rerank(QUERY, docs, base_url=server.url)
            except RerankResponseError:
                refused += 1
            else:
                assert dict(enumerate(scores)) == right
    assert 150 < refused < 300  # some changes put in what was there


def test_module_offers_what_the_readme_names():
    for name in ("rerank", "score", "arerank", "ascore", "rerank_many", "RerankItem"):
        assert hasattr(model_utils, name)
    assert Caller("sync").rerank is rerank
