"""The table of measured differences in docs/scores.md: `python measurements/score_table.py` prints it.

One seeded tiny Qwen3-Reranker, 24 documents for one query; scores by vllm.LLM with different prompts and precisions
against transformers in float32 with the model card's own recipe. tests/serving/test_parity.py compares the two.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]

from rerank_kit.models.card_prompts import INSTRUCTION, PREFIX, SUFFIX
from rerank_kit.models.pair import Pair
from rerank_kit.models.reference import reference_scores

QUERY = "What is the capital of China?"
HEAD = ("prompt and precision", "max difference", "mean difference", "documents on another rank")
# One process a precision: (name, which template, dtype).
VARIANTS = {
    "float32": (
        ("the kit's profile, float32", "kit"),
        ("the model card's prompt in a file that ends in `</think>` and two newlines (Jinja drops one)", "literal"),
        ("no template: `vllm serve` with the three overrides alone", "none"),
    ),
    "bfloat16": (("the kit's profile, bfloat16", "kit"),),
}
ENGINE = """
import json, os, sys
from vllm import LLM
if __name__ == "__main__":
    engine, query, documents, templates = json.load(sys.stdin)
    llm = LLM(**engine)
    scores = [
        [o.outputs.score for o in llm.score(query, documents, chat_template=template, use_tqdm=False)]
        for template in templates
    ]
    with open(sys.argv[1], "w") as out:
        json.dump(scores, out)
    os._exit(0)  # as offline.program.leave(): the interpreter's teardown can abort
"""


def documents() -> list[str]:
    rng = random.Random(3)
    words = re.findall(r"\S+", "The capital of China is Beijing Gravity yes no search 中国 的 首都 是 北京 相关 query")
    return [" ".join(rng.choices(words, k=rng.randint(3, 60))) for _ in range(24)]


def templates() -> dict[str, str | None]:
    from rerank_kit.models.profiles import load_profiles

    fields = ("<Query>: {{ messages[0]['content'] }}\n<Document>: {{ messages[1]['content'] }}",)
    literal = PREFIX + f"<Instruct>: {INSTRUCTION}\n" + fields[0] + SUFFIX
    return {"kit": load_profiles()["qwen3_reranker"].template_text(), "literal": literal, "none": None}


def vllm_scores(model: Path, dtype: str, texts: list[str], wanted: list[str | None]) -> list[list[float]]:
    """Scores of the documents with each template, by one engine."""
    from rerank_kit.engine.plan import plan_service
    from rerank_kit.settings import get_config

    plan = plan_service(get_config(dtype=dtype, max_model_len=1024), model)
    env = {**os.environ, **plan.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        script, out = Path(scratch, "engine.py"), Path(scratch, "out.json")
        script.write_text(ENGINE)
        asked = json.dumps([plan.engine, QUERY, texts, wanted])
        done = subprocess.run([sys.executable, script, out], input=asked, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(out.read_text())


def rows(model: Path) -> list[tuple[str, float, float, int]]:
    """(name, largest difference, mean difference, documents on another rank) of every variant."""
    texts = documents()
    expected = reference_scores(model, "causal_yes_no", [Pair(QUERY, text) for text in texts], None, 1024)
    if max(expected) - min(expected) < 0.1:
        raise RuntimeError("equal reference scores prove nothing")
    ranks = sorted(range(len(texts)), key=lambda i: -expected[i])
    out = []
    for dtype, variants in VARIANTS.items():
        wanted = [templates()[kind] for _, kind in variants]
        for (name, _), scores in zip(variants, vllm_scores(model, dtype, texts, wanted), strict=True):
            apart = [abs(a - b) for a, b in zip(scores, expected, strict=True)]
            other = sorted(range(len(texts)), key=lambda i, scores=scores: -scores[i])
            moved = sum(a != b for a, b in zip(ranks, other, strict=True))
            out.append((name, max(apart), sum(apart) / len(apart), moved))
    return out


def markdown(measured: list[tuple[str, float, float, int]]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += [f"| {name} | {worst:.1e} | {mean:.1e} | {moved} of 24 |" for name, worst, mean, moved in measured]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import tiny_models

    with tempfile.TemporaryDirectory() as folder:
        print(markdown(rows(tiny_models.qwen3_reranker(Path(folder, "Qwen3-Reranker-tiny")))), end="")
