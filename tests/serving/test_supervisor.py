"""Crashes, hangs, limits, logs, with a stand-in; test_keyed_service.py has a real server."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KIT, http, kit_environment, until
from fake_kit import alive, session_of

from rerank_kit.serving import supervisor
from rerank_kit.serving import watch as serving_watch
from rerank_kit.serving.health import API_HANGS, metrics
from rerank_kit.settings import get_config


def has(kit, **wanted):
    """The state file says all of this."""

    def ask():
        try:
            state = kit.state
        except (OSError, ValueError):
            return None
        return state if all(state[name] == value for name, value in wanted.items()) else None

    return ask


def test_a_killed_server_comes_back_by_itself(kit):
    kit("start", FAKE_MODE="family")
    leader, first = kit.pid, kit.server_pid
    (child,) = [pid for pid in session_of(leader) if pid not in (leader, first)]
    os.kill(first, signal.SIGKILL)
    state = until(has(kit, state="ready", restarts=1))
    assert kit.pid == leader and state["server_pid"] != first
    assert not alive(child), "what the dead server left is gone before the next start"
    assert len(session_of(leader)) == 3
    status = kit("status")
    assert status.returncode == 0 and "1 restart, last death" in status.stdout and "SIGKILL" in status.stdout
    told = json.loads(kit("status", "--json").stdout)
    assert (told["state"], told["restarts"], told["pid"], told["requests_running"]) == ("ready", 1, leader, 2)
    assert told["vllm"] == "0.32.0+cpu" and told["uptime_s"] >= 0 and told["memory_mib"] > 5
    starts = [
        line
        for line in kit.log.splitlines()
        if line.startswith("[kit]") and " start vLLM 0.32.0+cpu: vllm serve" in line
    ]
    assert len(starts) == 2 and "--max-model-len" in starts[0] and "GUARD_MAX_WAIT_S=" in starts[0]
    environ = Path(f"/proc/{kit.server_pid}/environ").read_bytes().split(b"\0")
    assert b"GUARD_RESTARTS=1" in environ, "/metrics shows it"
    assert kit("stop").returncode == 0 and not alive(leader)
    assert list(kit.logs.glob("*.state")) == list(kit.logs.glob("*.pid")) == []


def test_a_hanging_server_is_restarted(kit):
    kit("start", HEALTH_TIMEOUT_S=2)
    first = kit.server_pid
    os.kill(first, signal.SIGSTOP)
    state = until(has(kit, state="ready", restarts=1))
    assert state["server_pid"] != first and not alive(first)
    assert "it hung: no answer for HEALTH_TIMEOUT_S=2 s" in state["why"]


def test_a_busy_server_is_not_taken_for_a_hanging_one(kit, tmp_path):
    """Refused probes are no proof of a hang while pairs are still scored."""
    busy = tmp_path / "busy"
    kit("start", HEALTH_TIMEOUT_S=2, FAKE_BUSY=busy)
    first, cfg = kit.server_pid, get_config(port=kit.settings["PORT"])
    busy.write_text("grow")
    status = kit("status")
    assert status.returncode == 0 and status.stdout.startswith("busy: ") and "429" in status.stdout
    refused = metrics(cfg)["fake_refused_total"]
    until(lambda: metrics(cfg)["fake_refused_total"] >= refused + 8)  # one each half second, so for twice the limit
    assert (kit.server_pid, kit.state["restarts"]) == (first, 0)


def test_a_busy_server_that_scores_nothing_is_restarted(kit, tmp_path):
    busy = tmp_path / "busy"
    kit("start", HEALTH_TIMEOUT_S=2, FAKE_BUSY=busy)
    first = kit.server_pid
    busy.write_text("stand")
    state = until(lambda: kit.state["restarts"] and kit.state)
    assert "it hung" in state["why"] and not alive(first)


def engines_of(kit):
    """PIDs of the session but the supervisor and the service's own."""
    return [pid for pid in session_of(kit.pid) if pid not in (kit.pid, kit.server_pid)]


