"""Is the service of this configuration ready, loading or dead, and why? Asked by start_rerank.sh.

Standard library only, and one process for a whole wait: the machine is busy loading the model.
"""

import http.client
import json
import os
import re
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from env_utils import ConfigError, EnvConfig, get_config

READY, DIED, LOADING = 0, 1, 4  # exit codes

# What the log says while vLLM starts, in the order in which it happens.
PHASES = (
    (r"Starting to load model", "loading weights"),
    (r"Loading weights took|Model loading took", "weights loaded"),
    (r"Start compiling|Compiling a graph|Dynamo bytecode transform", "compiling"),
    (r"Capturing (CUDA|cuda) graphs?|Graph capturing", "capturing graphs"),
    (r"KV cache size: |# GPU blocks|Warming up model", "warming up"),
    (r"Starting vLLM (API )?server|Application startup complete", "opening the port"),
)

# First match in the log wins; the more specific stands first.
CAUSES = (
    (r"(?i)no space left on device", "no space left on a disk: free some, or move LOG_DIR or the caches"),
    (
        r"(?i)cuda out of memory|OutOfMemoryError|out of memory",
        "out of GPU memory: lower GPU_MEMORY_UTILIZATION or MAX_NUM_BATCHED_TOKENS, or free the GPU",
    ),
    (
        r"Free memory on device .* is less than desired",
        "the GPU is taken by another process (see nvidia-smi): free it, or lower GPU_MEMORY_UTILIZATION",
    ),
    (
        r"(?i)available memory on node .* less than|Cannot allocate memory|MemoryError",
        "not enough memory for the model and its KV cache: lower MAX_NUM_BATCHED_TOKENS or GPU_MEMORY_UTILIZATION",
    ),
    (
        r"(?i)no available memory for the cache blocks|larger than the (maximum number of tokens|available KV cache)",
        "no memory left for the KV cache: raise GPU_MEMORY_UTILIZATION or lower MAX_MODEL_LEN",
    ),
    (r"(?i)address already in use", "the port is in use: change PORT, or stop what uses it"),
    (r"unrecognized arguments?: .*", "vLLM does not know an argument: check EXTRA_ARGS"),
    (r"vllm( serve)?: error: .*", "vLLM refused its arguments"),
    (
        r"(?i)driver version is insufficient|no cuda-capable device|CUDA driver init.* failed|NVML.*(fail|error)",
        "the NVIDIA driver does not work or is too old for this vLLM: see nvidia-smi",
    ),
    (r"CUDA error: .*", "a CUDA error: see the log and dmesg (Xid)"),
    (
        r"(?i)SafetensorError|HeaderTooLarge|incomplete metadata|not a valid safetensors",
        "the checkpoint's weights are damaged: download them again",
    ),
    (
        r"(?i)cannot find any model weights|Model architectures .* (are not supported|failed)|not a valid model ident",
        "the folder holds no model that vLLM can serve: check MODEL_PATH",
    ),
    (r"ConfigError: .*", "the configuration cannot be used"),
    (r"(?m)^(?!.*initialization failed\. See root cause above).*\b\w*(?:Error|Exception): .+$", "an error in vLLM"),
)
QUIET = re.compile(r"^(\(\w[\w -]* pid=\d+\) )?(DEBUG|INFO|WARNING) ", re.MULTILINE)


