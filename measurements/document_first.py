"""What the prefix cache saves where the prompt has the document before the query (ctxl-rerank-v2).

python measurements/document_first.py [--documents 16] [--tokens 1000] [--runs 5] [--csv FILE]

Rows of two profiles with weights of one shape (random, seeded, 8 layers of 512): ctxl_rerank_v2, and qwen3_reranker,
whose prompt has the query first. "new": documents that were never scored; "seen": the same ones with another query.
Each run has its own documents and queries. Offline, one engine; its start is not counted. Runs on CPU and GPU.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests" / "stand_ins")]

import tiny_hub_models
import tiny_models

from measurements import results
from rerank_kit.benchmark.server_view import hardware
from rerank_kit.engine.plan import plan_engine
from rerank_kit.models.pair import Pair
from rerank_kit.offline.program import leave
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import get_config

MAKERS = {
    "ctxl_rerank_v2": ("ctxl-rerank-v2-instruct-multilingual-1b", tiny_hub_models.ctxl_rerank_v2),
    "qwen3_reranker": ("Qwen3-Reranker-0.6B", tiny_models.qwen3_reranker),
}
WORDS = ("capital", "China", "Beijing", "gravity", "attracts", "bodies", "search", "relevance", "document", "query")


def made(profile: str, root: Path) -> Path:
    """A checkpoint of the family with a network large enough that it, not Python, is measured."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    name, make = MAKERS[profile]
    folder = make(root / name)
    config = Qwen3Config.from_pretrained(folder)
    config.update(
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
        | {"num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096, "layer_types": None}
    )
    model = Qwen3ForCausalLM(Qwen3Config.from_dict(config.to_dict()))
    tiny_models._spread(model)
    model.save_pretrained(folder)
    return folder


def text(rng: random.Random, n_tokens: int, tokenizer) -> str:
    words = rng.choices(WORDS, k=n_tokens)
    while len(tokenizer(" ".join(words))["input_ids"]) > n_tokens:
        words.pop()
    return " ".join(words)


def measure(profile: str, args: argparse.Namespace) -> list[results.Row]:
    rows: list[results.Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        plan = plan_engine(get_config(model_path=str(made(profile, Path(scratch)))))
        assert plan.profile.name == profile
        with OfflineReranker(plan) as reranker:
            rng, tokenizer = random.Random(1), reranker.encoder.tokenizer
            for run in range(-1, args.runs):  # the first warms up
                documents = [text(rng, args.tokens, tokenizer) for _ in range(args.documents)]
                for which in ("new", "seen"):
                    query = text(rng, 20, tokenizer)
                    began = time.perf_counter()
                    reranker.score([Pair(query, document) for document in documents])
                    speed = args.documents / (time.perf_counter() - began)
                    if run >= 0:
                        rows.append({"profile": profile, "documents": which, "run": run, "pairs/s": speed})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000, help="of a document")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="file to write; default: the table is printed alone")
    parser.add_argument(
        "--profile", choices=MAKERS, help="this one alone, appended to --csv (used by the program itself)"
    )
    args = parser.parse_args()
    if args.profile:
        rows = measure(args.profile, args)
        head = {
            "command": shlex.join(["python", "measurements/document_first.py", *_options(args)]),
            "hardware": hardware(),
            "cores": len(os.sched_getaffinity(0)),
            "vllm": version("vllm"),
            "documents": args.documents,
            "tokens of a document": args.tokens,
        }
        results.write(args.csv, head, rows)
        return 0
    rows, head = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for profile in MAKERS:  # each engine in a process of its own
            part = Path(scratch, f"{profile}.csv")
            options = [*_options(args), "--csv", str(part), "--profile", profile]
            subprocess.run([sys.executable, __file__, *options], check=True)
            results.FOLDER, kept = part.parent, results.FOLDER
            head, more = results.read(profile)
            results.FOLDER = kept
            rows += more
    for row in rows:
        print(f"{row['profile']:<16} {row['documents']:<5} {row['run']}  {row['pairs/s']:.2f} pairs/s")
    if args.csv:
        results.write(args.csv, head, rows)
    return 0


def _options(args: argparse.Namespace) -> list[str]:
    return ["--documents", str(args.documents), "--tokens", str(args.tokens), "--runs", str(args.runs)]


if __name__ == "__main__":
    leave(main())
