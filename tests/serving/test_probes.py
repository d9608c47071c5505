"""What the supervisor asks the running service."""

import json

import pytest

from rerank_kit.serving import health
from rerank_kit.settings import get_config


@pytest.mark.parametrize("cache", [{}, {"result_cache_mib": 64}, {"result_cache_url": "redis://h"}], ids=str)
def test_no_probe_is_answered_from_the_result_cache(monkeypatch, cache):
    """A score that the cache keeps would say that a hung engine lives."""
    bodies = []

    def request(cfg, method, path, body=None, timeout_s=60):
        if body:
            bodies.append(json.dumps(body))
        return 200, json.dumps({"results": [{"relevance_score": 0.5}]}).encode()

    monkeypatch.setattr(health, "request", request)
    cfg = get_config(**cache)
    assert [health.probe(cfg) for _ in range(3)] == [None] * 3
    assert len(set(bodies)) == (3 if cache else 1)


@pytest.mark.parametrize("list_tokens", [600, 4096, 8192, 16384, None])
def test_the_burst_of_a_listwise_model_fits_into_one_prompt(monkeypatch, list_tokens):
    calls = []

    def request(cfg, method, path, body=None, timeout_s=60):
        calls.append(body["documents"])
        return 200, b""

    monkeypatch.setattr(health, "request", request)
    assert health.warm_up(get_config(), n_calls=8, list_tokens=list_tokens) == 8
    # Qwen3's tokenizer makes 2 to 3 tokens of a word; the prompt writes about 20 around a document and 200 beside all.
    longest = max(sum(3 * len(text.split()) + 20 for text in documents) + 200 for documents in calls)
    words = max(len(text.split()) for documents in calls for text in documents)
    if list_tokens is None:
        assert longest > 16384 and {len(documents) for documents in calls} == {64}
    else:
        assert longest <= list_tokens and all(calls) and (words >= 64 or list_tokens == 600)
        assert list_tokens < 4096 or longest > 0.5 * list_tokens
