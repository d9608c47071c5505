"""Configuration of the kit: argument > environment > .env > default.

Every key is defined once, as a field of EnvConfig, with its type, default and one line of help.
`.env.example`, `start_rerank.sh cfg` and docs/settings.md are printed from these fields.

Standard library only: start_rerank.sh reads the settings through this module before anything is installed.
"""

import ast
import dataclasses
import ipaddress
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

KIT_DIR = Path(__file__).resolve().parents[1]  # the folder of start_rerank.sh, .env, profiles/ and log/
# .env may also set variables of other libraries; start_rerank.sh exports them to the server.
PASSED_ON = re.compile(
    r"^(HF_|HUGGINGFACE_|MODELSCOPE_|VLLM_|NCCL_|GLOO_|TORCH|OMP_|MKL_|PIP_|UV_|OTEL_|PYTORCH_|TRITON_|CUDA_)"
    r"|^(PYTHON|DO_NOT_TRACK|LD_PRELOAD|TMPDIR|XDG_CACHE_HOME|HTTPS?_PROXY|ALL_PROXY|NO_PROXY|https?_proxy|all_proxy|no_proxy)$"
)


# The client runs in other programs, whose environment has a PORT or an API_KEY of its own. So it has two names that come
# first, and it reads what belongs to the service from .env alone.
CLIENTS_OWN = {"RERANK_BASE_URL": "BASE_URL", "RERANK_API_KEY": "API_KEY"}
FROM_FILE_ALONE = ("HOST", "PORT", "SSL_CERTFILE", "API_KEY", "API_KEY_FILE")


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the key, its source and the allowed values."""


def _key(
    default: Any,
    help: str,
    group: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    secret: bool = False,
) -> Any:
    meta = {"help": help, "group": group, "choices": choices, "low": low, "high": high, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=meta)


@dataclass(frozen=True)
class EnvConfig:
    """All settings, checked. None means "not set"; rerank_kit.engine then chooses by model and machine."""

    # fmt: off
    model_path: str | None = _key(None, "checkpoint to serve: a local folder (a relative path starts at the kit's folder) or a Hugging Face / ModelScope id", "model")
    model_path_tiny: str | None = _key(None, "checkpoint of vllm_usage_tiny.py. Default: MODEL_PATH, or Qwen/Qwen3-Reranker-0.6B when that is unset too", "model")
    model_profile: str | None = _key(None, "name of a file in profiles/, without .json. Default: chosen by the checkpoint's files", "model")
    template: str | None = _key(None, "Jinja file with the prompt of a pair, from messages of role query, document and system (the instruction); a relative path starts at the kit's folder. Default: the checkpoint's own, or the profile's", "model")
    score_tokens: str | None = _key(None, "tokens whose logits are the score of a language model: the one for relevant, and the one for not relevant, as yes,no. Default: those of the checkpoint's files, or the profile's", "model")
    served_model_name: str = _key("qwen3-reranker", "model name that clients send", "model")
    instruction: str | None = _key(None, "task instruction of calls that bring none. Default: the profile's own", "model")
    host: str = _key("127.0.0.1", "address to listen on; 0.0.0.0 opens the service to the network", "service")
    port: int = _key(11438, "port of the server; the benchmark calls it too, and a client beside this .env", "service", low=1, high=65535)
    api_key: str | None = _key(None, "key that clients must send, as Authorization: Bearer KEY", "service", secret=True)
    api_key_file: str | None = _key(None, "file that holds the key; used when API_KEY is unset", "service")
    log_dir: str = _key("log", "folder of logs and PID files; a relative path starts at the kit's folder", "service")
    start_timeout_s: int = _key(900, "seconds that start waits for the first scored probe", "service", low=1)
    stop_timeout_s: int = _key(30, "seconds that stop gives calls in flight to finish", "service", low=0)
    stop_delay_s: int = _key(0, "seconds before that, in which a stopping service still takes calls while /ready is 503, so that balancers learn to ask others; behind nginx 11", "service", low=0)
    restart: str = _key("yes", "yes: the supervisor restarts a server that died or hangs; no: the server stays down, for systemd and Kubernetes, which restart it themselves", "service", choices=("yes", "no"))
    restart_max: int = _key(5, "limit on restarts within RESTART_WINDOW_S; beyond it the service stays down", "service", low=0)
    restart_window_s: int = _key(600, "seconds of the window in which restarts are counted", "service", low=1)
    health_timeout_s: int = _key(120, "seconds without any score after which a server counts as hung; 0 = never", "service", low=0)
    log_max_mib: int = _key(100, "size in MiB above which the log of a running server is rotated; 0 = never", "service", low=0)
    log_keep: int = _key(5, "number of rotated logs that are kept", "service", low=0, high=1000)
    allow_no_key: int = _key(0, "1: serve without a key even if HOST is open to the network", "service", low=0, high=1)
    ssl_certfile: str | None = _key(None, "TLS certificate (PEM, with its chain); needs SSL_KEYFILE", "service")
    ssl_keyfile: str | None = _key(None, "private key of SSL_CERTFILE (PEM)", "service")
    startup_check: int = _key(1, "1: start and /ready report ready only when prompt, head and known answers are right; 0: when a pair is scored", "service", low=0, high=1)
    cuda_visible_devices: str | None = _key(None, "GPUs to use, e.g. 0,1. Default: the first TP x DP", "gpu")
    tp: int = _key(1, "tensor parallel size: one model over several GPUs", "gpu", low=1)
    dp: int = _key(1, "data parallel size: number of copies of the model", "gpu", low=1)
    engines_per_gpu: int | None = _key(None, "engine processes on each GPU; more than 1 is faster for small models on large GPUs. Default: chosen by model and machine", "gpu", low=1, high=8)
    dp_address: str | None = _key(None, "address of node 0 when the DP copies are on several hosts. Default: one host", "nodes")
    dp_local: int | None = _key(None, "copies on each host; DP is the sum over all hosts", "nodes", low=1)
    node_rank: int = _key(0, "0: the head node (API and its own copies); 1, 2 ...: a node with copies only", "nodes", low=0)
    dp_rpc_port: int = _key(29550, "port of node 0 at which the other nodes register; the nodes open further ports between them", "nodes", low=1, high=65535)
    gpu_memory_utilization: float | None = _key(None, "share of GPU memory that vLLM may take, 0 to 1 (CPU build: of the host's memory). Default: 0.85 on a GPU", "engine", low=0.01, high=1)
    max_model_len: int | None = _key(None, "longest prompt in tokens (query + document + template). Default: the model's own limit, 4096 at most (16384 for a listwise model)", "engine", low=16)
    max_num_batched_tokens: int | None = _key(None, "limit on tokens in one engine step. Default: chosen by model and machine", "engine", low=16)
    max_num_seqs: int | None = _key(None, "limit on pairs in one engine step. Default: chosen by model and machine", "engine", low=1)
    dtype: str = _key("auto", "precision of weights and activations", "engine", choices=("auto", "bfloat16", "float16", "half", "float32", "float"))
    quantization: str | None = _key(None, "vLLM quantization method: fp8_per_tensor (fp8 means this), fp8_per_channel, fp8_per_block and others of the installed vLLM; it changes scores", "engine")
    exact: int = _key(0, "1: a pair has the same bits in any batch, order and cache state, on any engine and after a restart; slower, NVIDIA GPUs only", "engine", low=0, high=1)
    api_server_count: int | None = _key(None, "API processes (HTTP, tokenizing) of one service. Default: chosen by model and machine", "engine", low=1)
    extra_args: str = _key("", "further arguments for vllm serve, quoted as in a shell", "engine")
    base_url: str | None = _key(None, "URL at which clients find the service; RERANK_BASE_URL comes first. Default: that of the service in .env", "client")
    timeout_s: float = _key(120.0, "seconds that a client waits for an answer", "client", low=0.001)
    connect_timeout_s: float = _key(5.0, "seconds that a client waits for a connection", "client", low=0.001)
    pool_size: int = _key(150, "connections that a client keeps open; at least the number of calling threads", "client", low=1)
    retries: int = _key(2, "number of retries after a failed connect or a 429, 502, 503 or 504", "client", low=0, high=20)
    client_batch_size: int = _key(64, "limit on documents in one request; the client splits longer lists", "client", low=1)
    client_concurrency: int = _key(8, "limit on requests in flight of one split list or one rerank_many call", "client", low=1)
    guard: int = _key(1, "1: load the guard into the server (limits, defaults, key check on every path); 0: bare vLLM", "guard", low=0, high=1)
    max_docs_per_call: int = _key(1000, "limit on documents in one call; 0 = no limit", "guard", low=0)
    max_body_bytes: int = _key(33554432, "limit on bytes in one request body; 0 = no limit", "guard", low=0)
    body_timeout_s: float = _key(60.0, "seconds that a client may take to send one request body; 0 = no limit", "guard", low=0)
    max_chars_per_field: int = _key(500000, "limit on characters in one query, document or instruction; 0 = no limit", "guard", low=0)
    max_images_per_call: int = _key(128, "limit on different images in one call, for a model that takes images; 0: texts only, and no vision tower is loaded", "guard", low=0)
    max_image_bytes: int = _key(8388608, "limit on bytes of one image; 0 = no limit", "guard", low=0)
    max_image_pixels: int = _key(25000000, "limit on width x height of one image, read from its header before it is decoded; 0 = no limit", "guard", low=0)
    image_hosts: str = _key("", "hosts from which images are fetched, separated by commas: names, *.name, * for every public host; private addresses only in networks named here, such as 10.0.0.0/8. Default: none, images come as data URLs", "guard")
    max_pairs_in_flight: int | None = _key(None, "limit on pairs in flight; more get 429. Default: as many as are served within MAX_WAIT_S", "guard", low=1)
    max_wait_s: float = _key(10.0, "limit on the estimated seconds before a call's first pair starts; a longer wait gets 429; 0 = no limit", "guard", low=0)
    max_tokens_per_doc: int | None = _key(None, "default for max_tokens_per_doc when a call does not set it. Default: no cut", "guard", low=1)
    max_tokens_per_query: int | None = _key(None, "default for max_tokens_per_query when a call does not set it. Default: no cut", "guard", low=1)
    long_documents: str = _key("truncate", "pairs longer than MAX_MODEL_LEN: truncate cuts them as the model card does, error refuses them, chunk scores overlapping windows and takes the best", "guard", choices=("truncate", "error", "chunk"))
    allow_paths: str = _key("", "further paths to serve, e.g. /tokenize,/docs; they need the key too", "guard")
    slow_call_ms: float = _key(30000.0, "milliseconds above which a scoring call is logged; 0 = never", "guard", low=0)
    result_cache_mib: float = _key(0.0, "MiB of each API process for the scores of pairs that were asked before; 0 = no cache", "guard", low=0)
    result_cache_url: str | None = _key(None, "Redis in which replicas share the scores of pairs that were asked before: redis://USER:PASSWORD@HOST:PORT/DATABASE, or rediss:// for TLS. Default: none", "guard", secret=True)
    # fmt: on

    @property
    def engines_here(self) -> int:
        """DP copies on this host."""
        return self.dp_local or self.dp

    @property
    def drain_s(self) -> int:
        """Seconds from TERM until the server gives calls up. The guard is what makes it wait."""
        return self.stop_timeout_s + (self.stop_delay_s if self.guard else 0)

    @property
    def service_url(self) -> str:
        """Base URL of the service that this configuration starts, without a trailing slash."""
        # Nobody can connect to a wildcard address: it is only one to listen on.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        scheme = "https" if self.ssl_certfile else "http"
        return f"{scheme}://[{host}]:{self.port}/v1" if ":" in host else f"{scheme}://{host}:{self.port}/v1"

    @property
    def local_base_url(self) -> str:
        """Base URL that clients use, without a trailing slash; BASE_URL may point to another host."""
        return self.base_url.rstrip("/") if self.base_url else self.service_url

    @property
    def log_path(self) -> Path:
        """LOG_DIR as an absolute path."""
        return setting_path("LOG_DIR", self.log_dir)


FIELDS = {f.name.upper(): f for f in dataclasses.fields(EnvConfig)}
OLD_NAMES = {"LOCAL_BASE_URL": "BASE_URL"}  # of older versions, in resources.py


def load_env(path: Path | str | None = None) -> dict[str, str]:
    """Read a .env file without touching os.environ.

    Args:
        path: the file; None = KIT_ENV_FILE, else .env in the kit's folder. A missing file is empty.

    Returns:
        {key: text}. Accepts `export `, quotes, comments, CRLF and a byte order mark.

    Raises:
        ConfigError: a line is not KEY=VALUE; the message has its number.
    """
    path = env_path(path)
    values = {}
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        key, sep, value = line.partition("=")
        key, value = key.strip(), value.strip()
        if not sep or not re.fullmatch(r"[A-Za-z_]\w*", key):
            # The line may hold an API key without its name: show its number only.
            raise ConfigError(f"{path.name} line {number} is not KEY=VALUE")
        if value[:1] in ("'", '"'):
            end = value.find(value[0], 1)
            if end < 0 or value[end + 1 :].strip()[:1] not in ("", "#"):
                raise ConfigError(f"{path.name} line {number}: the quote of {key} is not closed")
            value = value[1:end]
        else:
            value = re.split(r"\s#|^#", value, maxsplit=1)[0].strip()
        values[key] = value
    return values


def _parse(key: str, text: str, source: str) -> Any:
    """Convert the text of one key to its type. ConfigError names key, source and the allowed values."""
    field = FIELDS[key]
    meta = field.metadata
    kind = int if "int" in str(field.type) else float if "float" in str(field.type) else str
    shown = "***" if meta["secret"] else repr(text)
    try:
        value = kind(text)
    except ValueError:
        name = {int: "an integer", float: "a number"}[kind]
        raise ConfigError(f"{key}={shown} ({source}) is not {name}: {meta['help']}") from None
    low, high = meta["low"], meta["high"]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={shown} ({source}) is not a finite number: {meta['help']}")
    if kind is not str and ((low is not None and value < low) or (high is not None and value > high)):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise ConfigError(f"{key}={shown} ({source}) is out of range: allowed is {allowed}")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{key}={shown} ({source}) is unknown: allowed is {', '.join(meta['choices'])}")
    return value


def get_config(env_file: Path | str | None = None, **overrides: object) -> EnvConfig:
    """Build the configuration: argument > environment > .env > default.

    Args:
        env_file: see load_env().
        overrides: values by field name, e.g. max_model_len=2048; None = not given.

    Raises:
        ConfigError: the message has a line for every setting that cannot be used.
    """
    file_values = load_env(env_file)
    values: dict[str, Any] = {}
    errors: list[str] = []
    for key, field in FIELDS.items():
        for source, text in (
            ("argument", overrides.get(field.name)),
            ("environment", os.environ.get(key)),
            (".env", file_values.get(key)),
        ):
            # An empty value means "not set"; CUDA_VISIBLE_DEVICES= in the environment hides all GPUs.
            if text is None or (text == "" and (key, source) != ("CUDA_VISIBLE_DEVICES", "environment")):
                continue
            try:
                values[field.name] = _parse(key, str(text), source)
            except ConfigError as exc:
                errors.append(str(exc))
            break
    unknown = set(overrides) - set(values) - {f.name for f in FIELDS.values()}
    errors += [f"{name} is not a setting" for name in sorted(unknown)]
    return _finished_config(values, errors)


def _finished_config(values: dict[str, Any], errors: list[str]) -> EnvConfig:
    """The configuration with the key of API_KEY_FILE. Raises ConfigError with all errors."""
    if not values.get("api_key") and values.get("api_key_file"):
        try:
            values["api_key"] = _read_key(values["api_key_file"])
        except ConfigError as exc:
            errors.append(str(exc))
    if not re.fullmatch(r"[!-~]*", values.get("api_key") or ""):
        errors.append("API_KEY=*** holds white space or non-ASCII characters: no HTTP header can carry it")
    if errors:
        raise ConfigError("\n".join(errors))
    return EnvConfig(**values)


def client_config(env_file: Path | str | None = None) -> EnvConfig:
    """The settings of a caller: RERANK_BASE_URL and RERANK_API_KEY, then group "client" and SERVED_MODEL_NAME.

    Without RERANK_BASE_URL and BASE_URL the address is that of the service which .env describes; so is the key. Other
    settings of the service are neither read nor checked.

    Raises:
        ConfigError: the message has a line for every setting that cannot be used.
    """
    file_values = load_env(env_file)
    of_client = [key for key, field in FIELDS.items() if field.metadata["group"] == "client"]
    found: dict[str, tuple[str, str, str]] = {}  # key -> (name, text, source)

    def look(key: str, name: str, *sources: str) -> None:
        for source in sources:
            if key not in found and (text := (os.environ if source == "environment" else file_values).get(name)):
                found[key] = (name, text, source)

    for name, key in CLIENTS_OWN.items():
        look(key, name, "environment", ".env")
    for key in (*of_client, "SERVED_MODEL_NAME"):
        look(key, key, "environment", ".env")
    for key in FROM_FILE_ALONE:
        if "BASE_URL" not in found or key in ("API_KEY", "API_KEY_FILE"):
            look(key, key, ".env")
    values: dict[str, Any] = {}
    errors: list[str] = []
    for key, (name, text, source) in found.items():
        try:
            values[FIELDS[key].name] = _parse(key, text, source if name == key else f"{name}, {source}")
        except ConfigError as exc:
            errors.append(str(exc))
    return _finished_config(values, errors)


def called_config(**overrides: Any) -> EnvConfig:
    """get_config() of a program that measures a service: RERANK_BASE_URL and RERANK_API_KEY come first, as in the client.

    Raises:
        ConfigError: as get_config().
    """
    file_values = load_env()
    for name, key in CLIENTS_OWN.items():
        value = os.environ.get(name) or file_values.get(name)
        if value and overrides.get(key.lower()) is None:
            overrides[key.lower()] = value
    return get_config(**overrides)


def not_read_by_client() -> str:
    """A hint for errors: variables of the environment that the client leaves to the program around it; mostly empty."""
    names = [name for name in FROM_FILE_ALONE if os.environ.get(name)]
    if not names:
        return ""
    return f"; the client does not read {', '.join(names)} of the environment: set RERANK_BASE_URL, RERANK_API_KEY"


def setting_path(key: str, name: str) -> Path:
    """The path that a setting names; a relative one starts at the kit's folder.

    Raises:
        ConfigError: it starts with ~ and a user that this machine does not have.
    """
    try:
        return KIT_DIR / Path(name).expanduser()
    except RuntimeError:
        user = name.split("/")[0]
        raise ConfigError(f"{key}={name!r}: {user} is no user's home here, write the whole path") from None


def _read_key(name: str) -> str:
    path = setting_path("API_KEY_FILE", name)
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"API_KEY_FILE={name!r} cannot be read: {exc}") from exc
    if not key:
        raise ConfigError(f"API_KEY_FILE={name!r} is empty: write the key into it")
    return key


def env_path(env_file: Path | str | None = None) -> Path:
    """The .env file: env_file, else KIT_ENV_FILE, else .env in the kit's folder."""
    return Path(env_file or os.environ.get("KIT_ENV_FILE") or KIT_DIR / ".env")


