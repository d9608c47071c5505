"""Finds out whether the configured service is ready, loading or dead, and why. start_rerank.sh and the supervisor ask.

Standard library only, and one process for a whole wait, because the machine is busy loading the model. status.py
reports the complete state.
"""

import http.client
import json
import os
import random
import re
import secrets
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from rerank_kit.engine.nodes import describe_node, is_headless
from rerank_kit.processes import is_alive
from rerank_kit.serving.log_causes import phase, read_log, root_cause
from rerank_kit.settings import ConfigError, EnvConfig, get_config

READY, DIED, LOADING = 0, 1, 4  # exit codes
WARMING = "warming up"  # the supervisor's state between the first score and ready
BUSY = "busy: it scores, and refuses further calls for now (429)"

WRONG_SCORES = "the scores cannot be right"  # how the guard begins the fault of its own check (GUARD_CHECK)
API_HANGS = "an API process hangs"  # how the guard begins what one API process says of another

# At most, of a list of jina-reranker-v3: its prompt and query, what surrounds a document, a word of warm_up().
PROMPT_TOKENS, DOCUMENT_TOKENS, WORD_TOKENS = 512, 32, 3
PROBE_PAIRS = 4  # pairs that the supervisor scores on each of several engines, every 10 s


def request(
    cfg: EnvConfig, method: str, path: str, body: dict | None = None, timeout_s: float = 5.0
) -> tuple[int, bytes]:
    """One HTTP call to this configuration's service, without a proxy.

    Returns:
        (status, body).

    Raises:
        OSError or http.client.HTTPException: no answer.
    """
    url = urlsplit(cfg.service_url)
    host = url.hostname or ""
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        # The certificate has the name that clients use, and this call goes to a local address.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(host, url.port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(host, url.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"}
    if cfg.api_key:
        headers["Authorization"] = f"Bearer {cfg.api_key}"
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def probe(cfg: EnvConfig, timeout_s: float = 60.0, n_docs: int = 1) -> str | None:
    """Score n_docs pairs. Returns None if the score is finite, BUSY after a 429, else the fault."""
    body = {"model": cfg.served_model_name, "query": "ping", "documents": ["pong"] * n_docs}
    if cfg.guard and (cfg.result_cache_mib or cfg.result_cache_url):
        # A part of the cache's key: a score that it keeps would say nothing of the engine.
        body["cache_salt"] = secrets.token_hex(8)
    try:
        status, data = request(cfg, "GET", "/health", timeout_s=min(5.0, timeout_s))
        if status != 200:
            return f"/health answers {status}"
        status, data = request(cfg, "POST", "/v1/rerank", body, timeout_s)
        if status == 429:
            return BUSY
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


def not_ready(cfg: EnvConfig, timeout_s: float = 5.0) -> str:
    """Why the guard's /ready is 503, as after first scores that are wrong; empty = it is ready, or GUARD=0."""
    if not cfg.guard:
        return ""
    try:
        status, data = request(cfg, "GET", "/ready", timeout_s=timeout_s)
        return str(json.loads(data)["error"]["message"]) if status == 503 else ""
    except (OSError, http.client.HTTPException) as exc:
        return f"no answer from {cfg.service_url} ({type(exc).__name__})"
    except (ValueError, LookupError, TypeError):
        return "/ready answers 503"


def warm_up(
    cfg: EnvConfig, n_calls: int = 32, n_docs: int = 64, timeout_s: float = 120.0, *, list_tokens: int | None = None
) -> int:
    """Score a burst of made-up documents, so that no user's call waits for kernels that are compiled on first use.

    On an H100 the first burst after a start took up to 10 s because of that, and the guard then refused calls.

    Args:
        list_tokens: of a listwise model, the tokens that a whole call may have; None = any number.

    Returns:
        Number of calls that were answered with scores.
    """
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ca", "do", "en", "mi", "pro") for b in ("pital", "main", "gine", "nute", "cess")]

    def one(number: int) -> bool:
        documents = [" ".join(rng.choices(words, k=8 << rng.randrange(6))) for _ in range(n_docs)]
        if list_tokens is not None:
            documents = _fitting(documents, list_tokens)
        body = {"model": cfg.served_model_name, "query": f"{number} {words[number % 25]}", "documents": documents}
        try:
            return request(cfg, "POST", "/v1/rerank", body, timeout_s)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    with ThreadPoolExecutor(n_calls) as pool:
        return sum(pool.map(one, range(n_calls)))


def _fitting(documents: list[str], list_tokens: int) -> list[str]:
    """Those of warm_up()'s documents that surely fit into one list beside its prompt; one short one always."""
    left, out = list_tokens - PROMPT_TOKENS, []
    for document in documents:
        n_tokens = WORD_TOKENS * len(document.split()) + DOCUMENT_TOKENS
        if n_tokens <= left:
            out.append(document)
            left -= n_tokens
    return out or [documents[0].split()[0]]


