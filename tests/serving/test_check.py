"""check: passes on the real service, and each fault that it looks for makes it fail with its reason."""

import json
import time
from pathlib import Path

import pytest
from conftest import run_kit

from rerank_kit.models import library
from rerank_kit.models.checkpoint import Checkpoint, MissingPackage, read_checkpoint
from rerank_kit.models.known_pairs import judge
from rerank_kit.models.profiles import load_profiles
from rerank_kit.models.settled import Settled
from rerank_kit.serving import check, health
from rerank_kit.serving.check import PAIRS, reference_bytes, run_checks
from rerank_kit.settings import ConfigError, get_config

pytestmark = pytest.mark.server
REAL = health.request


@pytest.fixture
def cfg(service):
    return get_config(port=service.port)


def changed(monkeypatch, change):
    """The real service's /v1/score answers, changed: change(answer, number of the pair)."""
    numbers = iter(range(99))

    def request(cfg, method, path, body=None, timeout_s=5.0):
        status, data = REAL(cfg, method, path, body, timeout_s)
        if path == "/v1/score":
            answer = json.loads(data)
            change(answer, next(numbers))
            data = json.dumps(answer).encode()
        return status, data

    monkeypatch.setattr(check, "request", request)


def faults(cfg, reference=False):
    return {name: fault for name, fault, _ in run_checks(cfg, reference) if fault}


def test_check_passes_one_line_a_check(service):
    began = time.monotonic()
    done = run_kit("check", **service.settings)
    assert time.monotonic() - began < 60, "without the reference nothing large is loaded"
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["ok", name] for name in ("model", "prompt", "head", "answers")
    ]
    done = run_kit("check", "--reference", **service.settings)
    assert done.returncode == 0 and "transformers in float32 agrees" in done.stdout, done.stdout + done.stderr


def test_another_template_is_found(cfg, monkeypatch):
    def one_token_less(answer, _):
        answer["usage"]["prompt_tokens"] -= 1

    changed(monkeypatch, one_token_less)
    found = faults(cfg)
    assert list(found) == ["prompt"] and "the service uses another template" in found["prompt"]


def test_a_head_that_was_not_loaded_is_found(cfg, monkeypatch):
    def half(answer, _):
        answer["data"][0]["score"] = 0.5

    changed(monkeypatch, half)
    found = faults(cfg)
    assert "every score is 0.5" in found["head"]


@pytest.mark.parametrize(("score", "said"), [(1.5, "not within 0 to 1"), (float("nan"), "finite"), (None, "finite")])
def test_scores_out_of_range_are_found(cfg, monkeypatch, score, said):
    def spoil(answer, number):
        if number == 1:
            answer["data"][0]["score"] = score

    changed(monkeypatch, spoil)
    assert said in faults(cfg)["head"]


def test_known_answers_that_rank_wrong_are_found(cfg, monkeypatch):
    monkeypatch.setattr(check, "REAL_MODEL", 1)  # take the tiny model for one that knows answers

    def put(scores):
        def change(answer, number):
            answer["data"][0]["score"] = scores[number]

        return change

    # This tiny tokenizer is an English model's to the check: one question is asked.
    changed(monkeypatch, put([0.1, 0.9, 0.9, 0.1, 0.5]))
    assert "ranks first" in faults(cfg)["answers"]
    changed(monkeypatch, put([0.9, 0.1, 0.9, 0.1, 0.5]))
    assert "answers" not in faults(cfg)


def test_scores_that_differ_from_the_reference_are_found(cfg, monkeypatch):
    def drift(answer, number):
        if number == 4:
            answer["data"][0]["score"] += 0.03 if answer["data"][0]["score"] < 0.5 else -0.03

    changed(monkeypatch, drift)
    assert "differs by 0.03" in faults(cfg, reference=True)["reference"]


def test_a_reference_that_does_not_fit_is_not_tried(cfg, monkeypatch):
    checkpoint = read_checkpoint(next(iter(check.served(cfg)[:1])).path)
    assert 4 * 50_000 < reference_bytes(checkpoint) < 4 * 1_000_000
    monkeypatch.setattr(check, "free_memory", lambda: 1000)
    with pytest.raises(check.NotMade, match="not compared: transformers in float32 needs"):
        faults(cfg, reference=True)


def test_reference_bytes_counts_every_shard(checkpoints):
    whole = reference_bytes(read_checkpoint(checkpoints["qwen3_untied"]))
    tied = reference_bytes(read_checkpoint(checkpoints["qwen3"]))
    assert whole - tied == pytest.approx(1.2 * 4 * 1024 * 64, abs=2)  # the lm_head of its own
    assert reference_bytes(Checkpoint(checkpoints["qwen3"].parent, {}, (), None)) == 0