def test_several_engines_live_and_die_as_one_service(kit):
    kit("start", ENGINES_PER_GPU=3)
    leader, first, others = kit.pid, kit.server_pid, engines_of(kit)
    assert len(others) == 2 and "and 2 more for its engines" in kit.log
    os.kill(others[0], signal.SIGKILL)
    state = until(has(kit, state="ready", restarts=1))
    assert state["why"].startswith("engine process ") and "of 3: killed by signal 9" in state["why"]
    assert not any(map(alive, [first, *others])) and len(session_of(leader)) == 4
    os.kill(kit.server_pid, signal.SIGKILL)
    until(has(kit, state="ready", restarts=2))
    assert len(session_of(leader)) == 4
    assert kit("stop").returncode == 0 and session_of(leader) == []
    assert "killing remaining processes" not in kit.log


def test_engines_of_one_service_are_told_of_each_other(kit, tmp_path):
    kit("start", ENGINES_PER_GPU=2)
    argv = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in (kit.server_pid, *engines_of(kit))]
    ports = {words[words.index("--data-parallel-rpc-port") + 1] for words in argv}
    assert len(ports) == 1 and ports.pop().isdigit()
    assert ["--headless" in words for words in argv] == [False, True]
    assert argv[1][argv[1].index("--data-parallel-start-rank") + 1] == "1"


@pytest.mark.parametrize("ending", ["TERM", "INT", "engine dies", "KILL"])
def test_run_with_several_engines_stays_in_the_foreground(kit, ending):
    """What systemd and container runtimes run: one process to wait for, no restarts, nothing left behind."""
    env = kit_environment(**kit.settings, ENGINES_PER_GPU=2)
    with subprocess.Popen(["dash", str(KIT / "start_rerank.sh"), "run"], env=env, start_new_session=True) as run:
        until(lambda: _answers(kit.settings["PORT"]))
        own = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        leader = own[0]
        members = session_of(leader)
        assert len(own) == 1 and len(members) == 3, "supervisor, service and one more engine, in a session of their own"
        if ending == "engine dies":
            os.kill(max(members), signal.SIGKILL)
        else:
            run.send_signal(getattr(signal, f"SIG{ending}"))
        assert run.wait(30) == {"TERM": 0, "INT": 0, "engine dies": 1, "KILL": -9}[ending]
    until(lambda: session_of(leader) == [])


@pytest.mark.parametrize(
    ("looks", "suspect"),
    [
        # what progress() says at each look, and whether the probe before it was answered
        ([({"0": (5, False)}, True), ({"0": (6, False)}, True)], []),
        ([({"0": (5, True)}, False), ({"0": (9, True)}, False)], []),  # slow, but it scores
        ([({"0": (5, False)}, True), ({"0": (5, False)}, False)], ["0"]),
        ([({"0": (5, False), "1": (5, False)}, True), ({"0": (6, False), "1": (5, True)}, True)], ["1"]),
        # idle when it stopped: probes reach it or the other in turn
        ([({"0": (5, False), "1": (5, False)}, False)] * 2 + [({"0": (6, False), "1": (5, False)}, True)], ["1"]),
        ([({"0": (5, False), "1": (5, False)}, True)] * 3, []),  # another engine answered, this one was not asked
        ([({"0": (5, True)}, False)] * 2 + [({"0": (9, True)}, False)], []),  # a pause, then it scores again
        ([({}, True), ({}, True)], []),  # no metrics: the answer is what counts
        ([({}, True), ({}, False)], [""]),
        ([({}, False), ({}, True)], []),
        ([({"": (5, False)}, False), ({"": (5, False)}, False)], [""]),
        ([({"": (5, False)}, False), ({"": (6, False)}, False)], []),
        ([({}, True), ({}, False), ({"0": (1, False)}, True)], []),  # metrics came back
    ],
)
def test_watch_judges_each_engine_by_its_own_counter(monkeypatch, looks, suspect):
    monkeypatch.setattr(serving_watch.Watch, "start", lambda self: None)
    watch, seen = serving_watch.Watch(get_config(health_timeout_s=10), False), {}
    for number, (now, answered) in enumerate(looks):
        seen = watch._judge(now, seen, answered, time.monotonic() - 100 + number)
    assert sorted(watch.suspect_since) == suspect
    assert bool(watch.hangs()) == bool(suspect)
    for limit_s in (1000, 0):
        watch.cfg = get_config(health_timeout_s=limit_s)
        assert not watch.hangs(), "suspect for less than HEALTH_TIMEOUT_S, or 0: nothing counts as a hang"