def warnings_of(env_file: Path | str | None = None) -> list[str]:
    """A warning for each setting that has no effect: an unknown key of .env, an edit of a file that is no .env."""
    out = [line for name in ("env_utils.py", "resources.py") for line in edits_of(name)]
    for key, value in load_env(env_file).items():
        if key == "PYTHON":  # read before .env is
            if os.environ.get(key) != value:
                out.append(
                    "PYTHON in .env has no effect, because that Python would read .env: set it in the environment"
                )
        elif key not in FIELDS and key not in CLIENTS_OWN and not PASSED_ON.search(key):
            near = get_close_matches(key, FIELDS, 1)
            out.append(f"{key} in .env is not a setting" + (f": did you mean {near[0]}?" if near else ""))
    return out


def permission_warnings(cfg: "EnvConfig", env_file: Path | str | None = None) -> list[str]:
    """A warning for each file that others can read although it holds a secret, or that others can write."""
    secrets = [key for key, field in FIELDS.items() if field.metadata["secret"]]
    named = re.compile("|".join(["KEY", "TOKEN", "PASSWORD", "SECRET", *secrets]))
    secret = any(named.search(key) for key in load_env(env_file) if key != "API_KEY_FILE")
    files = [(".env", env_path(env_file), secret)]
    for key in ("API_KEY_FILE", "SSL_KEYFILE"):
        if name := getattr(cfg, key.lower()):
            files.append((key, setting_path(key, name), True))
    out = []
    for name, path, holds_secret in files:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if mode & 0o002:
            out.append(f"{name}: everybody on this host can write {path}: chmod o-rwx {shlex.quote(str(path))}")
        elif mode & 0o004 and holds_secret:
            out.append(f"{name}: everybody on this host can read {path}: chmod o-rwx {shlex.quote(str(path))}")
    return out


