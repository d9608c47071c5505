"""Imports vLLM once and forks what the tests run with it: an import costs 10 s and more, and a start makes up to three.

Two ways:
- ForkServer.command in front of a Python program and its arguments runs it in a fork of a process that has imported
  vLLM, with the caller's environment, folder and standard streams. Signals and the exit code are handed on. The fork is
  in a session of its own and has a PID of its own: not for tests that kill by PID or by session.
- `vllm` of quick_environment() imports vLLM itself, under the PID that its supervisor knows, and forks its engine and
  workers, which the real program starts as new Pythons.

Fork hides faults of an import: the services of the fixture `service` and of the demo are the real program.
"""

import json
import multiprocessing.context
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PRELOAD = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)


class ForkServer:
    """A process that has imported vLLM."""

    def __init__(self, env: dict[str, str]):
        self.folder = tempfile.TemporaryDirectory(prefix="fork-")  # a socket's path holds 107 characters
        self.socket = Path(self.folder.name, "socket")
        command = [sys.executable, "-P", __file__, "serve", str(self.socket)]
        # It ends when this process closes its standard input, or ends.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **pipes)
        self.ready = False

    @property
    def command(self) -> list[str]:
        if not self.ready:
            assert self.process.stdout.readline() == "ready\n", "vLLM cannot be imported"
            self.ready = True
        return [sys.executable, "-I", "-S", __file__, "ask", str(self.socket)]

    def stop(self) -> None:
        self.process.communicate(timeout=30)
        self.folder.cleanup()

    def environment(self, root: Path) -> Path:
        """The python of an environment whose `vllm` runs in a fork."""
        return make_environment(root, [*self.command, str(Path(sys.executable).with_name("vllm"))])


def quick_environment(root: Path) -> Path:
    """The python of an environment whose `vllm` forks its engine and workers."""
    return make_environment(root, [sys.executable, "-P", __file__, "run", str(Path(sys.executable).with_name("vllm"))])


def make_environment(root: Path, vllm: list[str]) -> Path:
    """An environment with all the packages of this one and another `vllm` program; returns its python."""
    bin_dir, site = root / "bin", root / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
    bin_dir.mkdir(parents=True)
    site.mkdir(parents=True)
    (root / "pyvenv.cfg").write_text(f"home = {Path(sys._base_executable).parent}\n")
    (bin_dir / "python").symlink_to(sys._base_executable)
    ours = sysconfig.get_path("purelib")
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    words = " ".join(f'"{word}"' for word in vllm)
    (bin_dir / "vllm").write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    (bin_dir / "vllm").chmod(0o755)
    return bin_dir / "python"


# --- the process that has imported vLLM ---


def serve(path: str) -> None:
    spawn_is_fork()
    for name in PRELOAD:
        __import__(name)
    look_at_models_here()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            caller, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                keep(caller)
            caller.close()


def keep(caller: socket.socket) -> None:
    """Fork one program and stay between it and its caller; the program dies with its caller."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(caller, 4, 3)
    with caller.makefile("rb") as request:
        asked = json.loads(request.read(struct.unpack("I", head)[0]))
    child = os.fork()
    if child == 0:
        caller.close()
        become(asked, streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while ended not in select.select([caller, ended], [], [])[0]:
        numbers = caller.recv(16)
        for number in numbers:
            os.kill(child, number)
        if not numbers:
            os.killpg(child, signal.SIGKILL)
            break
    status = os.waitpid(child, 0)[1]
    try:
        caller.sendall(struct.pack("I", status))
    finally:
        os._exit(0)


def become(asked: dict, streams: list[int]) -> None:
    """Run the program in this process, as `python PROGRAM ARGS` does; ends the process."""
    import runpy

    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["folder"])
    sys.argv = asked["argv"]
    program = asked["argv"][0]
    sys.path[:0] = [str(Path(program).resolve().parent), *filter(None, asked["env"].get("PYTHONPATH", "").split(":"))]
    runpy.run_path(program, run_name="__main__")
    sys.exit(0)


def ask(path: str, argv: list[str]) -> int:
    """Have `argv` run by the server, wait for its end and end the same way."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        for number in HANDED_ON:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        request = json.dumps({"argv": argv, "env": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(server, [struct.pack("I", len(request))], [0, 1, 2])
        server.sendall(request)
        answer = server.recv(4)
    if not answer:
        return 70  # the server is gone
    status = struct.unpack("I", answer)[0]
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


# --- engine and workers by fork ---


def spawn_is_fork() -> None:
    """From now on multiprocessing's "spawn", which vLLM's CPU build insists on, forks."""
    contexts = multiprocessing.context._concrete_contexts
    contexts["spawn"] = contexts["fork"]
    os.register_at_fork(after_in_child=bind_threads)


def look_at_models_here() -> None:
    """vLLM imports itself once more in a new process to look at each class of model that it has not met before."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def bind_threads() -> None:
    """OpenMP reads the cores and threads that vLLM chose for a worker only when a program starts."""
    cores = os.environ.get("GOMP_CPU_AFFINITY") or os.environ.get("OMP_PLACES", "").strip("{}").replace(",", " ")
    if cores and "torch" in sys.modules:
        os.sched_setaffinity(0, map(int, cores.split()))
        sys.modules["torch"].set_num_threads(len(cores.split()))


def run(program: str, argv: list[str]) -> None:
    import runpy

    spawn_is_fork()
    sys.argv = [program, *argv]
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")


def main() -> int | None:
    _, how, first, *rest = sys.argv
    if how == "serve":
        return serve(first)
    if how == "run":
        return run(first, rest)
    return ask(first, rest)


if __name__ == "__main__":
    sys.exit(main())