def test_watch_takes_the_guards_word_for_an_api_process_that_hangs(monkeypatch):
    """Of several API processes that share the port, one that hangs is never reached by a probe."""
    monkeypatch.setattr(serving_watch.Watch, "start", lambda self: None)
    monkeypatch.setattr(serving_watch, "probe", lambda *_: None)
    monkeypatch.setattr(serving_watch, "progress", lambda cfg: {"0": (5, False)})
    watch = serving_watch.Watch(get_config(health_timeout_s=10), False)
    watch.ready = True
    for said, hangs in (
        ("", ""),
        ("the server is stopping", ""),
        (f"{API_HANGS}: it gave no sign of life for 11 s", "it hung: an API process gave no sign of life"),
        ("", ""),
    ):
        monkeypatch.setattr(serving_watch, "not_ready", lambda cfg, said=said: said)
        watch._look({})
        assert watch.hangs() == hangs


def test_watch_outlives_an_error_of_its_own(monkeypatch, capfd):
    monkeypatch.setattr(serving_watch, "listens", lambda cfg: True)
    monkeypatch.setattr(serving_watch, "not_ready", lambda cfg: "")
    left = [RuntimeError("can't start new thread")]

    def failing_once(*_):
        if left:
            raise left.pop()

    monkeypatch.setattr(serving_watch, "probe", failing_once)
    watch = serving_watch.Watch(get_config(health_timeout_s=10), warm=False)
    until(lambda: watch.ready)
    watch.stopped.set()
    watch.join(10)
    assert "[kit] the probe failed: RuntimeError: can't start new thread" in capfd.readouterr().out


def test_an_end_in_the_foreground_is_not_explained_by_an_old_log():
    assert supervisor.describe_end(256) == "exit code 1"
    assert supervisor.describe_end(signal.SIGKILL) == "killed by signal 9 (SIGKILL)"


