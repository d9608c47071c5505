"""setup: what would fail after gigabytes is said before, and two setups of one folder take turns."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import KIT, copy_kit, kit_environment

from rerank_kit.models import download
from rerank_kit.serving import before_setup
from rerank_kit.serving.before_setup import check_disk, check_gpus, index_warnings, proxy_warnings
from rerank_kit.settings import ConfigError

NEW, VOLTA = "580.95.05, 9.0, NVIDIA H100", "580.95.05, 7.0, Tesla V100-SXM2-16GB"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("550.54.15, 9.0, NVIDIA H100", "driver 550.54.15 is too old: this vLLM is built for CUDA 13, which needs"),
        (f"{NEW}\n535.1, 8.0, NVIDIA A100", "driver 535.1 is too old"),
        (
            f"{VOLTA}\n{VOLTA}",
            "V100-SXM2-16GB (compute capability 7.0): this vLLM is built for CUDA 13, which needs 7.5",
        ),
    ],
)
def test_a_driver_or_gpu_that_is_too_old_is_refused(text, said):
    with pytest.raises(ConfigError) as caught:
        check_gpus(text)
    assert said in str(caught.value) and "PYTHON=" in str(caught.value) and "\n" not in str(caught.value)


def test_gpus_that_fit_and_answers_that_say_nothing():
    assert check_gpus(NEW) == check_gpus("580.0, 7.5, Tesla T4\n590.1, 12.0, B200") == check_gpus("") == []
    assert check_gpus("[N/A], [N/A], NVIDIA GB10\nno devices were found") == []
    (mixed,) = check_gpus(f"{NEW}\n{VOLTA}")
    assert "V100" in mixed and "H100" not in mixed and "CUDA_VISIBLE_DEVICES" in mixed


def test_the_pins_are_those_that_the_driver_check_is_for():
    assert "nvidia-cuda-runtime==13." in (KIT / "requirements.txt").read_text()


def test_a_full_disk_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3.5e9))
    with pytest.raises(ConfigError, match=rf"3\.5 GB are free in {tmp_path}, and the GPU build needs about 12"):
        check_disk("gpu", tmp_path)
    with pytest.raises(ConfigError, match="the CPU build needs about 4"):
        check_disk("cpu", tmp_path)
    (tmp_path / ".venv").mkdir()
    with (tmp_path / ".venv" / "torch").open("wb") as file:
        file.truncate(600_000_000)  # an earlier build is replaced, or continued
    check_disk("cpu", tmp_path)


def test_a_socks_proxy_is_named(monkeypatch):
    for name in ("ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "socks5h://user:secret@127.0.0.1:1080")
        (said,) = proxy_warnings()
        assert said.startswith(f"{name}=socks5h://***@127.0.0.1:1080: pip cannot use a SOCKS proxy")
        assert "secret" not in said
        monkeypatch.setenv(name, "http://127.0.0.1:3128")
        assert proxy_warnings() == []


def test_a_hub_behind_a_socks_proxy_is_named(monkeypatch):
    import requests

    def head(url, timeout):
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr(requests, "head", head)
    with pytest.raises(ConfigError, match=r"through the SOCKS proxy .*PySocks.*unset ALL_PROXY"):
        download._ask("https://hub.example")
    with pytest.raises(ConfigError) as caught:
        download.locate("some/model")
    assert "unset ALL_PROXY" in str(caught.value), "the remedy is not cut off"


@pytest.mark.parametrize(
    ("config", "file_values", "environ", "said"),
    [
        ("", {}, {}, []),
        ("global.index-url='http://a/s'", {}, {}, []),
        (
            ":env:.index-url='http://b/s'\nglobal.index-url='http://u:p@a/s'",
            {},
            {"PIP_INDEX_URL": "http://b/s"},
            ["pip asks http://b/s (PIP_INDEX_URL), not http://***@a/s of pip.conf"],
        ),
        (
            ":env:.index-url='http://b/s'",
            {"PIP_INDEX_URL": "http://a/s"},
            {"PIP_INDEX_URL": "http://b/s"},
            ["PIP_INDEX_URL=http://b/s (environment) takes precedence over .env's http://a/s"],
        ),
        (":env:.index-url='http://a/s'", {"PIP_INDEX_URL": "http://a/s"}, {"PIP_INDEX_URL": "http://a/s"}, []),
        (
            "",
            {},
            {"UV_INDEX_URL": "http://a/s"},
            ["UV_INDEX_URL is uv's: setup uses pip, which asks the public index; set PIP_INDEX_URL too"],
        ),
        ("global.index-url='http://a/s/'", {}, {"UV_DEFAULT_INDEX": "http://a/s"}, []),
        (
            "global.extra-index-url='\\nhttp://u:p@c/s\\nhttp://d/s'",
            {},
            {},
            ["pip also asks c, d (extra-index-url, pip.conf) and takes the newest version that either has"],
        ),
        (":env:.no-index='1'", {}, {}, ["pip asks no index (no-index, environment)"]),
    ],
)
def test_an_index_that_one_would_not_expect_is_named(config, file_values, environ, said):
    found = index_warnings(config, file_values, environ)
    assert len(found) == len(said), found
    for text, start in zip(found, said, strict=True):
        assert text.startswith(start) and ":p@" not in text


def test_what_pip_says_of_itself_is_understood(tmp_path):
    """The real output of `pip config list`."""
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = http://a/s\nextra-index-url =\n  http://c/s\n  http://d/s\n"
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    env |= {"PIP_INDEX_URL": "http://b/s", "PYTHONPATH": str(KIT), "KIT_ENV_FILE": "/nonexistent"}
    command = [sys.executable, "-P", "-m", "rerank_kit.serving.before_setup", "index", sys.executable]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "pip asks http://b/s (PIP_INDEX_URL), not http://a/s of pip.conf" in done.stderr
    assert "pip also asks c, d (extra-index-url, pip.conf)" in done.stderr
    assert before_setup.main([]) == 2


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """(a copy of the kit without .venv, an environment whose Python has no vLLM, a folder that is first on PATH)."""
    copy, first = copy_kit(tmp_path / "kit"), tmp_path / "first"
    first.mkdir()
    env = {k: v for k, v in kit_environment().items() if not k.startswith(("PIP_", "VIRTUAL_ENV", "CONDA", "PYTHON"))}
    env |= {"PATH": f"{first}:{Path(sys._base_executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    env |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    return copy, env, first


def program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def script(copy: Path, action: str, env: dict, **options) -> subprocess.CompletedProcess:
    command = ["dash", str(copy / "start_rerank.sh"), action]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)


def test_setup_refuses_an_old_driver_before_it_makes_anything(bare):
    copy, env, first = bare
    program(first / "nvidia-smi", 'case $1 in -L) echo "GPU 0: x" ;; *) echo "550.54.15, 9.0, NVIDIA H100" ;; esac')
    done = script(copy, "setup", env)
    assert done.returncode == 5 and "driver 550.54.15 is too old" in done.stderr, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (copy / ".venv").exists()


@pytest.mark.parametrize("system", ["Darwin", "MINGW64_NT-10.0"])
def test_other_systems_get_one_line(bare, system):
    copy, env, first = bare
    program(first / "uname", f'[ "$1" = -s ] && echo {system}')
    for action in ("setup", "demo", "start", "status"):
        done = script(copy, action, env)
        assert done.returncode == 5 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"runs on Linux only, and this is {system}" in done.stderr and not (copy / ".venv").exists()
    assert script(copy, "help", env).returncode == 0


def test_two_setups_take_turns(bare):
    copy, env, _ = bare
    with (copy / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["dash", str(copy / "start_rerank.sh"), "setup"]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as second:
            assert "another one is under way" in second.stdout.readline()
            time.sleep(0.5)
            assert second.poll() is None and not (copy / ".venv").exists()
            # The first one has finished: its Python serves.
            program(copy / ".venv" / "bin" / "python", "exit 0")
            list_sum = subprocess.run(
                "cksum < requirements-cpu.txt", shell=True, cwd=copy, capture_output=True, text=True
            )
            (copy / ".venv" / ".kit-complete").write_text(f"CPU {list_sum.stdout.strip()}")
            fcntl.flock(lock, fcntl.LOCK_UN)
            said = second.communicate(timeout=20)[0]
    assert second.returncode == 0 and said == "setup: .venv is complete (CPU build)\n"


def test_the_lock_of_setup_ends_with_it(bare):
    """Nothing that demo starts later inherits it."""
    copy, env, _ = bare
    text = (copy / "start_rerank.sh").read_text().replace('main "$@"\n', "")
    text += '. "$KIT/rerank_kit/setup.sh"\n'
    text += f"HAVE_VLLM= PY={sys.executable}\nstep() {{ :; }}\nkit() {{ :; }}\nfind_python() {{ :; }}\n"
    text += 'mkdir "$VENV"\ndo_setup\nsleep 60 &\necho "$!"\n'
    (copy / "start_rerank.sh").write_text(text)
    with subprocess.Popen(["dash", str(copy / "start_rerank.sh")], env=env, stdout=subprocess.PIPE, text=True) as shell:
        lines = [shell.stdout.readline() for _ in "12"]
        pid = int(lines[1])
        held = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        os.kill(pid, 15)
    assert "setup: done in" in lines[0] and not any(".venv.lock" in path for path in held), held


def test_pip_is_asked_as_if_nobody_had_changed_it(bare):
    """PIP_USER and user = true in pip.conf; modules in the current folder."""
    copy, env, _ = bare
    text = (copy / "start_rerank.sh").read_text().replace('main "$@"\n', "")
    (copy / "start_rerank.sh").write_text(f'{text}\n. "$KIT/rerank_kit/setup.sh"\npip --no-deps torch\n')
    program(copy / ".venv" / "bin" / "python", 'echo "PIP_USER=$PIP_USER $*"')
    done = subprocess.run(
        ["dash", str(copy / "start_rerank.sh")], env=env | {"PIP_USER": "1"}, capture_output=True, text=True, timeout=20
    )
    assert done.stdout.startswith("PIP_USER=0 -P -m pip ") and done.stdout.endswith("install --quiet --no-deps torch\n")


def test_an_active_environment_with_an_old_python_is_named(bare):
    copy, env, first = bare
    program(first.parent / "active" / "bin" / "python", "exit 1")  # not one of those that the kit takes
    done = script(copy, "start", env | {"VIRTUAL_ENV": str(first.parent / "active"), "MODEL_PATH": "/m"})
    assert done.returncode == 5 and "vLLM is not installed" in done.stderr
    assert f"{first.parent}/active/bin/python is not a Python 3.11 to 3.14" in done.stderr
