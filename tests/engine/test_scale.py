"""What a score is, by profile and the checkpoint's files."""

import json

import pytest
from test_plan import plan

from rerank_kit.engine.scale import score_scale
from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.profiles import load_profiles

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("profile", "name", "low", "high"),
    [("qwen3_reranker", "probability", 0, 1), ("embedding", "cosine", -1, 1), ("cross_encoder", "probability", 0, 1)],
)
def test_scale_of_a_profile(tmp_path, profile, name, low, high):
    scale = score_scale(load_profiles()[profile], Checkpoint(tmp_path, {}, (), None))
    assert scale == {"name": name, "min": low, "max": high, "profile": profile}


@pytest.mark.parametrize(
    ("config", "newer", "name"),
    [
        ({"sbert_ce_default_activation_function": IDENTITY}, None, "logit"),
        ({"sentence_transformers": {"activation_fn": IDENTITY}}, None, "logit"),
        ({"sentence_transformers": {"activation_fn": SIGMOID}}, None, "probability"),
        ({}, {"activation_fn": IDENTITY}, "logit"),
        ({"sbert_ce_default_activation_function": IDENTITY}, {"activation_fn": SIGMOID}, "probability"),
        ({"sentence_transformers": 7}, [], "probability"),
        ({}, "no JSON", "probability"),
    ],
)
def test_the_files_name_the_activation(tmp_path, config, newer, name):
    if newer is not None:
        text = newer if isinstance(newer, str) else json.dumps(newer)
        (tmp_path / "config_sentence_transformers.json").write_text(text)
    assert score_scale(load_profiles()["cross_encoder"], Checkpoint(tmp_path, config, (), None))["name"] == name


def test_the_guard_is_told(checkpoints):
    env = plan(checkpoints, served_model_name="mine").env
    assert json.loads(env["GUARD_SCORE_SCALE"])["profile"] == "qwen3_reranker" and env["GUARD_MODEL"] == "mine"