def source_of(cfg: "EnvConfig", key: str, env_file: Path | str | None = None) -> str:
    """Where the value of a key came from: argument, environment, .env or default."""
    value = str(getattr(cfg, key.lower()))
    if os.environ.get(key) == value:
        return "environment"
    if load_env(env_file).get(key) == value:
        return ".env"
    return "default" if str(FIELDS[key].default) == value else "argument"


def check_host(cfg: "EnvConfig") -> None:
    """Raise ConfigError if HOST is a name that the shell exports for ends of its own, as tcsh and conda's compilers do."""
    if cfg.host == "localhost" or source_of(cfg, "HOST") != "environment":
        return
    try:
        ipaddress.ip_address(cfg.host)
    except ValueError:
        raise ConfigError(
            f"HOST={cfg.host!r} (environment) is not an address to listen on. Some shells and conda's compilers export "
            "HOST for ends of their own: unset HOST (env -u HOST sh start_rerank.sh ...), or export HOST=127.0.0.1"
        ) from None


def model_setting(name: str) -> str:
    """A setting that names a model: a relative folder starts at the kit's folder, like every path in a setting.

    Raises:
        ConfigError: only the caller's folder has it, so that another folder would get another model; or no file system
            takes such a name.
    """
    found = setting_path("MODEL_PATH", name)
    path = Path(name).expanduser()
    try:
        if found.is_dir():
            return str(found)
        elsewhere = not path.is_absolute() and path.is_dir()
    except OSError as exc:
        shown = name if len(name) < 100 else f"{name[:60]}... ({len(name)} characters)"
        raise ConfigError(
            f"MODEL_PATH={shown!r} cannot be looked up: {exc.strerror}; give the folder of the checkpoint or a hub id"
        ) from None
    if elsewhere:
        raise ConfigError(
            f"MODEL_PATH={name!r} starts at the kit's folder {KIT_DIR}, which has no such folder; "
            f"for the one in the current folder write MODEL_PATH={path.absolute()}"
        )
    return name


