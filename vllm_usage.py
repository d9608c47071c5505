"""Cold start: score query-document pairs with vllm.LLM in this process, without a server.

    python vllm_usage.py                                            the built-in example
    python vllm_usage.py --input pairs.jsonl --output scores.jsonl  a file; an interrupted run goes on where it stopped
    python vllm_usage.py --input FOLDER --output FOLDER [--shard 1/4]   all its *.jsonl and *.jsonl.gz (docs/bulk.md)

Model: MODEL_PATH, through the same profile as the service. Input lines: {"query": ..., "document": ...,
"instruction": optional, "id": optional}. Output, a line for each input line in the same order:
{"line": N, "score": float, "id": ...} or {"line": N, "error": "...", "id": ...}. LONG_DOCUMENTS says what becomes of a
pair longer than MAX_MODEL_LEN: truncate cuts it ("cut": true), error reports it, chunk gives it the best score of
overlapping windows of its document ("windows": n). MAX_TOKENS_PER_DOC and MAX_TOKENS_PER_QUERY cut ("cut": true) as in
the service.
"""

import os
import sys

from rerank_kit.engine.plan import plan_engine
from rerank_kit.models.pair import Pair
from rerank_kit.offline.files import Result
from rerank_kit.offline.program import arguments, example_pairs, leave, print_example, run_file, tell_loading
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import ConfigError, get_config, passed_on_env

__all__ = ["OfflineReranker", "Pair", "Result", "main"]


def main() -> int:
    args = arguments(__doc__).parse_args()
    try:
        os.environ.update(passed_on_env())  # HF_*, VLLM_* ... of .env; the environment's own are not among them
        plan = plan_engine(get_config(), args.model)
        if args.input or args.output or args.shard:
            if not args.input:
                raise ConfigError("--output and --shard need --input")
            return run_file(args, plan, args.model)
        tell_loading(plan)
        with OfflineReranker(plan) as reranker:
            return print_example(plan, reranker.score(example_pairs()))
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":  # vLLM's workers import this file again
    leave(main())
