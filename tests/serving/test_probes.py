"""What the supervisor asks the running service."""

import json

import pytest

from rerank_kit.serving import health
from rerank_kit.settings import get_config


@pytest.mark.parametrize("mib", [0, 64])
def test_no_probe_is_answered_from_the_result_cache(monkeypatch, mib):
    """A score that the cache keeps would say that a hung engine lives."""
    bodies = []

    def request(cfg, method, path, body=None, timeout_s=60):
        if body:
            bodies.append(json.dumps(body))
        return 200, json.dumps({"results": [{"relevance_score": 0.5}]}).encode()

    monkeypatch.setattr(health, "request", request)
    cfg = get_config(result_cache_mib=mib)
    assert [health.probe(cfg) for _ in range(3)] == [None] * 3
    assert len(set(bodies)) == (3 if mib else 1)
