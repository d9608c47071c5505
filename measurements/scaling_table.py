"""The capacity model of docs/scaling.md: its tables, and a plan for your own numbers.

    python measurements/scaling_table.py                       # print the tables
    python measurements/scaling_table.py --write               # and put them into docs/scaling.md
    python measurements/scaling_table.py --target-pairs-s 5000 --pairs-s-gpu 700 --doc-tokens 512 --price-per-hour 2

Everything comes from measurements/results: capacity.csv (pairs/s of one GPU), tiers.csv (by measurements/tiers.py) and
scale*.csv (by measurements/scale.py, several GPUs). What is assumed is in Assumed, each with an option.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
DOC = KIT / "docs" / "scaling.md"
sys.path.insert(0, str(KIT))

from measurements import results


@dataclass
class Assumed:
    """Assumptions that are not measured: (default, meaning) of each."""

    utilisation: float = 0.7  # planned share of the measured throughput; above it queues grow fast
    efficiency: float = 1.0  # throughput of N GPUs / N x that of one; replicas share nothing but the host
    spare: float = 0.1  # share of extra hosts, at least one, for failures and updates
    gpus_per_host: int = 8  # of one host
    latency_s: float = 1.0  # of a call at that load: gives the calls in flight
    nic_gbit_s: float = 25.0  # of a balancer
    nic_share: float = 0.6  # of it that is planned with
    balancer_cores: int = 8  # of one balancer
    core_share: float = 0.6  # of a core that is planned with
    price_per_hour: float = 2.5  # of one GPU, with its share of the host
    cell_hosts: int = 12  # hosts behind one pair of balancers: what one mistake can take down


def load_tiers() -> dict:
    """The measured call of tiers.csv: its documents and bytes, and the CPU time of each tier."""
    head, rows = results.read("tiers")
    cpu = {row["tier"]: row["cpu_s_per_1000_calls"] for row in rows}
    return {k: int(head[k]) for k in ("documents", "request_bytes", "answer_bytes")} | {"cpu_s_per_1000_calls": cpu}


def load_capacity() -> dict[str, list[dict]]:
    """Rows of capacity.csv by what they are of: `gpu`, or the process that was full (`api`, `engine`)."""
    kinds: dict[str, list[dict]] = {}
    for row in results.read("capacity")[1]:
        kinds.setdefault(row["what"], []).append(row)
    return kinds


def call_bytes(tiers: dict, docs: int, doc_tokens: int) -> tuple[float, float]:
    """(bytes to the service, bytes back) of one call: the measured call's, scaled by documents and their length."""
    # 128 tokens of English are about 85 words, the measured document.
    factor = docs / tiers["documents"] * doc_tokens / 128
    return tiers["request_bytes"] * factor, tiers["answer_bytes"] * factor


def plan(
    target: float, pairs_s_gpu: float, docs: int, doc_tokens: int, about: Assumed, tiers: dict, api: float
) -> dict:
    """What a deployment for `target` pairs/s needs.

    Args:
        pairs_s_gpu: measured throughput of one GPU.
        api: pairs/s of one API process that does nothing else.
    """
    gpus = math.ceil(target / (pairs_s_gpu * about.efficiency * about.utilisation))
    needed = math.ceil(gpus / about.gpus_per_host)
    spare = max(1, math.ceil(needed * about.spare))
    hosts, calls = needed + spare, target / docs
    there, back = call_bytes(tiers, docs, doc_tokens)
    # Cost is assumed proportional to bytes, which overestimates it compared with the measured short calls.
    longer = max(1.0, there / tiers["request_bytes"])
    cpu = {name: value * longer * calls / 1000 for name, value in tiers["cpu_s_per_1000_calls"].items()}
    gbit_s = calls * (there + back) * 8 / 1e9  # a balancer receives and sends both
    by_cpu = cpu.get("nginx_tls", 0.0) / (about.balancer_cores * about.core_share)
    by_network = gbit_s / (about.nic_gbit_s * about.nic_share)
    cells = math.ceil(hosts / about.cell_hosts)
    balancers = max(2 * cells, math.ceil(max(by_cpu, by_network)) + 1)
    hourly = hosts * about.gpus_per_host * about.price_per_hour
    return {
        "GPUs by throughput": gpus,
        "hosts": f"{hosts} ({needed} + {spare} spare)",
        "calls/s": calls,
        "calls in flight": calls * about.latency_s,
        "Gb/s to the service": calls * there * 8 / 1e9,
        "Gb/s back": calls * back * 8 / 1e9,
        "API cores, all hosts": target / api / about.core_share,
        "guard cores of them": cpu["guard"],
        "client cores": cpu["client"] / about.core_share,
        "nginx cores (TLS)": cpu.get("nginx_tls", 0.0) / about.core_share,
        "balancers": balancers,
        "cells": cells,
        "share of a host in the capacity": 1 / hosts,
        "cost an hour": hourly,
        "cost of a million pairs": hourly / (target * 3600) * 1e6,
    }


