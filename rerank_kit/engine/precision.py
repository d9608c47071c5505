"""What decides the bits of a score: the quantization method and EXACT=1, vLLM's batch-invariant mode.

Source: vllm/model_executor/determinism/batch_invariant.py and vllm/config/quantization.py of vLLM 0.32.0.
"""

import os
import re
from difflib import get_close_matches

from rerank_kit.engine.extra_args import find_flag
from rerank_kit.engine.machine import Machine, compute_capabilities, quantization_methods
from rerank_kit.settings import ConfigError, EnvConfig, passed_on_env

MODE = "VLLM_BATCH_INVARIANT"
# Below it FlashAttention and bf16 are missing, and vLLM's own kernels of this mode are not written for it.
LEAST_CAPABILITY = (8, 0)
PROVED_SINCE = (0, 32)
DECODERS = ("qwen2", "qwen3")
UNPROVED = (
    *("--pipeline-parallel*", "--decode-context-parallel*", "--prefill-context-parallel*"),
    *("--enable-lora*", "--kv-cache-dtype*", "--quantization*"),
)


def quantization(name: str, config: dict) -> tuple[str, str]:
    """The installed vLLM's name for QUANTIZATION, and why.

    Args:
        config: the checkpoint's config.json.

    Raises:
        ConfigError: the installed vLLM has no such method.
    """
    known = quantization_methods()
    if name == "fp8" and "fp8_per_tensor" in known and not config.get("quantization_config"):
        # vLLM 0.32 calls "fp8" deprecated for weights that it quantizes itself.
        return "fp8_per_tensor", "QUANTIZATION=fp8, which this vLLM calls fp8_per_tensor"
    if known and name not in known:
        near = get_close_matches(name, known, 1)
        mean = f"did you mean {near[0]}? " if near else ""
        has = ", ".join(known)
        raise ConfigError(f"QUANTIZATION={name!r}: the installed vLLM has no such method. {mean}It has {has}")
    return name, "QUANTIZATION"


def check_exact(cfg: EnvConfig, machine: Machine, config: dict) -> str:
    """Why EXACT=1 holds here.

    Raises:
        ConfigError: it does not hold, or nobody has shown that it does.
    """
    if machine.is_cpu:
        raise ConfigError(
            f"EXACT=1: the CPU build of vLLM ({machine.vllm_version}) has no batch-invariant mode: unset EXACT, or "
            "serve on an NVIDIA GPU"
        )
    if tuple(int(n) for n in re.findall(r"\d+", machine.vllm_version)[:2]) < PROVED_SINCE:
        raise ConfigError(
            f"EXACT=1 is proved with vLLM 0.32 and newer, this is {machine.vllm_version}: unset EXACT, or run "
            '"sh start_rerank.sh setup"'
        )
    capabilities = compute_capabilities()
    weak = [text for text in capabilities if tuple(map(int, text.split("."))) < LEAST_CAPABILITY]
    if weak or not capabilities:
        found = f"a GPU here has {min(weak)}" if weak else "nvidia-smi does not say what this GPU has"
        raise ConfigError(f"EXACT=1 needs GPUs of compute capability 8.0 or higher, {found}: unset EXACT")
    if config.get("model_type") not in DECODERS:
        raise ConfigError(
            f"EXACT=1 is not proved with models of type {config.get('model_type')!r} (config.json), only with Qwen "
            "decoders: unset EXACT, or set MODEL_PATH to one of these"
        )
    if cfg.dtype in ("float", "float32"):  # with "auto" vLLM serves float32 weights in 16 bits
        raise ConfigError(f"EXACT=1 is not proved with DTYPE={cfg.dtype}: set DTYPE=bfloat16, or unset EXACT")
    if cfg.tp > 1:
        raise ConfigError(f"EXACT=1 is not proved with TP={cfg.tp}: set TP=1 (DP copies keep the bits), or unset EXACT")
    method = cfg.quantization or (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ConfigError(f"EXACT=1 is not proved with quantized weights ({method}): unset QUANTIZATION or EXACT")
    given = {**passed_on_env(), **os.environ}.get(MODE)
    if given not in (None, "1"):
        raise ConfigError(f"EXACT=1 and {MODE}={given} contradict each other: unset {MODE}")
    other = find_flag(cfg.extra_args, *UNPROVED)
    if other:
        raise ConfigError(f"EXACT=1 is not proved with {other} (EXTRA_ARGS): take it out, or unset EXACT")
    return "EXACT: the bits of a score do not depend on batch, order, cache, engine or restart; costs throughput"
