"""Keeps one service running: starts it, restarts it after a crash or a hang, rotates its log, stops it.

A service is one `vllm serve`. With ENGINES_PER_GPU above 1 it is several, which start and die together.

`sh start_rerank.sh start` runs the supervisor in a session of its own, and all processes of the server are in that
session. The supervisor logs what it does, and writes its state to LOG_DIR/rerank-PORT.state (JSON), which status reads.
With RESTART=no a dead server stays down. Standard library only: the supervisor must survive any fault of the server.
"""

import ctypes
import json
import os
import re
import select
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from rerank_kit.engine.nodes import describe_node, has_other_nodes, is_headless
from rerank_kit.engine.plan import Plan, plan_service
from rerank_kit.processes import born, end_with_parent, is_alive, session_pids
from rerank_kit.serving.command import (
    make_joined,
    refused,
    server_commands,
    server_env,
    shown_args,
    shown_env,
    startable_plan,
)
from rerank_kit.serving.compare import key_mark, supervised_settings
from rerank_kit.serving.health import WARMING, log_file, pid_file, state_file
from rerank_kit.serving.launch import launch, rotate
from rerank_kit.serving.log_causes import read_log, root_cause
from rerank_kit.serving.network import hold_port
from rerank_kit.serving.peers import HEAD_LOST, NO_HEAD, Peers
from rerank_kit.serving.watch import Watch
from rerank_kit.settings import ConfigError, EnvConfig, get_config

TICK_S = 0.2
LONGEST_BACKOFF_S = 60.0
END_OF_ENGINE_S = 10  # beyond STOP_DELAY_S and STOP_TIMEOUT_S, for the engine's own end
END_OF_LOADING_S = 3
ROOM_FOR_LOG = 2**20
NO_OUTPUT = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, 1, 2)]
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass
class State:
    """The content of the state file; times are seconds since the epoch."""

    state: str  # starting | warming up | ready | backoff | stopping | failed
    pid: int  # PID of the supervisor
    server_pid: int = 0
    server_born: int = 0
    began: float = field(default_factory=time.time)  # start of the supervisor
    server_began: float = 0.0
    ready_since: float = 0.0
    restarts: int = 0
    next_start: float = 0.0
    why: str = ""  # cause of the last death, in one line
    died: float = 0.0
    vllm: str = ""
    model: str = ""  # folder of the checkpoint
    profile: str = ""
    version: str = ""  # X-Rerank-Version
    url: str = ""
    node: str = ""  # which node this is, if there are several hosts
    command: list[str] = field(default_factory=list)  # the command of the server, without secrets
    env: dict[str, str] = field(default_factory=dict)
    source: str = ""  # MODEL_PATH as it was set
    settings: dict[str, str] = field(default_factory=dict)  # those that the supervisor itself follows
    key: str = ""  # key_mark() of API_KEY
    cache_url: str = ""  # key_mark() of RESULT_CACHE_URL


