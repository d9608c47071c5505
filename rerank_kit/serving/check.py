"""Checks whether the running service scores as its model family should: `sh start_rerank.sh check`.

`--reference` compares with transformers in float32 too, `--exact` scores the same pairs in many batches (exact.py).

These faults give wrong scores without an error: a missing or broken template (one token is enough), a head that was not
loaded (all scores are the same), and another model than the configured one. It prints one line for each check. Exit
codes: 0 no fault, 1 a fault, 4 a check could not be made.
"""

import http.client
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from rerank_kit.engine.machine import GIB, free_memory, vllm_version
from rerank_kit.engine.nodes import is_headless
from rerank_kit.engine.scale import score_difference
from rerank_kit.models.card_prompts import INSTRUCTION, jina_v3_prompt
from rerank_kit.models.chat_template import render, special_tokens
from rerank_kit.models.checkpoint import Checkpoint, MissingPackage, load_tokenizer, read_checkpoint
from rerank_kit.models.given import for_reference, with_settings
from rerank_kit.models.known_pairs import KNOWN, PAIRS, judge
from rerank_kit.models.library import RECIPE, Compared, compare
from rerank_kit.models.library import TOLERANCE as LIBRARY_TOLERANCE
from rerank_kit.models.pair import Pair
from rerank_kit.models.profiles import find_profile
from rerank_kit.models.published import DOCUMENTS, QUERY, Published, difference, distance, logit, published
from rerank_kit.models.published import TOLERANCE as TOLERANCE_LOGIT
from rerank_kit.models.reference import reference_scores
from rerank_kit.models.settled import Settled, settle
from rerank_kit.serving.exact import check_exact
from rerank_kit.serving.health import progress, request
from rerank_kit.settings import ConfigError, EnvConfig, get_config

# A checkpoint below this hidden size is a test model, which knows no answers. all-MiniLM-L6-v2 has 384.
REAL_MODEL = 256
# Largest difference from the float32 reference that bf16 explains; docs/scores.md has the measurements.
TOLERANCE = 0.02


PATIENCE_S = 30.0  # how long a refused call (429, 503) is repeated


class Failed(Exception):
    """A check that failed, with its reason."""


class NoAnswer(Exception):
    """The service is too busy to be judged."""


class NotMade(Exception):
    """A check of an answering service that could not be made, with its reason."""


def ask(cfg: EnvConfig, method: str, path: str, body: dict | None = None) -> bytes:
    """The body of a 200 answer. The service may be busy with users' calls, so a refused call (429, 503) is repeated.

    Raises:
        NoAnswer: the call is still refused after PATIENCE_S. Failed: any other status.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        status, data = request(cfg, method, path, body, timeout_s=60)
        if status == 200:
            return data
        said = f"{path} answers {status}: {data[:300].decode('utf-8', 'replace')}"
        if status not in (429, 503):
            raise Failed(said)
        if time.monotonic() > end:
            raise NoAnswer(said)
        time.sleep(0.5)


def served(cfg: EnvConfig) -> tuple[Checkpoint, Settled]:
    """The checkpoint that the service reports, and its profile as the checkpoint's files settle it."""
    models = {m["id"]: m.get("root") for m in json.loads(ask(cfg, "GET", "/v1/models"))["data"]}
    if cfg.served_model_name not in models:
        raise Failed(f"the service has {sorted(models)}, not SERVED_MODEL_NAME={cfg.served_model_name}")
    checkpoint = with_settings(read_checkpoint(Path(models[cfg.served_model_name])), cfg)
    return checkpoint, settle(checkpoint, find_profile(checkpoint, cfg.model_profile), cfg)


def score(cfg: EnvConfig, query: str, document: str, instruction: str | None = None) -> tuple[float, int]:
    """(score, prompt tokens) of one pair."""
    body = {"model": cfg.served_model_name, "text_1": query, "text_2": document}
    body |= {"instruction": instruction} if instruction else {}
    answer = json.loads(ask(cfg, "POST", "/v1/score", body))
    return answer["data"][0]["score"], answer["usage"]["prompt_tokens"]


def prompt_tokens(checkpoint: Checkpoint, settled: Settled, query: str, document: str) -> int:
    """Number of tokens in the prompt that should be served by the checkpoint's own tokenizer.

    This needs `tokenizers` and `jinja2` only: importing transformers would add seconds to every start.
    """
    tokenizer = load_tokenizer(checkpoint.path)
    if settled.template is not None:
        chat = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        return len(tokenizer.encode(render(settled.template, chat, special_tokens(checkpoint))).ids)
    if settled.profile.listwise:
        return len(tokenizer.encode(jina_v3_prompt(query, [document])).ids)
    if late := settled.profile.late:
        both = ((late.text(query, True), True), (late.text(document, False), False))
        return sum(len(late.prompt(tokenizer.encode(text).ids, is_query)[0]) for text, is_query in both)
    if settled.profile.reference == "embedding":
        return len(tokenizer.encode(query).ids) + len(tokenizer.encode(document).ids)
    return len(tokenizer.encode(query, document).ids)


