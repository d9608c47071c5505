"""Reads the server's log: what the server is doing, and why it died, in one line."""

import re
from pathlib import Path

from rerank_kit.serving.peers import NO_HEAD

# Log lines of a starting vLLM, in the order of their appearance.
PHASES = (
    (r"in headless mode, with head node address", "waiting for the head"),
    (r"Starting to load model", "loading weights"),
    (r"Loading weights took|Model loading took", "weights loaded"),
    (r"Start compiling|Compiling a graph|Dynamo bytecode transform", "compiling"),
    (r"Capturing (CUDA|cuda) graphs?|Graph capturing", "capturing graphs"),
    (r"KV cache size: |# GPU blocks|Warming up model", "warming up"),
    (r"Starting vLLM (API )?server|Application startup complete", "opening the port"),
)

# The first pattern that matches is the cause, so the more specific ones come first.
CAUSES = (
    (r"(?i)no space left on device", "no space left on a disk: free some space, or move LOG_DIR or the caches"),
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
        r"(?i)driver version is insufficient|driver on your system is too old|no cuda-capable device|"
        r"CUDA driver init.* failed|NVML.*(fail|error)",
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
    (r"(?m)^\[ERR\] .*", "the supervisor could not start it"),
    (NO_HEAD, "the head (node 0) does not answer: start it, and check DP_ADDRESS, DP_RPC_PORT and the network"),
    (r"(?m)^(?!.*initialization failed\. See root cause above).*\b\w*(?:Error|Exception): .+$", "an error in vLLM"),
)
START_MARK = re.compile(r"^\[kit\] \S+ start ", re.MULTILINE)  # the supervisor writes it before each start
QUIET = re.compile(r"^(\(\w[\w -]* pid=\d+\) )?(DEBUG|INFO|WARNING) |^\[kit\] ", re.MULTILINE)


def phase(log_text: str) -> str:
    """What the server is doing, by its log so far."""
    found = "importing vLLM"
    for pattern, name in PHASES:
        if re.search(pattern, log_text):
            found = name
    return found


def root_cause(log_text: str) -> str:
    """One line: why the server died, followed by the log's own words in brackets."""
    # Warnings mention errors that did not happen ("this can cause ... Too many open files").
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
    return "the log names no error: somebody killed the process, or the kernel did for lack of memory (see dmesg)"


def read_log(path: Path, limit: int = 4_000_000) -> str:
    """The log since the last start, at most its last `limit` bytes; empty if there is no log yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    marks = list(START_MARK.finditer(text))
    return text[marks[-1].start() :] if marks else text