class Supervisor:
    """The loop around one service. Only Watch and Peers run in other threads."""

    def __init__(self, plan: Plan, foreground: bool = False):
        self.cfg, self.log, self.foreground = plan.cfg, log_file(plan.cfg), foreground
        self.plan = plan
        url, version = plan.cfg.service_url, plan.machine.vllm_version
        self.state = State("starting", os.getpid(), vllm=version, model=str(plan.checkpoint.path), url=url)
        self.state.profile, self.state.version = plan.profile.name, plan.env.get("GUARD_VERSION", "")
        if has_other_nodes(plan.cfg):
            self.state.node = describe_node(plan.cfg)
        self.state.command, self.state.env = shown_args(plan), shown_env(server_env(plan))
        self.state.source, self.state.settings = plan.cfg.model_path or "", supervised_settings(plan.cfg)
        self.state.key = key_mark(plan.cfg.api_key)
        self.state.cache_url = key_mark(plan.cfg.result_cache_url)
        self.header = f"vLLM {version}: {shlex.join(['vllm', *shown_args(plan)])}"
        self.header += f" and {plan.engines - 1} more for its engines" if plan.engines > 1 else ""
        self.header += "".join(f" {k}={shlex.quote(v)}" for k, v in sorted(plan.env.items()))
        # On a CPU no kernels are compiled on first use, and the burst would take many seconds.
        self.warm = not plan.machine.is_cpu
        self.asked_to_stop = False
        self.crashes: list[float] = []  # monotonic times, within RESTART_WINDOW_S
        self.servers: list[int] = []  # the first is the service, the others are engines beside it
        # The disk was full: the state file does not say what is, the server's output goes nowhere.
        self.unsaved = self.unlogged = False
        self.silent = False  # the output of this server goes nowhere
        self.umask = os.umask(0o077)  # only the owner may read log, state and old logs

    def run(self) -> int:
        """Run until stopped (returns 0) or until the service stays down (returns 1)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # rings the bell
        adopt_orphans()
        with Bell() as self.bell:
            return self._keep_running()

    def _keep_running(self) -> int:
        while True:
            try:
                self._start()
                why = self._watch_until_death()
            except (OSError, ConfigError, RuntimeError) as exc:
                # No memory for a process or a thread, a host name that is not resolved, a full disk: a failed attempt.
                why = f"it could not be started: {describe_error(exc)}"
            if why is not None:  # also when a stop came while it died: nothing may be left behind
                kill_rest()
            if why is None or self.asked_to_stop:
                return self._end()
            was_ready = self.state.ready_since > 0
            self._note(f"died: {why}")
            now = time.monotonic()
            self.crashes = [t for t in self.crashes if now - t < self.cfg.restart_window_s] + [now]
            give_up = self._verdict(was_ready, why)
            why = f"{why}; {give_up}" if give_up else why
            self._save(
                server_pid=0, ready_since=0.0, why=why, died=time.time(), state="failed" if give_up else "backoff"
            )
            if give_up:
                self._note(give_up)
                return 1
            if not self._back_off():
                return self._end()

    def _end(self) -> int:
        """Remove state and PID file after a stop, so that status does not report a death."""
        self._note("stopped")
        with suppress(OSError, ValueError, LookupError):  # another supervisor's files stay
            if json.loads(state_file(self.cfg).read_text())["pid"] == os.getpid():
                state_file(self.cfg).unlink()
        with suppress(OSError, IndexError):
            if pid_file(self.cfg).read_text().split()[0] == str(os.getpid()):
                pid_file(self.cfg).unlink()
        return 0

    def _verdict(self, was_ready: bool, why: str) -> str:
        """Why the server is not started again; empty = it is."""
        if self.cfg.restart == "no":
            return "stays down: RESTART=no"
        if is_headless(self.cfg) and re.search(f"{HEAD_LOST}|{NO_HEAD}", why):
            return ""  # without limit: the head may be down for long
        if not was_ready and not self.state.restarts:
            return "stays down: it was never ready, and a restart would fail for the same reason"
        if len(self.crashes) > self.cfg.restart_max:
            limit = f"RESTART_MAX={self.cfg.restart_max} restarts in RESTART_WINDOW_S={self.cfg.restart_window_s} s"
            return f"stays down: {limit} were not enough"
        return ""

    def _back_off(self) -> bool:
        """Wait before the next start; False if a stop was requested meanwhile."""
        wait_s = min(LONGEST_BACKOFF_S, 2.0 ** min(10, len(self.crashes) - 1))
        end = time.monotonic() + wait_s
        self._save(restarts=self.state.restarts + 1, next_start=time.time() + wait_s)
        self._note(f"restart {self.state.restarts} in {wait_s:.0f} s")
        while time.monotonic() < end and not self.asked_to_stop:
            self.bell.wait(TICK_S)
        return not self.asked_to_stop

    def _start(self) -> None:
        self.unlogged = self.silent = not self._has_room()
        _ended.clear()  # PIDs are reused
        unignore = [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE]
        self.servers = []
        commands, env = server_commands(self.plan)
        env = {**env, "GUARD_RESTARTS": str(self.state.restarts)}  # for /metrics
        os.umask(self.umask)  # other users may share the caches that the server fills
        try:
            for argv in commands:  # all, or none: what is spawned before a failure is killed with the rest
                actions = NO_OUTPUT if self.silent else []
                self.servers.append(os.posix_spawn(argv[0], argv, env, setsigdef=unignore, file_actions=actions))
        finally:
            os.umask(0o077)
        now = time.time()
        self._save(
            state="starting",
            server_pid=self.servers[0],
            server_born=born(self.servers[0]) or 0,
            server_began=now,
            ready_since=0.0,
        )

    def _has_room(self) -> bool:
        """Whether there is room for the server's output: a worker of vLLM that cannot write its first lines ends."""
        return (self.foreground or self._disk_has_room()) and self._note(f"start {self.header}")

    def _disk_has_room(self) -> bool:
        with suppress(OSError):  # LOG_DIR may be gone
            return shutil.disk_usage(self.log.parent).free >= ROOM_FOR_LOG
        return False

    def _watch_until_death(self) -> str | None:
        """Why the server died, or None after a requested stop."""
        peers: Peers | None = None
        watch: Peers | Watch | None = None
        next_rotation = 0.0
        try:
            peers = Peers(self.cfg, rest_of_session) if has_other_nodes(self.cfg) else None
            watch = (
                peers
                if peers and is_headless(self.cfg)
                else Watch(self.cfg, self.warm, self.plan.copies, self.bell.ring, list_tokens=self._list_tokens())
            )
            while True:
                ended = [(number, reap(pid)) for number, pid in enumerate(self.servers)]
                if self.asked_to_stop:
                    self._stop_server()
                    return None
                for number, status in ended:
                    if status is not None:  # vLLM's API process does not notice that an engine of another group died
                        who = f"engine process {number + 1} of {len(ended)}: " if number else ""
                        if self.silent:
                            return f"{who}{describe_end(status)}: its output was dropped, because the disk was full"
                        seen = "see the server's own output" if self.foreground else root_cause(read_log(self.log))
                        return f"{who}{describe_end(status)}: {seen}"
                if watch.warming and self.state.state == "starting":
                    self._save(state=WARMING)
                if watch.ready and not self.state.ready_since:
                    if peers and peers is not watch:
                        peers.watch()
                    self._save(state="ready", ready_since=time.time())
                    self._note(f"ready after {time.time() - self.state.server_began:.0f} s")
                if isinstance(watch, Watch) and watch.fault:
                    kill_rest()
                    return f"{watch.fault} (STARTUP_CHECK=0 serves them), killed"
                if hung := (peers and peers.lost()) or self._hangs(watch):
                    kill_rest()
                    return hung
                if not self.foreground and time.monotonic() >= next_rotation:
                    next_rotation = time.monotonic() + 1
                    rotate_if_large(self.log, self.cfg.log_max_mib * 2**20, self.cfg.log_keep)
                    if self.unsaved:
                        self._save()
                    if self.unlogged and self._disk_has_room():
                        self.unlogged = not self._note("the disk was full: no output of this server until a restart")
                self.bell.wait(TICK_S)
        finally:
            for thread in (watch, peers):
                if thread:
                    thread.stopped.set()

    def _list_tokens(self) -> int | None:
        return self.plan.engine["max_model_len"] if self.plan.profile.listwise else None

    def _hangs(self, watch: Watch | Peers) -> str:
        """Why this live server counts as dead; empty = it does not."""
        if hung := watch.hangs():
            return f"{hung} for HEALTH_TIMEOUT_S={self.cfg.health_timeout_s} s, killed"
        # The first start is not limited here: `start` has a deadline of its own and leaves the server running.
        loading_s = time.time() - self.state.server_began
        if self.state.restarts and not watch.ready and loading_s > self.cfg.start_timeout_s:
            return f"it hung: not ready after START_TIMEOUT_S={self.cfg.start_timeout_s} s, killed"
        return ""

    def _stop_server(self) -> None:
        """Send TERM to the server only: it drains, then ends its engine. KILL would orphan the GPU workers."""
        # A loading server has no calls, and vLLM does not react to TERM while it imports and loads.
        limit_s = self.cfg.drain_s + END_OF_ENGINE_S if self.state.ready_since else END_OF_LOADING_S
        self._save(state="stopping")
        self._note(f"stopping: calls in flight get {self.cfg.drain_s} s")
        end = time.monotonic() + limit_s
        for pid in self.servers:  # the engines of other groups follow when it has drained
            if is_alive(pid):
                os.kill(pid, signal.SIGTERM)
            while time.monotonic() < end and is_alive(pid):
                reap(pid)
                self.bell.wait(TICK_S)
        # Its engine ends with it and needs a moment.
        end = time.monotonic() + 2
        while time.monotonic() < end and rest_of_session():
            reap(0)
            self.bell.wait(TICK_S)
        if left := rest_of_session():
            self._note(f"killing remaining processes: {' '.join(map(str, left))}")
            kill_rest()

    def _on_stop(self, *_) -> None:
        self.asked_to_stop = True

    def _note(self, text: str) -> bool:
        """Write a line into the log. False on a full disk, which must not end the service."""
        with suppress(OSError):
            stamp = datetime.now().astimezone().isoformat(timespec="seconds")
            print(f"[kit] {stamp} {text}", flush=True)
            return True
        return False

    def _save(self, **changes) -> None:
        for name, value in changes.items():
            setattr(self.state, name, value)
        path, self.unsaved = state_file(self.cfg), True
        with suppress(OSError):
            scratch = path.with_suffix(".part")
            scratch.write_text(json.dumps(asdict(self.state)), "utf-8")
            scratch.replace(path)
            self.unsaved = False


