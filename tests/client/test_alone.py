"""The client without the rest: installed by pip, its files copied beside a program, and inside a package of one's own.

In a Python environment that holds nothing but what is said to be needed.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import KIT

COPIED = ("env_utils.py", "resources.py", "model_utils.py", "main.py")
COPIED_PARTS = ("rerank_kit/__init__.py", "rerank_kit/settings.py", "rerank_kit/client")
PROGRAM = """
import asyncio, sys
from {package} import ConfigError, RerankError, RerankItem, SharedResources, arerank, ascore, rerank, rerank_many, score
items, scores, raw = rerank("q", ["aa", "b"])
assert items == [RerankItem(0, 0.2, "aa"), RerankItem(1, 0.1, "b")] and scores == [0.2, 0.1], (items, scores)
assert score("q", ["aa", "b"])[1] == [0.2, 0.1]
assert [found[1] for found in rerank_many(["q", "q"], [["aa"], ["b"]])] == [[0.2], [0.1]]
if "async" in sys.argv:
    assert asyncio.run(arerank("q", ["aa", "b"]))[1] == [0.2, 0.1]
assert not {{"resources", "env_utils", "model_utils", "vllm", "torch"}} & set(sys.modules)
print("fine")
"""


@pytest.fixture(scope="module")
def service():
    """The URL of a server whose score is a tenth of a document's length."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            kind = "rerank" if self.path.endswith("rerank") else "score"
            documents = asked["documents"] if kind == "rerank" else asked["text_2"]
            found = [(i, len(text) / 10) for i, text in enumerate(documents)]
            if kind == "rerank":
                rows = [{"index": i, "relevance_score": s} for i, s in sorted(found, key=lambda pair: -pair[1])]
                data = {"model": asked["model"], "results": rows}
            else:
                data = {"model": asked["model"], "data": [{"index": i, "score": s} for i, s in found]}
            body = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def install(folder: Path, *what: str) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run([*command, "--target", str(folder), *what], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory) -> Path:
    """A Python that has nothing but the standard library."""
    root = tmp_path_factory.mktemp("empty") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=120)
    return root / "bin" / "python"


@pytest.fixture(scope="module")
def needed(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("needed"), "requests>=2.32")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("installed"), str(KIT))


def run(python: Path, *argv: str, path: Path, cwd: Path, **settings) -> subprocess.CompletedProcess:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(path), **settings}
    return subprocess.run([str(python), *argv], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_pip_installs_the_client_alone(installed):
    names = {path.name for path in installed.iterdir() if not path.name.startswith(("rerank_kit-", "bin"))}
    brought = {"requests", "urllib3", "certifi", "idna", "charset_normalizer", "rerank_kit"}
    assert brought <= names
    assert not {n for n in names if n.startswith(("resources", "env_utils", "model_utils", "aiohttp", "vllm"))}
    inside = {str(path.relative_to(installed)) for path in (installed / "rerank_kit").rglob("*.py")}
    wanted = {f"rerank_kit/{p.relative_to(KIT / 'rerank_kit')}" for p in (KIT / "rerank_kit/client").glob("*.py")}
    assert inside == wanted | {"rerank_kit/__init__.py", "rerank_kit/settings.py"}
    assert (installed / "rerank_kit" / "py.typed").exists()
    about = next(installed.glob("rerank_kit-*.dist-info/METADATA")).read_text("utf-8")
    assert "Requires-Python: >=3.11" in about and "Provides-Extra: async" in about and "Provides-Extra: fast" in about


def test_the_installed_client_works(empty_python, installed, service, tmp_path):
    (tmp_path / "resources.py").write_text("raise SystemExit('a file of the program, not of the client')\n")
    (tmp_path / "program.py").write_text(PROGRAM.format(package="rerank_kit"))
    done = run(empty_python, "-W", "error", "program.py", path=installed, cwd=tmp_path, BASE_URL=service)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_asyncio_without_aiohttp_says_what_to_install(empty_python, installed, service, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.format(package="rerank_kit"))
    done = run(empty_python, "program.py", "async", path=installed, cwd=tmp_path, BASE_URL=service)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and 'pip install "rerank-kit[async]"' in last, done.stderr
    assert last.startswith("rerank_kit.settings.ConfigError: ")


def test_copied_files_run_main(empty_python, needed, service, tmp_path):
    for name in COPIED:
        shutil.copy(KIT / name, tmp_path)
    copy_parts(tmp_path)
    (tmp_path / ".env").write_text(f"BASE_URL={service}\n")
    done = run(empty_python, "-W", "error", str(tmp_path / "main.py"), path=needed, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "- score=3.4000 | idx=2 | doc=Shanghai is a large city in China."


def test_copied_into_a_package_of_ones_own(empty_python, needed, service, tmp_path):
    inside = tmp_path / "app" / "vendored"
    inside.mkdir(parents=True)
    for folder in (inside, inside.parent):
        (folder / "__init__.py").touch()
    copy_parts(inside)
    (tmp_path / "program.py").write_text(PROGRAM.format(package="app.vendored.rerank_kit"))
    done = run(empty_python, "-W", "error", "program.py", path=needed, cwd=tmp_path, BASE_URL=service)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def copy_parts(target: Path) -> None:
    for part in COPIED_PARTS:
        if (KIT / part).is_dir():
            shutil.copytree(KIT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (target / part).parent.mkdir(exist_ok=True)
            shutil.copy(KIT / part, target / part)


def test_readme_names_what_has_to_be_copied():
    for name in ("README.md", "README.zh-CN.md"):
        text = (KIT / name).read_text("utf-8")
        for part in ("env_utils.py", "resources.py", "model_utils.py", *COPIED_PARTS[:2], "rerank_kit/client/"):
            assert f"`{part}`" in text, (name, part)
