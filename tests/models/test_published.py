"""The answers that model cards print, and what `check` says beside them."""

import math
import os
from pathlib import Path

import pytest

from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.published import DOCUMENTS, KNOWN, distance, logit, published
from rerank_kit.serving import check
from rerank_kit.settings import get_config

SMALL = {"hidden_size": 1024, "num_hidden_layers": 28}


def found(path: str, **config) -> Checkpoint:
    return Checkpoint(Path(path), {**SMALL, **config}, (), None)


def test_a_checkpoint_is_recognised_by_sizes_and_by_the_revision_of_its_files(tmp_path):
    cache = "/c/models--Qwen--Qwen3-Reranker-0.6B/snapshots/"
    assert published(found(cache + "e61197ed45024b0ed8a2d74b80b4d909f1255473")) == (KNOWN[0], True)
    assert published(found(cache + "0123")) == (KNOWN[0], False)
    assert published(found("/models/any", hidden_size=4096, num_hidden_layers=36)) == (KNOWN[2], False)
    assert published(found("/models/any", hidden_size=64)) is None
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    parts = [tmp_path / f"model-{n}.safetensors" for n in "12"]
    for part in parts:
        (notes / f"{part.name}.metadata").write_text("e61197ed45024b0ed8a2d74b80b4d909f1255473\netag\n1700000000.5\n")
        part.touch()
        os.utime(part, (1700000001, 1700000001))
    assert published(found(str(tmp_path))) == (KNOWN[0], True)
    os.utime(parts[1], (1700000002, 1700000002))
    assert published(found(str(tmp_path))) == (KNOWN[0], False), "a fine-tune was saved there"
    os.utime(parts[1], (1700000001, 1700000001))
    for spoilt in ("", "e61197ed\n", "e61197ed\netag\nsoon\n"):
        (notes / f"{parts[0].name}.metadata").write_text(spoilt)
        assert published(found(str(tmp_path))) == (KNOWN[0], False)
    (tmp_path / "model.safetensors").touch()  # saved beside them, and nobody noted it
    assert published(found(str(tmp_path))) == (KNOWN[0], False)


def test_distance_is_that_to_the_closest_published_run():
    for known in KNOWN:
        for run in known.logits:
            scores = [1 / (1 + math.exp(-value)) for value in run]
            assert distance(known, scores) < 1e-3
    assert distance(KNOWN[0], [0.5, 0.5]) > 7
    assert logit(0.0) < -27 and logit(1.0) > 27


@pytest.mark.parametrize(
    ("logits", "certain", "fault", "said"),
    [
        ((7.6, -12.2), False, False, "these weights"),
        ((7.0, -11.0), True, False, "these weights"),
        ((2.0, -3.0), False, False, "a fine-tune of this size"),
        ((2.0, -3.0), True, True, "the files are that revision (e61197ed)"),
        ((0.0, 0.0), True, True, "has 7.625, -11.375"),
    ],
)
def test_check_says_whose_answers_these_are(monkeypatch, logits, certain, fault, said):
    asked = []

    def score(cfg, query, document, instruction=None):
        asked.append(instruction)
        return 1 / (1 + math.exp(-logits[DOCUMENTS.index(document)])), 80

    monkeypatch.setattr(check, "score", score)
    if fault:  # not where settings cut texts or take bits
        for settings in ({"quantization": "fp8"}, {"max_tokens_per_doc": 8}, {"max_model_len": 64}):
            assert check.check_published(get_config(**settings), KNOWN[0], certain)[1] is None
    name, found_fault, seen = check.check_published(get_config(), KNOWN[0], certain)
    assert name == "published" and bool(found_fault) == fault and said in (found_fault or seen)
    assert set(asked) == {"Given a web search query, retrieve relevant passages that answer the query"}
