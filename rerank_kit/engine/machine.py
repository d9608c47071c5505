"""What this machine offers vLLM: the installed release, GPUs, cores, free memory.

It reads files, package metadata and nvidia-smi. Importing torch or vllm would cost 10 s.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rerank_kit.engine.limits import cpu_quota, free_in_cgroup
from rerank_kit.settings import ConfigError

OLDEST_VLLM = (0, 26)
TESTED_VLLM = (0, 32)  # the newest that the tests ran with
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """The installed vLLM and the hardware that it runs on."""

    vllm_version: str
    gpus: tuple[str, ...]  # "name, MiB" of every GPU of the host
    cores: tuple[int, ...]  # CPU cores, as many as this process may keep busy
    memory_bytes: int  # memory that is free now
    cpu_quota: float | None = None  # cores' worth of CPU time by the cgroup's limit, if that is less than its cores

    @property
    def release(self) -> tuple[int, ...]:
        """Major and minor number of vLLM's release."""
        return release_of(self.vllm_version)

    @property
    def is_cpu(self) -> bool:
        return self.vllm_version.endswith("+cpu")

    @property
    def gpu_mib(self) -> int:
        """Memory of the first GPU; 0 if nvidia-smi gives no number, as for a GPU that shares the host's memory."""
        mib = self.gpus[0].rpartition(",")[2].strip()
        return int(mib) if mib.isdigit() else 0


class NoVllm(ConfigError):
    """vLLM is missing or too old."""


def release_of(version_text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(n) for n in version_text.split("+")[0].split(".")[:2] if n.isdigit())


def vllm_version() -> str:
    """Version of the installed vLLM; the suffix `+cpu` marks the CPU build.

    Raises:
        NoVllm: vLLM is not installed, or it is older than the kit supports.
    """
    try:
        found = version("vllm")
    except PackageNotFoundError:
        raise NoVllm('vLLM is not installed for this Python: run "sh start_rerank.sh setup"') from None
    if release_of(found) < OLDEST_VLLM:
        raise NoVllm(
            f"vLLM {found} is too old: releases before {OLDEST_VLLM[0]}.{OLDEST_VLLM[1]} hang on prompts of exactly "
            'max_model_len tokens or ignore instructions; run "sh start_rerank.sh setup"'
        )
    return found


def untested(version_text: str) -> str:
    """One line about a vLLM that is newer than the tested one; empty for others."""
    if release_of(version_text) <= TESTED_VLLM:
        return ""
    tested = ".".join(map(str, TESTED_VLLM))
    return (
        f"vLLM {version_text} is newer than {tested}, the newest that this kit was tested with: compare its scores "
        'once by "sh start_rerank.sh check --reference"'
    )


def probe_machine() -> Machine:
    """Describe the machine that this runs on."""
    found = vllm_version()
    cores, quota = usable_cores()
    return Machine(found, () if found.endswith("+cpu") else list_gpus(), cores, free_memory(), quota)


def list_gpus() -> tuple[str, ...]:
    """`name, MiB` of every NVIDIA GPU of this host; empty if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()) if done.returncode == 0 else ()


def compute_capabilities() -> tuple[str, ...]:
    """`9.0` and so on of every NVIDIA GPU of this host; empty if nvidia-smi does not know."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = tuple(re.findall(r"^\d+\.\d+$", done.stdout, re.MULTILINE))
    return found if done.returncode == 0 else ()


def quantization_methods() -> tuple[str, ...]:
    """Names that the installed vLLM takes for a quantization method, from its source text; empty if it is not found."""
    found = find_spec("vllm")  # imports nothing
    for folder in found.submodule_search_locations or () if found else ():
        try:
            file = Path(folder) / "model_executor" / "layers" / "quantization" / "__init__.py"
            tree = ast.parse(file.read_text("utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "QuantizationMethods":
                return tuple(str(item.value) for item in ast.walk(node.value) if isinstance(item, ast.Constant))
    return ()


def free_memory() -> int:
    """Bytes of memory that a new process can take: free on the host, and within the cgroup's limit."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = free_in_cgroup()  # in a container /proc/meminfo is the host's
    return free if limit is None else min(free, limit)


def usable_cores() -> tuple[tuple[int, ...], float | None]:
    """(cores that this process may keep busy, the CPU limit that made them fewer than it may run on, or None)."""
    cores, quota = tuple(sorted(os.sched_getaffinity(0))), cpu_quota()
    if quota is None or quota >= len(cores):
        return cores, None
    return cores[: max(1, int(quota))], quota


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 instructions: AVX512_BF16 or AMX on x86, BF16 on Arm."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return bool(flags and {"avx512_bf16", "amx_bf16", "bf16"} & set(flags[1].split()))


def vllm_command() -> str:
    """The `vllm` program of this Python environment, or the first on PATH."""
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
    if not found:
        raise NoVllm(f'there is no vllm program beside {sys.executable} or on PATH: run "sh start_rerank.sh setup"')
    return found
