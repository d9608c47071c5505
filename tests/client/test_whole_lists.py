"""Lists for a model whose scores depend on the other documents of a call are sent in one piece."""

# ruff: noqa: F401, F811 (a fixture is imported, then named as an argument)

import pytest
from fault_server import client, config, reply, serve

from rerank_kit.client import one_call

pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("error")]


def listwise(request):
    """Scores that depend on how many documents came."""
    rows = [
        {"index": i, "relevance_score": 1 / (i + len(request.json["documents"]))}
        for i in range(len(request.json["documents"]))
    ]
    return {**request.results(), "results": rows}


@pytest.fixture(autouse=True)
def nothing_learnt(monkeypatch):
    monkeypatch.setattr(one_call, "_listwise", {})


def test_a_list_that_was_split_is_sent_again_whole_and_the_next_at_once(client, serve):
    server = serve(default=reply(listwise, {"X-Rerank-Listwise": "1"}))
    docs = list("abcdefg")
    for _ in range(2):
        _, scores, raw = client.rerank("q", docs, base_url=server.url, batch_size=3, top_n=7)
        assert scores == [1 / (i + 7) for i in range(7)] and raw["_client_calls"] == 1
        assert "_listwise" not in raw
    sent = [len(request.json["documents"]) for request in server.requests]
    assert sorted(sent[:3]) == [1, 3, 3] and sent[3:] == [7, 7]


def test_a_list_that_fits_into_one_request_costs_one(client, serve):
    server = serve(default=reply(listwise, {"X-Rerank-Listwise": "1"}))
    client.rerank("q", list("abc"), base_url=server.url, batch_size=3)
    assert len(server.requests) == 1


def test_other_services_get_parts(client, serve):
    server = serve(default=reply(listwise))
    _, _, raw = client.rerank("q", list("abcdefg"), base_url=server.url, batch_size=3)
    assert raw["_client_calls"] == 3 == len(server.requests)


def test_another_model_at_that_address_gets_parts_again(client, serve, monkeypatch):
    """Whole lists may be more than an ordinary service takes (413)."""
    server = serve(default=reply(listwise, {"X-Rerank-Listwise": "1"}))
    client.rerank("q", list("abcdefg"), base_url=server.url, batch_size=3)
    server.default = reply(listwise)
    _, _, raw = client.rerank("q", list("abcdefg"), base_url=server.url, batch_size=3)
    assert raw["_client_calls"] == 1, "believed for LISTWISE_S"
    monkeypatch.setattr(one_call, "LISTWISE_S", 0)
    _, _, raw = client.rerank("q", list("abcdefg"), base_url=server.url, batch_size=3)
    assert raw["_client_calls"] == 3
