"""jina-reranker-v2 and gte-multilingual-reranker in plain torch, written from their published code only.

Sources: block.py, mha.py, mlp.py and modeling_xlm_roberta.py of jinaai/jina-reranker-v2-base-multilingual,
modeling.py of Alibaba-NLP/new-impl. One pair at a time, so no padding and no mask.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional


class Weights:
    """A checkpoint's weights by name, and what layers do with them."""

    def __init__(self, folder: Path):
        self.of = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
        self.config = json.loads((folder / "config.json").read_text())

    def linear(self, name: str, x):
        return functional.linear(x, self.of[f"{name}.weight"], self.of.get(f"{name}.bias"))

    def norm(self, name: str, x):
        eps = self.config["layer_norm_eps"]
        return functional.layer_norm(x, x.shape[-1:], self.of[f"{name}.weight"], self.of[f"{name}.bias"], eps)

    def attend(self, packed, turn=lambda x: x):
        """Attention of all positions to all, from packed [tokens, query + key + value] rows; turn: rotary positions."""
        n, heads = len(packed), self.config["num_attention_heads"]
        query, key, value = (part.view(n, heads, -1).transpose(0, 1) for part in packed.chunk(3, dim=-1))
        query, key = turn(query), turn(key)
        weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        return (weights @ value).transpose(0, 1).reshape(n, -1)


def jina_reranker_v2(folder: Path, ids: list[int]) -> float:
    """Logit of one pair's token ids."""
    w = Weights(folder)
    first = w.config["pad_token_id"] + 1
    tables = {name: w.of[f"roberta.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = tables["word"][ids] + tables["position"][first : first + len(ids)] + tables["token_type"][0]
    x = w.norm("roberta.emb_ln", x)
    for n in range(w.config["num_hidden_layers"]):
        layer = f"roberta.encoder.layers.{n}."
        mixed = w.linear(layer + "mixer.out_proj", w.attend(w.linear(layer + "mixer.Wqkv", x)))
        x = w.norm(layer + "norm1", x + mixed)
        x = w.norm(layer + "norm2", x + w.linear(layer + "mlp.fc2", functional.gelu(w.linear(layer + "mlp.fc1", x))))
    return w.linear("classifier.out_proj", torch.tanh(w.linear("classifier.dense", x[0]))).item()


def gte_multilingual_reranker(folder: Path, ids: list[int]) -> float:
    """Logit of one pair's token ids."""
    w = Weights(folder)
    size = w.config["hidden_size"] // w.config["num_attention_heads"]
    factor = w.config["rope_scaling"]["factor"]
    frequencies = (w.config["rope_theta"] * factor) ** (-torch.arange(0, size, 2) / size) / factor ** (2 / size)
    angles = (torch.arange(len(ids))[:, None] * frequencies).repeat(1, 2)

    def turn(x):
        one, two = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-two, one), dim=-1) * angles.sin()

    x = w.of["new.embeddings.word_embeddings.weight"][ids] + w.of["new.embeddings.token_type_embeddings.weight"][0]
    x = w.norm("new.embeddings.LayerNorm", x)
    for n in range(w.config["num_hidden_layers"]):
        layer = f"new.encoder.layer.{n}."
        mixed = w.attend(w.linear(layer + "attention.qkv_proj", x), turn)
        x = w.norm(layer + "attn_ln", x + w.linear(layer + "attention.o_proj", mixed))
        up, gate = w.linear(layer + "mlp.up_gate_proj", x).chunk(2, dim=-1)
        x = w.norm(layer + "mlp_ln", x + w.linear(layer + "mlp.down_proj", functional.gelu(gate) * up))
    return w.linear("classifier", torch.tanh(w.linear("new.pooler.dense", x[0]))).item()
