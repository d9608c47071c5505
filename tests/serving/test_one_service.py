"""Whose is the port, the PID file and LOG_DIR: two services, two hosts, a reboot, another user, a folder of others."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KIT, copy_kit, kit_environment, run_kit, until
from fake_kit import FakeKit, alive

from rerank_kit import processes, settings
from rerank_kit.engine.machine import Machine
from rerank_kit.serving import command, health
from rerank_kit.serving.network import check_network, check_port, hold_port
from rerank_kit.settings import ConfigError, EnvConfig, get_config

SHELLS = ("dash", "busybox sh", "bash --posix")


# --- the port ---------------------------------------------------------------------------------------------------------


def test_a_second_service_cannot_load_for_a_port_that_another_loads_for(kit, tmp_path):
    other = {**kit.settings, "LOG_DIR": tmp_path / "other"}
    assert kit("start", FAKE_LOADS=KIT, START_TIMEOUT_S=1).returncode == 1
    second = run_kit("start", **other)
    assert second.returncode == 6 and "another service of the kit" in second.stderr, second.stdout + second.stderr
    assert run_kit("run", **other).returncode == 6
    assert kit("stop").returncode == 0
    assert run_kit("start", **other).returncode == 0, "free again"
    refused = kit("start")
    assert refused.returncode == 6 and "another service of the kit" in refused.stderr
    assert run_kit("stop", **other).returncode == 0


def test_a_port_that_is_bound_and_silent_is_taken():
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(("127.0.0.1", 0))
        cfg = EnvConfig(port=silent.getsockname()[1])
        with pytest.raises(ConfigError, match="does not listen yet"):
            check_port(cfg)
    check_port(cfg)


def test_lingering_connections_do_not_hold_a_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        caller = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()  # the side that closes first lingers (TIME_WAIT)
        caller.close()
    check_port(EnvConfig(port=port))


def test_a_held_port_is_free_when_its_holder_is_killed():
    cfg = EnvConfig(port=1)
    code = "import sys; from rerank_kit.settings import EnvConfig; from rerank_kit.serving.network import hold_port; "
    code += "kept = hold_port(EnvConfig(port=1)); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=KIT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(ConfigError, match="PORT=1 is taken"):
            hold_port(cfg)
        hold_port(EnvConfig(port=2)).close()
        holder.kill()
        holder.wait()
    hold_port(cfg).close()


def test_start_beside_a_service_that_still_loads_does_not_say_that_it_is_ready(kit, tmp_path):
    loads = tmp_path / "loads"
    loads.touch()
    assert kit("start", FAKE_LOADS=loads, START_TIMEOUT_S=1).returncode == 1
    again = kit("start", START_TIMEOUT_S=1)
    assert again.returncode == 1 and "already running" in again.stdout and "ready after" not in again.stdout
    loads.unlink()
    again = kit("start")
    assert again.returncode == 0 and "ready after" in again.stdout


# --- the PID file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger():
    """A session whose leader is gone, as every classic daemon has: (session, PID of the one that is left)."""
    code = "import os, time; os.setsid(); pid = os.fork(); pid and (print(os.getpid(), pid, flush=True), os._exit(0)); "
    code += "time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as leader:
        session, left = map(int, leader.stdout.readline().split())
        leader.wait()
        yield session, left
        os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("action", ["stop", "start"])
def test_numbers_of_before_a_reboot_are_nobodys(kit, stranger, shell, action):
    kit.logs.mkdir()
    session, left = stranger
    here = processes.this_machine()
    kit.pid_file.write_text(f"{session} 4711 {here.replace(here.split(':')[1], 'another-boot')}\n")
    status = kit("status")
    assert status.returncode == 1 and "dead" in status.stdout
    done = kit(action, shell=shell)
    assert done.returncode == 0, done.stdout + done.stderr
    assert alive(left) and "killing" not in done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_a_service_of_another_host_is_left_alone(kit, shell):
    kit.logs.mkdir()
    kit.pid_file.write_text("4711 4711 elsewhere:boot:pid:[1]\n")
    for action in ("start", "stop", "restart"):
        done = kit(action, shell=shell)
        assert done.returncode == 1 and "host elsewhere started" in done.stderr, done.stdout + done.stderr
    for action in ("status", "wait"):
        done = kit(action, shell=shell)
        assert done.returncode == 4 and "ask there" in done.stdout
    assert kit.pid_file.exists()
    kit.pid_file.unlink()


def test_a_pid_file_of_an_earlier_kit_still_counts(kit):
    assert kit("start").returncode == 0
    words = kit.pid_file.read_text().split()
    assert len(words) == 3 and words[2] == processes.this_machine()
    kit.pid_file.write_text(" ".join(words[:2]) + "\n")
    assert kit("status").returncode == 0
    assert "stopping PID" in kit("stop").stdout and not alive(int(words[0]))


def test_a_server_without_supervisor_and_pid_file_can_be_restarted(kit):
    assert kit("start").returncode == 0
    server = kit.server_pid
    os.kill(kit.pid, signal.SIGKILL)
    kit.pid_file.unlink()
    assert "without its supervisor" in kit("start").stderr
    assert kit("restart").returncode == 0
    assert not alive(server) and kit("status").returncode == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
@pytest.mark.parametrize("mode", [0o700, 0o711])  # the folder that start makes, and one that was there
def test_another_user_is_told_that_he_cannot_tell(mode):
    code = "import os, sys, rerank_kit.serving.status as s; os.setgid(65534); os.setuid(65534); sys.exit(s.main([]))"
    with tempfile.TemporaryDirectory() as logs:
        Path(logs, "rerank-1.pid").write_text(f"{os.getpid()} 1\n")
        Path(logs, "rerank-1.pid").chmod(0o600)
        os.chmod(logs, mode)
        env = {**os.environ, "LOG_DIR": logs, "PORT": "1", "KIT_ENV_FILE": "/nonexistent"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=KIT)
    assert done.returncode == 4 and "belongs to another user" in done.stdout, done.stdout + done.stderr


# --- folders and files of others ------------------------------------------------------------------------------------


def test_the_mode_of_a_folder_that_was_there_stays(kit):
    kit.logs.mkdir()
    kit.logs.chmod(0o1777)
    stopped = kit("stop")
    assert stopped.returncode == 0 and "can be written by everybody" in stopped.stderr
    assert kit.logs.stat().st_mode & 0o7777 == 0o1777
    kit.logs.chmod(0o755)
    assert "everybody" not in kit("stop").stderr
    kit.logs.joinpath(f"rerank-{kit.settings['PORT']}.lock").unlink()
    kit.logs.rmdir()
    kit("stop")
    assert kit.logs.stat().st_mode & 0o7777 == 0o700


def test_through_a_link_from_another_folder(kit, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "rerank").symlink_to(KIT / "start_rerank.sh")
    done = subprocess.run(
        ["dash", tmp_path / "bin" / "rerank", "status"],
        env={**os.environ, **{k: str(v) for k, v in kit.settings.items()}},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "not running\n"), done.stderr


@pytest.mark.parametrize("program", [command, settings])
def test_a_file_of_another_user_is_a_configuration_error(monkeypatch, capsys, tmp_path, program):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    # The checkpoint, or the settings file.
    monkeypatch.setattr(*((command, "plan_service") if program is command else (Path, "read_text")), closed)
    assert program.main(["cfg" if program is command else "shell"]) == 6
    said = capsys.readouterr().err
    assert said.startswith("ConfigError: ") and str(tmp_path) in said and "Permission denied" in said


# --- what start may take for ready --------------------------------------------------------------------------------


def test_a_key_that_only_vllm_knows_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    check_network(EnvConfig(api_key="k"))
    with pytest.raises(ConfigError, match="set API_KEY instead") as caught:
        check_network(EnvConfig())
    assert "abc" not in str(caught.value)
    monkeypatch.delenv("VLLM_API_KEY")
    (tmp_path / "env").write_text("VLLM_API_KEY=abc\n")
    monkeypatch.setenv("KIT_ENV_FILE", str(tmp_path / "env"))
    with pytest.raises(ConfigError, match="set API_KEY"):
        check_network(get_config())


@pytest.mark.parametrize(("state", "ready"), [("warming up", False), ("starting", True), ("ready", True)])
def test_ready_waits_for_the_burst(monkeypatch, state, ready):
    """A supervisor that is silent (full disk) is waited for some seconds, one that warms up as long as it takes."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(health.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(health.time, "sleep", lambda s: setattr(clock, "now", clock.now + s))
    monkeypatch.setattr(processes, "is_alive", lambda pid: True)
    monkeypatch.setattr(health, "listens", lambda cfg: True)
    monkeypatch.setattr(health, "probe", lambda cfg: None)
    monkeypatch.setattr(health, "not_ready", lambda cfg: "")
    monkeypatch.setattr(health, "supervised_state", lambda cfg, pid: state)
    ended = health.wait(EnvConfig(), 1, KIT / "nothing", 60)
    assert ended == (health.READY if ready else health.LOADING)
    assert clock.now >= 60 or (clock.now < 1) == (state == "ready")