def healthy(cfg: EnvConfig) -> int:
    """Print the answer of /ready (GUARD=0: /health) and return 0 if it is 200, else 1.

    A container's health check must not score: a busy service would refuse it.
    """
    path = "/ready" if cfg.guard else "/health"
    try:
        status, data = request(cfg, "GET", path)
        said = f"{status} {data[:500].decode('utf-8', 'replace')}".strip()
    except (OSError, http.client.HTTPException) as exc:
        status, said = 0, f"no answer from {cfg.service_url} ({type(exc).__name__})"
    print("healthy" if status == 200 else f"{path}: {said}")
    return 0 if status == 200 else 1


def listens(cfg: EnvConfig) -> bool:
    """Whether something accepts connections on the service's port."""
    url = urlsplit(cfg.service_url)
    try:
        with socket.create_connection((url.hostname, url.port), timeout=2):
            return True
    except OSError:
        return False


def samples(cfg: EnvConfig) -> list[tuple[str, str, float]]:
    """The server's metrics: (name, text of the labels, value); empty without an answer."""
    try:
        status, data = request(cfg, "GET", "/metrics")
    except (OSError, http.client.HTTPException):
        return []
    lines = data.decode("utf-8", "replace").splitlines() if status == 200 else ()
    found = (re.fullmatch(r"([a-z_:]+)(?:\{(.*)\})? (\S+)", line) for line in lines)
    return [(match[1], match[2] or "", float(match[3])) for match in found if match]


def metrics(cfg: EnvConfig) -> dict[str, float]:
    """Sums of the server's metrics over their labels, by name; empty without an answer."""
    out: dict[str, float] = {}
    for name, _, value in samples(cfg):
        out[name] = out.get(name, 0.0) + value
    return out


def progress(cfg: EnvConfig) -> dict[str, tuple[float, bool]]:
    """{engine: (a counter that grows while it scores, whether it holds pairs)}; empty if the server has no metrics.

    The engines are those of vLLM's metrics. Without these (--disable-log-stats) there is one entry "" with the guard's
    count of answered pairs.
    """
    steps: dict[str, float] = {}
    held: dict[str, float] = {}
    pairs: float | None = None
    for name, labels, value in samples(cfg):
        if name == "rerank_guard_pairs_total":
            pairs = (pairs or 0.0) + value
        elif engine := re.search(r'engine="(\d+)"', labels):
            if name == "vllm:prompt_tokens_total":
                steps[engine[1]] = steps.get(engine[1], 0.0) + value
            elif name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
                held[engine[1]] = held.get(engine[1], 0.0) + value
    if not steps:
        return {} if pairs is None else {"": (pairs, False)}
    return {engine: (count, held.get(engine, 0.0) > 0) for engine, count in steps.items()}


def pid_file(cfg: EnvConfig) -> Path:
    """The file with PID, start time and this_machine() of the supervisor, which leads the service's session."""
    return cfg.log_path / f"rerank-{cfg.port}.pid"


def state_file(cfg: EnvConfig) -> Path:
    """The file with the supervisor's State as JSON."""
    return cfg.log_path / f"rerank-{cfg.port}.state"


def log_file(cfg: EnvConfig) -> Path:
    """The file with the output of the server and its supervisor."""
    return cfg.log_path / f"rerank-{cfg.port}.log"


def supervised_state(cfg: EnvConfig, pid: int) -> str | None:
    """The state that the supervisor `pid` wrote; None if it writes none (start_rerank.sh run)."""
    try:
        known = json.loads(state_file(cfg).read_text("utf-8"))
        return known["state"] if known["pid"] == pid else None
    except (OSError, ValueError, LookupError):
        return None