def expectation(checkpoint: Checkpoint, settled: Settled) -> dict[str, Any]:
    """What judge() has to know of a model: lengths of the prompts of PAIRS, range of scores, known answers."""
    tokens = None
    if (checkpoint.path / "tokenizer.json").exists():
        tokens = [prompt_tokens(checkpoint, settled, *pair) for pair in PAIRS]
    is_embedding = settled.profile.reference in ("embedding", "listwise")
    is_probability = settled.template is not None and settled.profile.activation == "Sigmoid"
    low, high = (0.0, 1.0) if is_probability else (-1.0, 1.0) if is_embedding else (None, None)
    known: list[tuple[str, int, int]] = []
    if checkpoint.config.get("hidden_size", 0) >= REAL_MODEL:
        # The Chinese question is not for an English model, whose tokenizer knows few Chinese characters.
        asked = KNOWN if checkpoint.config.get("vocab_size", 0) > 50_000 else KNOWN[:1]
        known = [(query, 2 * i, 2 * i + 1) for i, (query, *_) in enumerate(asked)]
    return {"tokens": tokens, "low": low, "high": high, "known": known}


def reference_bytes(checkpoint: Checkpoint) -> int:
    """Memory that the float32 reference needs: four bytes for each weight, plus a fifth for activations."""
    n_weights = 0
    for path in checkpoint.path.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        n_weights += sum(math.prod(item["shape"]) for name, item in header.items() if name != "__metadata__")
    return int(1.2 * 4 * n_weights)


def check_batches(cfg: EnvConfig) -> Iterator[tuple[str, str | None, str]]:
    """The checks of `--exact`."""
    checkpoint, settled = served(cfg)
    if settled.profile.listwise:
        raise ConfigError(
            f"check --exact scores pairs in many batches, and profile {settled.profile.name} is listwise: its scores "
            "depend on the other documents of a call. Leave --exact out"
        )
    yield from check_exact(cfg, ask, TOLERANCE, far=score_difference(settled.profile, checkpoint))


def check_engines(cfg: EnvConfig, far: Callable[[float, float], float] = difference) -> tuple[str, str | None, str]:
    """(name, fault, seen). Every data parallel engine must score, and all must give a pair the same score.

    vLLM accepts an engine of another host without comparing its weights. A wrong checkpoint there would change the
    scores of some pairs.
    """
    before, scores = progress(cfg), []
    n = max(cfg.dp, len(before))
    with ThreadPoolExecutor(2 * n) as pool:
        for _ in range(5):  # vLLM picks the least busy engine, so a few rounds reach all of them
            scores += [s for s, _ in pool.map(lambda _: score(cfg, *PAIRS[0]), range(4 * n))]
            time.sleep(0.3)
    after = progress(cfg)
    idle = [engine for engine in sorted(after) if after[engine][0] == before.get(engine, (0.0,))[0]]
    fault = None
    if len(after) < n or idle:
        fault = f"only {len(after) - len(idle)} of {n} engines scored"
    elif far(max(scores), min(scores)) > TOLERANCE:
        fault = (
            f"the same pair has scores from {min(scores):.4f} to {max(scores):.4f}: the engines do not serve the same "
            "weights in the same way (another checkpoint, dtype or release on one of the hosts?)"
        )
    return "engines", fault, f"the scores of {n} engines for the same pair agree within {max(scores) - min(scores):.1e}"


def run_checks(cfg: EnvConfig, reference: bool = False) -> Iterator[tuple[str, str | None, str]]:
    """Yield (check, fault or None, observation), cheap checks first.

    Raises:
        NotMade, MissingPackage: what comes next could not be checked.
    """
    try:
        checkpoint, settled = served(cfg)
        profile = settled.profile
    except MissingPackage:
        raise
    except (Failed, ConfigError) as exc:
        yield "model", str(exc), ""
        return
    yield "model", None, f"{checkpoint.path}, profile {profile.name}"

    expected = expectation(checkpoint, settled)
    if profile.convert != "embed" and expected["tokens"]:  # those above the checkpoint's own limit are cut
        expected["tokens"] = [n if n <= checkpoint.max_length else None for n in expected["tokens"]]
    answers = [score(cfg, *pair) for pair in PAIRS]
    scores = [answer[0] for answer in answers]
    prompt, head, known = judge(expected, answers)
    yield prompt
    yield head
    engines = [engine for engine in progress(cfg) if engine]  # none without vLLM's metrics
    if max(cfg.dp, len(engines)) > 1:
        if engines:
            yield check_engines(cfg, score_difference(profile, checkpoint))
        else:
            yield "engines", None, "not compared: the service has no vLLM metrics"

    yield known

    card = published(checkpoint) if profile.name == "qwen3_reranker" else None
    if card:
        yield check_published(cfg, *card)
    if reference:
        yield from check_references(cfg, checkpoint, settled, scores)


