"""check --exact: the rounds on a real service; changed bits, a broken bound and a restart are found."""

import json
import math
import os
from pathlib import Path

import pytest
from conftest import free_port, run_kit

from rerank_kit.engine.scale import score_difference
from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.profiles import load_profiles
from rerank_kit.models.settled import Settled
from rerank_kit.serving import check, exact
from rerank_kit.serving.check import TOLERANCE
from rerank_kit.serving.exact import Scores, check_exact, known_pairs, measure, rounds
from rerank_kit.settings import ConfigError, get_config


class Service:
    """Scores a pair by its texts. `shift(call number)` is added to the scores of a call."""

    def __init__(self, shift=lambda call: 0.0):
        self.shift, self.calls, self.salts = shift, 0, []

    def ask(self, cfg, method, path, body):
        self.calls += 1
        self.salts.append(body["cache_salt"])
        scores = [
            len(q + d) / 9999 + self.shift(self.calls) for q, d in zip(body["text_1"], body["text_2"], strict=True)
        ]
        return json.dumps({"data": [{"index": i, "score": s} for i, s in enumerate(scores)][::-1]}).encode()


@pytest.fixture
def state(monkeypatch):
    """What the supervisor says of the running service."""
    known = {"version": "0123456789ab-exact", "server_pid": 1, "server_born": 1}
    counts = iter(range(1000))
    monkeypatch.setattr(exact, "known_state", lambda cfg: known)
    monkeypatch.setattr(exact, "progress", lambda cfg: {"0": (float(next(counts)), False)})
    return known


def run(service, tmp_path, on=1, pairs=24, n_rounds=4):
    cfg = get_config(exact=on, log_dir=str(tmp_path))
    return {name: (fault, seen) for name, fault, seen in check_exact(cfg, service.ask, TOLERANCE, pairs, n_rounds)}


def test_rounds_cover_sizes_orders_and_caches():
    assert len(rounds()) * len(known_pairs()) >= 10_000
    assert {one.pairs_per_call for one in rounds()} >= {1, 2, 32, 64} and {one.in_flight for one in rounds()} >= {1, 16}
    assert sum(one.cold for one in rounds()) == 10
    assert len(set(known_pairs())) == 512 and known_pairs() == known_pairs()
    service = Service()
    scores = measure(get_config(), service.ask, 24, 4)
    assert scores.n == 96 and not scores.changed and scores.furthest()[0] == 0.0
    assert len(set(service.salts)) == 2 and "" not in service.salts  # two cold rounds, each followed by a warm one


def test_bits_that_stay_pass_and_are_compared_after_a_restart(state, tmp_path):
    found = run(Service(), tmp_path)
    assert not any(fault for fault, _ in found.values())
    assert "0 differing bits: 96 scores of 24 pairs in 4 rounds on 1 engines" in found["exact"][1]
    assert "run this again after a restart" in found["restart"][1]
    assert "the run before" in run(Service(), tmp_path)["restart"][1]
    state["server_pid"] = 2
    assert run(Service(), tmp_path)["restart"] == (None, "24 scores have the bits of before the restart")
    state["server_pid"] = 3
    assert "24 of 24 pairs have other bits" in run(Service(lambda call: 1e-7), tmp_path)["restart"][0]
    state["version"] = "ba9876543210-exact"  # another checkpoint
    assert run(Service(), tmp_path)["restart"][0] is None


def test_a_folder_that_cannot_be_written_is_no_fault_of_the_scores(state, tmp_path):
    (tmp_path / "file").touch()
    fault, seen = run(Service(), tmp_path / "file" / "log")["restart"]
    assert fault is None and "not stored" in seen and "file" in seen


def test_one_changed_bit_is_a_fault_with_exact_only(state, tmp_path):
    def last_bit(call):
        return 6e-8 if call == 30 else 0.0

    fault, _ = run(Service(last_bit), tmp_path)["exact"]
    assert "pairs changed bits, the largest from" in fault and "a call" in fault
    state["version"] = "0123456789ab"
    fault, seen = run(Service(last_bit), tmp_path, on=0)["bound"]
    assert fault is None and "pairs change bits with the batch" in seen


