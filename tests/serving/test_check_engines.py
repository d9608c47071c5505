"""check of several engines: by vLLM's metrics where there are some, and not judged where there are none."""

from pathlib import Path

import pytest

from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.profiles import load_profiles
from rerank_kit.models.settled import Settled
from rerank_kit.serving import check
from rerank_kit.settings import get_config


@pytest.fixture
def two(monkeypatch):
    """A service of two engines whose other checks find nothing."""
    settled = Settled(load_profiles()["cross_encoder"], None)
    monkeypatch.setattr(check, "served", lambda cfg: (Checkpoint(Path("/m"), {}, (), None), settled))
    monkeypatch.setattr(check, "expectation", lambda *_: {"tokens": None})
    monkeypatch.setattr(check, "score", lambda *_: (0.5, 80))
    monkeypatch.setattr(check, "judge", lambda *_: [(name, None, "") for name in ("prompt", "head", "answers")])
    monkeypatch.setattr(check.time, "sleep", lambda _: None)
    return get_config(dp=2, extra_args="--disable_log_stats")


def seen(cfg):
    return {name: (fault, said) for name, fault, said in check.run_checks(cfg)}["engines"]


@pytest.mark.parametrize("counters", [{}, {"": (7.0, False)}])
def test_engines_without_metrics_are_not_judged(two, monkeypatch, counters):
    """--disable-log-stats, however it is written: nobody knows which engine scored."""
    monkeypatch.setattr(check, "progress", lambda cfg: counters)
    assert seen(two) == (None, "not compared: the service has no vLLM metrics")


def test_an_engine_that_did_not_score_is_found(two, monkeypatch):
    numbers = iter(range(99))
    monkeypatch.setattr(check, "progress", lambda cfg: {"0": (float(next(numbers)), False), "1": (7.0, False)})
    assert seen(two)[0] == "only 1 of 2 engines scored"