class Bell:
    """A sleep that a signal with a handler ends, or another thread: what happens is seen at once."""

    def __enter__(self) -> "Bell":
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(-1)
        # The pipe stays open: a thread that still runs may ring, and this process ends soon.

    def ring(self) -> None:
        """End the wait that runs, or the next one."""
        with suppress(BlockingIOError):  # full, so it rings already
            os.write(self.write_end, b"\0")

    def wait(self, seconds: float) -> None:
        """Sleep until it rings, at most so long."""
        if select.select([self.read_end], [], [], seconds)[0]:
            os.read(self.read_end, 4096)


def adopt_orphans() -> None:
    """Become the parent of processes that a killed server leaves, so that none remains as a zombie."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


_ended: dict[int, int] = {}


def reap(pid: int) -> int | None:
    """Collect every child that has ended. Returns the wait status of `pid` if it is one of them, else None."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            _ended[found[0]] = found[1]
    return _ended.pop(pid, None)


def describe_end(status: int) -> str:
    """How the server ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"killed by signal {number} ({signal.Signals(number).name})"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def describe_error(exc: Exception) -> str:
    """An error of our own in one line, with the file that it names."""
    if isinstance(exc, OSError):
        return ": ".join(str(part) for part in (exc.filename2 or exc.filename, exc.strerror or exc) if part)
    return " ".join(str(exc).split())


def rest_of_session() -> list[int]:
    """PIDs of this session without our own."""
    return [pid for pid in session_pids(os.getsid(0)) if pid != os.getpid()]


def kill_rest() -> None:
    """KILL the remaining processes of the server and wait for their end: the next start needs their memory."""
    end = time.monotonic() + 30
    while (left := rest_of_session()) and time.monotonic() < end:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        reap(0)


def rotate_if_large(log: Path, limit: int, keep: int) -> bool:
    """Copy a log above `limit` bytes to log.1 and empty it. Returns True if it did.

    The server keeps the file open (append mode), so it cannot be renamed. Lines written in the milliseconds between
    copy and truncation are lost. Without room for the copy the log is emptied all the same: a full disk is worse.
    """
    try:
        if not limit or log.stat().st_size <= limit:
            return False
        rotate(log, keep)
        if keep:
            with suppress(OSError):
                shutil.copyfile(log, log.with_name(f"{log.name}.1"))
        os.truncate(log, 0)
    except OSError:
        return False
    return True


def _held_port(cfg: EnvConfig):
    """A context that reserves the port of a service; a headless node has no port."""
    return nullcontext() if is_headless(cfg) else hold_port(cfg)


def run_in_foreground(cfg: EnvConfig) -> int:
    """Supervise the servers of `start_rerank.sh run` in a session of their own, without restarts.

    This process waits and forwards TERM and INT. systemd or a container runtime restarts it.
    """
    plan = plan_service(replace(cfg, restart="no"))
    with _held_port(cfg):
        child = os.fork()
        if child == 0:
            os.setsid()
            end_with_parent()
            os._exit(Supervisor(plan, foreground=True).run())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGTERM))
    while True:  # as PID 1 of a container it inherits children of other processes
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def begin(script: int) -> int:
    """Check the settings, and launch a supervisor for start_rerank.sh of that PID."""
    try:
        with redirect_stdout(sys.stderr):  # a hub's library may print; the script reads the PID from stdout
            plan = startable_plan(get_config())
            make_joined(plan)  # may take minutes, in which a supervisor could not react
    except (ConfigError, OSError) as exc:
        return refused(exc)

    def supervise() -> int:
        with _held_port(plan.cfg):
            return Supervisor(plan).run()

    return launch(plan.cfg, script, supervise)


def main(argv: list[str]) -> int:
    """`begin PID` is what `start` calls, `foreground` what `run` becomes with several engines or hosts."""
    try:
        if argv[:1] == ["begin"] and len(argv) == 2:
            return begin(int(argv[1]))
        if argv == ["foreground"]:
            return run_in_foreground(get_config())
    except ConfigError as exc:
        print(f"ConfigError: {exc}", file=sys.stderr)
        return 6
    except OSError as exc:
        print(f"[ERR] {describe_error(exc)}", file=sys.stderr)
        return 1
    print("usage: python -m rerank_kit.serving.supervisor begin PID | foreground", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
