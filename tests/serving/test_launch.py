"""The process that becomes the supervisor: what it says before it begins, and that it can always be found."""

import os
import subprocess
import sys

import pytest
from conftest import KIT, until
from fake_kit import session_of

PROGRAM = """
import os, sys, time
from rerank_kit.serving.launch import launch
from rerank_kit.settings import EnvConfig

def supervise():
    print("supervises", flush=True)
    time.sleep(60)
    return 0

sys.exit(launch(EnvConfig(log_dir=sys.argv[1], port=1, log_keep=int(sys.argv[3])), int(sys.argv[2]), supervise))
"""


def launched(folder, script: int | None = None, keep: int = 2) -> subprocess.CompletedProcess:
    """Read from pipes, as start_rerank.sh does: a supervisor that held them would be waited for."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(script or os.getpid()), str(keep)]
    return subprocess.run(command, cwd=KIT, capture_output=True, text=True, timeout=30)


def test_it_leads_a_session_and_is_known_by_its_pid_file(tmp_path):
    log, state = tmp_path / "rerank-1.log", tmp_path / "rerank-1.state"
    log.write_text("old")
    state.touch()
    done = launched(tmp_path)
    assert done.returncode == 0, done.stderr
    pid, since = done.stdout.split()
    try:
        where = (tmp_path / "rerank-1.pid").read_text().split()
        assert where[:2] == [pid, since] and len(where) == 3
        assert session_of(int(pid)) == [int(pid)] and not state.exists()
        until(lambda: log.read_text() == "supervises\n")
        assert log.with_name("rerank-1.log.1").read_text() == "old"
        assert {path.stat().st_mode & 0o777 for path in (log, tmp_path / "rerank-1.pid")} == {0o600}
        assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
        assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"], "nothing else is open"
    finally:
        os.kill(int(pid), 9)


@pytest.mark.parametrize(
    ("in_the_way", "said"),
    [
        ("rerank-1.pid", "rerank-1.pid cannot be written: Is a directory"),
        ("rerank-1.log", "rerank-1.log cannot be written: Is a directory"),
        ("rerank-1.log.2", "rerank-1.log cannot be rotated: Is a directory"),
    ],
)
def test_what_it_cannot_write_is_one_line_and_nothing_runs(tmp_path, in_the_way, said):
    (tmp_path / in_the_way / "x").mkdir(parents=True)
    (tmp_path / "rerank-1.log").exists() or (tmp_path / "rerank-1.log").touch()
    done = launched(tmp_path, keep=0 if in_the_way == "rerank-1.log" else 2)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"[ERR] {tmp_path}/{said}\n"


def test_nothing_is_launched_for_a_script_that_was_killed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = launched(tmp_path, gone.pid)
    assert (done.returncode, done.stderr) == (1, "[ERR] the script was killed, so nothing is started\n")
    assert not (tmp_path / "rerank-1.pid").exists()
