"""What a score of one checkpoint is: said in the service's answers (meta.score_scale) and by /info."""

import json
from pathlib import Path

from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.profiles import Profile


def score_scale(profile: Profile, checkpoint: Checkpoint) -> dict:
    """{"name", "min", "max", "profile"}: probability (0 to 1), cosine (-1 to 1) or logit (without bounds)."""
    if profile.reference == "embedding":
        scale = {"name": "cosine", "min": -1, "max": 1}
    elif profile.template is None and "Identity" in _activation(checkpoint):
        scale = {"name": "logit", "min": None, "max": None}
    else:
        scale = {"name": "probability", "min": 0, "max": 1}
    return scale | {"profile": profile.name}


def _activation(checkpoint: Checkpoint) -> str:
    """The class that a cross-encoder's files name for its logit; "" = none, which means the sigmoid.

    sentence-transformers 6 writes it into config_sentence_transformers.json, older ones into config.json.
    """
    try:
        newer = json.loads(Path(checkpoint.path, "config_sentence_transformers.json").read_text("utf-8"))
    except (OSError, ValueError):
        newer = {}
    older = checkpoint.config
    inner = older.get("sentence_transformers")
    named = [newer.get("activation_fn") if isinstance(newer, dict) else None]
    named += [inner.get("activation_fn") if isinstance(inner, dict) else None]
    named += [older.get("sbert_ce_default_activation_function")]
    return next((name for name in named if isinstance(name, str)), "")
