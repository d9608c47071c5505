"""Tiny checkpoints with 4-bit and 8-bit weights, as AutoAWQ, AutoGPTQ and llm-compressor write them.

AWQ and GPTQ are written by their formats (rounding alone, no calibration); the compressed-tensors ones are packed by
that library. Each comes with a twin in float: what its weights mean, so that scores can be compared.

Sources: awq/modules/linear/gemm.py of AutoAWQ 0.2.9, gptqmodel/nn_modules/qlinear of GPTQModel, compressed_tensors
0.17.0 (compressors/pack_quantized, naive_quantized).
"""

import json
import shutil
from pathlib import Path

GROUP = 32  # weights that share a scale
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight values in one int32


def quantised(source: Path, target: Path, method: str) -> tuple[Path, Path]:
    """(checkpoint with quantised weights, its twin in float) of a causal LM."""
    import torch
    from safetensors.torch import load_file, save_file

    twin = target.with_name(f"{target.name}-in-float")
    for folder in (target, twin):
        shutil.copytree(source, folder)
    weights, packed, plain = load_file(source / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            packed[name] = plain[name] = weight
            continue
        parts, plain[name] = WRITERS[method](weight.float())
        packed |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
    for folder, found in ((target, packed), (twin, plain)):
        save_file(found, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]()
    # The kernels of these methods want 16 bits.
    config["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config))
    assert all(torch.isfinite(value.float()).all() for value in packed.values())
    return target, twin


def _groups(weight):
    """(out, groups, GROUP) of a weight (out, in)."""
    return weight.reshape(weight.shape[0], -1, GROUP)


def _pack(values, order=range(8)):
    """Eight 4-bit values along the last axis in one int32."""
    import torch

    values = values.reshape(*values.shape[:-1], -1, 8).to(torch.int64)
    packed = sum(values[..., place] << (4 * number) for number, place in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _symmetric(weight, bits: int):
    """(values from 0, their scales in bfloat16's precision, the weight that they mean)."""
    import torch

    groups, top = _groups(weight), 2 ** (bits - 1)
    scale = (groups.abs().amax(-1, keepdim=True) / (top - 1)).to(torch.bfloat16).float()
    values = (groups / scale).round().clamp(-top, top - 1)
    return values + top, scale, (values * scale).reshape(weight.shape)


def _gptq(weight):
    import torch

    values, scale, meaning = _symmetric(weight, 4)
    n_out, n_in = weight.shape
    zeros = torch.full((n_in // GROUP, n_out), 7)  # GPTQ's files have the zero point less one
    return {
        "qweight": _pack(values.reshape(n_out, n_in)).T,
        "qzeros": _pack(zeros),
        "scales": scale.squeeze(-1).T.to(torch.bfloat16),
        "g_idx": torch.arange(n_in, dtype=torch.int32) // GROUP,
    }, meaning


def _awq(weight):
    import torch

    groups = _groups(weight)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).to(torch.bfloat16).float()
    zero = (-low / scale).round().clamp(0, 15)
    values = (groups / scale + zero).round().clamp(0, 15)
    n_out, n_in = weight.shape
    return {
        "qweight": _pack(values.reshape(n_out, n_in).T, AWQ_ORDER),
        "qzeros": _pack(zero.squeeze(-1).T, AWQ_ORDER),
        "scales": scale.squeeze(-1).T.to(torch.bfloat16),
    }, ((values - zero) * scale).reshape(weight.shape)


def _compressed(weight, bits: int):
    import torch
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    values, scale, meaning = _symmetric(weight, bits)
    signed = (values - 2 ** (bits - 1)).reshape(weight.shape).to(torch.int8)
    return {
        "weight_packed": pack_to_int32(signed, bits),
        "weight_scale": scale.squeeze(-1).to(torch.bfloat16),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }, meaning


def _compressed_w8a8(weight):
    """8-bit weights, a scale a row; activations are rounded to 8 bits while it serves."""
    import torch

    scale = (weight.abs().amax(-1, keepdim=True) / 127).to(torch.bfloat16).float()
    values = (weight / scale).round().clamp(-128, 127)
    return {"weight": values.to(torch.int8), "weight_scale": scale.to(torch.bfloat16)}, values * scale


def _compressed_config(bits: int, form: str, **more) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "minmax"}
    weights |= {"strategy": "group", "group_size": GROUP} if "pack" in form else {"strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
WRITERS = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors w4a16": lambda weight: _compressed(weight, 4),
    "compressed-tensors w8a8": _compressed_w8a8,
}
CONFIGS = {
    "awq": lambda: {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
    "gptq": lambda: {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    },
    "compressed-tensors w4a16": lambda: _compressed_config(4, "pack-quantized"),
    "compressed-tensors w8a8": lambda: _compressed_config(8, "int-quantized", input_activations=ACTIVATIONS),
}
