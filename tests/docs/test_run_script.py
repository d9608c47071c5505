"""tests/run.sh in a copy with stand-ins for its programs: what it says and how it ends."""

import os
import shutil
import subprocess

import pytest
from conftest import KIT

PYTHON = """#!/bin/sh
case $* in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"-m timing and"*) exit "$SECOND" ;;
  "-m pytest "*) exit "$FIRST" ;;
esac
"""


@pytest.fixture
def copy(tmp_path):
    for name in ("requirements-sdk.txt", "run.sh", "sdk-js/package.json", "sdk-js/package-lock.json"):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(KIT / "tests" / name, tmp_path / "tests" / name)
    shutil.copy(KIT / "requirements-reference.txt", tmp_path)
    (tmp_path / "models/sentence-transformers").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    programs = {"python": PYTHON, "shellcheck": "", "apt-get": "", "npm": 'exit "$NPM"'}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "start_rerank.sh").write_text(f"[ $1 = setup ] || echo {tmp_path}/bin/python\n")
    return tmp_path


def run(copy, first: int, second: int, npm: int = 0) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{copy}/bin:{os.environ['PATH']}"}
    env |= {"FIRST": str(first), "SECOND": str(second), "NPM": str(npm)}
    return subprocess.run(["sh", "tests/run.sh", "-k", "x"], cwd=copy, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("first", "second", "code"), [(0, 0, 0), (0, 5, 0), (5, 0, 0), (1, 0, 1), (0, 1, 1), (5, 1, 1), (5, 5, 5)]
)
def test_a_part_may_be_empty_but_not_both(copy, first, second, code):
    done = run(copy, first, second)
    assert done.returncode == code, done.stderr
    assert ("[ERR] no test was selected by: -k x" in done.stderr) is (code == 5)


def test_no_registry_for_npm_is_a_warning(copy):
    done = run(copy, 0, 0, npm=1)
    assert done.returncode == 0 and "[WARN] npm ci failed" in done.stderr, done.stderr
    assert not (copy / ".venv-sdk/js/package-lock.json").exists(), "the next run tries again"
