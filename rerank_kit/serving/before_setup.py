"""What would make `sh start_rerank.sh setup` fail after gigabytes: an old driver or GPU, a full disk, a proxy or index.

`python -m rerank_kit.serving.before_setup gpu | cpu` refuses with one line and exit code 5, or warns.
`python -m rerank_kit.serving.before_setup index PYTHON` warns where pip asks another index than the settings suggest.
Standard library only: nothing is installed yet.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from rerank_kit.settings import KIT_DIR, ConfigError, load_env

# The pinned GPU build is for CUDA 13, which came with driver 580 and has no code for GPUs before Turing.
# Source: the release notes of the CUDA Toolkit 13.0.
OLDEST_DRIVER, OLDEST_GPU = 580, (7, 5)
# The CPU build takes 3 GB with its wheels. The GPU build was not measured: an estimate for PyTorch, the CUDA libraries
# and vLLM, unpacked and as wheels.
NEED_GB = {"cpu": 4, "gpu": 12}
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


def check_gpus(text: str) -> list[str]:
    """Warnings for `driver, compute capability, name` lines of nvidia-smi.

    Raises:
        ConfigError: the driver is too old, or every GPU is.
    """
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in text.splitlines() if line.count(",") >= 2]
    old = []
    for driver, capability, name in rows:
        if re.match(r"\d+\.", driver) and int(driver.split(".")[0]) < OLDEST_DRIVER:
            raise ConfigError(
                f"the NVIDIA driver {driver} is too old: this vLLM is built for CUDA 13, which needs driver "
                f"{OLDEST_DRIVER} or newer. Update the driver, or give a Python that has a fitting vLLM (PYTHON=...)"
            )
        if (found := re.fullmatch(r"(\d+)\.(\d+)", capability)) and (int(found[1]), int(found[2])) < OLDEST_GPU:
            old.append(f"{name} (compute capability {capability})")
    if not old:
        return []
    said = f"{', '.join(old)}: this vLLM is built for CUDA 13, which needs 7.5 (Turing) or newer"
    if len(old) == len(rows):
        raise ConfigError(f"{said}. Use another GPU, or give a Python that has a fitting vLLM (PYTHON=...)")
    return [f"{said}. Leave those out of CUDA_VISIBLE_DEVICES"]


def ask_gpus() -> str:
    """The lines for check_gpus(); empty if nvidia-smi does not know the question."""
    command = ["nvidia-smi", "--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def check_disk(kind: str, folder: Path = KIT_DIR) -> None:
    """Raise ConfigError if the build does not fit beside the kit. An existing .venv counts: it is replaced."""
    venv = folder / ".venv"
    used = sum(file.lstat().st_size for file in venv.rglob("*") if not file.is_dir()) if venv.is_dir() else 0
    free = (shutil.disk_usage(folder).free + used) / 1e9
    if free < NEED_GB[kind]:
        raise ConfigError(
            f"{free:.1f} GB are free in {folder}, and the {kind.upper()} build needs about {NEED_GB[kind]}: make room, "
            "or put the kit's folder on another disk"
        )


def proxy_warnings() -> list[str]:
    """A warning if pip would have to go through a SOCKS proxy, which it cannot without a package it does not have."""
    for key in PROXIES:
        for name in (key, key.lower()):
            if os.environ.get(name, "").startswith("socks"):
                return [
                    f"{name}={shown(os.environ[name])}: pip cannot use a SOCKS proxy before PySocks is installed: "
                    f"set HTTPS_PROXY to an HTTP proxy, or unset {name}"
                ]
    return []


def shown(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"//[^/@]*@", "//***@", url)


def index_warnings(config: str, file_values: dict[str, str], environ: dict[str, str]) -> list[str]:
    """Warnings about where packages come from.

    Args:
        config: output of `pip config list`: SECTION.KEY='VALUE' lines, with section :env: for variables.
        file_values: what .env sets.
        environ: the environment that pip gets.
    """
    found = dict(re.findall(r"^([\w:-]+\.[\w-]+)='(.*)'$", config, re.MULTILINE))
    found = {key: value.replace("\\n", " ").strip() for key, value in found.items()}

    def effective(key: str) -> tuple[str, str]:
        for section, where in ((":env:", "environment"), ("install", "pip.conf"), ("global", "pip.conf")):
            if value := found.get(f"{section}.{key}"):
                return value, where
        return "", ""

    out = []
    index, where = effective("index-url")
    asked = file_values.get("PIP_INDEX_URL")
    if asked and asked != environ.get("PIP_INDEX_URL", asked):
        out.append(
            f"PIP_INDEX_URL={shown(environ['PIP_INDEX_URL'])} (environment) takes precedence over .env's {shown(asked)}"
        )
    in_files = found.get("install.index-url") or found.get("global.index-url")
    if where == "environment" and in_files and in_files != index:
        out.append(f"pip asks {shown(index)} (PIP_INDEX_URL), not {shown(in_files)} of pip.conf")
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX"):
        url = environ.get(name, "")
        if url and url.rstrip("/") != index.rstrip("/"):
            asks = shown(index) or "the public index"
            out.append(f"{name} is uv's: setup uses pip, which asks {asks}; set PIP_INDEX_URL too")
    extra, where = effective("extra-index-url")
    if extra:
        hosts = ", ".join(sorted({urlsplit(url).hostname or url for url in extra.split()}))
        out.append(
            f"pip also asks {hosts} (extra-index-url, {where}) and takes the newest version that either has: "
            "the pins name versions, not an index"
        )
    if effective("no-index")[0] not in ("", "0", "false"):
        out.append(f"pip asks no index (no-index, {effective('no-index')[1]}): wheels must come from find-links")
    return out


def main(argv: list[str]) -> int:
    """`gpu`, `cpu` before anything is installed; `index PYTHON` for the pip of that Python."""
    try:
        if argv in (["gpu"], ["cpu"]):
            found = check_gpus(ask_gpus()) if argv == ["gpu"] else []
            check_disk(argv[0])
            found += proxy_warnings()
        elif argv[:1] == ["index"] and len(argv) == 2:
            command = [argv[1], "-P", "-m", "pip", "--disable-pip-version-check", "config", "list"]
            config = subprocess.run(command, capture_output=True, text=True).stdout
            found = index_warnings(config, load_env(), dict(os.environ))
        else:
            print("usage: python -m rerank_kit.serving.before_setup gpu | cpu | index PYTHON", file=sys.stderr)
            return 2
    except ConfigError as exc:
        print(f"[ERR] {exc}", file=sys.stderr)
        return 5
    for text in found:
        print(f"[WARN] {text}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
