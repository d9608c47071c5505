"""config.json of nomic-embed-text with the names that vLLM and transformers read.

Its config.json is written for code from the hub (n_embd, n_layer ...). vLLM 0.32 reads some of these names, and
transformers' class, which it starts from, has others.
"""

from typing import Any

from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.json_files import shown, typed
from rerank_kit.settings import ConfigError

# transformers' name: (the hub's name, what the hub's code takes where the file does not say).
SIZES = {
    "hidden_size": ("n_embd", 768),
    "num_hidden_layers": ("n_layer", 12),
    "num_attention_heads": ("n_head", 12),
    "intermediate_size": ("n_inner", 3072),
    "max_position_embeddings": ("max_trained_positions", 2048),
}
# What both classes compute: other values are another network.
FIXED = {
    "activation_function": "swiglu",
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "qkv_proj_bias": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}
# The same, and vLLM does not look at them.
ALSO = {
    "causal": False,
    "moe_every_n_layers": 0,
    "parallel_block": False,
    "prenorm": False,
    "rotary_emb_fraction": 1.0,
    "use_rms_norm": False,
    "hidden_act": "silu",
}


def nomic_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Changes to config.json by which vLLM computes the model.

    Raises:
        ConfigError: the file describes another network than nomic-embed-text v1 and v1.5.
    """
    config, file = checkpoint.config, checkpoint.path / "config.json"
    for key, wanted in (FIXED | ALSO).items():
        found = config.get(key)
        if found is not None and found != wanted:
            raise ConfigError(
                f"{file} has {key}={shown(found)}, and nomic-embed-text v1 and v1.5 have {shown(wanted)}: this network "
                "was not proved on vLLM; use all-MiniLM, bge, multilingual-e5 or Qwen3-Embedding"
            )
    changes: dict[str, Any] = {"auto_map": None, **FIXED, "hidden_act": "silu"}
    for key, (hub, default) in SIZES.items():
        own = config.get(hub, config.get(key))
        value = typed(default if own is None else own, int, file, hub, 1)
        changes |= {key: value, hub: value}
    eps = config.get("layer_norm_epsilon", config.get("layer_norm_eps", 1e-12))
    changes |= {"layer_norm_eps": eps, "layer_norm_epsilon": eps}
    rope = config.get("rope_parameters") or {}
    theta = config.get("rotary_emb_base", rope.get("rope_theta", 1000.0))
    # Its longer texts (rotary_scaling_factor) begin behind max_trained_positions, where the kit cuts.
    return changes | {"rope_parameters": {"rope_type": "default", "rope_theta": float(theta)}}
