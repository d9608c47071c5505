"""The documentation says what the code does: tables, commands, files, both languages."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KIT

from docs import pages
from rerank_kit import settings

READMES = ("README.md", "README.zh-CN.md")


def read(name: str) -> str:
    return (KIT / name).read_text("utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]])
        elif rows:
            found.append(rows)
            rows = []
    return found


def table_with(text: str, first_cell: str) -> list[list[str]]:
    return next(t for t in tables(text) if t[0][0] == first_cell)


def test_the_generated_parts_are_up_to_date():
    stale = [path.name for path, text in pages.generated() if path.read_text("utf-8") != text]
    assert not stale, "run: python docs/pages.py --write"


def test_the_generator_keeps_translations_and_takes_new_keys():
    head = "<!-- table: settings -->\n| 键 | 默认值 | 含义 |\n|---|---|---|\n"
    text = head + "| `PORT` | `1` | 端口 |\n| `GONE` |  | 旧 |\n<!-- end -->\n"
    made = pages.filled_in("x.zh-CN.md", text)
    assert "| `PORT` | `11438` | 端口 |" in made and "GONE" not in made
    assert "| `HOST` | `127.0.0.1` | address" in made, "a new key has its English text until somebody translates it"
    assert "| `PORT` | `11438` | port of" in pages.filled_in("x.md", text)
    assert pages.cells(pages.row("a | b", "c")) == ["a | b", "c"], "a page that is made twice stays the same"


@pytest.mark.parametrize("page", ["settings", "models"])
def test_chinese_tables_are_translated(page):
    english, chinese = (tables(read(f"docs/{page}{ending}.md")) for ending in ("", ".zh-CN"))
    assert [[row[0] for row in table[2:]] for table in english] == [[row[0] for row in table[2:]] for table in chinese]
    for row in (row for table in chinese for row in table[2:]):
        assert re.search(r"[\u4e00-\u9fff]", row[-1]) or row[-1] == "zerank-2", f"docs/{page}.zh-CN.md: translate {row}"


def test_both_readmes_have_the_same_sections_tables_and_links():
    one, two = map(read, READMES)
    assert len(re.findall(r"^## ", one, re.M)) == len(re.findall(r"^## ", two, re.M))
    assert [len(t) for t in tables(one)] == [len(t) for t in tables(two)]
    targets = [{re.sub(r"\.zh-CN", "", t) for t in re.findall(r"\]\(([^)#:]+)\)", text)} for text in (one, two)]
    assert targets[0] - {"README.md"} <= targets[1], "a page that only the English README names"
    keys = [set(re.findall(r"\b[A-Z][A-Z_]{2,}\b", text)) & set(settings.FIELDS) for text in (one, two)]
    assert keys[0] == keys[1], "a setting that one README alone names"


@pytest.mark.parametrize("name", READMES)
def test_readme_is_short(name):
    assert len(read(name).splitlines()) <= 150


@pytest.mark.parametrize("page", ["docs/commands.md", "docs/quickstart.zh-CN.md"])
def test_every_action_is_explained(page):
    usage = subprocess.run(["sh", str(KIT / "start_rerank.sh"), "help"], capture_output=True, text=True).stdout
    actions = re.findall(r"^  ([a-z-]+)(?: \S+)? {2,}\S", usage, re.M)
    assert len(actions) > 15 and {"setup", "bench", "help"} <= set(actions)
    explained = next(t for t in tables(read(page)) if any(row[0] == "`setup`" for row in t))
    assert {row[0].strip("`") for row in explained[2:]} | {"help"} == set(actions)


def test_every_page_has_its_line_in_the_index():
    """An English page has a row that says what it answers; a Chinese one is named above the tables."""
    index = read("docs/README.md")
    rows = {re.search(r"\]\(([^)]+)\)", row[0])[1]: row[1] for table in tables(index) for row in table[2:]}
    top = index[: index.index("\n## ")]
    for path in (KIT / "docs").glob("*.md"):
        if path.name.endswith(".zh-CN.md"):
            assert f"({path.name})" in top, path.name
        elif path.name != "README.md":
            assert rows.get(path.name), path.name
    assert len(rows) == index.count("\n| ["), "a page has one line"


PAGES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (KIT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", read(name)):
        assert ((KIT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", READMES)
def test_readme_names_only_files_that_exist(name):
    text = read(name)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (KIT / target).exists(), target
    for program in re.findall(r"\b[a-z_]+/?[a-z_]*\.(?:py|sh)\b", text):
        assert (KIT / program).exists(), program


@pytest.mark.parametrize(
    ("program", "action"), [("vllm_usage.py", "score"), ("vllm_usage_tiny.py", "-"), ("bench_rerank.py", "bench")]
)
def test_options_in_the_pages_exist(program, action):
    done = subprocess.run([sys.executable, str(KIT / program), "--help"], capture_output=True, text=True, cwd=KIT)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    if action == "bench":  # its other half has options of its own
        quality = [sys.executable, str(KIT / program), "--quality", "--help"]
        shown += subprocess.run(quality, capture_output=True, text=True, cwd=KIT).stdout
    seen = 0
    for page in PAGES:
        for line in re.findall(rf"(?:{program}|start_rerank.sh {action}\b)([^\n#`]*)", read(page)):
            for option in re.findall(r"(?<!\S)--[a-z-]+", line):
                seen += 1
                assert option in shown, f"{page}: {program} {option}"
    assert seen


def packages(name: str) -> set[str]:
    text = read(name).lower().replace("-", "_")
    return set(re.findall(r"^([a-z0-9_.]+)(?:\[.*\])?==", text, re.M))


FOR_TESTS = packages("requirements-dev.txt") - packages("requirements.txt") - packages("requirements-cpu.txt")


def imported(file: Path, seen: set[Path]) -> set[str]:
    """The packages that a program of this folder imports when it starts, also by the files beside it."""
    if file in seen:
        return set()
    seen.add(file)
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            found.add(name.split(".")[0])
            for folder in (KIT, file.parent, KIT / "tests", KIT / "tests" / "stand_ins"):
                beside = folder / (name.replace(".", "/") + ".py")
                found |= imported(beside, seen) if beside.exists() else set()
    return found


def test_commands_that_need_more_than_setup_say_so():
    """`pip install -r requirements-dev.txt` stands in the page that names a program with pytest or hypothesis in it."""
    assert {"pytest", "hypothesis"} <= FOR_TESTS and not {"requests", "aiohttp"} & FOR_TESTS
    programs = 0
    for page in [*PAGES, "measurements/README.md", "deploy/README.md"]:
        text = read(page)
        for module, file in re.findall(r"(?:python3?|\$PY|sh\))\"? (?:-m (\w+)|([\w/]+\.py))", text):
            programs += 1
            names = {module} if module else set()
            if file and (path := next((p for p in (KIT / file, KIT / "docs" / file) if p.exists()), None)):
                names = imported(path, set())
            lacks = names & FOR_TESTS
            told = "requirements-dev.txt" in text or "tests/run.sh" in text
            assert not lacks or told, f"{page}: {file or module} needs {lacks}"
    assert programs > 20
