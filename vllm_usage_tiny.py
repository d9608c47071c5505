"""Cold start of the small model, and the check of its scores.

Model: MODEL_PATH_TINY, else MODEL_PATH, else Qwen/Qwen3-Reranker-0.6B.

python vllm_usage_tiny.py            the built-in example
python vllm_usage_tiny.py --check    beside it the transformers reference in float32, and sentence-transformers where it
                                     is installed (requirements-reference.txt); exit 1 when they disagree
python vllm_usage_tiny.py --input pairs.jsonl --output scores.jsonl
"""

import os
import sys

from rerank_kit import settings
from rerank_kit.engine.plan import Plan, plan_engine
from rerank_kit.engine.scale import score_difference
from rerank_kit.models.given import for_reference
from rerank_kit.models.library import RECIPE, Compared, compare
from rerank_kit.models.library import TOLERANCE as LIBRARY_TOLERANCE
from rerank_kit.models.pair import Pair
from rerank_kit.models.published import difference
from rerank_kit.models.reference import reference_scores
from rerank_kit.offline.program import arguments, example_pairs, leave, print_example, run_file, tell_loading
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import ConfigError, get_config, passed_on_env

# Largest difference to the float32 reference that rounding explains, by the engine's precision.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}


def check(plan: Plan, reranker: OfflineReranker, pairs: list[Pair]) -> bool:
    """Print each pair's score beside the reference; True when all agree within the precision's tolerance."""
    dtype = str(reranker.llm.llm_engine.model_config.dtype).removeprefix("torch.")
    tolerance = TOLERANCE[dtype]
    scores = [result.score for result in reranker.score(pairs)]
    length = plan.engine["max_model_len"]
    asked = plan.checkpoint.path, plan.profile.reference, pairs, plan.cfg.instruction, length
    expected = reference_scores(*asked, **for_reference(plan.checkpoint, plan.profile))
    far = difference if dtype == "float32" else score_difference(plan.profile, plan.checkpoint)
    print(f"vLLM {plan.machine.vllm_version} in {dtype} against transformers in float32, tolerance {tolerance:g}")
    worst = 0.0
    for index, (score, wanted) in enumerate(zip(scores, expected, strict=True)):
        gap = far(score, wanted) if score is not None else float("inf")
        gap = float("inf") if gap != gap else gap  # NaN never agrees
        worst = max(worst, gap)
        verdict = "ok" if gap <= tolerance else "DIFFERS"
        print(f"- idx={index} | vllm={score} | reference={wanted:.6f} | difference={gap:.2e} | {verdict}")
    print(f"largest difference {worst:.2e}: {'agrees' if worst <= tolerance else 'DOES NOT AGREE'}")
    others: dict[str, Compared] = {f"vLLM in {dtype}": (scores, tolerance, far)}
    others[RECIPE] = (expected, LIBRARY_TOLERANCE, difference)
    agrees = worst <= tolerance
    for same, said in compare(plan.checkpoint, plan.profile, pairs, plan.cfg.instruction, others):
        print(said)
        agrees &= same
    return agrees


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with transformers in float32")
    args = parser.parse_args()
    try:
        os.environ.update(passed_on_env())  # HF_*, VLLM_* ... of .env; the environment's own are not among them
        model = args.model or settings.model_setting(settings.MODEL_PATH_TINY)
        plan = plan_engine(get_config(), model)
        if args.input or args.output or args.shard:
            if args.check or not args.input:
                raise ConfigError("--output and --shard need --input, and --check takes none of them")
            return run_file(args, plan, model)
        tell_loading(plan)
        with OfflineReranker(plan) as reranker:
            if args.check:
                return 0 if check(plan, reranker, example_pairs()) else 1
            return print_example(plan, reranker.score(example_pairs()))
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":  # vLLM's workers import this file again
    leave(main())