def request(
    cfg: EnvConfig, method: str, path: str, body: dict | None = None, timeout_s: float = 5.0
) -> tuple[int, bytes]:
    """One HTTP call to the own service, past any proxy.

    Returns:
        (status, body).

    Raises:
        OSError or http.client.HTTPException: no answer.
    """
    url = urlsplit(cfg.service_url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"}
    if cfg.api_key:
        headers["Authorization"] = f"Bearer {cfg.api_key}"
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def probe(cfg: EnvConfig, timeout_s: float = 60.0) -> str | None:
    """Score one pair. None when the score is a finite number, else what is wrong."""
    body = {"model": cfg.served_model_name, "query": "ping", "documents": ["pong"]}
    try:
        status, data = request(cfg, "GET", "/health", timeout_s=5)
        if status != 200:
            return f"/health answers {status}"
        status, data = request(cfg, "POST", "/v1/rerank", body, timeout_s)
        if status != 200:
            return f"/v1/rerank answers {status}: {data[:300].decode('utf-8', 'replace')}"
        score = json.loads(data)["results"][0]["relevance_score"]
        if not isinstance(score, float) or score - score != 0:  # NaN and infinity
            return f"the probe's score is {score!r}, not a finite number"
    except (OSError, http.client.HTTPException) as exc:
        return f"no answer from {cfg.service_url} ({type(exc).__name__})"
    except (ValueError, LookupError, TypeError) as exc:
        return f"the probe's answer is not a rerank answer ({type(exc).__name__})"
    return None


def phase(log_text: str) -> str:
    """What the server is doing, from its log so far."""
    found = "importing vLLM"
    for pattern, name in PHASES:
        if re.search(pattern, log_text):
            found = name
    return found


def root_cause(log_text: str) -> str:
    """One line: why the server died, with the log's own words behind it."""
    # Warnings name errors that did not happen ("this can cause ... Too many open files").
    log_text = "\n".join(line for line in log_text.splitlines() if not QUIET.match(line))
    for pattern, meaning in CAUSES:
        match = re.search(pattern, log_text)
        if match:
            start = log_text.rfind("\n", 0, match.start()) + 1
            end = log_text.find("\n", match.end())
            line = log_text[start : end if end >= 0 else len(log_text)]
            line = re.sub(r"^\(\w+ pid=\d+\)\s*|^\w+ \d\d-\d\d [\d:]+ \[[^]]*\]\s*", "", line.strip())
            line = re.sub(r"^(ERROR|WARNING|INFO) [\d: -]+\[[^]]*\]\s*", "", line)
            return f"{meaning} [{line.strip()[:240]}]"
    return "the log names no error: the process was killed from outside, or by the kernel for its memory (see dmesg)"


def read_log(path: Path, limit: int = 4_000_000) -> str:
    """The last `limit` bytes of a log; empty if there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """The process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False


def wait(cfg: EnvConfig, pid: int, log: Path, timeout_s: float) -> int:
    """Wait until a scored probe answers, the process dies, or the time is over; progress on stderr.

    `log` may be /dev/null, for a server whose output goes elsewhere (journal, container).

    Returns:
        READY, DIED or LOADING.
    """
    begin = time.monotonic()
    shown, shown_at, last = "", -10.0, "no answer yet"
    while True:
        waited = time.monotonic() - begin
        if not is_alive(pid):
            cause = root_cause(read_log(log)) if log.is_file() else "its own output says why"
            print(f"[ERR] died after {waited:.0f} s: {cause}", file=sys.stderr)
            return DIED
        now = phase(read_log(log)) if log.is_file() else "loading"
        # A port that does not answer yet must not cost a scored probe.
        if now in ("opening the port", "warming up") or waited > 10:
            last = probe(cfg)
            if last is None:
                print(f"ready after {time.monotonic() - begin:.0f} s")
                return READY
        if now != shown or waited - shown_at >= 15:
            print(f"... {waited:4.0f} s  {now}", file=sys.stderr)
            shown, shown_at = now, waited
        if waited >= timeout_s:
            print(f"[WARN] still {now} after {waited:.0f} s ({last})", file=sys.stderr)
            return LOADING
        time.sleep(0.5)


def main(argv: list[str]) -> int:
    """`wait PID LOG`, `probe`, `why LOG`."""
    try:
        cfg = get_config()
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    if argv[:1] == ["wait"] and len(argv) == 3:
        return wait(cfg, int(argv[1]), Path(argv[2]), cfg.start_timeout_s)
    if argv == ["probe"]:
        wrong = probe(cfg, float(os.environ.get("PROBE_TIMEOUT_S", "30")))
        print(wrong or "ready")
        return DIED if wrong else READY
    if argv[:1] == ["why"] and len(argv) == 2:
        print(root_cause(read_log(Path(argv[1]))))
        return 0
    print("usage: service_health.py wait PID LOG | probe | why LOG", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
