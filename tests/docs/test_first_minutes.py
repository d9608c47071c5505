"""Every block of both READMEs, pasted as a newcomer does: each alone into an empty shell, then all in order into one.

`# needs: ...` in a block's first line says what it needs besides a CPU and a package index; such a block is not run.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import KIT

READMES = ("README.md", "README.zh-CN.md")
SLOW = " score "  # loads a model of its own: run once, alone


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    shown: str  # the block below it, when that is an output

    @property
    def needs(self) -> str | None:
        found = re.match(r"# needs: (.+)", self.text)
        return found and found[1]

    @property
    def code(self) -> str:
        """Without comments: the same in both languages."""
        return re.sub(r"(?m)(^|\s+)# .*", "", self.text)


def blocks(name: str) -> list[Block]:
    """The blocks that a reader runs."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (KIT / name).read_text("utf-8"), re.M | re.S)
    below = [text if kind == "json" else "" for kind, text in found[1:]] + [""]
    return [Block(*one, shown) for one, shown in zip(found, below, strict=True) if one[0] in ("sh", "python")]


def runnable(name: str) -> list[Block]:
    return [block for block in blocks(name) if not block.needs]


def paste(demo, text: str, timeout_s: float = 500) -> subprocess.CompletedProcess:
    """Type a text into a new shell in the kit's folder; a command that fails ends it."""
    text = "set -e\n" + text.replace("11438", str(demo.port))
    shell = {"cwd": demo.folder, "env": demo.env, "timeout": timeout_s}
    return subprocess.run(["sh"], input=text, capture_output=True, text=True, **shell)


def typed(demo, number: int, block: Block) -> str:
    """A Python block is saved and run, as the README says."""
    if block.kind == "sh":
        return block.text
    (demo.folder / f"block{number}.py").write_text(block.text)
    return f'"$(sh start_rerank.sh python)" block{number}.py\n'


def same(shown, seen, where: str = "") -> None:
    """The same names and texts, numbers but for rounding; an answer may have more fields, and ids of its own."""
    if isinstance(shown, dict):
        assert shown.keys() <= seen.keys(), where
        for key in shown.keys() - {"id", "created"}:
            same(shown[key], seen[key], f"{where}.{key}")
    elif isinstance(shown, list):
        assert len(shown) == len(seen), where
        for number, (a, b) in enumerate(zip(shown, seen, strict=True)):
            same(a, b, f"{where}[{number}]")
    elif isinstance(shown, float):
        assert seen == pytest.approx(shown, abs=0.01), where
    else:
        assert shown == seen, where


@pytest.mark.server
def test_demo_ranks_with_the_shipped_model(demo):
    """One command from an installed environment to ranked documents; MiniLM, since there is neither GPU nor hub."""
    assert demo.done.returncode == 0, demo.done.stdout + demo.done.stderr
    ranked = [line for line in demo.done.stdout.splitlines() if line.startswith("- score=")]
    assert "The capital of China is Beijing." in ranked[0]
    assert float(ranked[0].split("=")[1].split()[0]) == pytest.approx(0.8655, abs=0.005)
    assert "This was all-MiniLM-L6-v2" in demo.done.stdout and "MODEL_PATH=Qwen/Qwen3-Reranker-0.6B" in demo.done.stdout
    assert "sh start_rerank.sh stop" in demo.done.stdout
    again = paste(demo, "./start_rerank.sh demo\n")
    assert again.returncode == 0 and "already running" in again.stdout


@pytest.mark.server
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", READMES)
def test_each_block_alone(demo, name):
    done_before = {b.code for b in runnable(READMES[0])} if name != READMES[0] else set()
    ran = []
    for number, block in enumerate(runnable(name)):
        if block.code in done_before or "start_rerank.sh stop" in block.text:
            continue
        done = paste(demo, typed(demo, number, block))
        assert done.returncode == 0, f"{block.text}\n{done.stdout}{done.stderr}"
        ran.append(block)
        if block.shown:
            seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            same([json.loads(line) for line in block.shown.splitlines()], seen)
        if block.kind == "python":
            below = [line[2:] for line in block.text.splitlines() if line.startswith("# ")]
            for one, other in zip(below, done.stdout.splitlines(), strict=True):
                assert one.split()[1:] == other.split()[1:]
                assert float(other.split()[0]) == pytest.approx(float(one.split()[0]), abs=0.02)
    assert ran or done_before, "no block was run"


@pytest.mark.server
def test_all_blocks_in_order(demo):
    chosen = [block for block in runnable(READMES[0]) if SLOW not in block.text]
    whole = "".join(typed(demo, number, block) for number, block in enumerate(chosen))
    done = paste(demo, whole)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "stopped", "the last block stops the service"


def test_both_readmes_have_the_same_blocks():
    one, two = map(blocks, READMES)
    assert [(b.kind, b.code, b.needs is None) for b in one] == [(b.kind, b.code, b.needs is None) for b in two]
    assert sum(b.needs is not None for b in one) < len(one) / 2
    for block in one:
        assert "<" not in re.sub(r"<<?'?EOF|< ", "", block.code) or block.kind == "python", "a place to be filled in"


def test_the_fake_of_the_questions_runs():
    code = re.search(r"```python\n(.*?)```", (KIT / "docs" / "faq.md").read_text("utf-8"), re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=KIT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "first\n"), done.stderr


def test_numbers_of_the_readme_stand_in_the_page_that_they_name():
    for name in READMES:
        text = (KIT / name).read_text("utf-8")
        page = (KIT / "docs" / "performance_h100.md").read_text("utf-8")
        rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
        for number, row in (("2452", "after"), ("202", "after"), ("805", "plain"), ("647", "plain")):
            assert re.search(rf"\b{number}\b", text) and re.search(rf"\b{number}\b", rows[row]), (name, number)
        scores = (KIT / "docs" / "scores.md").read_text("utf-8")
        assert "24 of 24" in next(line for line in scores.splitlines() if line.startswith("| no template"))


def test_speeds_of_the_requirements_stand_in_the_row_that_they_name():
    performance = (KIT / "docs" / "performance.md").read_text("utf-8").replace("**", "")
    rows = [
        line
        for line in (KIT / "docs" / "requirements.md").read_text("utf-8").splitlines()
        if line.startswith("| Qwen3")
    ]
    assert len(rows) == 6
    for line in rows:
        *_, short, long, row = (cell.strip() for cell in line.split("|")[1:-1])
        source = next(there for there in performance.splitlines() if there.startswith(f"| {row} |"))
        for number in (short, long):
            assert re.search(rf"(?<![\d.]){re.escape(number)} ?\(", source), (row, number)
