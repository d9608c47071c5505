"""The numbers in the pages are what measurements/results/ says, each rounded as the page writes it.

A page links a file, and the next table below the link is made from it: TABLES says which rows. SENTENCES are further
numbers of the text. docs/scaling.md has generated tables (test_scaling.py).
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import pytest
from conftest import KIT

from measurements import faults, results, scaling_table

NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
GENERATED = ("capacity", "tiers", "scale-2xh100", "scale-2xh200-4b", "scale-2xh200-8b")  # by scaling_table.py
NAMES = sorted(path.stem for path in results.FOLDER.iterdir())


# --- values of the files ---


@cache
def rows_in(_folder: Path, name: str) -> list[dict]:
    return results.read(name)[1]


def picked(name: str, **where) -> list[dict]:
    """Rows with these values."""
    rows = rows_in(results.FOLDER, name)
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def values(name: str, column: str, **where) -> list[float]:
    found = [row[column] for row in picked(name, **where)]
    assert found, f"{name}.csv has no row with {where}"
    return found


def one(name: str, column: str = "pairs/s", **where) -> float:
    """The median of the windows, which for one window is its value."""
    return median(values(name, column, **where))


def spread(name: str, column: str = "pairs/s", **where) -> list[float]:
    found = values(name, column, **where)
    return [min(found), max(found)]


Cells = Callable[[dict], list[float]]  # what selects a column -> the numbers of its cell, [] = no such rows


def speed(name: str, *columns: str, **row) -> Cells:
    return lambda column: [one(name, c, **row, **column) for c in columns] if picked(name, **row, **column) else []


def ratio(mine: Cells, base: Cells, n: int = 2) -> Cells:
    """Of pairs/s, and of p50 the other way round."""

    def cells(column: dict) -> list[float]:
        mine_at, base_at = mine(column), base(column)
        both = [mine_at[0] / base_at[0], *(b / a for a, b in zip(mine_at[1:], base_at[1:], strict=True))]
        return both[:n]

    return lambda column: cells(column) if mine(column) and base(column) else []


def joined(*parts: Cells) -> Cells:
    return lambda column: [number for part in parts for number in part(column)]


# --- the pages ---


def as_written(text: str, value: float) -> bool:
    """Is the value, rounded to the digits of the text, the number in the text?"""
    mantissa, _, exponent = text.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(text.replace(",", "")) - value) <= 0.5 * unit * (1 + 1e-6)


def compare(where: str, found: list[str], expected: list[float]) -> None:
    shown = f"{where}: the page has {found}, the file {[float(f'{value:.7g}') for value in expected]}"
    assert len(found) == len(expected), shown
    assert all(map(as_written, found, expected)), shown


@dataclass
class Table:
    """The first table of a page below the first link to a file."""

    page: str
    names: tuple[str, ...]  # the linked file, and others
    columns: list[dict | None]  # what selects the rows of a column; None: not from a file
    rows: dict[str, Cells]  # beginning of a row's label -> its numbers

    def cells(self, text: str) -> Iterator[tuple[str, dict, list[re.Match]]]:
        """(label of the row, what selects the column's rows, the numbers in the text) of every cell from a file."""
        start = text.index(f"results/{self.names[0]}.csv)")
        table = re.compile(r"(?:^\|.*\n)+", re.M).search(text, start)
        for line in list(re.compile(r".+\n").finditer(text, table.start(), table.end()))[2:]:
            bars = [bar.start() for bar in re.compile(r"\|").finditer(text, line.start(), line.end())]
            assert len(bars) == len(self.columns) + 2, line[0]
            label = text[bars[0] + 1 : bars[1]].replace("**", "").strip()
            for column, left, right in zip(self.columns, bars[1:-1], bars[2:], strict=True):
                if column is not None:
                    no_result = r"(?<!\w)p50|(?<!\w)batch \d+"
                    found = re.compile(rf"{no_result}|({NUMBER})").finditer(text, left, right)
                    yield label, column, [match for match in found if match[1]]

    def check(self, text: str) -> None:
        known, seen = dict(self.rows), {}
        for label, column, found in self.cells(text):
            if label not in seen:
                fits = [start for start in known if label.startswith(start)]
                assert fits, f"{self.page}: no rows of a file are known for {label!r}"
                seen[label] = known.pop(max(fits, key=len))
            compare(f"{self.page}, {label}, {column}", [m[1] for m in found], seen[label](column))
        assert not known, f"{self.page} has no row for {list(known)}"

    def places(self, text: str) -> list[tuple[int, int]]:
        """Where the numbers are."""
        return [match.span(1) for _, _, found in self.cells(text) for match in found]


LEVELS = [{"tokens": 128, "level": n} for n in (8, 16, 64, 150)] + [{"tokens": 512, "level": n} for n in (16, 64)]
IN_FLIGHT = [{"tokens": column["tokens"], "in_flight": column["level"]} for column in LEVELS]
BOTH = ("pairs/s", "p50_ms")
TURN = [{"column": name} for name in ("peak", "x10", "of peak", "p50_ms", "p99_ms", "refused")]


def defaults(gpu: str, arrangement: str) -> Cells:
    return speed(f"defaults-{gpu}", *BOTH, arrangement=arrangement)


def engines(card: str, arrangement: str) -> Cells:
    return speed(f"engines-h100-{card}", *BOTH, arrangement=arrangement)


def batch(card: str, arrangement: str) -> Cells:
    return speed(f"batch-h200-{card}", "pairs/s", arrangement=arrangement)


def models(size: str, arrangement: str) -> Cells:
    """pairs/s, p50 and, but for the first arrangement, the ratio to it."""
    name = f"models-h100-{size}"
    mine = speed(name, *BOTH, arrangement=arrangement)
    return mine if arrangement == "DP=1" else joined(mine, ratio(mine, speed(name, *BOTH, arrangement="DP=1"), 1))


def overload(gpu: str, turn: int) -> Cells:
    def cells(column: dict) -> list[float]:
        peak, full = (picked(f"overload-{gpu}", turn=turn, load=load)[0] for load in ("peak", "x10"))
        what = column["column"]
        own = {"peak": peak["pairs/s"], "x10": full["pairs/s"], "of peak": full["pairs/s"] / peak["pairs/s"] * 100}
        return [own[what] if what in own else full[what]]

    return cells


def peers(name: str, model: str, tokens: int) -> Cells:
    """Of a way: the median, the smallest and largest run of its best variant."""

    def cells(column: dict) -> list[float]:
        file = "cold-h100" if name == "peers-h100" and column["way"] == "kit" else name
        if file == "cold-h100":
            found = values(file, "pairs_s", kind="end_to_end") if tokens == 128 else []
            return [median(found), min(found), max(found)] if found else []
        rows = picked(name, model=model, tokens=tokens, way=column["way"])
        best = max(rows, key=lambda row: row["pairs_s"], default={})
        return [best[key] for key in ("pairs_s", "pairs_s_min", "pairs_s_max")] if best else []

    return cells


def infinity(way: str) -> Cells:
    def cells(column: dict) -> list[float]:
        found = values("infinity-cpu", "pairs/s", way=way, dtype="bfloat16", **column)
        return [median(found), min(found), max(found)]

    return cells


PLAIN_H100, PLAIN_H200 = defaults("h100", "plain"), defaults("h200", "plain")
FP8_H100 = defaults("h100", "ENGINES_PER_GPU=2 QUANTIZATION=fp8")
THREE_8192 = defaults("h200", "ENGINES_PER_GPU=3 MAX_NUM_BATCHED_TOKENS=8192")
GRAPHS = "--cudagraph-capture-sizes 1 2 4 8 16 32 64 128 256 384 512 768 1024 1536 2048 3072 4096'"
SMALL = "MAX_NUM_BATCHED_TOKENS=4096 EXTRA_ARGS='--kv-cache-memory-bytes 2G"
KV_4G = "EXTRA_ARGS='--kv-cache-memory-bytes 4G"
CALL = [{"kind": "load", "level": n} for n in (1, 2, 4, 16, 64, 150)]
CALL += [{"kind": "one", "level": 1}, {"kind": "long", "level": 64}]


def call(arrangement: str, *columns: str) -> Cells:
    """p50 and pairs/s of one arrangement in call-h100-c."""
    return speed("call-h100-c", *(columns or ("p50", "pairs_s")), arrangement=arrangement)


def p50_ratio(mine: str, base: str) -> Cells:
    return lambda column: [call(mine, "p50")(column)[0] / call(base, "p50")(column)[0]]


CALL_H200 = [{"kind": "load", "level": n} for n in (1, 2, 4, 16, 64)] + [{"kind": "one", "level": 1}]


def call_h200(arrangement: str, *columns: str) -> Cells:
    return speed("call-h200", *(columns or ("p50_ms", "pairs/s")), arrangement=arrangement)


def quotient(name: str, mine: str, base: str) -> Cells:
    return lambda column: [call_h200(mine, name)(column)[0] / call_h200(base, name)(column)[0]]


def offline_h200(engines: int) -> Cells:
    def cells(column: dict) -> list[float]:
        found = values("offline-h200", column["column"], engines=engines, kind="end_to_end")
        return [median(found), min(found), max(found)] if column["column"] == "pairs_s" else found[:1]

    return cells


def exact_h200(**where) -> Cells:
    return lambda column: [one("exact-h200", column["column"], **where)]


def part_of_start(what: str) -> Cells:
    return lambda _: values("start-h200", "seconds", arrangement="pieces", what=what)


PARTS = [row["what"] for row in results.read("start-h200")[1] if not row["what"].startswith("start to ")]
TWO_STAGES = "two-stages-cranfield"


def stages(way: str, keep: int | None = None) -> Cells:
    """A row of quality.md: a metric, the milliseconds, or the pairs of both models."""

    def cells(column: dict) -> list[float]:
        if column["metric"] != "pairs":
            return speed(TWO_STAGES, "value", way=way, keep=keep)(column)
        return [one(TWO_STAGES, f"{m}_pairs", way=way, keep=keep, metric="MAP") for m in ("small", "large")]

    return cells


def stage_gain(way: str, keep: int | None, other: str) -> list[float]:
    """Difference in nDCG@10 to a model alone, with its interval."""
    where = {"way": way, "keep": keep, "metric": "nDCG@10"}
    return [abs(one(TWO_STAGES, f"to_{other}{edge}", **where)) for edge in ("", "_low", "_high")]


TABLES = [
    Table(
        "performance_h200.md",
        ("call-h200",),
        CALL_H200,
        {
            **{name: call_h200(name) for name in ("plain", "pieces", "whole", "exact")},
            "p50, whole / plain": quotient("p50_ms", "whole", "plain"),
            "pairs/s, exact / pieces": quotient("pairs/s", "exact", "pieces"),
        },
    ),
    Table(
        "performance_h200.md",
        ("offline-h200",),
        [{"column": "step_tokens"}, {"column": "pairs_s"}, {"column": "start_s"}],
        {"1, the default before": offline_h200(1), "3, the default": offline_h200(3)},
    ),
    Table(
        "performance_h200.md",
        ("exact-h200",),
        [{"column": "engines"}, None, {"column": "scores"}, {"column": "changed"}, None],
        {
            "0.6B, random": exact_h200(start="warm, alone"),
            "0.6B, random, cold": exact_h200(start="cold, beside three others", mode="EXACT=1"),
            "0.6B, random, whole graphs": exact_h200(graphs="whole", mode="EXACT=1"),
            "4B, random": exact_h200(model="4B", weights="random"),
            "8B, random": exact_h200(model="8B", weights="random"),
            "4B, dummy": exact_h200(model="4B", start="restarted"),
            "8B, dummy": exact_h200(model="8B", start="restarted"),
            "8B, dummy, cold": exact_h200(model="8B", start="cold"),
        },
    ),
    Table("performance_h200.md", ("start-h200",), [{}], {what: part_of_start(what) for what in PARTS}),
    Table(
        "performance_h100.md",
        ("call-h100-c",),
        CALL,
        {
            "plain": call("plain"),
            "before": call("kit"),
            "after": call("new"),
            "p50, after / plain": p50_ratio("new", "plain"),
            "p50, after / before": p50_ratio("new", "kit"),
        },
    ),
    Table(
        "performance.md",
        ("defaults-h100",),
        LEVELS,
        {
            "plain": PLAIN_H100,
            "ENGINES_PER_GPU=2": defaults("h100", "ENGINES_PER_GPU=2"),
            "ENGINES_PER_GPU=3, the default": defaults("h100", "ENGINES_PER_GPU=3"),
            "default against plain": ratio(defaults("h100", "ENGINES_PER_GPU=3"), PLAIN_H100),
            "ENGINES_PER_GPU=2 QUANTIZATION=fp8": FP8_H100,
            "its ratio to plain": ratio(FP8_H100, PLAIN_H100, 1),
            "ENGINES_PER_GPU=3 under CUDA MPS": defaults("h100", "ENGINES_PER_GPU=3 MAX_WAIT_S=2, CUDA MPS"),
        },
    ),
    Table(
        "performance.md",
        ("defaults-h200",),
        LEVELS,
        {
            "plain": PLAIN_H200,
            "ENGINES_PER_GPU=3 MAX_NUM_BATCHED_TOKENS=24576": defaults(
                "h200", "ENGINES_PER_GPU=3 MAX_NUM_BATCHED_TOKENS=24576"
            ),
            "ENGINES_PER_GPU=3 MAX_NUM_BATCHED_TOKENS=8192": THREE_8192,
            "default against plain": ratio(THREE_8192, PLAIN_H200),
        },
    ),
    Table(
        "performance.md",
        ("batch-h200-a", "batch-h200-b"),
        [None, *IN_FLIGHT[1:4], IN_FLIGHT[5]],
        {
            "card a: 24576": batch("a", "ENGINES_PER_GPU=3"),
            "8192": batch("a", "ENGINES_PER_GPU=3 MAX_NUM_BATCHED_TOKENS=8192 EXTRA_ARGS='--kv-cache-memory-bytes 2G'"),
            "4096, CUDA graphs": batch("a", f"ENGINES_PER_GPU=3 {SMALL} {GRAPHS}"),
            "24576, `-cc": batch("a", f"ENGINES_PER_GPU=3 {KV_4G} -cc.pass_config.enable_qk_norm_rope_fusion=true'"),
            "card b: 24576": batch("b", "ENGINES_PER_GPU=3"),
            "24576, QUANTIZATION=fp8": batch("b", "ENGINES_PER_GPU=3 QUANTIZATION=fp8"),
            "4096, no graphs": batch("b", f"ENGINES_PER_GPU=3 {SMALL}'"),
            "two engines, 4096": batch("b", f"ENGINES_PER_GPU=2 {SMALL} {GRAPHS}"),
        },
    ),
    Table(
        "performance.md",
        ("engines-h100-a", "engines-h100-b"),
        IN_FLIGHT,
        {
            "plain": engines("a", "API_SERVER_COUNT=1 ENGINES_PER_GPU=1 GUARD=0 VLLM_USE_FASTOKENS=0"),
            "ENGINES_PER_GPU=1": engines("a", "ENGINES_PER_GPU=1"),
            "=2, worker": engines("a", "ENGINES_PER_GPU=2"),
            "=3, worker": engines("a", "ENGINES_PER_GPU=3"),
            "card b: =2, worker processes": engines("b", "ENGINES_PER_GPU=2"),
            "card b: =2, worker in": engines("b", f"ENGINES_PER_GPU=2 {KV_4G} --distributed-executor-backend uni'"),
            "card b: =1, worker": engines("b", f"ENGINES_PER_GPU=1 {KV_4G} --distributed-executor-backend mp'"),
            "card b: =2 with fp8": engines("b", "ENGINES_PER_GPU=2 QUANTIZATION=fp8"),
            "card b: two services": engines("b", "ENGINES_PER_GPU=1 replicas=2"),
        },
    ),
    Table(
        "performance.md",
        ("models-h100-8b", "models-h100-4b"),
        [{"tokens": 128, "in_flight": 64}, {"tokens": 512, "in_flight": 16}],
        {
            "4B bf16": models("4b", "DP=1"),
            "4B QUANTIZATION=fp8": models("4b", "QUANTIZATION=fp8"),
            "4B fp8, KV cache": models(
                "4b",
                "QUANTIZATION=fp8 EXTRA_ARGS='--load-format dummy --kv-cache-memory-bytes 4G --kv-cache-dtype fp8'",
            ),
            "8B bf16": models("8b", "DP=1"),
            "8B QUANTIZATION=fp8": models("8b", "QUANTIZATION=fp8"),
        },
    ),
    Table(
        "performance.md",
        ("peers-h100", "peers-h200", "peers-cpu", "cold-h100"),
        [{"way": "kit"}, None, {"way": "transformers"}, {"way": "sentence_transformers"}],
        {
            "H100, 0.6B bf16, documents of 128": peers("peers-h100", "Qwen3-Reranker-0.6B", 128),
            "H200, 0.6B bf16, 128": peers("peers-h200", "Qwen3-Reranker-0.6B", 128),
            "H200, 0.6B bf16, 512": peers("peers-h200", "Qwen3-Reranker-0.6B", 512),
            "H100, 0.6B bf16, 512": peers("peers-h100", "Qwen3-Reranker-0.6B", 512),
            "2 CPU cores, 0.6B": peers("peers-cpu", "Qwen3-Reranker-0.6B-random", 128),
            "2 CPU cores, all-MiniLM-L6-v2": peers("peers-cpu", "all-MiniLM-L6-v2", 128),
        },
    ),
    Table(
        "performance.md",
        ("infinity-cpu",),
        [{"in_flight": n} for n in (1, 4, 16)],
        {"kit": infinity("kit"), "infinity-emb": infinity("infinity-emb")},
    ),
    *(
        Table("guard.md", (f"overload-{gpu}",), TURN, {str(turn): overload(gpu, turn) for turn in turns})
        for gpu, turns in (("h100", (1, 2, 3)), ("h200", (1, 2, 3)), ("h200-b", (1, 2, 3, 4, 5)))
    ),
    Table(
        "quality.md",
        (TWO_STAGES,),
        [{"metric": name} for name in ("nDCG@10", "MRR@10", "MAP", "pairs", "ms a query")],
        {
            "BM25": stages("bm25"),
            "all-MiniLM alone": stages("small"),
            "the cross-encoder alone": stages("large"),
            **{f"BM25, then the cross-encoder on {n}": stages("bm25, large", n) for n in (10, 20, 50)},
            **{f"all-MiniLM, then the cross-encoder on {n}": stages("small, large", n) for n in (10, 20, 50)},
        },
    ),
    Table(
        "quality.md",
        ("quality-cranfield",),
        [{"metric": name} for name in ("nDCG@10", "MRR@10", "MAP", "recall@10")],
        {
            "BM25": speed("quality-cranfield", "value", way="bm25"),
            "the kit": speed("quality-cranfield", "value", way="kit"),
            "sentence-transformers": speed("quality-cranfield", "value", way="sentence-transformers"),
            "a perfect ranking": speed("quality-cranfield", "value", way="perfect"),
        },
    ),
]


@dataclass
class Sentence:
    """Text of a page with # for each number."""

    page: str
    text: str
    names: tuple[str, ...]  # the files
    numbers: Callable[[], list[float]]

    def find(self, text: str) -> re.Match:
        pattern = re.escape(self.text).replace(r"\#", f"({NUMBER})").replace(r"\ ", r"\s+")
        found = list(re.finditer(pattern, text))
        assert len(found) == 1, f"{self.page} has {len(found)} times: {self.text}"
        return found[0]

    def check(self, text: str) -> None:
        compare(f"{self.page}, {self.text}", list(self.find(text).groups()), self.numbers())

    def places(self, text: str) -> list[tuple[int, int]]:
        found = self.find(text)
        return [found.span(n) for n in range(1, found.re.groups + 1)]


def says(page: str, text: str, names: str, numbers: Callable[[], list[float]]) -> Sentence:
    return Sentence(page, text, tuple(names.split()), numbers)


AT_64, AT_64_LONG = LEVELS[2], LEVELS[5]
TWO, THREE = {"arrangement": "ENGINES_PER_GPU=2"}, {"arrangement": "ENGINES_PER_GPU=3"}
H100, H200, MPS = "defaults-h100", "defaults-h200", {"arrangement": "ENGINES_PER_GPU=3 MAX_WAIT_S=2, CUDA MPS"}
STEP_8192 = {"arrangement": "ENGINES_PER_GPU=3 MAX_NUM_BATCHED_TOKENS=8192"}
STEP_24576 = {"arrangement": "ENGINES_PER_GPU=3 MAX_NUM_BATCHED_TOKENS=24576"}
UNI = {"arrangement": f"ENGINES_PER_GPU=2 {KV_4G} --distributed-executor-backend uni'"}
DP2_8B = {"arrangement": "DP=2 EXTRA_ARGS='--distributed-executor-backend uni'"}


def kinds(*names: str) -> list[float]:
    return [100 * one("kernels-h200", "share", kernel="all", kind=name) for name in names]


def quoted_start(ending: str) -> float:
    """Seconds from `start` to ready of an arrangement, by the head of defaults-h200."""
    head = results.read(H200)[0]
    return float(re.search(r"ready after (\d+) s", head[f"start of ENGINES_PER_GPU=3 {ending}"])[1])


def scale(name: str, arrangement: str, tokens: int, in_flight: int) -> float:
    rows = [r for r in picked(name, tokens=tokens, in_flight=in_flight) if r["arrangement"].startswith(arrangement)]
    assert len(rows) == 1, (name, arrangement)
    return rows[0]["pairs/s"]


def times(name: str, arrangement: str) -> list[float]:
    """Smallest and largest ratio to DP=1 at as many calls in flight."""
    loads = [(128, 64), (128, 128), (512, 16), (512, 32)]
    found = [scale(name, arrangement, *load) / scale(name, "DP=1", *load) for load in loads]
    return [min(found), max(found)]


def two_services() -> list[float]:
    """Percent by which two services are faster than two engines with the worker in the engine's process."""
    replicas = {"arrangement": "ENGINES_PER_GPU=1 replicas=2"}
    loads = [IN_FLIGHT[i] for i in (1, 2, 5)]
    found = [one("engines-h100-b", **replicas, **at) / one("engines-h100-b", **UNI, **at) for at in loads]
    return [100 * min(found) - 100, 100 * max(found) - 100]


def step_gain(column: str, at: dict) -> float:
    """A value with steps of 24576 tokens in terms of that with 8192."""
    return one(H200, column, **STEP_24576, **at) / one(H200, column, **STEP_8192, **at)


def product_us() -> float:
    """Microseconds of matrix products a pair."""
    head = results.read("kernels-h200")[0]
    return 1e4 * kinds("gemm")[0] * float(head["busy"]) / float(head["pairs/s"])


def peer_ratio(way: str) -> list[float]:
    """The kit's speed against a way on the CPU: 0.6B, MiniLM."""
    found = []
    for model in ("Qwen3-Reranker-0.6B-random", "all-MiniLM-L6-v2"):
        kit, other = (peers("peers-cpu", model, 128)({"way": name})[0] for name in ("kit", way))
        found.append(kit / other)
    return found


def fp8_gain() -> list[float]:
    three, fp8 = {"arrangement": "ENGINES_PER_GPU=3"}, {"arrangement": "ENGINES_PER_GPU=3 QUANTIZATION=fp8"}
    at = IN_FLIGHT[2], IN_FLIGHT[3], IN_FLIGHT[5]
    return [100 * one("batch-h200-b", **fp8, **load) / one("batch-h200-b", **three, **load) - 100 for load in at]


def bf16_parity(column: str) -> float:
    rows = [row for card in "ab" for row in picked(f"batch-h200-{card}") if "fp8" not in row["arrangement"]]
    return max(row[column] for row in rows)


def fp8_scores() -> list[float]:
    row = picked("engines-h100-b", arrangement="ENGINES_PER_GPU=2 QUANTIZATION=fp8")[0]
    counts = re.findall(r"\d+", f"{row['other_first']} {row['swapped']}")
    return [row["parity"], row["parity_mean"], *map(float, counts)]


PAGE = "performance.md"
SENTENCES = [
    says(
        "scores.md",
        "new documents had # pairs/s, the same documents with another query #.",
        "document-first-cpu",
        lambda: [one("document-first-cpu", profile="ctxl_rerank_v2", documents=which) for which in ("new", "seen")],
    ),
    says(
        "scores.md",
        "has the query first: # and #",
        "document-first-cpu",
        lambda: [one("document-first-cpu", profile="qwen3_reranker", documents=which) for which in ("new", "seen")],
    ),
    says(
        "performance_h100.md",
        "but # pairs/s at 16 in flight (# to # with four).",
        "call-h100-b",
        lambda: [
            one("call-h100-b", "pairs_s", kind="load", arrangement="newapi1", level=16),
            *spread("call-h100-b", "pairs_s", kind="load", arrangement="new", level=16),
        ],
    ),
    says(
        "performance_h100.md",
        "# pairs/s at 16 in flight.",
        "call-h100-a",
        lambda: [one("call-h100-a", "pairs_s", kind="load", arrangement="one", level=16)],
    ),
    says(PAGE, "one window under MPS refused #.", H100, lambda: [max(values(H100, "refused"))]),
    says(
        PAGE,
        "plain at 64 in flight # to # and with 512 tokens # to #, two engines # to #, three # to #.",
        H100,
        lambda: [
            *spread(H100, arrangement="plain", **AT_64),
            *spread(H100, arrangement="plain", **AT_64_LONG),
            *spread(H100, **TWO, **AT_64),
            *spread(H100, **THREE, **AT_64),
        ],
    ),
    says(
        PAGE,
        "at 64: 2143, #, #, #. So three engines are # % faster than the median of those seven windows",
        f"{H100} overload-h100",
        lambda: [
            *(peaks := values("overload-h100", "pairs/s", load="peak")),
            100 * one(H100, **THREE, **AT_64) / median([*values(H100, "pairs/s", **TWO, **AT_64), 2143.0, *peaks])
            - 100,
        ],
    ),
    says(
        PAGE,
        "the GPU is busy # to # % of the time, with two # to # %",
        H100,
        lambda: [*spread(H100, "gpu_util", **THREE, **AT_64), *spread(H100, "gpu_util", **TWO, **AT_64)],
    ),
    says(
        PAGE,
        "it gave # % at 512 tokens and nothing at 128 (# to # pairs/s;",
        H100,
        lambda: [
            100 * one(H100, **MPS, **AT_64_LONG) / one(H100, **THREE, **AT_64_LONG) - 100,
            *spread(H100, **MPS, tokens=128),
        ],
    ),
    says(
        PAGE,
        "plain at 64 in flight # to #, with 512 tokens at 64 # to #, three engines # to # and # to #.",
        H200,
        lambda: [
            *spread(H200, arrangement="plain", **AT_64),
            *spread(H200, arrangement="plain", **AT_64_LONG),
            *spread(H200, **STEP_24576, **AT_64),
            *spread(H200, **STEP_8192, **AT_64),
        ],
    ),
    says(
        PAGE,
        "a light load is answered # % sooner",
        H200,
        lambda: [100 - 100 / step_gain("p50_ms", LEVELS[0])],
    ),
    says(
        PAGE,
        "and a full one loses # to # %",
        H200,
        lambda: sorted(100 - 100 / step_gain("pairs/s", at) for at in (LEVELS[3], AT_64_LONG)),
    ),
    says(
        PAGE,
        "was met on the H100s (#) and not here**, where plain's median was higher (# against #).",
        f"{H100} {H200}",
        lambda: [
            one(H100, **THREE, **AT_64_LONG) / one(H100, arrangement="plain", **AT_64_LONG),
            one(H200, arrangement="plain", **AT_64_LONG),
            one(H100, arrangement="plain", **AT_64_LONG),
        ],
    ),
    says(PAGE, "fp8 gives # to # % on a full card and # % at 512 tokens", "batch-h200-b", fp8_gain),
    says(
        PAGE,
        "differ by # at most and # in the mean (512 pairs,",
        "batch-h200-a batch-h200-b",
        lambda: [bf16_parity("parity"), bf16_parity("parity_mean")],
    ),
    says(
        PAGE,
        "matrix products # %, norm, rope and activation (fused by Inductor) # %, attention # %, "
        "writing the KV cache # %, copies # %.",
        "kernels-h200",
        lambda: kinds("gemm", "norm, rope, activation (fused by Inductor)", "attention", "kv cache", "copies"),
    ),
    says(PAGE, "reaches **# % of the ceiling of its own matrix products**", "kernels-h200", lambda: kinds("gemm")),
    says(
        PAGE,
        "those products took # us for a pair",
        "kernels-h200",
        lambda: [product_us()],
    ),
    says(PAGE, ", # us a token, so 5500 pairs/s for the 153 tokens", "kernels-h200", lambda: [product_us() / 139]),
    says(
        PAGE,
        "kept the GPU busy for # % of the time;",
        "kernels-h200",
        lambda: [100 * float(results.read("kernels-h200")[0]["busy"])],
    ),
    says(
        PAGE,
        "Three engines give # to #, # to # %: their steps are smaller (# to # tokens in the mean",
        f"{H200} batch-h200-a",
        lambda: [
            *(both := [one(H200, **STEP_24576, **LEVELS[3]), one("batch-h200-a", **THREE, **IN_FLIGHT[3])]),
            *(pairs_s / 55 for pairs_s in both),
            round(one("batch-h200-a", "step_tokens", **THREE, **IN_FLIGHT[3]), -2),  # to hundreds, in the page
            round(one(H200, "step_tokens", **STEP_24576, **LEVELS[3]), -2),
        ],
    ),
    says(
        PAGE,
        "the scores of 512 pairs agree between all bf16 rows of a card within #.",
        "engines-h100-a engines-h100-b",
        lambda: [
            max(r["parity"] for card in "ab" for r in picked(f"engines-h100-{card}") if "fp8" not in r["arrangement"])
        ],
    ),
    says(
        PAGE,
        "frees (# against # with one engine)",
        "engines-h100-a engines-h100-b",
        lambda: [
            one("engines-h100-a", arrangement="ENGINES_PER_GPU=1", **IN_FLIGHT[1]),
            one(
                "engines-h100-b",
                arrangement=f"ENGINES_PER_GPU=1 {KV_4G} --distributed-executor-backend mp'",
                **IN_FLIGHT[1],
            ),
        ],
    ),
    says(PAGE, "Two services behind two ports are # to # % faster still", "engines-h100-b", two_services),
    says(
        PAGE,
        "largest difference #, mean #, another document first in # of # queries, # of # document pairs in another",
        "engines-h100-b",
        fp8_scores,
    ),
    says(
        PAGE,
        "DP=2 with two engines a GPU gives # pairs/s (128 tokens, 128 in flight), DP=2 with one #, **TP=2 #**",
        "scale-2xh100",
        lambda: [
            scale("scale-2xh100", f"{start}", 128, 128)
            for start in ("DP=2 ENGINES_PER_GPU=2", "DP=2 ENGINES_PER_GPU=1", "TP=2")
        ],
    ),
    says(
        PAGE,
        "8B: DP=2 gives # to # times one GPU (# to # pairs/s against # to #; 512 tokens: # against #), "
        "TP=2 gave # and #",
        "scale-2xh200-8b models-2xh100",
        lambda: [
            *times("scale-2xh200-8b", "DP=2"),
            *spread("scale-2xh200-8b", **DP2_8B, tokens=128),
            *spread("scale-2xh200-8b", arrangement="DP=1", tokens=128),
            scale("scale-2xh200-8b", "DP=2", 512, 32),
            scale("scale-2xh200-8b", "DP=1", 512, 32),
            one("models-2xh100", model="Qwen3-Reranker-8B", arrangement="TP=2", tokens=128),
            one("models-2xh100", model="Qwen3-Reranker-8B", arrangement="TP=2", tokens=512),
        ],
    ),
    says(
        PAGE,
        "4B: TP=2 gives # to # times one GPU (# against #; 512 tokens: # against #).",
        "scale-2xh200-4b",
        lambda: [
            *times("scale-2xh200-4b", "TP=2"),
            scale("scale-2xh200-4b", "TP=2", 128, 128),
            scale("scale-2xh200-4b", "DP=1", 128, 128),
            scale("scale-2xh200-4b", "TP=2", 512, 32),
            scale("scale-2xh200-4b", "DP=1", 512, 32),
        ],
    ),
    *(
        says(
            PAGE,
            f"80 GB measured: GPU # % busy at #{ending}",
            name,
            lambda name=name: [one(name, c, arrangement="DP=1", tokens=128) for c in ("gpu_util", "pairs/s")],
        )
        for name, ending in (("models-h100-4b", " pairs/s"), ("models-h100-8b", " |"))
    ),
    says(
        PAGE,
        "# and # times transformers, # and # times sentence-transformers.",
        "peers-cpu",
        lambda: [*peer_ratio("transformers"), *peer_ratio("sentence_transformers")],
    ),
    says(
        PAGE,
        "tokens | # (# to #) | # (# to #) | not run | not run |\n| H200, 0.6B bf16, 512",
        "peers-h200",
        lambda: [
            picked("peers-h200", way=way, tokens=128)[0][column]
            for way in ("kit", "llm_score")
            for column in ("pairs_s", "pairs_s_min", "pairs_s_max")
        ],
    ),
    says(
        PAGE,
        "Python side could feed: # pairs/s (an engine",
        "cold-h100",
        lambda: [round(one("cold-h100", "pairs_s", kind="host"), -2)],  # to hundreds, in the page
    ),
    says(
        PAGE,
        "it gave #, # and # pairs/s.",
        "infinity-cpu",
        lambda: [one("infinity-cpu", way="infinity-emb", dtype="float32", in_flight=n) for n in (1, 4, 16)],
    ),
    says(
        PAGE,
        "three engines # and # s; engines that fork",
        H200,
        lambda: [quoted_start(f"MAX_NUM_BATCHED_TOKENS={n}") for n in (8192, 24576)],
    ),
    says(
        PAGE,
        "# s, and it then scored as fast (# pairs/s at 64 in flight).",
        H200,
        lambda: [
            quoted_start("MAX_NUM_BATCHED_TOKENS=24576 VLLM_WORKER_MULTIPROC_METHOD=fork"),
            one(H200, arrangement=STEP_24576["arrangement"] + " VLLM_WORKER_MULTIPROC_METHOD=fork"),
        ],
    ),
    says(
        PAGE,
        "| fastokens, 1 API process | 1532 | 1709, 1436 | 1435, 1467 | # |",
        "capacity",
        lambda: [one("capacity", "pairs_s", what="api")],
    ),
    says(PAGE, "| 2009, 1883 | 2116, 1999 | # |", "capacity", lambda: [one("capacity", "pairs_s", what="engine")]),
    says(
        "guard.md",
        "then met up to # wrong refusals",
        "overload-h100",
        lambda: [max(values("overload-h100", "refused", load="peak"))],
    ),
    says(
        "guard.md",
        "The median is # %, and accepted calls took up to # times MAX_WAIT_S.",
        "overload-h200",
        lambda: [
            median(overload("h200", turn)({"column": "of peak"})[0] for turn in (1, 2, 3)),
            max(values("overload-h200", "p99_ms")) / 4000,
        ],
    ),
    says(
        "guard.md",
        "The median of five is # %, the worst # %, and accepted calls took at most # times MAX_WAIT_S (p99).",
        "overload-h200-b",
        lambda: [
            median(shares := [overload("h200-b", turn)({"column": "of peak"})[0] for turn in range(1, 6)]),
            min(shares),
            max(row["p99_ms"] for row in picked("overload-h200-b", load="x10")) / 4000,
        ],
    ),
    says(
        "performance_h200.md",
        "p99 # to # ms (`pieces`), # to # (`whole`), # (`exact`), # to # (`plain`).",
        "call-h200",
        lambda: [
            *spread("call-h200", "p99_ms", arrangement="pieces", level=64),
            *spread("call-h200", "p99_ms", arrangement="whole", level=64),
            one("call-h200", "p99_ms", arrangement="exact", level=64),
            *spread("call-h200", "p99_ms", arrangement="plain", level=64),
        ],
    ),
    says(
        "performance_h200.md",
        "caches warm: # s, default # s, so # times. The first start took # s beside three other services.",
        "exact-h200 start-h200",
        lambda: [
            exact := one("exact-h200", "start_s", start="warm, alone"),
            default := one("start-h200", "seconds", arrangement="pieces", what="start to ready"),
            exact / default,
            one("exact-h200", "start_s", mode="EXACT=1", start="cold, beside three others"),
        ],
    ),
    says(
        "performance_h200.md",
        "# scores lie within # of their pair's median with whole graphs and within # with pieces.",
        "exact-h200",
        lambda: [
            one("exact-h200", "scores", mode="EXACT=0", graphs="whole"),
            *(one("exact-h200", "largest", mode="EXACT=0", graphs=graphs) for graphs in ("whole", "pieces")),
        ],
    ),
    says(
        "performance_h200.md",
        "# s, bare `vllm serve` # s until its first score.",
        "start-h200",
        lambda: [
            one("start-h200", "seconds", arrangement=name, what=what)
            for name, what in (("pieces", "start to ready"), ("plain", "start to first score"))
        ],
    ),
    says(
        PAGE,
        "- **EXACT=1** costs # % on a full card",
        "call-h200",
        lambda: [100 - 100 * quotient("pairs/s", "exact", "pieces")(CALL_H200[4])[0]],
    ),
    says(
        PAGE,
        "three engines on the card give # times the pairs/s of one",
        "offline-h200",
        lambda: [offline_h200(3)({"column": "pairs_s"})[0] / offline_h200(1)({"column": "pairs_s"})[0]],
    ),
    says("guard.md", "At the # pairs/s of [performance.md]", H100, lambda: [one(H100, **THREE, **LEVELS[3])]),
    says(
        "scaling.md",
        "One such GPU alone gave # pairs/s with two engines and # to # with one",
        "engines-h100-a engines-h100-b",
        lambda: [
            one("engines-h100-b", **UNI, **IN_FLIGHT[2]),
            *spread("engines-h100-a", arrangement="ENGINES_PER_GPU=1", tokens=128),
        ],
    ),
    says(
        "scaling.md",
        "8B with DP=2 gives # to # times one GPU",
        "scale-2xh200-8b",
        lambda: times("scale-2xh200-8b", "DP=2"),
    ),
    says("scaling.md", "4B with TP=2 # to # times;", "scale-2xh200-4b", lambda: times("scale-2xh200-4b", "TP=2")),
    says(
        "scaling.md",
        "8B with TP=2 gave # pairs/s (128 tokens) and # (512) on H100s, # and # of two single GPUs",
        "models-2xh100 models-h100-8b",
        lambda: [
            *(two := [one("models-2xh100", gpus=2, tokens=n) for n in (128, 512)]),
            *(
                n / one("models-h100-8b", arrangement="DP=1", tokens=t) / 2
                for n, t in zip(two, (128, 512), strict=True)
            ),
        ],
    ),
    says(
        "scaling.md",
        "two GPUs had # (# of 2 x #, measured on two days).",
        "scale-2xh100 engines-h100-b",
        lambda: [
            (both := scale("scale-2xh100", "DP=2 ENGINES_PER_GPU=2", 128, 128))
            / (2 * (alone := one("engines-h100-b", **UNI, **IN_FLIGHT[2]))),
            both,
            alone,
        ],
    ),
]


def of_fault(kind: str) -> list[float]:
    return faults.figures(rows_in(results.FOLDER, "faults-cpu"))[kind]


SENTENCES += [
    says("reliability.md", f"| {kind} | # | # s | # s | # s | # | # |", "faults-cpu", lambda kind=kind: of_fault(kind))
    for kind in faults.figures(results.read("faults-cpu")[1])
]
SENTENCES += [
    says(
        "quality.md",
        "gives nDCG@10 #, MRR@10 # and MAP #, as the kit does",
        "quality-cranfield",
        lambda: [
            one("quality-cranfield", "value", way="RerankingEvaluator", metric=f"binary {name}")
            for name in ("nDCG@10", "MRR@10", "MAP")
        ],
    ),
]
SENTENCES += [
    says("quality.md", f"{text}#, {low}# to +#)", TWO_STAGES, lambda which=which: stage_gain(*which))
    for text, low, which in (
        ("(all-MiniLM ahead by ", "-", ("small", None, "large")),
        ("the cross-encoder alone (+", "+", ("small, large", 20, "large")),
        ("gain is not measurable (+", "-", ("small, large", 20, "small")),
        ("it ranks as on all 100 (+", "-", ("bm25, large", 20, "large")),
    )
]
CHECKS = [*TABLES, *SENTENCES]


def named(check: Table | Sentence) -> str:
    return f"{check.page} {check.names[0] if isinstance(check, Table) else check.text[:40]}"


def page(name: str) -> str:
    return (KIT / "docs" / name).read_text("utf-8")


def fails(check: Table | Sentence, text: str) -> bool:
    try:
        check.check(text)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_a_page_says_what_the_file_says(check):
    check.check(page(check.page))


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_any_other_number_in_the_page_is_noticed(check):
    text = page(check.page)
    for start, end in check.places(text):
        changed = str((int(text[end - 1]) + 1) % 10)
        assert fails(check, text[: end - 1] + changed + text[end:]), text[start - 40 : end]


@pytest.mark.parametrize("name", NAMES)
def test_other_speeds_in_a_file_are_noticed(name, tmp_path, monkeypatch):
    shutil.copytree(results.FOLDER, tmp_path / "results")
    head, rows = results.read(name)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    names = ("pairs/s", "pairs_s", "share", "cpu_s_per_1000_calls", "start_s", "seconds", "value")
    names += ("recovery_s",)
    column = next(name for name in names if name in rows[0])
    for row in rows:
        row[column] = row[column] and row[column] * 1.02
    results.write(tmp_path / "results" / f"{name}.csv", head, rows)
    text = page("scaling.md")
    noticed = name in GENERATED and scaling_table.filled_in(text) != text
    assert noticed or any(fails(check, page(check.page)) for check in CHECKS if name in check.names)


def test_every_file_that_a_page_links_is_compared_with_it():
    linked = set()
    for path in (KIT / "docs").glob("*.md"):
        text = path.read_text("utf-8")
        for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]*measurements/results/[^)\s]*)\)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
            if target.endswith(".csv"):
                assert target.endswith(f"/{label}"), f"{path.name}: {label} is a link to {target}"
                linked.add((path.name, label.removesuffix(".csv")))
    compared = {(check.page, name) for check in CHECKS for name in check.names}
    compared |= {("scaling.md", name) for name in GENERATED}
    assert not linked - compared
    assert {name for _, name in linked} | set(GENERATED) == set(NAMES), "a file that no page links"
