"""Launches the supervisor of `start_rerank.sh start` from the process that has checked the settings.

A second start of Python would import everything and make the same plan again.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rerank_kit.processes import born, this_machine
from rerank_kit.serving.health import log_file, pid_file, state_file
from rerank_kit.settings import EnvConfig


def launch(cfg: EnvConfig, script: int, supervise: Callable[[], int]) -> int:
    """Run supervise() in a process and session of its own, with the log as its output.

    That process writes its own PID file before anything else, so none runs that `stop` cannot find.

    Args:
        script: PID of start_rerank.sh. Whoever killed it wants no service.

    Returns:
        0 after "PID START_TIME" on stdout, 1 after an error on stderr; in the new process what supervise() returns.
    """
    log = log_file(cfg)
    try:
        if log.exists() and cfg.log_keep:
            rotate(log, cfg.log_keep)
            log.rename(log.with_name(f"{log.name}.1"))
    except OSError as exc:
        return _refuse(f"{log} cannot be rotated: {exc.strerror}")
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    except OSError as exc:
        return _refuse(f"{log} cannot be written: {exc.strerror}")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal may be closed before the supervisor has its session
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(output)
        os.close(write_end)
        with open(read_end) as said:
            answer = said.read()
        if not answer.startswith(f"{pid} "):
            return _refuse(answer or "the supervisor was killed before it began")
        print(answer)
        return 0
    os.close(read_end)
    os.setsid()  # protects it from a closing terminal, and stop finds every process by the session
    fault = _register(cfg, script)
    with suppress(BrokenPipeError):  # the script was killed just now: the service can be stopped by its PID file
        os.write(write_end, (fault or f"{os.getpid()} {born(os.getpid())}").encode())
    if fault:
        os._exit(1)
    os.close(write_end)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, stream in enumerate((nothing, output, output)):
        os.dup2(stream, number)
    os.close(nothing)
    os.close(output)
    return supervise()


def _register(cfg: EnvConfig, script: int) -> str:
    """Write the PID file of this process. Returns why it must not go on; empty = it may."""
    if born(script) is None:
        return "the script was killed, so nothing is started"
    with suppress(OSError):
        state_file(cfg).unlink()
    path = pid_file(cfg)
    try:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(target, "w") as file:
            file.write(f"{os.getpid()} {born(os.getpid())} {this_machine()}\n")
    except OSError as exc:
        with suppress(OSError):
            path.unlink()
        return f"{path} cannot be written: {exc.strerror}"
    return ""


def _refuse(text: str) -> int:
    print(f"[ERR] {text}", file=sys.stderr)
    return 1


def rotate(log: Path, keep: int) -> None:
    """Rename log.1 to log.2 and so on, so that log.1 is free. At most `keep` old logs remain."""
    with suppress(FileNotFoundError):
        log.with_name(f"{log.name}.{keep}").unlink()
    for number in range(keep - 1, 0, -1):
        with suppress(FileNotFoundError):
            log.with_name(f"{log.name}.{number}").rename(log.with_name(f"{log.name}.{number + 1}"))
