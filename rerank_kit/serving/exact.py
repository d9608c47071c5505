"""Does a pair keep the bits of its score? `sh start_rerank.sh check --exact`, with EXACT=1 and without.

512 pairs are scored 20 times each in other batches: 1 to 64 pairs a call, 1 to 16 calls in flight, other neighbours and
orders, with an empty prefix cache (a new cache_salt) and with a full one. With EXACT=1 no bit may change, also against
the scores that an earlier run left in LOG_DIR, before a restart. Without EXACT the bound of docs/scores.md is checked.
"""

import json
import random
import secrets
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rerank_kit.models.published import difference
from rerank_kit.serving.health import progress
from rerank_kit.serving.status import known_state
from rerank_kit.settings import ConfigError, EnvConfig

N_PAIRS, N_QUERIES, N_ROUNDS = 512, 16, 20
TEXT = """the of capital China gravity attracts bodies search engine query document page answer river music 的 北京 搜索
引擎 résumé naïve 3.14 100% (a) [b] {c} x_1 https://a.b/c ПРИВЕТ عربي 日本語 한국어 🚀 don't state-of-the-art"""
WORDS = TEXT.split()


@dataclass(frozen=True)
class Round:
    """One pass over all pairs."""

    pairs_per_call: int
    in_flight: int
    cold: bool  # a new cache_salt: nothing of the prompts is in the prefix cache

    @property
    def text(self) -> str:
        cache = "cold" if self.cold else "warm"
        return f"{self.pairs_per_call} a call, {self.in_flight} in flight, {cache} cache"


def rounds(n: int = N_ROUNDS) -> list[Round]:
    """The first has every pair alone; each batch size comes with a cold cache and a warm one."""
    sizes = (1, 8, 32, 3, 64, 2, 16, 5, 48, 12)
    flights = (16, 16, 4, 1, 16, 4, 16, 16, 4, 1)
    return [Round(sizes[i // 2 % 10], flights[i // 2 % 10], i % 2 == 0) for i in range(n)]


def known_pairs(n: int = N_PAIRS) -> list[tuple[str, str]]:
    """The same (query, document) pairs at every call: documents of 1 to 300 words, 32 for each query."""
    rng = random.Random(22)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    queries = [text(2, 20) for _ in range(N_QUERIES)]
    return [(queries[i % N_QUERIES], text(1, rng.choice((8, 40, 120, 300)))) for i in range(n)]


class Scores:
    """Every score that each pair got, with the round that gave it."""

    def __init__(self, n_pairs: int):
        self.of_pair: list[list[tuple[float, str]]] = [[] for _ in range(n_pairs)]

    @property
    def n(self) -> int:
        return sum(map(len, self.of_pair))

    @property
    def changed(self) -> list[int]:
        """Pairs whose scores are not all the same bits."""
        return [i for i, found in enumerate(self.of_pair) if len({score for score, _ in found}) > 1]

    def furthest(self, far: Callable[[float, float], float] = difference) -> tuple[float, int]:
        """(largest distance of a score from the median of its pair, that pair)."""
        gaps = []
        for i, found in enumerate(self.of_pair):
            values = [score for score, _ in found]
            middle = statistics.median_low(values)
            gaps.append((max(far(value, middle) for value in values), i))
        return max(gaps)


def measure(cfg: EnvConfig, ask, n_pairs: int = N_PAIRS, n_rounds: int = N_ROUNDS) -> Scores:
    """Score the known pairs in every round. `ask(cfg, method, path, body)` returns the body of a 200 answer."""
    pairs, rng, salt = known_pairs(n_pairs), random.Random(7), ""
    scores = Scores(n_pairs)
    for one in rounds(n_rounds):
        salt = secrets.token_hex(16) if one.cold else salt
        order = list(range(n_pairs))
        rng.shuffle(order)
        calls = [order[at : at + one.pairs_per_call] for at in range(0, n_pairs, one.pairs_per_call)]

        def call(indices: list[int], salt: str = salt) -> list[float]:
            body: dict = {"model": cfg.served_model_name, "cache_salt": salt}
            body |= {"text_1": [pairs[i][0] for i in indices], "text_2": [pairs[i][1] for i in indices]}
            data = json.loads(ask(cfg, "POST", "/v1/score", body))["data"]
            found = {item["index"]: item["score"] for item in data}
            return [found[at] for at in range(len(indices))]

        with ThreadPoolExecutor(one.in_flight) as pool:
            for indices, found in zip(calls, pool.map(call, calls), strict=True):
                for i, score in zip(indices, found, strict=True):
                    scores.of_pair[i].append((score, one.text))
    return scores


def earlier_file(cfg: EnvConfig) -> Path:
    return cfg.log_path / f"exact-{cfg.port}.json"


def against_earlier(cfg: EnvConfig, scores: Scores) -> tuple[str | None, str]:
    """(fault, seen): the scores beside those of an earlier run with the same version id; then they are stored."""
    state, file = known_state(cfg), earlier_file(cfg)
    me = {"version": state.get("version"), "server": [state.get("server_pid"), state.get("server_born")]}
    now = [found[0][0] for found in scores.of_pair]
    try:
        earlier = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        earlier = {}
    if not me["version"]:
        return None, "no earlier scores: only a service that this kit started has a version id"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**me, "scores": now}), "utf-8")
    except OSError as exc:
        return None, f"not stored, so a restart cannot be compared: {exc.filename}: {exc.strerror}"
    if earlier.get("version") != me["version"] or len(earlier.get("scores", [])) != len(now):
        return None, f"stored in {file.name}: run this again after a restart to compare"
    since = "the run before" if earlier["server"] == me["server"] else "before the restart"
    changed = sum(a != b for a, b in zip(earlier["scores"], now, strict=True))
    if not changed:
        return None, f"{len(now)} scores have the bits of {since}"
    said = f"{changed} of {len(now)} pairs have other bits than in {since}"
    return said if cfg.exact else None, said


