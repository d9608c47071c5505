"""A restart that fails before vLLM runs is a failed attempt: back-off, the cause in status, nothing runs unwatched."""

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KIT, kit_environment, until
from fake_kit import alive

from rerank_kit.serving import supervisor
from rerank_kit.serving.supervisor import Supervisor, describe_error
from rerank_kit.settings import EnvConfig


def died_once(kit) -> dict:
    return until(lambda: kit.state if kit.state["state"] == "backoff" and "could not" in kit.state["why"] else None)


@pytest.mark.parametrize("broken", ["template", "program"])
def test_a_restart_that_cannot_begin_is_tried_again(kit, broken):
    assert kit("start", INSTRUCTION="Find it").returncode == 0
    pid, server = kit.pid, kit.server_pid
    if broken == "template":
        file = kit.logs / f"template-{kit.settings['PORT']}.jinja"
        kept = file.read_text()
        file.unlink()
        (file / "in the way").mkdir(parents=True)
    else:
        file = Path(kit.settings["PYTHON"]).with_name("vllm")
        kept = file.with_name("kept")
        file.rename(kept)
        # Else another one on PATH would do.
    os.kill(server, signal.SIGKILL)
    state = died_once(kit)
    status = kit("status", INSTRUCTION="Find it")
    wanted = f"it could not be started: {file}: Is a directory" if broken == "template" else "it could not be started: "
    assert wanted in state["why"] and "the log names no error" not in status.stdout
    assert status.returncode == 150 and "restarting: it could not be started" in status.stdout
    assert alive(pid), "the supervisor outlives its own errors"
    if broken == "template":
        (file / "in the way").rmdir()
        file.rmdir()
    else:
        kept.rename(file)
    until(lambda: kit.state["state"] == "ready", 60)
    assert kit.pid == pid and kit.server_pid != server
    if broken == "template":
        assert file.read_text() == kept and not list(kit.logs.glob("*.part"))
    assert kit("stop").returncode == 0


def test_a_first_start_that_cannot_begin_says_why(kit):
    file = kit.logs / f"template-{kit.settings['PORT']}.jinja"
    file.mkdir(parents=True)
    done = kit("start", INSTRUCTION="Find it")
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("[ERR]")]
    assert "died after" in errors[0] and f"it could not be started: {file}: Is a directory" in errors[0]
    assert "the log names no error" not in done.stderr and "stays down" not in errors[0]
    assert kit("status").returncode == 3


WRONG = "the scores cannot be right: every score is 0.5: the head was not loaded"


def test_a_start_with_wrong_scores_ends_at_once_and_says_why(kit, tmp_path):
    """What the guard finds in its own first scores; it asks for them again and again meanwhile."""
    (tmp_path / "unready").write_text(WRONG)
    done = kit("start", FAKE_UNREADY=tmp_path / "unready")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("[ERR]")]
    assert f"{WRONG} (STARTUP_CHECK=0 serves them), killed" in errors[0], done.stderr
    assert kit("status").returncode == 3


def test_a_restart_with_wrong_scores_is_a_failed_attempt(kit, tmp_path):
    unready = tmp_path / "unready"
    assert kit("start", FAKE_UNREADY=unready).returncode == 0
    pid, server = kit.pid, kit.server_pid
    unready.write_text(WRONG)
    os.kill(server, signal.SIGKILL)
    until(lambda: kit.state["state"] == "backoff" and WRONG in kit.state["why"] and kit.state["restarts"] == 2)
    assert alive(pid)
    unready.write_text("no pair was scored yet")  # that alone is no fault
    until(lambda: kit.state["state"] == "starting")
    until(lambda: kit("status").stdout.startswith("loading: no pair was scored yet"))
    assert kit.state["state"] == "starting"
    unready.unlink()
    until(lambda: kit.state["state"] == "ready", 60)
    status = kit("status").stdout
    assert "2 restarts" in status and f"last death {status.split('last death ')[1].split(': ')[0]}: {WRONG}" in status


def test_the_wait_of_systemd_ends_at_wrong_scores(kit, tmp_path):
    """`run` has no supervisor that would end it."""
    (tmp_path / "unready").write_text(WRONG)
    env = kit_environment(**kit.settings, FAKE_UNREADY=tmp_path / "unready")
    with subprocess.Popen(["dash", str(KIT / "start_rerank.sh"), "run"], env=env, stdout=subprocess.DEVNULL) as server:
        try:
            began = time.monotonic()
            waited = kit("wait-for", str(server.pid), START_TIMEOUT_S=120)
            assert waited.returncode == 1 and f"but {WRONG}" in waited.stderr and time.monotonic() - began < 60
            (tmp_path / "unready").unlink()
            assert kit("wait-for", str(server.pid)).returncode == 0
        finally:
            server.terminate()
            server.wait(10)


def test_a_stop_while_the_server_dies_leaves_nothing(monkeypatch, tmp_path):
    """The stop arrives between the death of one process and the look at the others."""
    made = object.__new__(Supervisor)
    cfg = EnvConfig(log_dir=str(tmp_path))
    made.cfg, made.asked_to_stop = cfg, False
    killed = []

    def died():
        made.asked_to_stop = True
        return "exit code 1: boom"

    monkeypatch.setattr(made, "_start", lambda: None)
    monkeypatch.setattr(made, "_watch_until_death", died)
    monkeypatch.setattr(supervisor, "kill_rest", lambda: killed.append(True))
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervisor, "adopt_orphans", lambda: None)
    assert made.run() == 0 and killed == [True]


def test_of_several_engines_all_are_started_or_none(monkeypatch, tmp_path):
    """In a process of its own: what is left is found by its session."""
    spawned = []
    commands = [["/bin/sleep", "60"], ["/no/such/program"]]
    monkeypatch.setattr(supervisor, "server_commands", lambda plan: (commands, dict(os.environ)))
    real = os.posix_spawn

    def spawn(*args, **kwargs):
        spawned.append(real(*args, **kwargs))
        return spawned[-1]

    def kill_spawned():
        for pid in filter(alive, spawned):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    monkeypatch.setattr(os, "posix_spawn", spawn)
    monkeypatch.setattr(supervisor, "kill_rest", kill_spawned)
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervisor, "adopt_orphans", lambda: None)
    monkeypatch.setattr(os, "umask", lambda mask: mask)
    made = object.__new__(Supervisor)
    cfg = EnvConfig(log_dir=str(tmp_path), restart="no")
    made.cfg, made.plan, made.header, made.umask = cfg, SimpleNamespace(cfg=cfg, copies=2), "", 0o022
    made.state, made.crashes, made.asked_to_stop = supervisor.State("starting", os.getpid()), [], False
    made.foreground, made.log = False, tmp_path / "log"
    assert made.run() == 1
    assert len(spawned) == 1 and not alive(spawned[0])
    assert "/no/such/program" in made.state.why and made.state.state == "failed"


def test_a_stop_during_a_failed_attempt_ends_it(kit):
    assert kit("start").returncode == 0
    file = Path(kit.settings["PYTHON"]).with_name("vllm")
    file.rename(file.with_name("kept"))
    pid = kit.pid
    os.kill(kit.server_pid, signal.SIGKILL)
    died_once(kit)
    began = time.monotonic()
    done = kit("stop")
    assert done.returncode == 0 and time.monotonic() - began < 15 and not alive(pid)
    assert kit("status").returncode == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "Resource temporarily unavailable"),
        (OSError("odd"), "odd"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
def test_errors_in_one_line(error, said):
    assert describe_error(error) == said