def test_start_and_status_wait_for_the_burst_of_a_gpu(tmp_path, checkpoints):
    """With nvidia-smi of a GPU that is not here; the supervisor is the real one."""
    (warms := tmp_path / "warms").touch()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    smi.chmod(0o755)
    gpu = FakeKit(tmp_path, checkpoints["qwen3"], version="0.32.0")
    gpu.settings |= {"PATH": f"{smi.parent}:{os.environ['PATH']}", "ENGINES_PER_GPU": 1, "FAKE_WARMS": warms}
    try:
        assert gpu("start", START_TIMEOUT_S=1).returncode == 1
        until(lambda: gpu.state["state"] == "warming up")
        status = gpu("status")
        assert status.returncode == 150 and "loading: warming up" in status.stdout
        assert gpu("wait", START_TIMEOUT_S=1).returncode == 150 and gpu.state["state"] == "warming up"
        warms.unlink()
        assert gpu("wait").returncode == 0 and gpu.state["state"] == "ready"
    finally:
        gpu("stop")


def test_ctrl_c_while_start_waits_says_what_goes_on(kit):
    env = kit_environment(**kit.settings, FAKE_LOADS=KIT)
    with subprocess.Popen(
        ["dash", KIT / "start_rerank.sh", "start"],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as start:
        assert "importing vLLM" in start.stderr.readline()
        os.killpg(start.pid, signal.SIGINT)  # as a terminal does
        said = start.communicate(timeout=20)[1]
    assert start.returncode == 130 and "the server continues to load" in said
    assert alive(kit.server_pid) and kit("stop").returncode == 0


@pytest.mark.parametrize(("code", "stays"), [(0, True), (4, True), (1, False)])
def test_start_ends_a_service_only_for_wrong_scores(kit, tmp_path, code, stays):
    """With a check that ends so; the script of a copy of the kit runs it."""
    copy = copy_kit(tmp_path / "kit")
    check = copy / "rerank_kit" / "serving" / "check.py"
    text = check.read_text()
    assert "sys.exit(main(sys.argv[1:]))" in text
    check.write_text(text.replace("sys.exit(main(sys.argv[1:]))", f"sys.exit({code})"))
    env = {**os.environ, **{k: str(v) for k, v in kit.settings.items()}, "STARTUP_CHECK": "1"}
    env["GUARD"] = "0"  # what the guard checks needs a tokenizer, which the stand-in's environment has none of
    done = subprocess.run(["dash", copy / "start_rerank.sh", "start"], env=env, capture_output=True, text=True)
    assert done.returncode == (0 if stays else 1), done.stdout + done.stderr
    assert (kit("status").returncode == 0) == stays
    assert ("could not be checked" in done.stderr) == (code == 4)


def test_a_gpu_without_memory_of_its_own_has_no_size():
    assert Machine("0.32.0", ("NVIDIA GB10, [N/A]",), (0,), 1).gpu_mib == 0
    assert Machine("0.32.0", ("NVIDIA H100 80GB HBM3, 81559",), (0,), 1).gpu_mib == 81559