def shown(value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.095 else f"{value:.3f}"


def markdown(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def capacity_table(capacity: dict[str, list[dict]]) -> str:
    rows = [
        [
            r["model"],
            r["precision"],
            r["doc_tokens"],
            f"{r['pairs_s']:,}",
            r["in_flight"],
            r["p50_ms"] or "-",
            r["setup"],
        ]
        for r in capacity["gpu"]
    ]
    head = ["model", "precision", "tokens a document", "pairs/s of one GPU", "calls in flight", "p50 ms", "how"]
    return markdown(head, rows)


def tiers_table(tiers: dict, capacity: dict[str, list[dict]]) -> str:
    """Where each tier is full, for the measured call."""
    docs, cpu = tiers["documents"], tiers["cpu_s_per_1000_calls"]
    rows = []
    for name, title in (
        ("client", "client process (`rerank`)"),
        ("client_async", "client process (`arerank`)"),
        ("nginx_tls", "nginx worker, TLS"),
        ("nginx", "nginx worker"),
        ("guard", "guard, of an API process"),
    ):
        if name in cpu:
            rows.append([title, f"{cpu[name]:.3f}", f"{1000 / cpu[name]:,.0f}", f"{1000 / cpu[name] * docs:,.0f}"])
    there, back = call_bytes(tiers, docs, 128)
    calls = 25e9 / 8 / (there + back)
    rows.append(["balancer's network, 25 Gb/s", "-", f"{calls:,.0f}", f"{calls * docs:,.0f}"])
    for name, title in (("api", "API process, all it does"), ("engine", "engine process, 0.6B")):
        pairs = capacity[name][0]["pairs_s"]
        rows.append([title, f"{1000 * docs / pairs:,.1f}", f"{pairs / docs:,.0f}", f"{pairs:,.0f}"])
    for model, precision in (("0.6B", "bf16"), ("4B", "bf16"), ("8B", "bf16")):
        pairs = best(capacity, model, precision, 128)
        rows.append([f"GPU, {model} {precision}", "-", f"{pairs / docs:,.0f}", f"{pairs:,.0f}"])
    return markdown(["tier", "CPU seconds for 1,000 calls", "calls/s when full", "pairs/s when full"], rows)


def best(capacity: dict[str, list[dict]], model: str, precision: str, doc_tokens: int) -> float:
    """Most pairs/s of one GPU."""
    key = (model, precision, doc_tokens)
    return max(r["pairs_s"] for r in capacity["gpu"] if (r["model"], r["precision"], r["doc_tokens"]) == key)


def deployments_table(capacity: dict[str, list[dict]], tiers: dict, about: Assumed) -> str:
    columns, head = [], ["needs"]
    for target in (10_000, 1_000_000):
        for model, precision, tokens in (("0.6B", "bf16", 128), ("0.6B", "bf16", 512), ("4B", "fp8", 128)):
            head.append(f"{target:,} pairs/s, {model} {precision}, {tokens} tokens")
            api = capacity["api"][0]["pairs_s"] * 128 / tokens
            one = best(capacity, model, precision, tokens)
            columns.append(plan(target, one, 32, tokens, about, tiers, api))
    return markdown(head, [[name, *(shown(column[name]) for column in columns)] for name in columns[0]])


def scale_table() -> str:
    """Several GPUs, from every scale*.csv; a row that says so where there is none yet."""
    rows = []
    for path in sorted(results.FOLDER.glob("scale*.csv")):
        head, found = results.read(path.stem)
        for row in found:
            if row["pairs/s"] is not None:
                # Flags for shared GPUs and random weights; not part of the arrangement.
                name = re.sub(
                    r"(GPU_MEMORY_UTILIZATION|STARTUP_CHECK)=\S+|--kv-cache-memory-bytes \S+", "", row["arrangement"]
                )
                name = " ".join(name.split()).replace("' ", "'")
                cells = [path.name, head["hardware"], head["vllm"], row["model"], name, row["gpus"]]
                cells += [row["tokens"], f"{row['in_flight']:g}", f"{row['pairs/s']:,.0f}"]
                optional = {"p50_ms": ",.0f", "p95_ms": ",.0f", "efficiency": ".2f", "parity": ".1e"}
                cells += ["-" if row.get(k) is None else format(row[k], how) for k, how in optional.items()]
                rows.append(cells)
    head = ["file", "hardware", "vLLM", "model", "arrangement", "GPUs", "tokens", "calls in flight", "pairs/s"]
    head += ["p50 ms", "p95 ms", "efficiency", "largest difference of a score to the first"]
    return markdown(head, rows or [["**not measured yet**: run measurements/scale.py", *["-"] * (len(head) - 1)]])


def assumed_table(about: Assumed) -> str:
    source = Path(__file__).read_text("utf-8")
    rows = []
    for one in fields(Assumed):
        meaning = re.search(rf"^    {one.name}: \w+ = \S+  # (.*)$", source, re.M)[1]
        rows.append([f"`--{one.name.replace('_', '-')}`", getattr(about, one.name), meaning])
    return markdown(["option", "here", "meaning"], rows)


def tables() -> dict[str, str]:
    """Every generated table of docs/scaling.md by its name there."""
    capacity, tiers, about = load_capacity(), load_tiers(), Assumed()
    return {
        "capacity": capacity_table(capacity),
        "scale": scale_table(),
        "tiers": tiers_table(tiers, capacity),
        "assumed": assumed_table(about),
        "deployments": deployments_table(capacity, tiers, about),
    }


def filled_in(text: str) -> str:
    """The document with every generated table replaced."""
    for name, table in tables().items():
        marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, n = re.subn(marks, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
        if n != 1:
            raise ValueError(f"docs/scaling.md has {n} places for the table {name}")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument("--target-pairs-s", type=float, help="a plan for this rate")
    parser.add_argument("--pairs-s-gpu", type=float, help="from bench_rerank.py; default: the 0.6B model's")
    parser.add_argument("--docs", type=int, default=32, help="documents a call")
    parser.add_argument("--doc-tokens", type=int, default=128, help="tokens a document")
    for one in fields(Assumed):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    args = parser.parse_args(argv)
    if args.target_pairs_s:
        about = Assumed(**{one.name: getattr(args, one.name) for one in fields(Assumed)})
        capacity = load_capacity()
        one = args.pairs_s_gpu or best(capacity, "0.6B", "bf16", args.doc_tokens)
        api = capacity["api"][0]["pairs_s"] * 128 / args.doc_tokens
        found = plan(args.target_pairs_s, one, args.docs, args.doc_tokens, about, load_tiers(), api)
        print("\n".join(f"{name:32} {shown(value)}" for name, value in found.items()))
        return 0
    if args.write:
        DOC.write_text(filled_in(DOC.read_text("utf-8")), "utf-8")
        return 0
    print("\n\n".join(f"{name}\n{table}" for name, table in tables().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