def edits_of(name: str) -> list[str]:
    """A warning for each setting that a file of the kit assigns: older versions were configured in their sources."""
    try:
        body = ast.parse((KIT_DIR / name).read_text("utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    assigned += [node.target for node in body if isinstance(node, ast.AnnAssign) and node.value is not None]
    keys = [OLD_NAMES.get(target.id, target.id) for target in assigned if isinstance(target, ast.Name)]
    return [f"{key} in {name} has no effect: write {key}=... into .env" for key in keys if key in FIELDS]


def warn_of_edits(module: str, names: Mapping[str, object]) -> None:
    """For a module whose users once edited it: print the warnings of edits_of() when its names hold a setting."""
    if names.keys() & {*FIELDS, *OLD_NAMES}:
        for line in edits_of(f"{module}.py"):
            print(f"[WARN] {line}", file=sys.stderr)


def not_installed(missing: ModuleNotFoundError, program: str, action: str) -> str:
    """The line of a program whose Python lacks a package, e.g. of bench_rerank.py, which is the action `bench`."""
    script, name = shlex.quote(str(KIT_DIR / "start_rerank.sh")), missing.name
    remedy = f'run "sh {script} {action}", which takes the Python that serves, or install it: pip install {name}'
    return f"[ERR] {program}: {sys.executable} has no package {name!r}: {remedy}"


def passed_on_env(env_file: Path | str | None = None) -> dict[str, str]:
    """Variables of other libraries (HF_*, VLLM_*, ...) that .env sets and the environment does not."""
    return {k: v for k, v in load_env(env_file).items() if PASSED_ON.search(k) and k not in {*os.environ, *FIELDS}}


def env_example() -> str:
    """Text of .env.example: every key with its default, commented out."""
    lines = ["# Copy to .env and uncomment what you change. Precedence: argument > environment > .env > default."]
    for group, fields in _groups().items():
        lines.append(f"\n# --- {group} ---")
        for key, field in fields:
            default = "" if field.default is None else field.default
            lines += [f"# {field.metadata['help']}", f"#{key}={default}"]
    return "\n".join(lines) + "\n"


def markdown_table() -> str:
    """The table of docs/settings.md."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for fields in _groups().values():
        for key, field in fields:
            default = "" if field.default in (None, "") else f"`{field.default}`"
            lines.append(f"| `{key}` | {default} | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def _groups() -> dict[str, list[tuple[str, dataclasses.Field[Any]]]]:
    out: dict[str, list[tuple[str, dataclasses.Field[Any]]]] = {}
    for key, field in FIELDS.items():
        out.setdefault(field.metadata["group"], []).append((key, field))
    return out


def _shell_values() -> str:
    """Lines that start_rerank.sh evaluates: `KEY='value'` without secrets, and `warn 'text'`."""
    cfg = get_config()
    check_host(cfg)
    lines = []
    for key, field in FIELDS.items():
        if not field.metadata["secret"]:
            value = getattr(cfg, field.name)
            lines.append(f"{key}={shlex.quote('' if value is None else str(value))}")
    lines.append(f"LOG_DIR={shlex.quote(str(cfg.log_path))}")
    lines.append(f"SERVICE_URL={shlex.quote(cfg.service_url)}")
    lines += [f"export {k}={shlex.quote(v)}" for k, v in passed_on_env().items()]
    lines += [f"warn {shlex.quote(text)}" for text in [*warnings_of(), *permission_warnings(cfg)]]
    return "\n".join(lines)


_cache: dict[str, EnvConfig] = {}
CFG: EnvConfig  # these four have a type here and a value by __getattr__
CLIENT: EnvConfig
MODEL_PATH: str
MODEL_PATH_TINY: str
if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that __getattr__ knows

    def __getattr__(name: str) -> EnvConfig | str:
        """CFG, CLIENT, MODEL_PATH and MODEL_PATH_TINY are read on first use, so an import reads no file."""
        if name not in ("CFG", "CLIENT", "MODEL_PATH", "MODEL_PATH_TINY"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "CLIENT":
            if name not in _cache:
                _cache[name] = client_config()
            return _cache[name]
        if "CFG" not in _cache:
            _cache["CFG"] = get_config()
        cfg = _cache["CFG"]
        if name == "CFG":
            return cfg
        if name == "MODEL_PATH_TINY":
            return cfg.model_path_tiny or cfg.model_path or "Qwen/Qwen3-Reranker-0.6B"
        if not cfg.model_path:
            raise ConfigError(
                "MODEL_PATH is not set: write MODEL_PATH=/folder/of/the/checkpoint (or a hub id) into .env"
            )
        return cfg.model_path


def main(argv: list[str]) -> int:
    """Print settings for start_rerank.sh and the documentation: shell | warnings | example | table | get KEY."""
    asked = argv[0] if argv else "table"
    try:
        if asked == "shell":
            print(_shell_values())
        elif asked == "warnings":
            print("\n".join(warnings_of()))
        elif asked == "example":
            print(env_example(), end="")
        elif asked == "table":
            print(markdown_table(), end="")
        elif asked == "get" and len(argv) == 2 and argv[1] in FIELDS:
            print(getattr(get_config(), argv[1].lower()))
        else:
            print(f"usage: env_utils.py shell | warnings | example | table | get KEY (not {argv})", file=sys.stderr)
            return 2
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
