"""A few pairs that every reranker can score, and what their scores must look like.

`check` asks the running service for them; the guard scores them in its own process before `/ready` is 200. Standard
library only, because the guard imports it.
"""

import math
from collections.abc import Iterator
from typing import Any

# (query, relevant document, irrelevant document)
KNOWN = (
    ("What is the capital of China?", "The capital of China is Beijing.", "Gravity attracts bodies to each other."),
    ("如何在 Python 中读取文件？", "用 open() 打开文件，再调用 read() 读取。", "今天天气晴朗，适合去公园散步。"),
)
PAIRS = [(query, document) for query, *documents in KNOWN for document in documents]
# No text is empty: vLLM drops the empty second segment of a cross-encoder (docs/scores.md).
PAIRS += [("code", "if (a <| b) { x |> f }\n\n<think> edge ")]


def judge(expected: dict[str, Any], answers: list[tuple[Any, int]]) -> Iterator[tuple[str, str | None, str]]:
    """Yield (check, fault or None, observation).

    Args:
        expected: "tokens": the length of each pair's prompt (None: it is cut), or None where they are not known; "low",
            "high": limits of a score, or None; "known": (query, index of its relevant pair, index of its irrelevant
            pair).
        answers: (score, prompt tokens) of each pair.
    """
    scores, wanted = [answer[0] for answer in answers], expected["tokens"]
    if wanted is None:
        yield "prompt", None, "skipped: the checkpoint has no tokenizer.json"
    else:
        got, fault = [answer[1] for answer in answers], None
        if any(want not in (None, n) for n, want in zip(got, wanted, strict=True)):
            fault = f"prompts have {got} tokens, the profile's have {wanted}: the service uses another template"
        known = [want for want in wanted if want is not None]
        said = f"{len(known)} prompts have the profile's {min(known)} to {max(known)} tokens" if known else ""
        yield "prompt", fault, said or "skipped: the model takes fewer tokens than these pairs have"

    # A head without activation (ms-marco) returns the logit itself, which can be any finite number.
    low = -math.inf if expected["low"] is None else expected["low"]
    high = math.inf if expected["high"] is None else expected["high"]
    fault = None
    if not all(isinstance(s, float) and math.isfinite(s) for s in scores):
        fault = f"scores {scores} are not all finite numbers"
    elif not (low - 1e-3 <= min(scores) and max(scores) <= high + 1e-3):
        fault = f"scores {scores} are not within {low:g} to {high:g}"
    elif max(scores) - min(scores) < 1e-6:
        fault = f"every score is {scores[0]}: the head was not loaded (an untied lm_head, as in the 8B model?)"
    yield "head", fault, "" if fault else f"scores are finite and differ ({min(scores):.4f} to {max(scores):.4f})"

    if not expected["known"]:
        yield "answers", None, "skipped: a test model knows no answers"
        return
    usable = [s if isinstance(s, float) else math.nan for s in scores]
    wrong = [query for query, good, bad in expected["known"] if not usable[good] > usable[bad]]
    fault = f"the irrelevant document ranks first for: {'; '.join(wrong)}" if wrong else None
    yield "answers", fault, f"{len(expected['known'])} known answers rank first"
