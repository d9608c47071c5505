"""Who wins: a stop over a start, a signal over whatever the script waits for; and nobody waits for what is gone."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import KIT, kit_environment, until
from fake_kit import alive, session_of

SHELLS = ["dash", "busybox sh", "bash --posix"]


def begin(kit, action: str, shell: str = "dash", **settings) -> subprocess.Popen:
    """The script in a session of its own, as in a terminal of its own."""
    env = kit_environment(**{**kit.settings, **settings})
    command = [*shell.split(), str(KIT / "start_rerank.sh"), action]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def slow_model(tmp_path):
    """A checkpoint whose config.json never comes, as on a file system that hangs: a start prepares for ever."""
    folder = tmp_path / "slow"
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    return {"MODEL_PATH": folder}


def prepares(kit) -> bool:
    lock = kit.pid_file.with_suffix(".lock")
    return lock.exists() and lock.read_text().endswith(" start\n")


@pytest.mark.parametrize("shell", SHELLS[:2])
def test_stop_wins_over_a_start_that_waits(kit, shell):
    with begin(kit, "start", shell, FAKE_MODE="slow", START_TIMEOUT_S=120) as start:
        until(lambda: kit.pid_file.with_suffix(".state").exists() and kit.state["server_pid"])
        pids = session_of(kit.pid)
        began = time.monotonic()
        stopped = kit("stop", shell=shell)
        assert (stopped.returncode, stopped.stderr) == (0, "") and time.monotonic() - began < 60
        said = start.communicate(timeout=30)[1]
    assert start.returncode == 1 and "[ERR] stopped by another command" in said and "last lines" not in said
    assert len(pids) == 2 and not any(map(alive, pids))
    assert kit("status").returncode == 3


def test_restart_wins_over_a_start_that_waits_and_keeps_its_own(kit, tmp_path):
    """The start that lost must not clean up what the restart began."""
    loads = tmp_path / "loads"
    loads.touch()
    with begin(kit, "start", START_TIMEOUT_S=120, FAKE_LOADS=loads) as start:
        until(lambda: kit.pid_file.with_suffix(".state").exists() and kit.state["server_pid"])
        first = kit.pid
        assert kit("restart").returncode == 0
        said = start.communicate(timeout=30)[1]
    assert start.returncode == 1 and "stopped by another command" in said
    assert kit.pid != first and kit("status").returncode == 0


def test_stop_wins_over_a_start_that_still_prepares(kit, slow_model):
    with begin(kit, "start", **slow_model) as start:
        until(lambda: prepares(kit))
        stopped = kit("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert f"[WARN] ending the start that is under way (PID {start.pid})" in stopped.stderr
        assert "not running" in stopped.stdout
        assert start.wait(15) == 143
    assert kit("start").returncode == 0, "nothing is left in its way"


@pytest.mark.parametrize(
    ("shell", "number"), [*zip(SHELLS, (signal.SIGTERM, signal.SIGINT, signal.SIGTERM), strict=True)]
)
def test_a_signal_to_the_script_acts_at_once(kit, shell, number, slow_model):
    """To its process alone, as from `timeout` or an editor; once while it prepares, once while it waits."""
    code = 128 + number
    with begin(kit, "start", shell, **slow_model) as start:
        until(lambda: prepares(kit))
        time.sleep(0.5)
        start.send_signal(number)
        assert start.wait(15) == code
        until(lambda: not session_of(start.pid))
        assert "continues to load" not in start.communicate()[1]
    # The script is about to run the program that waits: none of its processes may begin behind the signal's back.
    with begin(kit, "start", shell, FAKE_LOADS=KIT, START_TIMEOUT_S=120) as start:
        until(lambda: kit.pid_file.with_suffix(".state").exists() and kit.state["server_pid"])
        start.send_signal(number)
        assert start.wait(15) == code
        said = start.communicate(timeout=30)[1]
        assert 'interrupted; the server continues to load, "stop" ends it' in said
        until(lambda: not session_of(start.pid))
    assert alive(kit.pid) and alive(kit.server_pid) and kit("stop").returncode == 0


def test_a_signal_while_pip_runs_ends_pip(tmp_path):
    """setup: the step's own processes get the signal too."""
    script = (KIT / "start_rerank.sh").read_text().replace('main "$@"\n', "")
    script += f". {KIT}/rerank_kit/setup.sh\nPID_FILE={tmp_path}/none\n"
    script += "do_setup() { step install install_torch_cpu; }\n"
    script += f"install_torch_cpu() {{ sh -c 'echo $$ >{tmp_path}/pip; exec sleep 60'; }}\nact do_setup\n"
    for shell in SHELLS:
        (tmp_path / "pip").unlink(missing_ok=True)
        command = [*shell.split(), "-c", script, str(KIT / "start_rerank.sh")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as setup:
            pid = int(until(lambda: (tmp_path / "pip").exists() and (tmp_path / "pip").read_text()))
            setup.terminate()
            assert setup.wait(15) == 143
        until(lambda pid=pid: not alive(pid))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("fractions", [True, False])
def test_a_wait_has_its_seconds_whatever_sleep_takes(shell, fractions):
    script = (KIT / "start_rerank.sh").read_text().replace('main "$@"\n', "")
    script += f"""
sleep() {{ case $1 in *.*) {"" if fractions else "return 1"} ;; esac; slept="$slept $1"; }}
for since in "$(born $$)" 1 ""; do
  slept=
  wait_for_end 20 $$ "$since"
  echo $? $slept
done
"""
    command = [*shell.split(), "-c", script, str(KIT / "start_rerank.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lives, *gone = [line.split() for line in done.stdout.splitlines()]
    assert lives[0] == "1" and sum(map(float, lives[1:])) == pytest.approx(20), done.stderr
    assert len(lives) == (201 if fractions else 21) and gone == [["0"], ["0"]]


@pytest.mark.parametrize("shell", SHELLS)
def test_nobody_waits_for_a_process_that_is_gone(tmp_path, shell):
    """It ended between the look at the PID file and the TERM."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    script = (KIT / "start_rerank.sh").read_text().replace('main "$@"\n', "")
    script += f"""
LOG_DIR={tmp_path} PORT=1 STOP_TIMEOUT_S=30 STOP_DELAY_S=0
PID_FILE=$LOG_DIR/pid STATE_FILE=$LOG_DIR/state LOCK_FILE=$LOG_DIR/lock
server_pid() {{ echo {gone.pid}; }}
born "" && echo "an empty PID has a start time"
do_stop"""
    began = time.monotonic()
    command = [*shell.split(), "-c", script, str(KIT / "start_rerank.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 20 and done.returncode == 0, done.stderr
    assert re.fullmatch(rf"stopping PID {gone.pid}: .*\nstopped\n", done.stdout), done.stdout


def test_the_script_reads_the_terminal_of_its_caller(tmp_path):
    """pip may ask for a password of an index."""
    script = (KIT / "start_rerank.sh").read_text().replace('main "$@"\n', "")
    script += 'ask() { read -r word; say "got $word"; }\nact ask\n'
    for shell in SHELLS:
        command = [*shell.split(), "-c", script, str(KIT / "start_rerank.sh")]
        done = subprocess.run(command, input="secret\n", capture_output=True, text=True, timeout=60)
        assert done.stdout == "got secret\n", done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_a_start_whose_script_was_killed_keeps_its_lock_and_starts_nothing(kit, shell, slow_model):
    """Its action's shell runs on: two starts at once would fight for the port and for the PID file."""
    with begin(kit, "start", shell, **slow_model) as start:
        until(lambda: prepares(kit))
        time.sleep(0.5)  # it waits for config.json now
        start.kill()
        start.wait()
        second = kit("start", shell=shell)
        assert second.returncode == 1 and "another start or stop for port" in second.stderr, second.stderr

        def fails():
            """Its config.json is empty, as soon as it waits for that: the preparation ends."""
            os.close(os.open(slow_model["MODEL_PATH"] / "config.json", os.O_RDWR))
            return not session_of(start.pid)

        until(fails)
    assert not kit.pid_file.exists() and kit("start", shell=shell).returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_stop_ends_a_start_whose_script_was_killed(kit, shell, slow_model):
    with begin(kit, "start", shell, **slow_model) as start:
        until(lambda: prepares(kit))
        time.sleep(0.5)
        start.kill()
        start.wait()
        stopped = kit("stop", shell=shell)
        assert stopped.returncode == 0, stopped.stderr
        assert "ending the start that is under way" in stopped.stderr and not session_of(start.pid)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_killed_script_launches_no_supervisor(kit, tmp_path, shell):
    """It dies while the process that launches the supervisor begins."""
    there, go = tmp_path / "there", tmp_path / "go"
    python = kit.settings["PYTHON"]
    python.rename(python.with_name("python3"))
    waits = f"touch '{there}'; while [ ! -e '{go}' ]; do sleep 0.05; done"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"supervisor begin"*) {waits} ;; esac\nexec "{python.with_name("python3")}" "$@"\n'
    )
    python.chmod(0o755)
    with begin(kit, "start", shell) as start:
        until(there.exists)
        start.kill()
        go.touch()
        said = start.communicate(timeout=30)[1]
    assert "the script was killed, so nothing is started" in said, said
    until(lambda: not session_of(start.pid))
    assert not kit.pid_file.exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_quit_ends_the_action_too(kit, shell, slow_model):
    """Ctrl-\\ reaches the script alone: a background shell ignores it."""
    with begin(kit, "start", shell, **slow_model) as start:
        until(lambda: prepares(kit))
        time.sleep(0.5)
        start.send_signal(signal.SIGQUIT)
        assert start.wait(15) == 131
        until(lambda: not session_of(start.pid))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_failed_start_leaves_the_state_of_another_live_supervisor(tmp_path, shell):
    script = (KIT / "start_rerank.sh").read_text().replace('main "$@"\n', "")
    script += f"""
LOG_DIR={tmp_path} PORT=1
PID_FILE=$LOG_DIR/pid STATE_FILE=$LOG_DIR/state LOCK_FILE=$LOG_DIR/lock
kill_session() {{ :; }}
echo '999999999 1' >"$PID_FILE"
mine='999999999 1'
echo '{{"state": "ready", "pid": '$OWNER', "server_pid": 999999998}}' >"$STATE_FILE"
end_mine
"""
    for owner, stays in ((os.getpid(), True), (999999999, False)):
        command = [*shell.split(), "-c", script, str(KIT / "start_rerank.sh")]
        subprocess.run(command, check=True, timeout=20, env={**os.environ, "OWNER": str(owner)})
        assert (tmp_path / "state").exists() is stays and not (tmp_path / "pid").exists()
