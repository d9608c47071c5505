"""An update of the kit's folder while a service runs that the old one started, and old names in settings."""

import os
import shutil
import signal
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from conftest import KIT, copy_kit, http, kit_environment, until
from fake_kit import alive, session_of

from rerank_kit.engine.machine import Machine
from rerank_kit.engine.plan import plan_service
from rerank_kit.settings import ConfigError, get_config

FLAT = "580e935899"  # the last commit whose modules lie beside the script


def unpack_flat_kit(target: Path) -> Path:
    """The kit as it was before rerank_kit/, from this repository's history."""
    done = subprocess.run(["git", "-C", str(KIT), "archive", FLAT], capture_output=True)
    if done.returncode:
        pytest.skip(f"commit {FLAT} is not in this checkout: {done.stderr.decode()[:100].strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(target, filter="data")
    return target


def script(folder: Path, *args: str, **settings) -> subprocess.CompletedProcess:
    command = ["dash", str(folder / "start_rerank.sh"), *args]
    env = kit_environment(**settings)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, cwd="/")


@pytest.mark.parametrize("supervised", [True, False])
def test_a_service_of_the_flat_kit_is_stopped_and_restarted_by_the_new_script(kit, tmp_path, supervised):
    folder = unpack_flat_kit(tmp_path / "kit")
    settings = {**kit.settings, "FAKE_MODE": "family"}
    started = script(folder, "start", **settings)
    assert started.returncode == 0, started.stdout + started.stderr
    old = kit.pid
    members = session_of(old)
    assert len(members) == 3, "supervisor, server and its child"
    copy_kit_over(folder)
    assert (folder / "supervisor.py").exists() and (folder / "rerank_kit").is_dir(), "half old, half new"
    told = script(folder, "status", **settings)
    assert told.returncode == 0 and f"PID {old}" in told.stdout, told.stdout + told.stderr
    if not supervised:
        os.kill(old, signal.SIGKILL)
        until(lambda: not alive(old))
    again = script(folder, "restart", **settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert not any(alive(pid) for pid in members)
    command = Path(f"/proc/{kit.pid}/cmdline").read_bytes()
    assert kit.pid != old and b"rerank_kit.serving.supervisor" in command
    assert http("GET", f"http://127.0.0.1:{settings['PORT']}/health")[0] == 200
    new = session_of(kit.pid)
    assert script(folder, "stop", **settings).returncode == 0
    assert not any(alive(pid) for pid in new)


def copy_kit_over(folder: Path) -> None:
    new = copy_kit(folder.with_name("new"))
    shutil.copytree(new, folder, dirs_exist_ok=True)


@pytest.mark.parametrize("text", ["--middleware server_guard.Guard", "--middleware=server_guard.Guard --x"])
def test_the_old_name_of_the_guard_gets_the_new_one(checkpoints, text):
    machine = Machine("0.32.0+cpu", (), (0, 1), 2**37)
    with pytest.raises(ConfigError, match=r"server_guard\.Guard.*is rerank_kit\.guard\.Guard now") as caught:
        plan_service(get_config(extra_args=text), checkpoints["bert"], machine)
    assert "GUARD=1" in str(caught.value)
