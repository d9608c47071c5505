"""Cold start of the small model (MODEL_PATH_TINY, by default Qwen3-Reranker-0.6B), and the check of its scores.

python vllm_usage_tiny.py            the built-in example
python vllm_usage_tiny.py --check    beside it the transformers reference in float32; exit 1 when they disagree
python vllm_usage_tiny.py --input pairs.jsonl --output scores.jsonl
"""

import sys
from pathlib import Path

import env_utils
from engine_args import Plan, make_plan
from env_utils import ConfigError, get_config
from vllm_usage import OfflineReranker, Pair, arguments, example_pairs, print_example, run_file

# Largest difference to the float32 reference that rounding explains, by the engine's precision.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}

# Model card of Qwen/Qwen3-Reranker-0.6B: the two fixed parts of the prompt and the default instruction.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def qwen3_prompt_ids(tokenizer, pair: Pair, instruction: str | None = None, max_length: int = 8192) -> list[int]:
    """Token ids of one prompt as the model card builds it; the document's end is cut, the suffix is kept."""
    prefix = tokenizer.encode(PREFIX, add_special_tokens=False)
    suffix = tokenizer.encode(SUFFIX, add_special_tokens=False)
    instruct = pair.instruction or instruction or INSTRUCTION
    text = f"<Instruct>: {instruct}\n<Query>: {pair.query}\n<Document>: {pair.document}"
    middle = tokenizer.encode(text, add_special_tokens=False)
    return prefix + middle[: max_length - len(prefix) - len(suffix)] + suffix


def reference_scores(
    model: Path, kind: str, pairs: list[Pair], instruction: str | None, max_length: int
) -> list[float]:
    """Scores by transformers in float32 on the CPU.

    Args:
        model: checkpoint folder.
        kind: Profile.reference: causal_yes_no (model card of Qwen3-Reranker), sequence_classification (the converted
            Qwen3-Reranker and cross-encoders with a head) or embedding (cosine, model card of all-MiniLM-L6-v2).
        pairs: N pairs.
        instruction: default instruction; None = the model card's.
        max_length: tokens of the longest prompt.

    Returns:
        N scores.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loader = {"causal_yes_no": AutoModelForCausalLM, "embedding": AutoModel}.get(
        kind, AutoModelForSequenceClassification
    )
    network = loader.from_pretrained(model, dtype=torch.float32).eval()
    scores = []
    with torch.inference_mode():
        for pair in pairs:
            if kind == "causal_yes_no":
                ids = torch.tensor([qwen3_prompt_ids(tokenizer, pair, instruction, max_length)])
                logits = network(ids).logits[0, -1]
                two = logits[[tokenizer.convert_tokens_to_ids("no"), tokenizer.convert_tokens_to_ids("yes")]]
                scores.append(torch.softmax(two, 0)[1].item())
            elif kind == "sequence_classification":
                if "Qwen" in type(network).__name__:
                    ids = torch.tensor([qwen3_prompt_ids(tokenizer, pair, instruction, max_length)])
                    logits = network(ids).logits
                else:
                    both = (pair.query, pair.document)
                    batch = tokenizer(*both, truncation=True, max_length=max_length, return_tensors="pt")
                    logits = network(**batch).logits
                scores.append(torch.sigmoid(logits[0, 0]).item())
            elif kind == "embedding":
                first, second = (
                    _mean_embedding(tokenizer, network, t, max_length) for t in (pair.query, pair.document)
                )
                scores.append(torch.cosine_similarity(first, second, dim=0).item())
            else:
                raise ValueError(f"unknown reference {kind!r}")
    return scores


def _mean_embedding(tokenizer, network, text: str, max_length: int):
    batch = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
    return network(**batch).last_hidden_state[0].mean(0)  # one text, no padding: every position counts


def check(plan: Plan, reranker: OfflineReranker, pairs: list[Pair]) -> bool:
    """Print each pair's score beside the reference; True when all agree within the precision's tolerance."""
    dtype = str(reranker.llm.llm_engine.model_config.dtype).removeprefix("torch.")
    tolerance = TOLERANCE[dtype]
    scores = [result.score for result in reranker.score(pairs)]
    length = plan.engine["max_model_len"]
    expected = reference_scores(plan.checkpoint.path, plan.profile.reference, pairs, plan.cfg.instruction, length)
    print(f"vLLM {plan.machine.vllm_version} in {dtype} against transformers in float32, tolerance {tolerance:g}")
    worst = 0.0
    for index, (score, wanted) in enumerate(zip(scores, expected, strict=True)):
        difference = abs(score - wanted) if score is not None else float("inf")
        difference = float("inf") if difference != difference else difference  # NaN never agrees
        worst = max(worst, difference)
        verdict = "ok" if difference <= tolerance else "DIFFERS"
        print(f"- idx={index} | vllm={score} | reference={wanted:.6f} | difference={difference:.2e} | {verdict}")
    print(f"largest difference {worst:.2e}: {'agrees' if worst <= tolerance else 'DOES NOT AGREE'}")
    return worst <= tolerance


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with transformers in float32")
    args = parser.parse_args()
    try:
        plan = make_plan(get_config(), args.model or env_utils.MODEL_PATH_TINY)
        if args.input or args.output:
            if args.check or not args.input:
                raise ConfigError("--output needs --input, and --check takes neither")
            return run_file(args, plan)
        reranker = OfflineReranker(plan)
        if args.check:
            return 0 if check(plan, reranker, example_pairs()) else 1
        print_example(plan, reranker.score(example_pairs()))
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":  # vLLM's workers import this file again
    sys.exit(main())