def _leader_pid(cfg: EnvConfig) -> int | None:
    """The supervisor's PID by the PID file; None without one."""
    try:
        return int(pid_file(cfg).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _why_it_failed(cfg: EnvConfig, pid: int) -> str:
    """The cause that the supervisor `pid` wrote when it gave up; empty if it wrote none."""
    try:
        known = json.loads(state_file(cfg).read_text("utf-8"))
        # "stays down: ..." says why there is no second attempt; here it is the first.
        return known["why"].partition("; stays down: ")[0] if (known["pid"], known["state"]) == (pid, "failed") else ""
    except (OSError, ValueError, LookupError):
        return ""


def _times_file(cfg: EnvConfig) -> Path:
    return cfg.log_path / f"rerank-{cfg.port}.times"


def _usual(cfg: EnvConfig) -> dict[str, str]:
    """How long each phase of a start takes: as the last one here took, else what is known of the longest one."""
    known = {"importing vLLM": "usually 20 to 80 s"}
    try:
        took = json.loads(_times_file(cfg).read_text("utf-8"))
        return known | {name: f"last time {float(seconds):.0f} s" for name, seconds in took.items() if seconds >= 5}
    except (OSError, ValueError, TypeError, AttributeError):
        return known


def _keep_times(cfg: EnvConfig, spent: dict[str, float]) -> None:
    with suppress(OSError):  # a full disk: the next start knows less
        _times_file(cfg).touch(0o600)
        _times_file(cfg).write_text(json.dumps({name: round(seconds, 1) for name, seconds in spent.items()}), "utf-8")


def _say(text: str, stream: str = "stderr") -> None:
    """Print a line. A terminal or reader that is gone must not look like a start that failed: that ends the service."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except OSError:  # from now on nowhere, what Python writes at its end too
        setattr(sys, stream, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def wait(cfg: EnvConfig, pid: int, log: Path, timeout_s: float) -> int:
    """Wait until a probe is scored, the process dies, or timeout_s is over; progress goes to stderr.

    `log` may be /dev/null if the output of the server goes elsewhere (journal, container).

    Returns:
        READY, DIED or LOADING.
    """
    begin = looked = time.monotonic()
    shown, shown_at, answered = "", -10.0, 0.0
    last: str | None = "no answer yet"
    spent: dict[str, float] = {}  # seconds by phase
    usual = _usual(cfg) if log.is_file() else {}
    while True:
        waited = time.monotonic() - begin
        if not is_alive(pid):
            if log.is_file() and _leader_pid(cfg) != pid:  # a supervisor removes its PID file only after a stop
                _say(f"[ERR] stopped by another command after {waited:.0f} s")
                return DIED
            cause = _why_it_failed(cfg, pid)
            cause = cause or (root_cause(read_log(log)) if log.is_file() else "see the server's own output")
            _say(f"[ERR] died after {waited:.0f} s: {cause}")
            return DIED
        now = phase(read_log(log)) if log.is_file() else "loading"
        if is_headless(cfg) and not log.is_file():
            _say(f"{describe_node(cfg)} is started; its own output shows when it has registered at the head", "stdout")
            return READY
        if is_headless(cfg) and supervised_state(cfg, pid) == "ready":
            _say(f"ready after {waited:.0f} s: {describe_node(cfg)} is registered at the head", "stdout")
            return READY
        open_now = not is_headless(cfg) and listens(cfg)
        now = "first scores" if open_now else now
        now = WARMING if open_now and supervised_state(cfg, pid) == WARMING else now
        since, looked = looked, time.monotonic()
        spent[now] = spent.get(now, 0.0) + looked - since
        if open_now:  # a loading server must not be asked for scores
            last = probe(cfg)
            if last in (None, BUSY) and (unready := not_ready(cfg)):
                last = unready
                if WRONG_SCORES in last and supervised_state(cfg, pid) is None:  # `run`: nobody else ends the wait
                    _say(f"[ERR] it answers after {waited:.0f} s, but {last}")
                    return DIED
            answered = answered or (time.monotonic() if last in (None, BUSY) else 0.0)
            # The supervisor must have seen the score too, because it takes an earlier death for a failed start. If it
            # cannot write its state (full disk), this waits 5 s for it.
            state = supervised_state(cfg, pid)
            seen = state in ("ready", None) or (state != WARMING and time.monotonic() - answered > 5)
            if last in (None, BUSY) and seen:
                spent[now] += time.monotonic() - looked
                parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in spent.items() if seconds >= 0.5)
                _say(f"ready after {time.monotonic() - begin:.0f} s" + (f" ({parts})" if parts else ""), "stdout")
                if log.is_file() and "importing vLLM" in spent:  # a whole start, not a second wait
                    _keep_times(cfg, spent)
                return READY
        if now != shown or waited - shown_at >= 15:
            hint = f" ({usual[now]})" if now in usual and now != shown else ""
            _say(f"... {waited:4.0f} s  {now}{hint}")
            shown, shown_at = now, waited
        if waited >= timeout_s:
            _say(f"[WARN] still {now} after {waited:.0f} s ({last})")
            return LOADING
        # What is over soon is seen soon. Later a look at the log and a score must not cost the loading server much.
        time.sleep(min(0.5, 0.1 + waited / 20))


def main(argv: list[str]) -> int:
    """`wait PID LOG` waits until the process PID scores, and shows progress from the log. `healthy` asks /ready."""
    try:
        cfg = get_config()
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    if argv[:1] == ["wait"] and len(argv) == 3:
        return wait(cfg, int(argv[1]), Path(argv[2]), cfg.start_timeout_s)
    if argv == ["healthy"]:
        return healthy(cfg)
    print("usage: python -m rerank_kit.serving.health wait PID LOG | healthy", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
