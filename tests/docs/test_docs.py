"""The documentation says what the code does: tables, commands, files, both languages."""

import re
import subprocess
import sys

import pytest
from conftest import KIT

from rerank_kit import settings
from rerank_kit.models.profiles import load_profiles

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


@pytest.mark.parametrize("name", READMES)
def test_the_last_words_of_the_demo_are_those_of_the_script(name):
    script = read("start_rerank.sh")
    said = re.findall(r'^ +say "(This was|through the same|into \.env)(.*)"$', script, re.M)
    assert len(said) == 3
    text = "\n".join(start + rest.replace('\\"', '"') for start, rest in said)
    assert text in read(name), text


def test_readme_settings_are_those_of_the_code():
    assert settings.markdown_table() in read("README.md"), "run: python env_utils.py table, paste into README.md"


def test_chinese_settings_have_the_same_keys_and_defaults():
    english, chinese = (table_with(t, h) for t, h in ((settings.markdown_table(), "key"), (read(READMES[1]), "键")))
    assert [row[:2] for row in chinese[2:]] == [row[:2] for row in english[2:]]
    assert all(re.search(r"[\u4e00-\u9fff]", row[2]) for row in chinese[2:])


def test_both_readmes_have_the_same_sections_tables_and_code():
    one, two = map(read, READMES)
    assert len(re.findall(r"^## ", one, re.M)) == len(re.findall(r"^## ", two, re.M))
    assert [len(t) for t in tables(one)] == [len(t) for t in tables(two)]
    blocks = [re.findall(r"^```(\w*)\n(.*?)^```", t, re.M | re.S) for t in (one, two)]
    without_comments = [[(kind, re.sub(r"\s*#.*", "", code)) for kind, code in b[1:]] for b in blocks]
    assert without_comments[0] == without_comments[1]


@pytest.mark.parametrize("name", READMES)
def test_readme_lists_every_profile_and_action(name):
    text = read(name)
    assert {row[0].strip("`") for row in table_with(text, "profile")[2:]} == set(load_profiles())
    usage = subprocess.run(["sh", str(KIT / "start_rerank.sh"), "help"], capture_output=True, text=True).stdout
    actions = re.search(r"start_rerank\.sh (\S+)", usage).group(1).split("|")
    action_table = next(t for t in tables(text) if any(row[0] == "`setup`" for row in t))
    assert {row[0].strip("`") for row in action_table[2:]} | {"help"} == set(actions)


@pytest.mark.parametrize("name", READMES)
def test_readme_names_only_files_that_exist(name):
    text = read(name)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (KIT / target).exists(), target
    for program in re.findall(r"\b[a-z_]+/?[a-z_]*\.(?:py|sh)\b", text):
        assert (KIT / program).exists(), program


@pytest.mark.parametrize("program", ["vllm_usage.py", "vllm_usage_tiny.py", "bench_rerank.py"])
def test_options_in_the_readme_exist(program):
    done = subprocess.run([sys.executable, str(KIT / program), "--help"], capture_output=True, text=True, cwd=KIT)
    assert done.returncode == 0, done.stderr
    for line in re.findall(rf"{program}([^\n#]*)", read("README.md")):
        for option in re.findall(r"--[a-z-]+", line):
            assert option in done.stdout, f"{program} {option}"


@pytest.mark.parametrize("message", ["no hub gave it", "fits no profile", "setup failed at", "cannot be bound"])
def test_troubleshooting_quotes_messages_of_the_code(message):
    code = "".join(p.read_text("utf-8") for p in [*KIT.glob("rerank_kit/**/*.py"), KIT / "start_rerank.sh"])
    assert message in code
    for name in READMES:
        assert message in read(name)