@pytest.mark.parametrize("nohup", [False, True])
def test_it_survives_the_terminal_that_started_it(kit, nohup):
    """start in a terminal that is closed while the server still loads; nohup: start goes on, and nobody reads it."""
    loads = kit.root / "loads"
    loads.touch()
    command = ["dash", str(KIT / "start_rerank.sh"), "start"]
    if nohup:  # the program of this name would have the output go to a file
        command = ["sh", "-c", """trap '' HUP; exec "$@\"""", "sh", *command]
    master, slave = os.openpty()
    env = kit_environment(**kit.settings, FAKE_LOADS=loads)
    with subprocess.Popen(command, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as start:
        os.close(slave)
        until(lambda: kit.pid_file.exists() and kit.pid_file.read_text())  # an earlier end of `start` ends it too
        os.killpg(start.pid, signal.SIGHUP)  # what a closing terminal sends to its foreground group
        os.close(master)
        loads.unlink()
    until(has(kit, state="ready"))
    assert kit("status").returncode == 0


def test_it_starts_from_cron(kit):
    """Hardly any environment, no terminal, another directory."""
    env = {name: str(value) for name, value in kit.settings.items()}
    env |= {"PATH": "/usr/bin:/bin", "HOME": "/", "SHELL": "/bin/sh", "KIT_ENV_FILE": "/nonexistent"}
    command = ["sh", str(KIT / "start_rerank.sh"), "start"]
    done = subprocess.run(
        command, env=env, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert kit("status").returncode == 0


def test_it_gives_up_after_restart_max(kit, tmp_path):
    die = tmp_path / "die"
    kit("start", RESTART_MAX=2, FAKE_DIE=die, FAKE_LOG="RuntimeError: CUDA error: device lost")
    leader = kit.pid
    die.touch()
    os.kill(kit.server_pid, signal.SIGKILL)
    until(lambda: not alive(leader))
    status = kit("status")
    assert status.returncode == 1
    assert "CUDA error" in status.stdout and "RESTART_MAX=2" in status.stdout and "2 restarts" in status.stdout
    assert kit.log.count(" start vLLM ") == 3 and "restart 2 in 2 s" in kit.log
    assert kit("wait").returncode == 1
    die.unlink()
    assert kit("start").returncode == 0 and kit.state["restarts"] == 0
    assert kit("status").returncode == 0


def test_restart_no_leaves_it_down(kit):
    kit("start", RESTART="no")
    leader = kit.pid
    os.kill(kit.server_pid, signal.SIGKILL)
    until(lambda: not alive(leader))
    status = kit("status")
    assert status.returncode == 1 and "SIGKILL" in status.stdout and "RESTART=no" in status.stdout
    assert kit("restart").returncode == 0


def test_stop_works_in_every_state(kit, tmp_path):
    die = tmp_path / "die"
    kit("start", FAKE_DIE=die)
    leader = kit.pid
    die.touch()
    os.kill(kit.server_pid, signal.SIGKILL)
    # Starts that fail are between the pauses, so a status may see one.
    assert (
        until(
            lambda: kit.state["restarts"] > 1 and "restarting: " in (said := kit("status")).stdout and said
        ).returncode
        == 150
    )
    assert kit("stop").returncode == 0 and session_of(leader) == []
    assert kit("start", FAKE_MODE="slow", START_TIMEOUT_S=1).returncode == 1
    leader, began = kit.pid, time.monotonic()
    assert kit("stop", STOP_TIMEOUT_S=30).returncode == 0 and session_of(leader) == []
    assert time.monotonic() - began < 25, "a server that loads has no calls to wait for"


def test_term_to_the_supervisor_is_a_stop(kit):
    kit("start")
    pids = session_of(kit.pid)
    os.kill(kit.pid, signal.SIGTERM)
    until(lambda: not any(map(alive, pids)))
    assert kit("status").returncode == 3


def test_a_stop_removes_only_its_own_files(tmp_path):
    ended = object.__new__(supervisor.Supervisor)
    ended.cfg = get_config(log_dir=str(tmp_path), port=1)
    pid, state = tmp_path / "rerank-1.pid", tmp_path / "rerank-1.state"
    for owner, stays in ((os.getppid(), True), (os.getpid(), False)):
        pid.write_text(f"{owner} 1\n")
        state.write_text(json.dumps({"server_pid": 1, "pid": owner}))
        assert ended._end() == 0 and pid.exists() is stays and state.exists() is stays


def test_wait_blocks_until_ready_or_dead(kit):
    assert kit("wait").returncode == 3
    kit("start", FAKE_MODE="slow", START_TIMEOUT_S=1)
    assert kit("wait", START_TIMEOUT_S=1).returncode == 150
    kit("stop")
    kit("start")
    os.kill(kit.server_pid, signal.SIGKILL)
    done = kit("wait")
    assert done.returncode == 0 and "ready after" in done.stdout


def test_the_first_start_that_dies_is_not_repeated(kit):
    assert kit("start", FAKE_MODE="die").returncode == 1
    assert kit.log.count(" start vLLM ") == 1


def test_log_is_rotated_while_the_server_runs(kit):
    kit("start", LOG_MAX_MIB=1, LOG_KEEP=2)
    path = kit.logs / f"rerank-{kit.settings['PORT']}.log"
    for generation in range(3):
        with path.open("a") as log:  # as the server has it open
            log.write(f"generation {generation}\n" + "x" * 2**20)
        until(lambda: path.stat().st_size < 2**20, 15)
    names = sorted(p.name for p in kit.logs.glob("*.log*"))
    assert names == [path.name, f"{path.name}.1", f"{path.name}.2"]
    assert "generation 2" in path.with_name(f"{path.name}.1").read_text()
    assert path.with_name(f"{path.name}.1").stat().st_mode & 0o077 == 0
    assert kit("status").returncode == 0


def test_old_logs_are_kept_in_order_and_bounded(kit):
    for number in range(4):
        kit("start", FAKE_MODE="die", FAKE_LOG=f"RuntimeError: number {number}", LOG_KEEP=2)
    path = kit.logs / f"rerank-{kit.settings['PORT']}.log"
    texts = [p.read_text() for p in sorted(kit.logs.glob("*.log*"))]
    assert len(texts) == 3
    assert [f"number {n}" in text for n, text in zip((3, 2, 1), texts, strict=True)] == [True] * 3
    kit("start", FAKE_MODE="die", LOG_KEEP=0)
    assert "number" not in path.read_text()


def test_tail_follows_across_restarts(kit):
    kit("start")
    command = ["dash", str(KIT / "start_rerank.sh"), "tail"]
    with subprocess.Popen(command, env=kit_environment(**kit.settings), stdout=subprocess.PIPE, text=True) as tail:
        lines = []
        threading.Thread(target=lambda: lines.extend(tail.stdout), daemon=True).start()
        until(lambda: any("ready after" in line for line in lines))
        kit("restart", SERVED_MODEL_NAME="renamed")
        until(lambda: any("renamed" in line for line in lines))
        tail.terminate()


def test_a_full_disk_does_not_end_the_service(kit):
    kit.logs.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", kit.logs], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        assert kit("start").returncode == 0
        (kit.logs / "filler").write_bytes(b"")
        with (kit.logs / "filler").open("wb", buffering=0) as filler:
            while True:
                try:
                    filler.write(b"x" * 512)
                except OSError:
                    break
        first = kit.server_pid
        os.kill(first, signal.SIGKILL)
        port = kit.settings["PORT"]
        until(lambda: not alive(first) and _answers(port))
        time.sleep(3)  # the supervisor has seen it, too, and could not write it down
        (kit.logs / "filler").unlink()
        # There was no room to write it down: status must not show the dead server for ever.
        until(has(kit, restarts=1, state="ready"))
        assert kit.server_pid != first and "1 restart, last death" in kit("status").stdout
        # A worker of vLLM that cannot write its first lines ends, and so would every restart.
        assert os.readlink(f"/proc/{kit.server_pid}/fd/1") == os.readlink(f"/proc/{kit.server_pid}/fd/2") == os.devnull
        until(lambda: "the disk was full: no output of this server until a restart" in kit.log)
        # Nobody knows why it ends now: what the log says is of the one before it.
        with (kit.logs / f"rerank-{port}.log").open("a") as log:
            log.write("torch.OutOfMemoryError: CUDA out of memory\n")
        os.kill(kit.server_pid, signal.SIGKILL)
        until(has(kit, restarts=2, state="ready"))
        assert "(SIGKILL): its output was dropped, because the disk was full" in kit("status").stdout
        assert kit("stop").returncode == 0
    finally:
        if kit.pid_file.exists():
            kit("stop")
        subprocess.run(["umount", "-l", kit.logs], check=True)


def test_a_log_folder_that_is_gone_has_no_room(tmp_path):
    made = object.__new__(supervisor.Supervisor)
    made.log = tmp_path / "gone" / "rerank.log"
    assert not made._disk_has_room()
    made.log = tmp_path / "rerank.log"
    assert made._disk_has_room()


def _answers(port):
    try:
        return http("GET", f"http://127.0.0.1:{port}/health", timeout_s=2)[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("warm", [True, False])
def test_a_gpu_service_is_warm_before_it_is_ready(monkeypatch, warm):
    """The burst comes after the first score and before anyone is told that the service is ready; not on a CPU."""
    order, watches = [], []
    monkeypatch.setattr(serving_watch, "listens", lambda cfg: True)
    monkeypatch.setattr(serving_watch, "not_ready", lambda cfg: "")
    monkeypatch.setattr(serving_watch, "probe", lambda cfg, timeout_s, n_docs: order.append("probe"))
    monkeypatch.setattr(
        serving_watch,
        "warm_up",
        lambda cfg, list_tokens: order.append(f"warm, ready={watches[0].ready}, {list_tokens}"),
    )
    watches.append(serving_watch.Watch(get_config(health_timeout_s=2), warm, list_tokens=4096))
    until(lambda: watches[0].ready and order.count("probe") > 2)
    watches[0].stopped.set()
    watches[0].join(5)
    assert order[:3] == (["probe", "warm, ready=False, 4096", "probe"] if warm else ["probe"] * 3)
    assert sum(word.startswith("warm") for word in order) == warm


def test_rotate_if_large_without_room_for_a_copy(tmp_path, monkeypatch):
    log = tmp_path / "a.log"
    log.write_text("x" * 100)
    assert not supervisor.rotate_if_large(log, 100, 3) and not supervisor.rotate_if_large(log, 0, 3)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", no_room)
    assert supervisor.rotate_if_large(log, 99, 3) and log.stat().st_size == 0
    assert not supervisor.rotate_if_large(tmp_path / "none.log", 1, 3)


def test_what_a_library_prints_is_not_taken_for_the_pid(monkeypatch, capfd):
    def printing(cfg):
        print("Downloading 3 files")
        return SimpleNamespace(cfg=cfg)

    monkeypatch.setattr(supervisor, "startable_plan", printing)
    monkeypatch.setattr(supervisor, "make_joined", lambda plan: None)
    monkeypatch.setattr(supervisor, "launch", lambda cfg, script, supervise: print("123 456") or 0)
    assert supervisor.begin(os.getpid()) == 0
    out, err = capfd.readouterr()
    assert (out, err) == ("123 456\n", "Downloading 3 files\n")
