"""start_rerank.sh: the real service on its main path, a stand-in for vllm on the rare ends; three shells."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import KIT, copy_kit, free_port, http, kit_environment, run_kit, until
from fake_kit import FakeKit, alive, session_of

from rerank_kit.serving.health import listens
from rerank_kit.serving.log_causes import root_cause
from rerank_kit.settings import get_config


@pytest.mark.parametrize("shell", ["dash", "busybox sh", "bash --posix"])
def test_life_of_a_service(kit, shell):
    if not shutil.which(shell.split()[0]):
        pytest.fail(f"{shell} is not installed; the script must be tested under it")
    assert kit("status", shell=shell).returncode == 3
    started = kit("start", shell=shell)
    assert started.returncode == 0, started.stderr
    assert f"ready: http://127.0.0.1:{kit.settings['PORT']}/v1" in started.stdout
    first = kit.pid
    assert sorted(session_of(first)) == sorted([first, kit.server_pid]), (
        "supervisor and server in a session of their own"
    )
    assert kit("status", shell=shell).returncode == 0
    again = kit("start", shell=shell)
    assert (again.returncode, kit.pid) == (0, first) and "already running" in again.stdout
    assert kit("restart", shell=shell).returncode == 0
    assert kit.pid != first and not alive(first)
    second = kit.pid
    stopped = kit("stop", shell=shell)
    assert (stopped.returncode, alive(second)) == (0, False)
    assert kit("status", shell=shell).returncode == 3
    assert kit("stop", shell=shell).stdout == "not running\n"
    assert kit("restart", shell=shell).returncode == 0, "restart works also when nothing ran"
    assert kit("stop", shell=shell).returncode == 0


def test_start_says_how_long_it_took_the_last_time(kit, tmp_path):
    def phase():
        """What `start` says of the first phase; the server loads until it has said it."""
        (loads := tmp_path / "loads").touch()
        command = ["dash", str(KIT / "start_rerank.sh"), "start"]
        env = kit_environment(**kit.settings, FAKE_LOADS=loads)
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as start:
            said = start.stderr.readline()
            loads.unlink()
            start.communicate(timeout=60)
        assert start.returncode == 0 and kit("stop").returncode == 0
        return said

    assert "importing vLLM (usually 20 to 80 s)" in phase()
    times = kit.logs / f"rerank-{kit.settings['PORT']}.times"
    assert "importing vLLM" in json.loads(times.read_text())
    times.write_text('{"importing vLLM": 53.2}')
    assert "importing vLLM (last time 53 s)" in phase()
    times.write_text("[]")  # damaged
    assert "importing vLLM (usually" in phase()


def test_usage():
    assert run_kit().returncode == 2
    wrong = run_kit("begin")
    assert wrong.returncode == 2 and "unknown action: begin" in wrong.stderr
    shown = run_kit("help").stdout
    assert "  setup  " in shown and "Settings: environment" in shown
    assert (KIT / "start_rerank.sh").stat().st_mode & 0o111, "./start_rerank.sh works"


def test_the_words_for_programs_run_them_from_anywhere(tmp_path):
    assert "--saturate" in run_kit("bench", "--help", cwd=tmp_path).stdout
    assert "--shard" in run_kit("score", "--help", cwd=tmp_path).stdout
    (tmp_path / "mine.jsonl").write_text('{"query": "q"}\n')
    wrong = run_kit("bench", "--input", "mine.jsonl", BASE_URL="http://127.0.0.1:9/v1", cwd=tmp_path)
    assert wrong.returncode in (1, 2) and "No such file" not in wrong.stderr, "paths are those of the caller"
    none = run_kit("example", PORT=free_port(), RETRIES=0)
    assert none.returncode == 1 and "no server at" in none.stderr


@pytest.mark.parametrize(("action", "package"), [("example", "requests"), ("bench", "requests"), ("score", "vLLM")])
def test_a_word_without_its_packages_is_one_line(action, package, tmp_path):
    subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    done = run_kit(action, PYTHON=tmp_path / "bin" / "python")
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1), done.stderr
    assert package in done.stderr and "start_rerank.sh setup" in done.stderr


CAUSES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of GPU memory"),
    ("ValueError: Free memory on device cuda:0 (1/79 GiB) is less than desired", "taken by another process"),
    ("OSError: [Errno 98] Address already in use", "the port is in use"),
    ("OSError: [Errno 28] No space left on device", "no space left"),
    ("vllm: error: unrecognized arguments: --nope", "unrecognized arguments: --nope"),
    (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020)",
        "the NVIDIA driver does not work or is too old for this vLLM",
    ),
    ("ValueError: No available memory for the cache blocks.", "no memory left for the KV cache"),
    ("ValueError: Available memory on node 0 (1/2 GiB) is less than desired", "not enough memory for the model"),
    ("ValueError: Cannot find any model weights with `/m`", "check MODEL_PATH"),
    ("WARNING 11-22 10:00:00 [a.py:1] this may raise OSError: too many files\nKeyError: 'lm'", "KeyError: 'lm'"),
    ("nothing of use", "names no error"),
]


@pytest.mark.parametrize(("log", "cause"), CAUSES)
def test_the_cause_of_a_death_is_in_the_log(log, cause):
    assert cause in root_cause(log)


@pytest.mark.parametrize(("log", "cause"), CAUSES[-2:])
def test_start_that_dies_names_the_cause(kit, log, cause):
    done = kit("start", FAKE_MODE="die", FAKE_LOG=log)
    assert done.returncode == 1
    first = next(line for line in done.stderr.splitlines() if line.startswith("[ERR]"))
    assert "died after" in first and cause in first
    assert log.splitlines()[-1] in done.stderr, "the last lines of the log are shown"
    assert not kit.pid_file.exists()
    assert kit("status").returncode == 3


def test_start_still_loading_at_the_deadline(kit):
    done = kit("start", FAKE_MODE="slow", START_TIMEOUT_S=1)
    assert done.returncode == 1 and "still" in done.stderr
    status = kit("status", PROBE_TIMEOUT_S=1)
    assert status.returncode == 150 and status.stdout.startswith("loading: importing vLLM, PID")
    assert kit("stop").returncode == 0 and not alive(kit.pid if kit.pid_file.exists() else 0)


def test_stop_kills_what_ignores_term(kit):
    kit.change("serving/supervisor.py", "END_OF_ENGINE_S = 10", "END_OF_ENGINE_S = 1")
    kit("start", FAKE_MODE="stubborn", STOP_TIMEOUT_S=0)
    pids = session_of(kit.pid)
    done = kit("stop", STOP_TIMEOUT_S=0)
    assert done.returncode == 0 and len(pids) == 2 and not any(map(alive, pids))
    assert "killing remaining processes" in kit.log


def test_stop_leaves_no_process_of_a_family(kit):
    kit("start", FAKE_MODE="family")
    pids = session_of(kit.pid)
    assert len(pids) == 3
    assert kit("stop").returncode == 0
    assert not any(map(alive, pids))


def test_a_killed_supervisor_leaves_a_service_that_can_be_stopped_and_restarted(kit):
    for action in ("stop", "restart"):
        kit("start", FAKE_MODE="family")
        first, family = kit.pid, session_of(kit.pid)
        os.kill(first, signal.SIGKILL)
        until(lambda pid=first: not alive(pid))
        status = kit("status")
        assert status.returncode == 0 and "its supervisor was killed" in status.stdout
        started = kit("start")
        assert started.returncode == 1 and "restart" in started.stderr
        assert kit(action).returncode == 0
        assert session_of(first) == [] and not any(alive(p) for p in family)
    assert kit("status").returncode == 0


def test_start_after_everything_was_killed_cleans_up_first(kit):
    kit("start", FAKE_MODE="family")
    pid = kit.pid
    for victim in (pid, kit.server_pid):
        os.kill(victim, signal.SIGKILL)
    until(lambda: len(session_of(pid)) == 1)
    assert kit("status").returncode == 1
    done = kit("start")
    assert done.returncode == 0 and "killing processes that a dead server left" in done.stderr
    assert session_of(pid) == []


def test_a_recycled_pid_is_not_ours(kit):
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        kit.logs.mkdir()
        kit.pid_file.write_text(f"{stranger.pid} 1\n")
        assert kit("status").returncode == 1
        assert kit("stop").returncode == 0
        assert stranger.poll() is None, "a foreign process was signalled"
        kit.pid_file.write_text(f"{stranger.pid} 1\n")
        assert kit("start").returncode == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_two_starts_at_once_make_one_server(kit):
    env = kit_environment(**kit.settings)
    command = ["dash", str(KIT / "start_rerank.sh"), "start"]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "12"]
    outputs = [p.communicate(timeout=60) for p in both]
    codes = sorted(p.returncode for p in both)
    assert codes in ([0, 0], [0, 1]), outputs
    said = "".join(out + err for out, err in outputs)
    assert said.count("starting: PID") == 1, said
    assert "another start or stop" in said or "already running" in said
    assert not (kit.logs / f"rerank-{kit.settings['PORT']}.lock").read_text()


def test_a_stale_lock_is_taken_over(kit):
    kit.logs.mkdir()
    (kit.logs / f"rerank-{kit.settings['PORT']}.lock").write_text("999999 1\n")
    assert kit("start").returncode == 0


SHELLS = ["dash", "busybox sh", "bash --posix"]


def taker(folder, then):
    """A script that takes a lock as start_rerank.sh does, then goes on; 7 = refused, and why."""
    text = (KIT / "start_rerank.sh").read_text()
    functions = text[text.index("born() {") : text.index("server_pid() {")]
    functions += text[text.index("take_lock() {") : text.index("# --- actions")]
    head = f"LOG_DIR={folder} LOCK_FILE={folder}/lock PORT=1\ndie() {{ printf '%s\\n' \"$2\"; exit 7; }}\n"
    return f"{head}{functions}\n{then}"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_stale_lock_is_taken_over_by_one_only(tmp_path, shell):
    """Six takers at the same moment, five times: with a look and a take in two steps, two could get it."""
    wait = 'while [ ! -e "$LOG_DIR/{}" ]; do sleep 0.01; done\n'
    script = taker(tmp_path, wait.format("go") + "take_lock start\n" + wait.format("done"))
    for _ in range(5):
        for name in ("go", "done"):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "lock").write_text("999999 1\n")
        takers = [subprocess.Popen([*shell.split(), "-c", script], stdout=subprocess.PIPE) for _ in range(6)]
        (tmp_path / "go").touch()
        end = time.monotonic() + 20
        while sum(t.poll() is not None for t in takers) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        (tmp_path / "done").touch()
        said = [t.communicate(timeout=60)[0].decode() for t in takers]
        assert sorted(t.returncode for t in takers) == [0, 7, 7, 7, 7, 7], said
        assert sum("is under way" in text for text in said) == 5, said
        assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("content", ["999999\n", "", "\n", "1", "a b c"])
def test_a_broken_lock_is_taken_over(tmp_path, shell, content):
    (tmp_path / "lock").write_text(content)
    script = taker(tmp_path, 'take_lock start; take_lock start; cat "$LOCK_FILE"; rm -rf "$LOG_DIR"; exit 3')
    done = subprocess.run([*shell.split(), "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and not done.stderr, "the way out keeps the exit code"
    assert len(done.stdout.split()) == 4


@pytest.mark.parametrize("shell", SHELLS)
def test_a_lock_that_cannot_be_had_says_why(tmp_path, shell):
    (tmp_path / "lock").mkdir()  # what root cannot write either
    done = subprocess.run(
        [*shell.split(), "-c", taker(tmp_path, "take_lock start")], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 7 and "irectory" in done.stdout and "remove the file" in done.stdout, done.stdout
    (tmp_path / "lock").rmdir()
    stub = tmp_path / "flock"
    stub.write_text("#!/bin/sh\necho 'No locks available' >&2\nexit 1\n")
    stub.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = taker(tmp_path, "take_lock start").replace("flock 9", f"{stub} 9")  # busybox prefers its own
    done = subprocess.run([*shell.split(), "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7 and "No locks available" in done.stdout and "local folder" in done.stdout, done.stdout


def test_an_empty_lock_is_taken_over(kit):
    """What is left of a start on a full disk, or of one that was killed in the wrong microsecond."""
    kit.logs.mkdir()
    (kit.logs / f"rerank-{kit.settings['PORT']}.lock").touch()
    done = kit("stop")
    assert done.returncode == 0, done.stderr
    assert not (kit.logs / f"rerank-{kit.settings['PORT']}.lock").read_text()


def test_foreign_process_on_the_port(kit):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", kit.settings["PORT"]))
        taken.listen()
        done = kit("start")
        assert done.returncode == 6
        assert f"PORT={kit.settings['PORT']} cannot be bound" in done.stderr and "change PORT" in done.stderr
        assert not kit.pid_file.exists()
        assert kit("status").returncode == 3


def test_api_key_is_in_no_process_list_log_or_cfg(kit, tmp_path):
    secret = "s3cret-key-123"
    seen = tmp_path / "seen.json"
    done = kit("start", API_KEY=secret, FAKE_ARGS=seen)
    assert done.returncode == 0, "the probe sends the key"
    cmdline = "".join(Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in (kit.pid, kit.server_pid))
    state = json.dumps(kit.state)
    cfg = kit("cfg", API_KEY=secret)
    for text in (cmdline, state, kit.log, cfg.stdout, cfg.stderr, done.stdout, done.stderr):
        assert secret not in text
    given = json.loads(seen.read_text())
    assert given["env"]["VLLM_API_KEY"] == secret and secret not in " ".join(given["args"])
    assert given["env"]["VLLM_NO_USAGE_STATS"] == "1"


def test_old_log_is_kept(kit):
    kit("start", FAKE_MODE="die", FAKE_LOG="RuntimeError: first")
    kit("start", FAKE_MODE="die", FAKE_LOG="RuntimeError: second")
    assert "second" in kit.log
    assert "first" in (kit.logs / f"rerank-{kit.settings['PORT']}.log.1").read_text()


def test_run_serves_in_the_foreground_and_ends_on_term(kit):
    env = kit_environment(**kit.settings)
    command = ["dash", str(KIT / "start_rerank.sh"), "run"]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as server:
        until(lambda: listens(get_config(port=kit.settings["PORT"])))
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"MODEL_PATH": ""}, 6, "MODEL_PATH is not set"),
        ({"MODEL_PATH": "/no/model"}, 6, "MODEL_PATH='/no/model' does not exist"),
        ({"PORT": "many"}, 6, "PORT='many' (environment) is not an integer"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 6, "asks for a GPU"),
        ({"PYTHON": "no-such-python"}, 5, "PYTHON=no-such-python is not a program"),
    ],
)
def test_bad_configuration_is_one_clear_line(kit, settings, code, said):
    done = kit("start", **settings)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (code, 1), done.stderr
    assert said in done.stderr
    assert not kit.pid_file.exists()


@pytest.mark.parametrize(("version", "said"), [(None, "vLLM is not installed"), ("0.25.0", "vLLM 0.25.0 is too old")])
def test_missing_or_old_vllm(tmp_path, checkpoints, version, said):
    done = FakeKit(tmp_path, checkpoints["qwen3"], version)("start")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (5, 1), done.stderr
    assert said in done.stderr and "setup" in done.stderr


def test_gpu_build_without_gpu(tmp_path, checkpoints):
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    done = FakeKit(tmp_path, checkpoints["qwen3"], "0.32.0")("start")
    assert done.returncode == 6 and "nvidia-smi finds no GPU" in done.stderr


def test_setup_that_fails_names_the_step_and_leaves_a_retry(tmp_path):
    copy = copy_kit(tmp_path / "kit")
    env = {k: v for k, v in kit_environment().items() if not k.startswith(("PIP_", "VIRTUAL_ENV", "CONDA", "PYTHON"))}
    # A package index that is out of reach, and a Python that has no vLLM.
    env |= {"PATH": f"{Path(sys._base_executable).parent}:/usr/bin:/bin", "PIP_NO_INDEX": "1", "HOME": str(tmp_path)}
    env["PIP_CONFIG_FILE"] = os.devnull
    for _ in "12":
        command = ["dash", str(copy / "start_rerank.sh"), "setup"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "setup failed at: torch 2.13.0 for the CPU" in done.stderr and "again" in done.stderr
        assert not (copy / ".venv" / ".kit-complete").exists()


@pytest.mark.server
def test_real_service_status_and_second_start(service):
    assert run_kit("status", **service.settings).returncode == 0
    again = run_kit("start", **service.settings)
    assert again.returncode == 0 and "already running" in again.stdout
    log = Path(service.settings["LOG_DIR"]) / f"rerank-{service.port}.log"
    assert log.stat().st_mode & 0o077 == 0, "the log is for its owner only"


@pytest.mark.server
def test_score_calls_do_not_fill_the_log(service):
    body = {"model": "qwen3-reranker", "text_1": "q", "text_2": "d"}
    for _ in range(5):
        assert http("POST", f"{service.url}/v1/score", body)[0] == 200
    log = (Path(service.settings["LOG_DIR"]) / f"rerank-{service.port}.log").read_text()
    assert log.count("Score API is not part of standard") == 1


@pytest.mark.server
def test_cfg_prints_the_command_that_runs(service):
    cfg = run_kit("cfg", **service.settings)
    assert cfg.returncode == 0, cfg.stderr
    command = cfg.stdout.strip().splitlines()[-1]
    pid = json.loads(run_kit("status", "--json", **service.settings).stdout)["server_pid"]
    running = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    words = shlex.split(command)
    wanted = words[words.index("serve") :]
    assert running[running.index("serve") : -1] == wanted


def test_the_command_of_cfg_runs_from_any_folder(checkpoints, tmp_path):
    settings = {
        "MODEL_PATH": checkpoints["qwen3"],
        "INSTRUCTION": "find it",
        "LOG_DIR": tmp_path / "logs",
        "DTYPE": "float32",
    }
    cfg = run_kit("cfg", **settings)
    assert cfg.returncode == 0, cfg.stderr
    words = shlex.split(cfg.stdout.strip().splitlines()[-1])
    assert Path(words[words.index("--chat-template") + 1]).read_text().startswith("{%- set instruction"), (
        "it was written"
    )
    program, env = words[words.index("serve") - 1], dict(w.split("=", 1) for w in words[: words.index("serve") - 1])
    assert os.access(program, os.X_OK) and Path(program).is_absolute()
    guard = words[words.index("--middleware") + 1].rpartition(".")[0]
    code = [sys.executable, "-P", "-c", f"import {guard}"]
    for path, expected in ((env["PYTHONPATH"], 0), ("", 1)):
        done = subprocess.run(code, env={"PATH": os.environ["PATH"], "PYTHONPATH": path}, cwd="/", capture_output=True)
        assert done.returncode == expected, done.stderr


@pytest.mark.server
def test_changing_the_port_in_env_file_moves_everything(service, tmp_path):
    env_file = tmp_path / ".env"
    env_file.write_text(f"PORT={service.port}\n")
    env = kit_environment() | {"KIT_ENV_FILE": str(env_file)}
    code = "import resources, env_utils; print(resources.PORT, resources.LOCAL_BASE_URL, env_utils.CFG.service_url)"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=KIT, capture_output=True, text=True)
    url = f"http://127.0.0.1:{service.port}/v1"
    assert done.stdout.split() == [str(service.port), url, url], done.stderr
    shown = subprocess.run([sys.executable, "main.py"], env=env, cwd=KIT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "- score=" in shown.stdout, shown.stderr
    command = [sys.executable, "bench_rerank.py", "--concurrency", "2", "--requests", "4", "--docs", "2"]
    bench = subprocess.run(command, env=env, cwd=KIT, capture_output=True, text=True, timeout=120)
    assert bench.returncode == 0 and url in bench.stdout, bench.stdout + bench.stderr


def test_two_services_of_one_folder_keep_to_themselves(kit, tmp_path):
    """Every action, one port from .env and one from the environment over it."""
    dotenv, other = tmp_path / "two.env", free_port()
    first = kit.settings.pop("PORT")
    dotenv.write_text(f"PORT={first}\nINSTRUCTION=find it\n")
    kit.settings |= {"KIT_ENV_FILE": dotenv}
    log, log_2 = (kit.logs / f"rerank-{port}.log" for port in (first, other))

    def both(action):
        return kit(action), kit(action, PORT=other, INSTRUCTION="find that")

    try:
        for done, port in zip(both("start"), (first, other), strict=True):
            assert done.returncode == 0 and f"http://127.0.0.1:{port}/v1" in done.stdout
        templates = [(kit.logs / f"template-{port}.jinja").read_text() for port in (first, other)]
        assert "find it" in templates[0] and "find that" in templates[1]
        pids = {port: (kit.logs / f"rerank-{port}.pid").read_text() for port in (first, other)}
        for done, port in zip(both("status"), (first, other), strict=True):
            assert (
                done.returncode == 0 and f":{port}/v1" in done.stdout and f"PID {pids[port].split()[0]}," in done.stdout
            )
        assert [done.returncode for done in both("wait")] == [0, 0]
        assert f"--port {first}" in log.read_text() and f"--port {other}" not in log.read_text()
        assert f"--port {other}" in log_2.read_text()

        # A start of one is no obstacle for the other: the lock is the port's own.
        (kit.logs / f"rerank-{first}.lock").write_text(" ".join(pids[first].split()[:2]) + "\n")
        assert "under way" in kit("stop").stderr
        assert kit("restart", PORT=other, INSTRUCTION="find that").returncode == 0
        (kit.logs / f"rerank-{first}.lock").unlink()
        assert log_2.with_name(f"{log_2.name}.1").exists() and not log.with_name(f"{log.name}.1").exists()
        assert (kit.logs / f"rerank-{first}.pid").read_text() == pids[first]
        assert (kit.logs / f"rerank-{other}.pid").read_text() != pids[other]

        assert kit("stop").returncode == 0
        assert [done.returncode for done in both("status")] == [3, 0]
        assert kit("wait").returncode == 3 and kit("check").returncode == 4
    finally:
        both("stop")
    assert [done.returncode for done in both("status")] == [3, 3]
    kit.settings["PORT"] = first