def check_published(cfg: EnvConfig, known: Published, certain: bool) -> tuple[str, str | None, str]:
    """(name, fault, seen). The service's answers beside those that the model card prints for these very weights."""
    scores = [score(cfg, QUERY, document, INSTRUCTION)[0] for document in DOCUMENTS]
    worst = distance(known, scores)
    # Fewer bits, or texts that the settings cut, may give other answers.
    limits = (cfg.max_model_len, cfg.max_tokens_per_doc, cfg.max_tokens_per_query)
    certain &= not cfg.quantization and all(limit is None or limit >= 256 for limit in limits)
    said = f"the logits of the model card's example are {', '.join(f'{logit(s):.3f}' for s in scores)}"
    card = f"{known.name} has {', '.join(str(value) for value in known.logits[0])}"
    if worst <= TOLERANCE_LOGIT:
        return "published", None, f"{said}; {card}: these weights"
    if certain:
        return "published", f"{said}; {card}, and the files are that revision ({known.revision})", ""
    return "published", None, f"{said}; {card}: a fine-tune of this size, or other weights"


def check_references(
    cfg: EnvConfig, checkpoint: Checkpoint, settled: Settled, scores: list[float]
) -> Iterator[tuple[str, str | None, str]]:
    """The service's scores beside the recipe of the family in transformers, and beside sentence-transformers itself.

    Raises:
        NotMade, MissingPackage: transformers cannot score the checkpoint here.
    """
    profile = settled.profile
    needed, free = reference_bytes(checkpoint), free_memory()
    if needed > free:
        sizes = f"transformers in float32 needs {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free"
        raise NotMade(f"reference  not compared: {sizes}")
    pairs = [Pair(*pair) for pair in PAIRS]
    late = profile.late
    length = max(late.query_length, late.document_length) if late else min(checkpoint.max_length, 8192)
    asked = checkpoint.path, profile.reference, pairs, cfg.instruction, length
    try:
        expected = reference_scores(*asked, **for_reference(checkpoint, profile))
    except MissingPackage:
        raise
    except ConfigError as exc:
        raise NotMade(f"reference  not compared: {exc}") from exc
    far = score_difference(profile, checkpoint)
    differences = [far(a, b) if isinstance(a, float) else math.inf for a, b in zip(scores, expected, strict=True)]
    worst = max(math.inf if math.isnan(value) else value for value in differences)  # max() passes over NaN
    fault = None
    if worst > TOLERANCE:
        far_off = [(a, b) for a, b, d in zip(scores, expected, differences, strict=True) if not d <= TOLERANCE]
        fault = f"a score differs by {worst:.4f} from transformers in float32"
        fault += f" ({', '.join(f'{a} for {b:.4f}' for a, b in far_off)})"
    quantized = cfg.quantization or (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if fault and quantized:
        fault += (
            f"; its weights are quantized ({quantized}), which moves single scores by more than {TOLERANCE}: "
            "compare without QUANTIZATION first, and judge this one by your own relevance data"
        )
    yield "reference", fault, f"transformers in float32 agrees within {worst:.1e} (bf16 explains {TOLERANCE})"
    # Recipe and service beside the library, which loads the folder by rules of its own.
    others: dict[str, Compared] = {RECIPE: (expected, LIBRARY_TOLERANCE, difference)}
    if not quantized:
        others["the service"] = (scores, TOLERANCE, far)
    for agrees, said in compare(checkpoint, profile, pairs, cfg.instruction, others):
        yield "library", None if agrees else said, said


def main(argv: list[str]) -> int:
    if argv not in ([], ["--reference"], ["--exact"], ["--quiet"]):
        print("usage: sh start_rerank.sh check [--reference | --exact | --quiet]", file=sys.stderr)
        return 2
    failed = 0
    try:
        cfg = get_config()
        vllm_version()
        if is_headless(cfg):
            raise ConfigError(f"NODE_RANK={cfg.node_rank} has no API: run check on node 0, which asks all engines")
        checks = run_checks(cfg, "--reference" in argv)
        for name, fault, seen in chain(checks, check_batches(cfg) if "--exact" in argv else ()):
            failed += fault is not None
            if fault or "--quiet" not in argv:
                print(f"{'FAILED' if fault else 'ok':<6}  {name:<9}  {fault or seen}")
    except MissingPackage as exc:
        print(f"FAILED  {exc}")
        return 1 if failed else 4
    except NotMade as exc:
        print(f"unsure  {exc}")
        return 1 if failed else 4
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except (OSError, http.client.HTTPException, NoAnswer) as exc:
        print(f'FAILED  no answer to check: {exc}; see "sh start_rerank.sh status"')
        return 4
    except Failed as exc:
        print(f"FAILED  {exc}")
        return 1
    except ImportError as exc:
        print(f"FAILED  this Python lacks a package: {exc}; use the one that serves (sh start_rerank.sh python)")
        return 1 if failed else 4
    except (ValueError, LookupError, TypeError) as exc:
        print(f"FAILED  an answer does not have vLLM's format: {type(exc).__name__}: {exc}")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
