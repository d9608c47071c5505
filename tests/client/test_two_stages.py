"""rerank(..., first=(base_url, keep)): a small model scores all, a large one the best of them; sync and async alike."""

# ruff: noqa: F401, F811 (a fixture is imported, then named as an argument)

import time

import pytest
from fault_server import FaultServer, client, config, reply, score_of, serve, slow, status

from rerank_kit.client import FirstStage, RerankHTTPError, RerankTimeout, rerank_many

pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("error")]

QUERY = "q"
DOCS = [f"document {i}" for i in range(20)]
SMALL = [score_of(QUERY, doc) for doc in DOCS]
BEST = sorted(range(20), key=lambda i: -SMALL[i])


def large_score(text):
    """The large model's order is the reverse of the small one's."""
    return 1 - score_of(QUERY, text)


def large(headers=None):
    def body(request):
        texts = request.json["documents"]
        rows = [{"index": i, "document": {"text": t}, "relevance_score": large_score(t)} for i, t in enumerate(texts)]
        rows.sort(key=lambda row: -row["relevance_score"])
        rows = rows[: request.json.get("top_n") or len(rows)]
        return {"id": "x", "model": request.json["model"], "usage": {"total_tokens": len(rows)}, "results": rows}

    return reply(body, headers)


def test_the_large_model_ranks_what_the_small_one_kept(client, serve):
    one, two = serve(), serve(default=large())
    items, scores, raw = client.rerank(QUERY, DOCS, base_url=two.url, first=(one.url, 5))
    assert [r.json["documents"] for r in one.requests] == [DOCS] and "top_n" not in one.requests[0].json
    kept = sorted(BEST[:5])
    assert [r.json["documents"] for r in two.requests] == [[DOCS[i] for i in kept]]  # in input order: ties keep it
    assert [item.index for item in items] == BEST[:5][::-1]
    assert [(item.score, item.doc) for item in items] == [(large_score(DOCS[i]), DOCS[i]) for i in BEST[:5][::-1]]
    assert scores == [large_score(DOCS[i]) if i in kept else None for i in range(20)]
    assert [row["index"] for row in raw["results"]] == BEST[:5][::-1]
    assert raw["_first"]["scores"] == SMALL and raw["_first"]["usage"]["total_tokens"] == 20
    assert raw["_client_calls"] == 2 and raw["_first"]["_client_calls"] == 1
    assert (raw["_first"]["_client_url"], raw["_client_url"]) == (one.url, two.url)
    assert raw["_client_cost_ms"] > raw["_first"]["_client_cost_ms"] > 0


def test_retries_of_both_stages_count(client, serve, config):
    config(retries=2)
    busy = status(503)
    one, two = serve(busy, busy), serve(default=large())
    _, _, raw = client.rerank(QUERY, DOCS, base_url=two.url, first=(one.url, 5))
    assert raw["_client_retries"] == 2 and raw["_first"]["_client_retries"] == 2


def test_the_first_stage_needs_no_setting_of_the_server(client, serve, monkeypatch):
    one, two = serve(), serve(default=large())
    monkeypatch.setenv("PORT", "tcp://10.0.0.1:80")  # of the program around this client
    client.rerank(QUERY, DOCS, base_url=two.url, first=(one.url, 5))


def test_top_n_applies_to_the_second_stage(client, serve):
    one, two = serve(), serve(default=large())
    items, scores, _ = client.rerank(QUERY, DOCS, 2, base_url=two.url, first=(one.url, 5))
    assert two.requests[0].json["top_n"] == 2
    assert [item.index for item in items] == BEST[3:5][::-1]
    assert sum(score is not None for score in scores) == 2


def test_lists_are_split_in_both_stages(client, serve):
    one, two = serve(), serve(default=large())
    items, _, raw = client.rerank(QUERY, DOCS, base_url=two.url, batch_size=3, first=(one.url, 5))
    assert (len(one.requests), len(two.requests), raw["_client_calls"]) == (7, 2, 9)
    assert [item.index for item in items] == BEST[:5][::-1]


