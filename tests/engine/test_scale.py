"""What a score is, by profile and the checkpoint's files."""

import json

import pytest
from test_plan import plan

from rerank_kit.engine.scale import score_scale
from rerank_kit.models.checkpoint import Checkpoint, Said
from rerank_kit.models.profiles import load_profiles

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("profile", "name", "low", "high"),
    [
        ("qwen3_reranker", "probability", 0, 1),
        ("embedding", "cosine", -1, 1),
        ("cross_encoder", "probability", 0, 1),
        ("ctxl_rerank_v2", "logit", None, None),
        ("llama_nemotron_rerank", "logit", None, None),
    ],
)
def test_scale_of_a_profile(tmp_path, profile, name, low, high):
    scale = score_scale(load_profiles()[profile], Checkpoint(tmp_path, {}, (), None))
    assert scale == {"name": name, "min": low, "max": high, "profile": profile}


@pytest.mark.parametrize(
    ("profile", "function", "name"),
    [
        ("cross_encoder", IDENTITY, "logit"),
        ("cross_encoder", SIGMOID, "probability"),
        ("cross_encoder", "torch.nn.modules.activation.Tanh", "Tanh"),
        ("logit_score", IDENTITY, "probability"),  # served with the sigmoid, whatever the files say
        ("qwen3_reranker", IDENTITY, "probability"),
        ("ctxl_rerank_v2", SIGMOID, "logit"),
    ],
)
def test_the_files_name_the_activation(tmp_path, profile, function, name):
    found = Checkpoint(tmp_path, {}, (), None, activation=Said(function, "config.json"))
    scale = score_scale(load_profiles()[profile], found)
    assert scale["name"] == name and (scale["min"], scale["max"]) == ((0, 1) if name == "probability" else (None, None))


def test_the_guard_is_told(checkpoints):
    env = plan(checkpoints, served_model_name="mine").env
    assert json.loads(env["GUARD_SCORE_SCALE"])["profile"] == "qwen3_reranker" and env["GUARD_MODEL"] == "mine"
