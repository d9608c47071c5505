"""What the benchmark observes of the server: version, flags, processes, GPUs, counters."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from rerank_kit.benchmark.load import CLOSED, OPENED, Bench, Gate
from rerank_kit.engine.choices import count_weights
from rerank_kit.engine.extra_args import SECRET_FLAG

# What may be observed of the server inside a window; None = not observed.
# fmt: off
SEEN = (
    "gpu_util", "gpu_mem_gib", "api_cpu", "engine_cpu", "server_cpu", "host_cpu", "host_cores",
    "queue_ms", "cache_hits", "step_tokens", "mfu",
)
# fmt: on


def hardware() -> str:
    """GPUs of this host, else its CPU."""
    try:
        ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        cpu = Path("/proc/cpuinfo")
        name = re.search(r"model name\s*:\s*(.+)", cpu.read_text()) if cpu.exists() else None
        names = [name[1] if name else platform.machine()] * (os.cpu_count() or 1)
    return ", ".join(f"{n} x {name}" for name, n in Counter(names).items())


def is_local(base_url: str) -> bool:
    return urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")


def without_secrets(words: list[str]) -> str:
    """A command line to show: no API key, no password in a URL."""
    line = re.sub(
        rf"({SECRET_FLAG}(?=[ =])|--\S*(?:api.key|hf.token|secret|password|headers)\S*?)([ =](?!--)\S+)+",
        r"\1 ***",
        shlex.join(words),
    )
    return re.sub(r"//[^/@\s]*@", "//***@", line)


def server_flags(base_url: str) -> str | None:
    """Arguments of the `vllm serve` on this host that has base_url's port; None = not found, or another host."""
    port = str(urlsplit(base_url).port or 80)
    for path in Path("/proc").glob("[0-9]*/cmdline") if is_local(base_url) else ():
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:  # ended, or not ours to read
            continue
        flags = words[words.index("serve") + 1 :] if "serve" in words else []
        if f"--port={port}" in flags or ("--port", port) in itertools.pairwise(flags):
            return without_secrets(flags)
    return None


# Dense bf16 peak of one GPU in 1e12 operations a second, from NVIDIA's data sheets (without sparsity); the first
# name whose words nvidia-smi's name holds.
# fmt: off
PEAKS = (
    ("H200 NVL", 835), ("H200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H20", 148),
    ("B200", 2250), ("A100", 312), ("A800", 312), ("L40S", 362), ("L40", 181), ("L4", 121), ("A10G", 70),
    ("A10", 125), ("RTX 4090", 165), ("A30", 165),
)
# fmt: on


def peak_flops(name: str) -> float | None:
    """Dense bf16 operations a second of a GPU by its name; None = not in the list."""
    return next((1e12 * peak for known, peak in PEAKS if re.search(rf"\b{known}\b", name)), None)


