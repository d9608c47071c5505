"""A ModernBERT whose head is in modules of sentence-transformers (ettin-reranker), as the one model that vLLM reads.

The head of ModernBertForSequenceClassification is a linear layer, GELU, a LayerNorm and the classifier. Modules that
compute the same are put into one weight file under its names.
"""

import json
import math
from pathlib import Path

from rerank_kit.models.checkpoint import Checkpoint
from rerank_kit.models.json_files import read_json, read_object
from rerank_kit.models.whole import safetensors_header, weight_files
from rerank_kit.settings import ConfigError

NAME = "model.safetensors"
MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Dense")
PIECE = 1 << 22
GELU = "torch.nn.modules.activation.GELU"
IDENTITY = "torch.nn.modules.linear.Identity"


def head_config(checkpoint: Checkpoint) -> dict:
    """Changes to config.json that make vLLM compute these modules.

    Raises:
        ConfigError: the modules are no head of a ModernBERT; says which one differs.
    """
    folders = _folders(checkpoint)
    first, norm, last = (read_object(folder / "config.json") for folder in folders)
    size, eps = checkpoint.config.get("hidden_size"), checkpoint.config.get("norm_eps", 1e-5)
    pooling = checkpoint.pooling
    wanted = {
        f"{folders[0].name}: in_features, out_features, activation_function": (
            (first.get("in_features"), first.get("out_features"), first.get("activation_function")),
            (size, size, GELU),
        ),
        f"{folders[1].name}: dimension": (norm.get("dimension"), size),
        "config.json: norm_eps": (eps, 1e-5),  # that of sentence-transformers' LayerNorm
        f"{folders[2].name}: in_features, out_features, activation_function": (
            (last.get("in_features"), last.get("out_features"), last.get("activation_function")),
            (size, 1, IDENTITY),
        ),
    }
    for what, (found, expected) in wanted.items():
        if found != expected:
            raise ConfigError(
                f"{checkpoint.path}: its modules are no head of a ModernBERT, so vLLM cannot compute them ({what} is "
                f"{found}, and {expected} is needed): use gte-reranker-modernbert-base instead"
            )
    if pooling not in (("cls",), ("mean",)):
        raise ConfigError(f"{checkpoint.path}: pooling is {pooling}, and a ModernBERT's head takes cls or mean")
    return {
        "architectures": ["ModernBertForSequenceClassification"],
        "classifier_pooling": pooling[0],
        "classifier_activation": "gelu",
        "classifier_bias": "linear.bias" in safetensors_header(folders[0] / NAME),
        "id2label": {"0": "LABEL_0"},
    }


def _folders(checkpoint: Checkpoint) -> list[Path]:
    """Those of Dense, LayerNorm and Dense behind the Pooling module."""
    if checkpoint.modules != MODULES:
        raise ConfigError(
            f"{checkpoint.path}: its modules are {list(checkpoint.modules)}, and {list(MODULES)} are needed: unset "
            "MODEL_PROFILE"
        )
    modules = read_json(checkpoint.path / "modules.json") or []
    folders = [checkpoint.path / m.get("path", "") for m in modules][2:]
    for folder in folders:
        if not (folder / NAME).is_file():
            raise ConfigError(f"{folder}/{NAME} is missing: the download is incomplete; download the model again")
    return folders


def write_joined(checkpoint: Checkpoint, target: Path) -> None:
    """Write the weights of encoder and head into one safetensors file under the names of one model."""
    head = _head_weights(checkpoint)
    header: dict[str, dict] = {}
    copies: list[tuple[Path, int, int]] = []  # (file, first byte, number of bytes)
    end = 0

    def place(name: str, kind: str, shape: list[int], n_bytes: int) -> None:
        nonlocal end
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes

    for file in weight_files(checkpoint.path):
        if file.suffix != ".safetensors":
            raise ConfigError(f"{file} is no safetensors file: save the model again with safetensors")
        with file.open("rb") as source:
            begin = 8 + int.from_bytes(source.read(8), "little")
        for name, item in safetensors_header(file).items():
            first, last = item["data_offsets"]
            place(name if name.startswith("model.") else f"model.{name}", item["dtype"], item["shape"], last - first)
            copies.append((file, begin + first, last - first))
    for name, tensor in head.items():
        place(name, "F32", list(tensor.shape), 4 * math.prod(tensor.shape))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for file, begin, n_bytes in copies:
            with file.open("rb") as source:
                source.seek(begin)
                while n_bytes:  # a piece at a time: the weights may be larger than the memory that is free
                    out.write(source.read(min(n_bytes, PIECE)))
                    n_bytes -= min(n_bytes, PIECE)
        for tensor in head.values():
            out.write(tensor.contiguous().numpy().tobytes())


def _head_weights(checkpoint: Checkpoint) -> dict:
    """The head's tensors in float32. The LayerNorm's bias goes into the classifier's, which follows it at once."""
    import torch
    from safetensors.torch import load_file

    dense, norm, last = (
        {name: weight.float() for name, weight in load_file(folder / NAME).items()} for folder in _folders(checkpoint)
    )
    bias = last.get("linear.bias", torch.zeros(1))
    if "norm.bias" in norm:
        bias = bias + last["linear.weight"] @ norm["norm.bias"]
    out = {"head.dense.weight": dense["linear.weight"], "head.norm.weight": norm["norm.weight"]}
    if checkpoint.config.get("norm_bias"):
        out["head.norm.bias"] = torch.zeros_like(norm["norm.weight"])
    if "linear.bias" in dense:
        out["head.dense.bias"] = dense["linear.bias"]
    return out | {"classifier.weight": last["linear.weight"], "classifier.bias": bias}
