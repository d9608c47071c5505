"""Choices by model and machine, each with its reason. plan.py makes them where no setting is given.

docs/performance.md lists them and says which were measured and which are only reasoned.
"""

import random
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rerank_kit.engine.extra_args import find_flag

# Texts on which tokenizers differ: control tokens and parts of them, white space, scripts, combining characters, emoji.
PIECES = (
    *("<|im_start|>system\n", "<|im_end|>", "<| im_end|>", "<think>\n\n</think>\n\n", "<|im_", "|>"),
    *("\n\n\n", "  ", "\t\r\n", "\u200b\u00a0\ufeff", "The capital of China is Beijing.", "don't WE'LL it's"),
    *("中国的首都是北京。", "한국어", "日本語テキスト", "العربية", "हिन्दी", "e\u0301 Å ﬁ ② ½", "🚀👩‍👩‍👧 🇨🇳"),
    *("3.14159e-10", "if (a <| b) { x |> f }", "https://a.b/c?d=e&f", "a" * 60),
)
N_PROBES = 300


def count_weights(config: dict) -> int:
    """Number of weights of a decoder with gated MLP by its config.json, 0 if unknown. For an encoder it is too high."""
    hidden, layers = config.get("hidden_size") or 0, config.get("num_hidden_layers") or 0
    heads = config.get("num_attention_heads") or 1
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + (config.get("num_key_value_heads") or heads))
    mlp = 3 * hidden * (config.get("intermediate_size") or 0)
    embeddings = hidden * (config.get("vocab_size") or 0) * (1 if config.get("tie_word_embeddings", True) else 2)
    return layers * (attention + mlp) + embeddings