def flops_per_token(config: dict, tokens_per_prompt: float) -> float | None:
    """Operations that a decoder with gated MLP needs for one prompt token; None for others (encoders).

    Two for each weight that is multiplied (embeddings are looked up), and for causal attention over the half of the
    prompt that a token sees on average 2 * 2 * layers * heads * head_dim * tokens / 2.
    """
    hidden, layers, heads = map(config.get, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if not hidden or not layers or not heads or not config.get("num_key_value_heads"):  # no encoder has the last
        return None
    weights = count_weights({**config, "vocab_size": 0})
    head_dim = config.get("head_dim") or hidden // heads
    return 2 * weights + 2 * layers * heads * head_dim * tokens_per_prompt


def utilisation(row: dict, config: dict, gpu: str, n_gpus: int) -> float | None:
    """Model-FLOPs utilisation of a row against the bf16 peak of its GPUs; prefix-cache hits are not computed."""
    peak = peak_flops(gpu)
    each = flops_per_token(config, row["tokens_per_pair"] or 0)
    if not peak or not each or not row["tok/s"] or not n_gpus:
        return None
    return row["tok/s"] * (1 - (row["cache_hits"] or 0)) * each / (peak * n_gpus)


def model_config(folder: str | None) -> dict:
    """config.json of a folder on this host; {} where there is none."""
    try:
        return dict(json.loads((Path(folder) / "config.json").read_text("utf-8"))) if folder else {}
    except (OSError, ValueError, TypeError):
        return {}


# vLLM's names on /metrics (vllm/v1/metrics/loggers.py; counters get _total from the Prometheus client).
METRICS = {
    "queue_ms": ("vllm:request_queue_time_seconds_sum", "vllm:request_queue_time_seconds_count", 1000),
    "cache_hits": ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", 1),  # both in tokens
    "step_tokens": ("vllm:iteration_tokens_total_sum", "vllm:iteration_tokens_total_count", 1),
}


def metric_sums(text: str) -> dict[str, float]:
    """The counters that METRICS needs from the text of /metrics, each summed over all engines."""
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^(vllm:\w+)(?:\{.*\})? (\S+)$", text, re.M):
        if any(name in names for names in METRICS.values()):
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def what_changed(first: dict, last: dict, pids: dict[int, bool], gpu_lines: list[str]) -> dict:
    """Counters of two looks at the server, and nvidia-smi's lines (index, % busy, MiB) between, as a row's SEEN."""
    d = {name: last[name] - first[name] for name in last if name in first}
    out: dict[str, float | None] = {}
    time_s = d["time_s"]
    gpus: dict[float, list[tuple[float, float]]] = {}
    for line in gpu_lines:
        with contextlib.suppress(ValueError):  # [N/A], or a line cut short
            index, used, mib = map(float, line.split(","))
            gpus.setdefault(index, []).append((used, mib / 1024))
    if gpus:  # the busiest one; others may belong to other programs
        means = [(statistics.mean(used for used, _ in one), max(gib for _, gib in one)) for one in gpus.values()]
        out["gpu_util"], out["gpu_mem_gib"] = max(means)
    cores = {pid: d[pid] / time_s for pid in pids if pid in d and time_s > 0}
    if cores:
        out["server_cpu"] = sum(cores.values())
        out["api_cpu"] = max((cores[pid] for pid in cores if pids[pid]), default=None)
        out["engine_cpu"] = max((cores[pid] for pid in cores if not pids[pid]), default=None)
    if d.get("host_all"):
        out |= {"host_cpu": d["host_busy"] / d["host_all"], "host_cores": os.cpu_count()}
    for name, (part, whole, unit) in METRICS.items():
        if d.get(whole, 0) > 0 and d.get(part, -1) >= 0:  # less: the server started anew
            out[name] = unit * d[part] / d[whole]
    return out


def gpus_of(flags: str | None) -> int | None:
    """GPUs of one service, from the arguments of `vllm serve`; None where they are not known."""
    if flags is None:
        return None
    kinds = {kind: rf"--{kind}-parallel-size" for kind in ("tensor", "data", "pipeline")}
    if "--data-parallel-address 127.0.0.1" in flags:  # ENGINES_PER_GPU: the other ranks are on the same GPUs
        kinds["data"] += "-local"
    found = [re.search(rf"{flag}[= ](\d+)", flags) for flag in kinds.values()]
    return math.prod(int(f[1]) for f in found if f)


async def ask_server(bench: Bench) -> dict:
    """Version and model as the server reports them; None = not reported."""

    async def get(url: str) -> dict:
        try:
            async with bench.session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                return dict(await answer.json(content_type=None)) if answer.status == 200 else {}
        except (aiohttp.ClientError, OSError, ValueError, TypeError):
            return {}

    version = await get(bench.base_url.removesuffix("/v1") + "/version")
    cards = (await get(f"{bench.base_url}/models")).get("data") or [{}]
    card = next((c for c in cards if c.get("id") == bench.model), cards[0])
    return {"vllm": version.get("version"), "model_root": card.get("root"), "max_model_len": card.get("max_model_len")}


def server_processes(base_url: str) -> dict[int, bool]:
    """{PID: is it an API process} of the server that listens on base_url's port of this host; {} = not seen."""
    if not is_local(base_url):
        return {}
    port, inodes, parents = urlsplit(base_url).port or 80, set(), {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for words in map(str.split, Path(table).read_text().splitlines()[1:] if Path(table).exists() else ()):
            if words[3] == "0A" and int(words[1].rsplit(":", 1)[1], 16) == port:  # 0A: it listens
                inodes.add(f"socket:[{words[9]}]")
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or not ours to read
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if inodes and any(os.readlink(fd) in inodes for fd in (folder / "fd").iterdir()):
                # A forked engine inherits the socket; vLLM names its processes VLLM::EngineCore, VLLM::Worker.
                name = (folder / "cmdline").read_bytes()
                found[pid] = not re.search(rb"EngineCore|Worker", name)
    for pid in list(parents) if found else ():
        line = [pid]
        while line[-1] in parents and line[-1] not in found:
            line.append(parents[line[-1]])
        if line[-1] in found:
            found |= {below: found.get(below, False) for below in line}
    found.pop(os.getpid(), None)
    return found


async def look(bench: Bench) -> dict[str | int, float]:
    """Counters of the server now: CPU seconds by PID and of the host, sums of /metrics over all engines."""
    now: dict[str | int, float] = {"time_s": time.perf_counter()}
    for pid in bench.server_pids:
        with contextlib.suppress(OSError):
            used = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
            now[pid] = sum(map(int, used)) / os.sysconf("SC_CLK_TCK")
    if is_local(bench.base_url) and Path("/proc/stat").exists():
        times = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        now |= {"host_all": sum(times), "host_busy": sum(times) - times[3] - times[4]}  # idle, waiting for a disk
    for base_url in bench.base_urls:
        url, timeout = base_url.removesuffix("/v1") + "/metrics", aiohttp.ClientTimeout(total=2)
        with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
            async with bench.session.get(url, timeout=timeout) as answer:
                for name, value in metric_sums(await answer.text()).items() if answer.status == 200 else ():
                    now[name] = now.get(name, 0.0) + value
    return now


async def sample_gpus(samples: list[tuple[float, str]]) -> None:
    """Append (time, line of nvidia-smi) four times a second until cancelled; a line: index, % busy, MiB used."""
    ask = ["--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "250"]
    smi = await asyncio.create_subprocess_exec("nvidia-smi", *ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert smi.stdout is not None
    try:
        async for line in smi.stdout:
            samples.append((time.perf_counter(), line.decode(errors="replace")))
    finally:
        with contextlib.suppress(ProcessLookupError):
            smi.kill()
        await smi.wait()


async def observe(bench: Bench, gate: Gate) -> dict:
    """What the server did inside the window, by the names in SEEN. What cannot be observed is left out."""
    samples: list[tuple[float, str]] = []
    sampling = None
    if is_local(bench.base_url) and shutil.which("nvidia-smi"):
        sampling = asyncio.create_task(sample_gpus(samples))
    try:
        while not gate.n[OPENED]:
            await asyncio.sleep(0.02)
        first = await look(bench)
        while not gate.n[CLOSED] or time.perf_counter() < gate.n[CLOSED]:
            await asyncio.sleep(0.02)
        last = await look(bench)
    finally:
        if sampling:
            sampling.cancel()
            await asyncio.wait([sampling])
    inside = [line for at, line in samples if gate.n[OPENED] < at <= gate.n[CLOSED]]
    return what_changed(first, last, bench.server_pids, inside)
