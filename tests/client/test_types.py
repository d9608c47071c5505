"""A program that uses the client is checked by mypy --strict and pyright: right use passes, wrong use is reported."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(300)

RIGHT = """
import asyncio
from typing import assert_type

import env_utils
import model_utils
import resources
from env_utils import CFG, MODEL_PATH, EnvConfig
from rerank_kit import (
    ConfigError,
    FirstStage,
    RerankConnectionError,
    RerankError,
    RerankHTTPError,
    RerankItem,
    RerankResponseError,
    RerankTimeout,
    arerank,
    ascore,
    rerank,
    rerank_many,
    score,
)
from resources import SharedResources

DOCUMENTS = ["a", "b"]


def sync() -> list[str]:
    items, scores, raw = rerank("q", DOCUMENTS, top_n=1, timeout_s=3, long_documents="chunk", deadline_s=9.5)
    assert_type(items, list[RerankItem])
    assert_type(scores, list[float | None])
    item = items[0]
    assert_type(item.index, int)
    assert_type(item.score, float)
    assert_type(item.doc, str)
    _, all_scores, _ = score("q", tuple(DOCUMENTS), model="m", base_url="http://127.0.0.1:1/v1")
    assert_type(all_scores, list[float])
    model_utils.rerank("q", DOCUMENTS, instruction="i", batch_size=2, max_tokens_per_doc=9)
    rerank("q", DOCUMENTS, first=("http://127.0.0.1:1/v1", 5))
    rerank("q", DOCUMENTS, first=FirstStage("http://127.0.0.1:1/v1", 5, model="m", instruction=""))
    for ranked, _, _ in rerank_many(["q"], [DOCUMENTS], concurrency=2, progress=True):
        assert_type(ranked, list[RerankItem])
    for result in rerank_many(["q"], [DOCUMENTS], return_errors=True):
        if isinstance(result, RerankError):
            print(result)
        else:
            print(result[0][0].score + 1)
    return [f"{item.score:.2f} {raw.get('_version')}"]


async def asynchronous() -> None:
    items, scores, _ = await arerank("q", DOCUMENTS, 1)
    assert_type(items, list[RerankItem])
    assert_type(scores, list[float | None])
    _, all_scores, _ = await ascore("q", DOCUMENTS)
    assert_type(all_scores, list[float])
    session = await SharedResources.get_async_rerank_client()
    print(session.closed)
    await SharedResources.aclose_local_rerank_client()


def errors() -> str:
    try:
        sync()
        asyncio.run(asynchronous())
    except RerankHTTPError as exc:
        assert_type(exc.status_code, int)
        return exc.body
    except (RerankTimeout, RerankConnectionError, RerankResponseError) as exc:
        return str(exc)
    except (RerankError, ConfigError) as exc:
        return str(exc)
    return ""


def settings() -> None:
    assert_type(CFG, EnvConfig)
    assert_type(CFG.port, int)
    assert_type(env_utils.CFG.api_key, str | None)
    assert_type(env_utils.CFG.timeout_s, float)
    assert_type(MODEL_PATH, str)
    assert_type(env_utils.MODEL_PATH_TINY, str)
    assert_type(env_utils.get_config(max_model_len=2048).local_base_url, str)
    assert_type(resources.PORT, int)
    assert_type(resources.LOCAL_BASE_URL, str)
    SharedResources.get_local_rerank_client().get("http://127.0.0.1:1/health")
    SharedResources.close_local_rerank_client()
"""

# One mistake a line: every marked line must be reported, and no other.
WRONG = """
import env_utils
import rerank_kit
import resources
from rerank_kit import arerank, rerank, rerank_many, score

rerank("q", ["a"], topn=1)  # wrong
rerank("q", ["a"], top_n="x")  # wrong
rerank("q", 3)  # wrong
rerank("q", ["a"], long_documents="cut")  # wrong
rerank("q", ["a"], first="http://127.0.0.1:1/v1")  # wrong
score("q", ["a"], top_n=1)  # wrong
rerank("q", ["a"])[0][0].text  # wrong
rerank("q", ["a"])[1][0] + 1  # wrong
rerank_many("q", ["a"], return_errors=True)[0][0]  # wrong
rerank_kit.rerank_all  # wrong
env_utils.CFG.prot  # wrong
env_utils.CGF  # wrong
resources.HOST  # wrong


async def main() -> None:
    items, scores, raw = arerank("q", ["a"])  # wrong
"""


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "MYPYPATH": str(KIT),
        "PYRIGHT_PYTHON_GLOBAL_NODE": "1",
        "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
    }


def mypy(folder: Path, program: str) -> tuple[list[tuple[str, int]], str]:
    """([(file, line) of each error], output) of mypy --strict with default settings, as in another project."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--hide-error-context"]
    command += ["--no-error-summary", "--cache-dir", str(folder / ".mypy_cache"), "program.py"]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(.+?):(\d+): error: ", done.stdout, re.M)
    return [(Path(name).name, int(line)) for name, line in found], done.stdout


def pyright(folder: Path, program: str) -> tuple[list[tuple[str, int]], str]:
    """The same by pyright, in strict mode."""
    if shutil.which("node") is None:
        pytest.skip("pyright runs on node, which is not installed")
    (folder / "program.py").write_text(program)
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(KIT)], "typeCheckingMode": "strict"}))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(folder)]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
    if not done.stdout.lstrip().startswith("{"):
        pytest.skip(f"pyright cannot run here: {(done.stderr or done.stdout).strip()[:200]}")
    errors = [one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    found = [(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in errors]
    return found, json.dumps(errors, indent=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all programs: mypy's cache makes the second one fast."""
    return tmp_path_factory.mktemp("types")


CHECKERS = pytest.mark.parametrize("checker", [mypy, pyright])


@CHECKERS
def test_a_program_that_uses_the_client_has_no_error(checker, folder):
    found, output = checker(folder, RIGHT)
    assert not found, output


@CHECKERS
def test_wrong_use_is_reported_at_its_line(checker, folder):
    found, output = checker(folder, WRONG)
    marked = {("program.py", n) for n, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}
    assert len(marked) == 14
    missed = marked - set(found)
    assert not missed, f"not reported: {sorted(missed)}\n{output}"
    assert {name for name, _ in found} == {"program.py"}, output