def test_a_busy_service_is_asked_again(cfg, monkeypatch, capsys):
    """Callers may have found the service first. What nobody could see is no fault: start ends nothing for it."""
    refusals = iter([429, 503, 429])

    def busy_at_first(*args, **kwargs):
        status = next(refusals, None)
        return (status, b"busy") if status else REAL(*args, **kwargs)

    monkeypatch.setattr(check, "request", busy_at_first)
    assert faults(cfg) == {} and next(refusals, None) is None
    monkeypatch.setattr(check, "PATIENCE_S", 1.0)
    monkeypatch.setattr(check, "get_config", lambda: cfg)
    for status, code in ((429, 4), (500, 1)):
        monkeypatch.setattr(check, "request", lambda *_, status=status, **__: (status, b"x"))
        assert check.main(["--quiet"]) == code
        assert f"/v1/models answers {status}" in capsys.readouterr().out


def test_no_server_is_one_line(monkeypatch):
    done = run_kit("check", PORT=1)
    assert done.returncode == 4 and done.stdout.startswith("FAILED  no answer to check"), done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert len(PAIRS) == 5


def test_another_model_name_is_found(service):
    done = run_kit("check", **{**service.settings, "SERVED_MODEL_NAME": "other"})
    assert done.returncode == 1 and "not SERVED_MODEL_NAME=other" in done.stdout


def test_a_check_by_a_python_without_tokenizers_could_not_be_made(monkeypatch, capsys):
    def lacking(*_):
        raise MissingPackage("this Python cannot read tokenizer.json")

    monkeypatch.setattr(check, "run_checks", lacking)
    assert check.main([]) == 4
    assert capsys.readouterr().out == "FAILED  this Python cannot read tokenizer.json\n"


def test_a_tokenizer_that_this_python_cannot_read_is_no_fault_of_the_service(monkeypatch, capsys):
    """MissingPackage is a ConfigError too, and those of the checkpoint are faults."""

    def lacking(*_, **__):
        raise MissingPackage("this Python cannot read tokenizer.json")

    found = Settled(load_profiles()["qwen3_reranker"], None)
    monkeypatch.setattr(check, "served", lacking)
    assert check.main([]) == 4 and "FAILED  this Python" in capsys.readouterr().out
    monkeypatch.setattr(check, "reference_scores", lacking)
    with pytest.raises(MissingPackage):
        list(check.check_references(get_config(), Checkpoint(Path(), {}, (), None), found, [0.5]))


@pytest.mark.parametrize(("before", "code"), [(None, 4), ("wrong", 1)])
def test_what_could_not_be_compared_is_unsure(monkeypatch, capsys, before, code):
    """Weights in AWQ, for example, which transformers cannot load: nobody knows, and no score is wrong for it."""

    def unloadable(*_, **__):
        raise ConfigError("weights in awq, which transformers cannot load here")

    def checks(cfg, _):
        yield "head", before, "fine"
        found = Settled(load_profiles()["qwen3_reranker"], None)
        yield from check.check_references(cfg, Checkpoint(Path(), {}, (), None), found, [0.5])

    monkeypatch.setattr(check, "reference_scores", unloadable)
    monkeypatch.setattr(check, "run_checks", checks)
    assert check.main(["--reference"]) == code
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "unsure  reference  not compared: weights in awq, which transformers cannot load here"


@pytest.mark.parametrize(("served", "wanted", "fine"), [(20.25, 20.0, True), (8.0, 4.0, False), (0.3, 0.0, False)])
def test_logits_are_compared_alike_with_recipe_and_library(monkeypatch, served, wanted, fine):
    """bf16 moves a logit of 20 by 0.25, also beside the library, whose own difference to the recipe is 0 here."""
    monkeypatch.setattr(check, "reference_scores", lambda *_, **__: [wanted] * len(PAIRS))
    monkeypatch.setattr(library, "library_scores", lambda *_: [wanted] * len(PAIRS))
    found = Settled(load_profiles()["ctxl_rerank_v2"], None)
    made = Checkpoint(Path(), {}, (), None)
    lines = list(check.check_references(get_config(), made, found, [served] * len(PAIRS)))
    assert [(name, fault is None) for name, fault, _ in lines] == [
        ("reference", fine),
        ("library", True),
        ("library", fine),
    ]
    assert fine or f"({served} for {wanted:.4f}" in lines[0][1]


@pytest.mark.parametrize(
    ("wanted", "fault", "said"),
    [
        ([9, 11], None, "2 prompts have the profile's 9 to 11 tokens"),
        ([9, 12], "the service uses another template", ""),
        ([9, None], None, "1 prompts have the profile's 9 to 9 tokens"),
        ([8, None], "the service uses another template", ""),
        ([None, None], None, "takes fewer tokens than these pairs have"),
        (None, None, "has no tokenizer.json"),
    ],
)
def test_prompts_that_are_cut_are_not_compared(wanted, fault, said):
    expected = {"tokens": wanted, "low": 0, "high": 1, "known": []}
    name, found, seen = next(judge(expected, [(0.1, 9), (0.9, 11)]))
    assert name == "prompt" and (fault in found if fault else found is None and said in seen)