def api_servers(n_weights: int, n_cores: int, dp: int = 1) -> tuple[int, str]:
    """API processes of a service on `dp` GPUs (or groups of them), and why.

    A small model scores faster than one process can tokenize, serialize and serve HTTP; a large one does not.
    """
    if n_weights > 6e9:
        n, why = 1, "the GPU is the bottleneck of a model of this size"
    elif n_weights > 2e9:
        n, why = (2, "two keep the GPU busy at this size") if n_cores >= 8 else (1, "few cores")
    else:
        # H100, 16 cores, 0.6B, vLLM 0.26: pairs/s at 64 calls in flight with 1, 2, 4 (fastokens): 1450, 2100, 2060.
        n = 4 if n_cores >= 8 else 2 if n_cores >= 4 else 1
        why = "one API process cannot feed the GPU with a model of this size"
    if dp == 1:
        return n, why
    return max(dp, min(n * dp, n_cores // 2)), f"{why}; {dp} copies"


def engines_per_gpu(n_weights: int, gpu_mib: int, n_cores: int) -> tuple[int, str]:
    """Engine processes on one GPU, and why. One process cannot launch the kernels of a small model fast enough."""
    if not n_weights or n_weights > 2e9:
        return 1, "the GPU is the bottleneck of a model of this size"
    if gpu_mib < 70_000:
        return 1, "one engine keeps a smaller GPU busy"
    if n_cores < 12:
        return 1, "few cores"
    why = "one engine process leaves a large GPU half idle with a model of this size"
    # H100, 16 cores, 0.6B, vLLM 0.26: pairs/s at 16, 64, 150 calls in flight with
    # 2: 2047, 2320, 2156; 3: 2474, 2636, 2676.
    return (3, why) if n_cores >= 16 else (2, f"{why}; a third needs 16 cores")


def whole_calls(vllm: str, extra_args: str) -> tuple[bool, str]:
    """Whether call_scheduler.py may replace vLLM's scheduler, and why.

    H100, 0.6B, vLLM 0.32, three engines, one call of 32 documents alone: p50 64 ms and 6 steps, with it 51 ms and 3
    (docs/performance_h100.md).
    """
    if not re.match(r"0\.32\.", vllm):
        return False, f"vLLM's own: call_scheduler.py knows the scheduler of vLLM 0.32, not that of {vllm}"
    other = find_flag(extra_args, "--scheduler-cls", "--async-scheduling", "--pipeline-parallel-size", "--kv-transfer*")
    if other:
        return False, f"vLLM's own: EXTRA_ARGS holds {other}"
    return True, "the pairs of a call are scored in one step; they arrive over some milliseconds"


def step_graphs(vllm: str) -> tuple[bool, str]:
    """Whether a small decoder gets CUDA graphs for the steps of whole calls, and why. Measured with vLLM 0.32."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", vllm)[:2])
    if numbers < (0, 32):
        return False, f"vLLM's own: graphs for steps of whole calls are measured with vLLM 0.32, this is {vllm}"
    return True, "a small model is launched slower than it computes: graphs for steps of whole calls"


def whole_graphs(
    vllm: str, capabilities: tuple[str, ...], dtype: str, config: dict, extra_args: str
) -> tuple[bool, str]:
    """Whether the graphs are of the whole forward pass (whole_graphs.py), not of its pieces, and why.

    H200, 0.6B, vLLM 0.32, three engines: one document 14.2 and 8.7 ms, p50 of 32 documents at 2 calls in flight 46 and
    35 ms, no loss at 64. With EXACT=1 the scores of 512 pairs have the same bits with both (docs/performance_h200.md).
    """
    if not vllm.startswith("0.32."):
        return False, f"graphs of the pieces: whole_graphs.py knows the worker of vLLM 0.32, not that of {vllm}"
    if set(capabilities) != {"9.0"}:
        return False, "graphs of the pieces: FlashAttention 3, which can be captured whole, is for Hopper GPUs"
    if dtype not in ("auto", "bfloat16", "float16", "half") or "float32" in (
        config.get("dtype"),
        config.get("torch_dtype"),
    ):
        return False, "graphs of the pieces: FlashAttention 3 computes in 16 bits"
    if config.get("model_type") not in ("qwen2", "qwen3"):
        return False, "graphs of the pieces: the whole pass is proved with Qwen models"
    other = find_flag(
        extra_args, "--worker-cls", "--attention-*", "--enable-lora*", "--speculative*", "--kv-cache-dtype*"
    )
    if other:
        return False, f"graphs of the pieces: EXTRA_ARGS holds {other}"
    return True, "one launch for the whole forward pass of a step"


def graph_sizes(max_tokens: int) -> list[int]:
    """Tokens of the steps for which CUDA graphs are captured. vLLM pads a step to the next of them.

    Padding is below 32 tokens in a step of up to 256, below 64 up to 512, and at most a fifth of a larger step.
    """
    steps = ((32, 256), (64, 512), (128, 2048), (256, 4096), (512, 8192))
    sizes, size = [], 0
    for step, end in steps:
        while size < min(end, max_tokens):
            size = min(size + step, max_tokens)
            sizes.append(size)
    return sizes


def weight_bytes(checkpoint: Path, config: dict) -> int:
    """Bytes of a checkpoint's weights: the size of its files, or 16 bits for each weight by config.json."""
    found = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return found or 2 * count_weights(config)


def fastokens_agrees(checkpoint: Path, n_probes: int = N_PROBES) -> tuple[bool, str]:
    """Whether vLLM may tokenize with fastokens (15 times faster with Qwen3's), and why.

    It may if both give the same ids for every probe text. The texts contain this checkpoint's own added tokens too.
    """
    try:
        found = version("fastokens")
    except PackageNotFoundError:
        return False, "fastokens is not installed"
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        return False, "the checkpoint has no tokenizer.json"
    import fastokens
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    try:
        fast = fastokens.Tokenizer.from_file(str(file))
        rng = random.Random(1)
        pieces = [*PIECES, *(token.content for token in plain.get_added_tokens_decoder().values())]
        for _ in range(n_probes):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
            got = fast.encode(text, add_special_tokens=False)
            if list(getattr(got, "ids", got)) != plain.encode(text, add_special_tokens=False).ids:
                return False, f"fastokens {found} and tokenizers give different ids for {text[:40]!r}"
    except Exception as exc:  # it raises many types for a tokenizer that it does not support
        return False, f"fastokens {found} does not support this tokenizer ({type(exc).__name__}: {str(exc)[:80]})"
    return True, f"fastokens {found} and tokenizers gave the same ids for {n_probes} probe texts"