def test_the_bound_without_exact_is_checked(state, tmp_path):
    state["version"] = "0123456789ab"
    assert run(Service(lambda call: 0.019 * (call == 30)), tmp_path, on=0)["bound"][0] is None
    fault, _ = run(Service(lambda call: 0.021 * (call == 30)), tmp_path, on=0)["bound"]
    assert "a score lies 0.0210 from its pair's median, the bound is 0.02" in fault


def test_an_idle_engine_is_a_fault(state, monkeypatch, tmp_path):
    seen = iter([{"0": (1.0, False), "1": (5.0, False)}, {"0": (9.0, False), "1": (5.0, False)}])
    monkeypatch.setattr(exact, "progress", lambda cfg: next(seen))
    assert run(Service(), tmp_path)["engines"][0] == "engines 1 scored none of these pairs"


def test_a_service_in_another_mode_is_not_checked(state, tmp_path):
    with pytest.raises(ConfigError, match="EXACT=0, but the running service was started with EXACT=1"):
        run(Service(), tmp_path, on=0)


@pytest.mark.server
def test_the_bound_holds_on_a_real_service(service):
    cfg = get_config(port=service.port, log_dir=str(service.settings["LOG_DIR"]))
    found = {name: (fault, seen) for name, fault, seen in check_exact(cfg, check.ask, TOLERANCE, 64, 4)}
    assert not any(fault for fault, _ in found.values()), found
    assert "256 scores of 64 pairs" in found["bound"][1]
    done = run_kit("check", "--exact", **{**service.settings, "EXACT": "1"})
    assert done.returncode == 6 and "started without EXACT=1" in done.stderr, done.stdout + done.stderr


@pytest.mark.gpu
def test_exact_keeps_every_bit_on_a_gpu_and_after_a_restart(tmp_path):
    """MODEL_PATH=FOLDER python -m pytest -m gpu tests/serving/test_exact.py"""
    settings = {"MODEL_PATH": os.environ["MODEL_PATH"], "PORT": free_port(), "LOG_DIR": tmp_path, "EXACT": 1}
    try:
        for wanted in ("stored in", "have the bits of before the restart"):
            started = run_kit("restart", **settings)
            assert started.returncode == 0, started.stdout + started.stderr
            done = run_kit("check", "--exact", **settings)
            assert done.returncode == 0 and wanted in done.stdout, done.stdout + done.stderr
    finally:
        run_kit("stop", **settings)


def test_logits_are_compared_as_probabilities(tmp_path):
    """bf16 moves a logit of 20 by more than the bound for scores from 0 to 1."""
    found = Checkpoint(tmp_path, {}, (), None)
    profiles = load_profiles()
    logit, score = (score_difference(profiles[name], found) for name in ("ctxl_rerank_v2", "qwen3_reranker"))
    assert logit(20.25, 20.0) < check.TOLERANCE < logit(0.25, 0.0) and score(0.25, 0.0) == 0.25
    assert logit(-11.375, -12.192464) < check.TOLERANCE, "bf16 and float32 of one card"
    assert logit(-800.0, 800.0) == 1 and logit(-800.0, -801.0) < check.TOLERANCE
    assert math.isnan(logit(float("nan"), -20.0)) and logit(float("inf"), 20.0) == float("inf")
    scores = Scores(1)
    scores.of_pair[0] = [(20.0, "alone"), (20.25, "among others")]
    assert scores.furthest() == (0.25, 0) and scores.furthest(logit)[0] < check.TOLERANCE


@pytest.mark.parametrize("wanted", [4.0, 8.0, -12.0])
def test_a_wrong_factor_on_large_logits_is_seen(wanted):
    """As probabilities 8 and 4 differ by less than the bound."""
    far = score_difference(load_profiles()["llama_nemotron_rerank"], Checkpoint(Path(), {}, (), None))
    assert min(far(2 * wanted, wanted), far(wanted / 2, wanted)) > check.TOLERANCE > far(1.05 * wanted, wanted)
    scores = Scores(1)
    scores.of_pair[0] = [(wanted, "alone"), (wanted, "alone"), (2 * wanted, "among others")]
    assert scores.furthest(far)[0] > check.TOLERANCE


def test_a_listwise_model_has_no_pairs_to_batch(monkeypatch):
    listwise = Settled(load_profiles()["jina_reranker_v3"], None)
    monkeypatch.setattr(check, "served", lambda cfg: (None, listwise))
    with pytest.raises(ConfigError, match="is listwise"):
        list(check.check_batches(get_config()))