def test_cut_and_split_documents_are_named_by_their_place_in_the_input(client, serve):
    heads = {"X-Rerank-Cut": "1", "X-Rerank-Windows": "0:3", "X-Rerank-Version": "b"}
    one = serve(default=lambda s, c, r: reply(r.results(), {"X-Rerank-Cut": "4,7", "X-Rerank-Version": "a"})(s, c, r))
    two = serve(default=large(heads))
    _, _, raw = client.rerank(QUERY, DOCS, base_url=two.url, first=(one.url, 5))
    kept = sorted(BEST[:5])
    assert (raw["_cut"], raw["_windows"], raw["_version"]) == ([kept[1]], {kept[0]: 3}, "b")
    assert (raw["_first"]["_cut"], raw["_first"]["_version"]) == ([4, 7], "a")


def test_names_and_instructions_of_both_models(client, serve):
    one, two = serve(), serve(default=large())
    more = {"base_url": two.url, "model": "large", "instruction": "all", "max_tokens_per_doc": 9}
    client.rerank(QUERY, DOCS, **more, first=(one.url, 5))
    client.rerank(QUERY, DOCS, **more, first=FirstStage(one.url, 5, "small", "own"))
    client.rerank(QUERY, DOCS, **more, first=FirstStage(one.url, 5, instruction=""))
    sent = [(r.json["model"], r.json.get("instruction"), r.json["max_tokens_per_doc"]) for r in one.requests]
    assert sent == [("qwen3-reranker", "all", 9), ("small", "own", 9), ("qwen3-reranker", None, 9)]
    assert [(r.json["model"], r.json["instruction"]) for r in two.requests] == [("large", "all")] * 3


def test_a_short_list_needs_no_first_stage(client, serve):
    one, two = serve(), serve(default=large())
    items, scores, raw = client.rerank(QUERY, DOCS[:5], base_url=two.url, first=(one.url, 5))
    assert one.requests == [] and raw["_first"] is None and None not in scores and len(items) == 5


def test_a_failed_first_stage_is_an_error_never_another_ranking(client, serve, config):
    config(retries=0)
    one, two = serve(default=status(500)), serve(default=large())
    with pytest.raises(RerankHTTPError):
        client.rerank(QUERY, DOCS, base_url=two.url, first=(one.url, 5))
    assert two.requests == []


@pytest.mark.timing
def test_the_deadline_is_that_of_both_stages(client, serve):
    one, two = serve(default=slow(1)), serve(default=slow(5))
    began = time.monotonic()
    with pytest.raises(RerankTimeout):
        client.rerank(QUERY, DOCS, base_url=two.url, deadline_s=1.5, first=(one.url, 5))
    assert 1.4 < time.monotonic() - began < 2.4 and len(two.requests) == 1


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("http://a/v1", r"first='http://a/v1' is not \(base_url, keep\)"),
        (("http://a/v1",), "is not"),
        (("http://a/v1", 0), "keep=0 is not an integer of 1 or more"),
        (("http://a/v1", 2.5), "keep=2.5 is not an integer"),
        (("http://a/v1", True), "keep=True is not an integer"),
        (("", 5), "base_url '' is not an address"),
        (("a:b", 6), "a:b"),
        (("http://a/v1", 5), "keep=5 is less than top_n=6"),
    ],
)
def test_a_wrong_first_is_refused_before_any_request(client, serve, first, said):
    server = serve()
    with pytest.raises(ValueError, match=said):
        client.rerank(QUERY, DOCS, 6, base_url=server.url, first=first)
    with pytest.raises(ValueError, match=said):
        rerank_many([QUERY], [DOCS], 6, base_url=server.url, first=first)
    assert server.requests == []


def test_rerank_many_takes_both_stages(config, serve):
    one, two = serve(), serve(default=large())
    found = rerank_many([QUERY] * 3, [DOCS] * 3, 2, base_url=two.url, first=(one.url, 4))
    assert [[item.index for item in items] for items, _, _ in found] == [BEST[2:4][::-1]] * 3
    assert (len(one.requests), len(two.requests)) == (3, 3)