def check_exact(
    cfg: EnvConfig,
    ask,
    bound: float,
    n_pairs: int = N_PAIRS,
    n_rounds: int = N_ROUNDS,
    *,
    far: Callable[[float, float], float] = difference,
) -> Iterator:
    """Yield (check, fault or None, observation) of `check --exact`. The bound is for far(score, median)."""
    mode = known_state(cfg).get("version", "").endswith("-exact")
    if known_state(cfg) and mode != bool(cfg.exact):
        runs = "with" if mode else "without"
        raise ConfigError(f"EXACT={cfg.exact}, but the running service was started {runs} EXACT=1: restart it first")
    before = progress(cfg)
    scores = measure(cfg, ask, n_pairs, n_rounds)
    after = progress(cfg)
    gap, pair = scores.furthest(far)
    low, high = min(scores.of_pair[pair]), max(scores.of_pair[pair])
    seen = f"{scores.n} scores of {n_pairs} pairs in {n_rounds} rounds on {max(1, len(after))} engines"
    worst = f"the largest from {low[0]!r} ({low[1]}) to {high[0]!r} ({high[1]})"
    if cfg.exact:
        changed = len(scores.changed)
        fault = f"{changed} of {n_pairs} pairs changed bits, {worst}; {seen}" if changed else None
        yield "exact", fault, f"0 differing bits: {seen}"
    else:
        fault = f"a score lies {gap:.4f} from its pair's median, the bound is {bound}: {worst}; {seen}"
        within = (
            f"scores lie within {gap:.4f} of their pair's median (bound {bound}), {len(scores.changed)} of {n_pairs} "
            f"pairs change bits with the batch: {seen}"
        )
        yield "bound", fault if gap > bound else None, within
    idle = [engine for engine in sorted(after) if after[engine][0] == before.get(engine, (0.0,))[0]]
    yield "engines", f"engines {', '.join(idle)} scored none of these pairs" if idle else None, f"{len(after)} scored"
    fault, seen = against_earlier(cfg, scores)
    yield "restart", fault, seen
