"""The state of the configured service, in one line or as JSON: `sh start_rerank.sh status [--json]`.

Exit codes are LSB's: 0 ready, 1 dead with a PID file, 3 not running, 4 unknown (another host or user), 150 alive but
not ready.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from rerank_kit.engine.nodes import is_headless
from rerank_kit.processes import born, session_pids, this_machine
from rerank_kit.serving.health import BUSY, WARMING, log_file, metrics, not_ready, pid_file, probe, state_file
from rerank_kit.serving.log_causes import phase, read_log, root_cause
from rerank_kit.settings import ConfigError, EnvConfig, get_config

READY, DEAD, NOT_RUNNING, UNKNOWN, LOADING = 0, 1, 3, 4, 150


def gather(cfg: EnvConfig, probe_timeout_s: float = 30.0) -> dict:
    """Collect everything that is known about the service.

    Returns:
        state: ready, busy (ready, but refusing calls for now), loading, not answering, restarting, stopping, dead, not
        running or unknown (of another host or user); exit_code; pid (of the supervisor) and server_pid; why: the fault,
        or the cause of the last death; supervised: whether a supervisor restarts it; times in seconds, memory in MiB;
        requests as vLLM counts them, one for each pair. A value that does not apply is None.
    """
    known = known_state(cfg)
    try:
        pid, alive, elsewhere = _leader(cfg)
    except PermissionError as exc:
        pid, alive, elsewhere = None, False, f"{exc.filename} belongs to another user: ask as that user"
    unattended = not alive and _same(known.get("server_pid"), known.get("server_born"))
    left = session_pids(pid) if pid and (alive or unattended) else []
    out = {
        "state": "not running",
        "exit_code": NOT_RUNNING,
        "pid": pid if alive else None,
        "server_pid": known.get("server_pid") or None,
        "supervised": alive,
        "url": None if is_headless(cfg) else cfg.service_url,
        "node": known.get("node") or None,
        "served_model_name": cfg.served_model_name,
        "model": known.get("model"),
        "profile": known.get("profile"),
        "version": known.get("version"),
        "vllm": known.get("vllm"),
        "restarts": known.get("restarts", 0),
        "why": known.get("why") or None,
        "died_at": _stamp(known.get("died")),
        "uptime_s": None,
        "memory_mib": _memory_mib(left),
        "gpu_memory_mib": _gpu_memory_mib(left),
        "requests_running": None,
        "requests_waiting": None,
    }
    if elsewhere:
        return out | {"state": "unknown", "exit_code": UNKNOWN, "why": elsewhere}
    if not pid:
        return out
    if not alive and not unattended:
        why = known.get("why") if known.get("state") == "failed" else None
        why = why or root_cause(read_log(log_file(cfg)))
        return out | {"state": "dead", "exit_code": DEAD, "server_pid": None, "why": why}
    out["exit_code"] = LOADING
    if alive and known.get("state") == "stopping":
        return out | {"state": "stopping"}
    if alive and known.get("state") == WARMING:
        return out | {"state": "loading", "why": WARMING}
    if alive and known.get("state") == "backoff":
        return out | {"state": "restarting", "why": f"{known['why']} (next start {_stamp(known['next_start'])})"}
    if is_headless(cfg):  # no HTTP to ask
        if known.get("state") != "ready":
            return out | {"state": "loading", "why": phase(read_log(log_file(cfg)))}
        out["uptime_s"] = round(time.time() - known["ready_since"])
        return out | {"state": "ready", "exit_code": READY}
    wrong = probe(cfg, probe_timeout_s)
    unready = not_ready(cfg) if wrong in (None, BUSY) else ""
    wrong = unready or wrong
    if wrong and not known.get("ready_since"):
        return out | {"state": "loading", "why": unready or phase(read_log(log_file(cfg)))}
    out["uptime_s"] = round(time.time() - (known.get("ready_since") or time.time()))
    counted = metrics(cfg)
    for name in ("requests_running", "requests_waiting"):
        value = counted.get(f"vllm:num_{name}")
        out[name] = None if value is None else int(value)
    if wrong == BUSY:
        return out | {"state": "busy", "exit_code": READY}
    if wrong:
        return out | {"state": "not answering", "why": wrong}
    return out | {"state": "ready", "exit_code": READY}


def known_state(cfg: EnvConfig) -> dict:
    """What the supervisor wrote last; empty without such a file."""
    try:
        return json.loads(state_file(cfg).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _leader(cfg: EnvConfig) -> tuple[int | None, bool, str]:
    """(PID in the PID file or None, whether that process lives, why this machine cannot know).

    Raises:
        PermissionError: the file belongs to another user.
    """
    try:
        first, second, *where = pid_file(cfg).read_text().split()
        pid, since = int(first), int(second)
    except PermissionError:
        raise
    except (OSError, ValueError):
        return None, False, ""
    host = where[0].split(":")[0] if where else ""
    if host and host != os.uname().nodename:
        return None, False, f"it was started on host {host}, which shares this LOG_DIR: ask there"
    return pid, born(pid) == since and (not where or where[0] == this_machine()), ""


def memory_of_service(cfg: EnvConfig) -> int:
    """Bytes that the running service has for itself, which its end sets free; 0 where none runs."""
    known = known_state(cfg)
    try:
        pid, alive, _ = _leader(cfg)
    except PermissionError:
        return 0
    # A server whose supervisor was killed runs on in the session.
    alive = alive or _same(known.get("server_pid"), known.get("server_born"))
    return 2**20 * (_memory_mib(session_pids(pid)) or 0) if pid and alive else 0


def _same(pid: int | None, since: int | None) -> bool:
    return bool(pid and since and born(pid) == since)


def _memory_mib(pids: list[int]) -> int | None:
    """Private memory of the processes (RssAnon)."""
    kib = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    kib += int(line.split()[1])
    return kib // 1024 if pids else None


def _gpu_memory_mib(pids: list[int]) -> int | None:
    """GPU memory of the processes by nvidia-smi; None without a GPU, or in containers, where it hides PIDs."""
    if not pids:
        return None
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        apps = [[int(cell) for cell in line.split(",")] for line in lines]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    own = [mib for pid, mib in apps if pid in pids]
    return sum(own) if own else None


def _stamp(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds") if seconds else None


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def one_line(now: dict) -> str:
    """The state as one line for an operator."""
    if now["exit_code"] == NOT_RUNNING:
        return "not running"
    if now["exit_code"] == UNKNOWN:
        return f"unknown: {now['why']}"
    parts = [f"{'ready' if now['state'] == 'ready' else BUSY}: {now['url'] or 'registered at the head'}"]
    if now["exit_code"]:
        parts = [f"{now['state']}: {now['why']}" if now["why"] else now["state"]]
    if now["state"] == "dead":
        if now["died_at"]:
            parts.append(f"died {now['died_at']}")
    else:
        parts += [now["node"]] if now["node"] else []
        about = [now["model"], now["profile"] and f"profile {now['profile']}"]
        about += [now["version"] and f"version {now['version']}"]
        model = ", ".join(filter(None, about))
        parts += [f"PID {now['pid'] or now['server_pid']}"]
        parts += [f"model name {now['served_model_name']}" + (f" ({model})" if model else "")]
        if now["uptime_s"] is not None:
            parts.append(f"up {_duration(now['uptime_s'])}")
        if now["requests_running"] is not None:
            parts.append(f"{now['requests_running']} running, {now['requests_waiting']} waiting")
        memory = ("GPU memory", now["gpu_memory_mib"]) if now["gpu_memory_mib"] else ("memory", now["memory_mib"])
        if memory[1]:
            parts.append(f"{memory[0]} {memory[1] / 1024:.1f} GiB")
        if now["vllm"]:
            parts.append(f"vLLM {now['vllm']}")
    if now["restarts"]:
        parts.append(f"{now['restarts']} restarts" if now["restarts"] > 1 else "1 restart")
        if not now["exit_code"]:
            parts.append(f"last death {now['died_at']}: {now['why']}")
    if now["state"] not in ("dead", "stopping") and not now["supervised"]:
        parts.append("its supervisor was killed: nothing restarts it, so restart it yourself")
    return ", ".join(parts)


def main(argv: list[str]) -> int:
    """Print the state (`[--json]`), or the PID of a server that runs without its supervisor (`server-pid`)."""
    if argv not in ([], ["--json"], ["server-pid"]):
        print("usage: python -m rerank_kit.serving.status [--json] | server-pid", file=sys.stderr)
        return 2
    try:
        cfg = get_config()
        if argv == ["server-pid"]:
            known = known_state(cfg)
            alone = _same(known.get("server_pid"), known.get("server_born"))
            print(known["server_pid"] if alone else "")
            return 0 if alone else 1
        now = gather(cfg, float(os.environ.get("PROBE_TIMEOUT_S", "30")))
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    print(json.dumps(now, indent=1) if argv else one_line(now))
    return now["exit_code"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
